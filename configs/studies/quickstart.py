"""Compares several methods on the quickstart config, with equal tuning.

`python -m configs.studies.quickstart` trains the model of
configs/quickstart.py, with the text, batches and rank of this config. As in
`configs.studies.methods`, each method has two learning rates, which are tuned
by successive halving until the best pair is not at an edge of the grid.
`--only` selects other methods of that study. The table is written to
results/quickstart.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from configs.quickstart import config as given
from configs.studies.comparison import command, page
from configs.studies.comparison.results import machines
from configs.studies.comparison.study import Around, Done, Rung
from configs.studies.comparison.text import Size, unshuffled
from configs.studies.methods import Methods
from train.config import Config


def usual_size() -> Size:
  """Returns the quickstart's size; its last rung has the full length."""
  model: Any = given.model
  return Size(
    width=model.width,
    num_layers=model.num_layers,
    vocab_size=model.vocab_size,
    batch_size=given.batch_size,
    sequence_length=given.sequence_length or 0,
    eval_rows=(given.eval_batches or 0) * given.batch_size,
    first=(Rung(50, 12), Rung(100, 6), Rung(given.steps, 2)),
  )


@dataclasses.dataclass(frozen=True)
class Quickstart(Methods):
  """Several methods on the quickstart config."""

  size: Size = dataclasses.field(default_factory=usual_size)

  name: ClassVar[str] = 'quickstart'
  usual: ClassVar[Sequence[str]] = (
    'AdamW',
    '8-bit Adam',
    'GaLore',
    '8-bit GaLore',
    'optax.contrib.galore',
  )

  def config(self, corpus: Any) -> Config:
    """Returns the quickstart config with another corpus."""
    return dataclasses.replace(given, corpus=corpus, window=self.size.window)

  def around(self, steps: int) -> Around:
    """Returns the quickstart's rank and gap, for runs of every length."""
    del steps
    optimizer: Any = given.optimizer
    return Around(optimizer.rank, optimizer.gap)

  def page(self, done: Done) -> str:
    """Returns the results page in Markdown."""
    head = '\n'.join(unshuffled(self.size))
    text = f"""# The quickstart with several methods

{head}
By `python -m configs.studies.quickstart`: {self.size.first[-1].steps} steps of
configs/quickstart.py on {machines(done.values())}, with one seed. Each
method uses the best of its pairs of learning rates, which is never at the edge
of the rates that were tried. Lower bits per byte are better. Another machine
adds in another order: expect results within 0.005 bits of these (one other
machine gave 2.0096 instead of 2.007). The command of each run is in
quickstart.json. `optax.contrib.galore` with its defaults projects only the
embedding and the head, because it does not treat the stacked layers as
matrices. Seconds are the minimum over the runs of a method, because the machine
had other work.
"""
    rows = page.first_table(self, done)
    link = '![Bits per byte against memory](quickstart.png)'
    return '\n'.join([text, *rows, '', link, ''])


STUDY = Quickstart()

if __name__ == '__main__':
  command.main(STUDY)
