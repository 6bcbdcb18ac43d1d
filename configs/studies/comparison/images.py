"""Studies of models of images: `ImageStudy`, on Fashion-MNIST."""

import abc
import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from configs.studies.comparison import page, table
from configs.studies.comparison.results import finals, machines
from configs.studies.comparison.runs import finite
from configs.studies.comparison.study import (
  Around,
  Done,
  Method,
  Rounds,
  Rung,
  Study,
)
from models.model import ModelConfig
from train.config import Config
from train.data.images.augment import Augment
from train.data.images.corpora import FASHION, IdxImages
from train.engine.task import Data, task_of
from train.method import AdamW

NAMES = (
  'AdamW',
  '8-bit Adam',
  'GaLore',
  '8-bit GaLore',
  'GaLore Adafactor',
  'FRUGAL',
  'Muon',
)
"""Names of the methods in all studies of images."""


def methods(*ranks: int) -> dict[str, Method]:
  """Returns the methods of `NAMES`, and GaLore with some other ranks."""
  others = {
    f'GaLore, rank {rank}': Method(table.make('Galore', rank=rank))
    for rank in ranks
  }
  return {name: table.METHODS[name] for name in NAMES} | others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size(Rounds):
  """Batches, held-out images and rank of a study of images."""

  batch_size: int
  eval_images: int
  """Number of held-out images that score each run."""
  rank: int
  gap: int = 50
  """Steps between two refreshes of the subspace, in runs of every length."""


def size(
  steps: int, num_methods: int, *, batch_size: int, eval_images: int, rank: int
) -> Size:
  """Returns the size of a study in which every method is in the finals.

  Args:
    steps: steps of the last runs. Runs that tune finalists have half of them.
    num_methods: number of methods.
    batch_size: images in a batch.
    eval_images: number of held-out images that score each run.
    rank: the rank of low-rank methods.
  """
  return Size(
    first=(Rung(steps // 16, 12), Rung(steps // 8, 4), Rung(steps // 4, 2)),
    tuned=steps // 2,
    final=steps,
    finalists=num_methods - 1,
    seeds=3,
    batch_size=batch_size,
    eval_images=eval_images,
    rank=rank,
  )


def means_by_batch(costs: Iterable[Any]) -> list[float]:
  """Returns the mean cost of each batch, from arrays [B] of costs."""
  return [round(finite(cost_B.mean()), 5) for cost_B in costs]


@dataclasses.dataclass(frozen=True)
class ImageStudy(Study):
  """A study of a model of images on Fashion-MNIST."""

  size: Size

  corpora: ClassVar[Sequence[str]] = ('Fashion-MNIST',)
  rows: ClassVar[str] = 'batches of test images'
  unit: ClassVar[str] = 'images'
  matrices: ClassVar[str] = 'blocks/.*kernel'
  title: ClassVar[str]
  """The title of the page."""

  @property
  @abc.abstractmethod
  def model(self) -> ModelConfig:
    """The model."""

  def amount(self, steps: int) -> int:
    """Returns the number of images in the batches of some steps."""
    return steps * self.size.batch_size

  def corpus(self, name: str, scratch: pathlib.Path) -> IdxImages:
    """Returns Fashion-MNIST, whose training images are flipped at random."""
    del name, scratch
    return IdxImages(names=FASHION, augment=Augment(flip=True))

  def config(self, corpus: Any) -> Config:
    """Returns the config of all runs with a corpus."""
    size = self.size
    return Config(
      model=self.model,
      corpus=corpus,
      optimizer=AdamW(),
      steps=1,
      learning_rate=1.0,
      batch_size=size.batch_size,
      eval_batches=size.eval_images // size.batch_size,
    )

  def around(self, steps: int) -> Around:
    """Returns rank and gap, which are those of runs of every length."""
    del steps
    return Around(self.size.rank, self.size.gap)

  def data(self, config: Config) -> Data:
    """Returns both splits of a corpus."""
    return task_of(config).open(None)

  def page(self, done: Done) -> str:
    """Returns the results page in Markdown."""
    size, corpus = self.size, self.corpora[0]
    weights = next(iter(done.values()))['weight_bytes'] // 4
    rungs = ', '.join(
      f'{rung.pairs} pairs for {rung.steps} steps' for rung in size.first
    )
    first = self.amount(size.first[-1].steps)
    text = [
      f'# {self.title}',
      '',
      f'By `python -m configs.studies.{self.name}`, whose docstring lists the '
      f'reductions for a small machine. There are {len(done)} runs, and '
      f'{self.name}.json has the command of each. The model has {weights:,} '
      f'weights in float32. Low-rank methods have rank {size.rank} unless '
      f'their name states another, a new basis every {size.gap} steps and a '
      'scale of 1, and FRUGAL has density 0.25. Lower is better in all '
      'columns. Seconds are the minimum over the runs of a method, on one core '
      'of a machine that had other work.',
      '',
      'Two learning rates are tuned for each method, one for the matrices of '
      f'the layers and one for all other weights: {rungs}, and neighbours '
      'outside the grid if the best pair is at its edge. The finals tune them '
      f'again for {size.tuned} steps, with neighbours of the best pair. The '
      f'held-out data are {size.eval_images:,} test images, which also select '
      'the learning rates.',
      '',
      f'## First round: {first:,} images, one seed, on '
      f'{machines(done.values())}',
      '',
      *page.first_table(self, done),
    ]
    if finals(corpus, self, done):
      text += ['', f'![First round, best method first]({self.name}_first.png)']
    text += page.final_section(corpus, self, done)
    missing = self.methods.keys() - finals(corpus, self, done).keys()
    if missing:
      text += ['', f'Not yet in the finals: {", ".join(sorted(missing))}.']
    for metric in self.metrics:
      file = page.picture(self, metric)
      text += ['', f'![{metric.title} against memory]({file})']
    return '\n'.join([*text, ''])
