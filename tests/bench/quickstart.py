"""Compares several methods on the quickstart config, with equal tuning.

`python -m tests.bench.quickstart` trains the model of configs/quickstart.py,
with the text, batches and rank of this config. As in `tests.bench.methods`,
each method has two learning rates, which are tuned by successive halving until
the best pair is not at an edge of the grid. `--only` selects other methods of
that benchmark. The table is written to tests/bench/results/quickstart.md.
"""

import dataclasses

from tests.bench import methods
from tests.bench.methods import (
  BASELINE,
  METHODS,
  Around,
  Done,
  Job,
  Rung,
  Size,
)
from train.config import Config
from train.engine.command import load
from train.method import AdamW

CONFIG = 'configs/quickstart.py'


class Quickstart(methods.Bench):
  """Trains single runs with the quickstart config."""

  name = 'quickstart'
  names = (
    BASELINE,
    '8-bit Adam',
    'GaLore',
    '8-bit GaLore',
    'optax.contrib.galore',
  )

  @staticmethod
  def usual() -> Size:
    """Returns the quickstart's size; its last rung has the full length."""
    given = load(CONFIG)
    return Size(
      width=given.model.width,
      num_layers=given.model.num_layers,
      vocab_size=given.model.vocab_size,
      batch_size=given.batch_size,
      sequence_length=given.sequence_length,
      eval_rows=given.eval_batches * given.batch_size,
      first=(Rung(50, 12), Rung(100, 6), Rung(given.steps, 2)),
    )

  def config(self, job: Job) -> Config:
    """Returns the config of a run, with a peak learning rate of 1."""
    adapter = METHODS[job.method].adapter
    return dataclasses.replace(
      load(CONFIG),
      optimizer=AdamW(),
      adapter=adapter and adapter(self.around(job.steps)),
      steps=job.steps,
      learning_rate=1.0,
      window=self.size.window,
      seed=job.seed,
    )

  def around(self, steps: int) -> Around:
    """Returns the quickstart's rank and gap, for runs of every length."""
    del steps
    given = load(CONFIG).optimizer
    return Around(given.rank, given.gap)

  def page(self, done: Done) -> str:
    """Returns the results page in Markdown."""
    head = '\n'.join(methods.unshuffled(self.size))
    text = f"""# The quickstart with several methods

{head}
By `python -m tests.bench.quickstart`: {self.size.first[-1].steps} steps of
configs/quickstart.py on {methods.machines(done.values())}, with one seed. Each
method uses the best of its pairs of learning rates, which is never at the edge
of the rates that were tried. Lower bits per byte are better. Another machine
adds in another order: expect results within 0.005 bits of these (one other
machine gave 2.0096 instead of 2.007). The command of each run is in
quickstart.json. `optax.contrib.galore` with its defaults projects only the
embedding and the head, because it does not treat the stacked layers as
matrices. Seconds are the minimum over the runs of a method, because the machine
had other work.
"""
    table = methods.first_table(self.size, done)
    link = '![Bits per byte against memory](quickstart.png)'
    return '\n'.join([text, *table, '', link, ''])


if __name__ == '__main__':
  methods.main(Quickstart)
