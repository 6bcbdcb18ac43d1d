"""Labelled texts, one or two each, to batches for a classifier.

A corpus is, as in `train.data.corpus`, a dataclass that a config names; what it
opens is a stream of `Row`s. `Labels` says what a label means to the model.

B rows of a batch, T tokens of a row.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import grain
import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from train.data import corpus, records
from train.data.batches import Batch, ahead, bucket
from train.data.corpus import Indexed, Sharded, Split
from train.data.text_files import expand
from train.data.tokenizer import (
  AnyTokenizer,
  JsonTokenizer,
  check_texts,
  checked,
  parsed,
)

Examples: TypeAlias = Indexed | Sharded
Metric: TypeAlias = Literal['accuracy', 'f1', 'matthews', 'pearson', 'spearman']

COLUMNS = (
  ('sentence1', 'sentence2'),
  ('question1', 'question2'),
  ('premise', 'hypothesis'),
  ('question', 'sentence'),
  ('question', 'passage'),
  ('sentence',),
  ('text',),
)
"""Names of columns of texts, in GLUE's and SuperGLUE's sets; the first of which
a set has all are read."""

# Rows are cut to the longest one of a batch, in few different lengths: each is
# a compilation.
_SHORTEST = 32


class Row(NamedTuple):
  """An example as it stands in the data."""

  texts: tuple[str, ...]  # one, or two
  label: Any  # int, float or str
  place: str  # where it is, for errors


class Labels(NamedTuple):
  """What a label means to a model."""

  count: int
  """Labels to choose from; 1 is a number to predict."""
  names: tuple[str, ...] | None = None
  """What they are called, in order."""

  def target(self, row: Row) -> np.ndarray:
    """The label's number, int32; or the number that it is, float32."""
    label, dtype = row.label, np.float32 if self.count == 1 else np.int32
    if self.names and label in self.names:
      return dtype(self.names.index(label))
    try:
      number = float(label)
    except (TypeError, ValueError):
      number = float('nan')
    if self.count == 1 and np.isfinite(number):
      return dtype(number)
    if self.count > 1 and number in range(self.count):
      return dtype(number)
    known = f'one of {list(self.names)}, or ' if self.names else ''
    rule = 'a number' if self.count == 1 else f'{known}in 0..{self.count - 1}'
    raise ValueError(
      f'{row.place}: the label must be {rule}, got {label!r}; correct it, or '
      'set model.num_labels and model.labels'
    )


@dataclasses.dataclass(frozen=True)
class LabelledFiles:
  """Labelled texts of .csv, .tsv, .jsonl, .json or .parquet files.

  The first line of a .csv or .tsv names the columns. A line of a .jsonl is an
  object, a .json file holds a list of them. Each may be compressed (.gz, .bz2,
  .xz). The texts are in the columns `text`, `sentence`, `sentence1` and
  `sentence2`, `premise` and `hypothesis`, `question` and `passage` or such.
  """

  train: str
  """Path or glob of the training files."""

  validation: str | None = None
  """Path or glob of the validation files; None holds out `holdout`."""

  texts: tuple[str, ...] | None = None
  """Columns of the texts, one or two; None finds them by their names."""

  label: str = 'label'
  """Column of the label: an integer from 0, a name, or a number to predict."""

  metric: Metric = 'accuracy'
  """What the best validation is the best by."""

  holdout: float = 0.1
  """Share of the training rows kept for validation, chosen by a hash of their
  texts, where `validation` is None."""

  def open(self, split: Split) -> Examples:
    """Rows of a split.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a column is missing, a line is no row, or there are none.
    """
    check_columns(self.texts)
    if self.validation is not None:
      return Indexed(self._rows(getattr(self, split)), _itself)
    corpus.check_holdout(self.holdout)
    rows = self._rows(self.train)
    kept = [
      row for row in rows if corpus.in_split(split, _crc(row), self.holdout)
    ]
    if not kept:
      raise ValueError(
        f'the {split} split of {self.train!r} is empty: holdout={self.holdout} '
        f'of {len(rows)} rows; give a validation file, another holdout, or '
        'more rows'
      )
    return Indexed(kept, _itself)

  def _rows(self, pattern: str) -> list[Row]:
    rows = [
      _row(record, self.texts, self.label, place)
      for path in expand(pattern)
      for record, place in _records(path)
    ]
    if not rows:
      raise ValueError(
        f'no row in the files of {pattern!r}: at least one is needed; give '
        'files with rows'
      )
    return rows


@dataclasses.dataclass(frozen=True)
class LabelledTfds:
  """A labelled data set that TFDS has prepared, read without TensorFlow."""

  name: str = 'glue/cola'
  """As in tfds.load: name/config, with :version where it matters."""

  data_dir: str | None = None
  """Where it is prepared; None is TFDS' own default, ~/tensorflow_datasets."""

  train: str = 'train'
  """The split to train on."""

  validation: str = 'validation'
  """The split to validate on; array_record takes slices ('train[99%:]')."""

  texts: tuple[str, ...] | None = None
  """Features of the texts, one or two; None finds them by their names."""

  label: str = 'label'
  """Feature of the label."""

  metric: Metric = 'accuracy'
  """What the best validation is the best by."""

  def open(self, split: Split) -> Examples:
    """Rows of a split.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ValueError: it has no such split, or no such features.
    """
    check_columns(self.texts)
    source = corpus.Tfds(self.name, self.data_dir, self.train, self.validation)
    read = functools.partial(
      _row, texts=self.texts, label=self.label, place=self.name
    )
    found = source.records(split)
    first = next(iter(found.stream(seed=0, repeat=False)))
    read(first)  # that names what is missing
    return dataclasses.replace(found, text=lambda x: read(found.text(x)))


def check_columns(texts: Sequence[str] | None) -> None:
  """Raises ValueError where columns are named, and not one or two."""
  if texts is not None and len(texts) not in (1, 2):
    raise ValueError(f'texts must be one or two columns, got {texts}')


def batches(
  examples: Examples,
  tokenizer: AnyTokenizer,
  labels: Labels,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
  noise: bool = False,
  put: Callable[[Batch], Batch] = jax.device_put,
) -> grain.DatasetIterator[Batch]:
  """Training batches without end, every epoch in another order, on the device.

  A thread makes them while the step before is computed. The iterator's state
  is small JSON; a restored iterator goes on bit-equal.

  Args:
    examples: `corpus.open('train')`.
    tokenizer: of the run, one with a tokenizer.json.
    labels: what the labels mean.
    batch_size: B.
    sequence_length: tokens in a row at most; longer texts are cut.
    seed: of the order, and of the noise.
    noise: whether there are bits for dropout.
    put: sends a batch to the device, or to many.

  Returns:
    An iterator of dicts: `inputs`, `types` (0, and 1 in the second text),
    `segments` (1, and 0 where a row is filled), all [B, T] int32, `targets` [B]
    (int32 or float32), `weights` [B] float32 ones, and `noise` [B, 2] uint32.

  Raises:
    ValueError: the tokenizer is none for this, or a label is unknown.
  """
  rows = _rows(examples, tokenizer, labels, sequence_length, seed, True)
  if noise:
    rows = rows.random_map(_noisy, seed=seed)
  fill = pad_id(tokenizer)
  stack = functools.partial(_stack, batch_size, sequence_length, fill)
  found = rows.batch(batch_size, drop_remainder=True, batch_fn=stack)
  return iter(ahead(found.map(put)))


def validation_batches(
  examples: Examples,
  tokenizer: AnyTokenizer,
  labels: Labels,
  *,
  batch_size: int,
  sequence_length: int,
  num_batches: int | None = None,
) -> grain.IterDataset[Batch]:
  """One pass over a split, the same batches each time it is iterated.

  As `batches`, but on the host, and in one order; the last batch is filled with
  rows of weight 0.
  """
  rows = _rows(examples, tokenizer, labels, sequence_length, 0, False)
  fill = pad_id(tokenizer)
  stack = functools.partial(_stack, batch_size, sequence_length, fill)
  found = rows.batch(batch_size, drop_remainder=False, batch_fn=stack)
  if num_batches is not None:
    found = grain.experimental.LimitIterDataset(found, num_batches)
  return ahead(found)


def shown(
  examples: Examples,
  tokenizer: AnyTokenizer,
  labels: Labels,
  *,
  sequence_length: int,
  seed: int = 0,
  counted: int = 1000,
) -> Table:
  """Returns a table with one example: its tokens' text, and its label.

  Args:
    examples: `corpus.open('train')`.
    tokenizer: of the run.
    labels: what the labels mean.
    sequence_length: T.
    seed: of the order; the first example is shown.
    counted: of how many examples the lengths are counted.
  """
  encode, fast = encoder(tokenizer, sequence_length), _fast(tokenizer)
  stream = examples.stream(seed=seed, repeat=False)
  rows = list(itertools.islice(stream, counted))
  full = sum(len(encode(row.texts)[0]) == sequence_length for row in rows)
  table = Table(
    title='an example',
    caption=f'{full:,} of {len(rows):,} examples fill {sequence_length:,} '
    'tokens or are cut there',
    box=None,
  )
  table.add_column('tokens')
  table.add_column('label')
  text = fast.decode(encode(rows[0].texts)[0].tolist(), False)
  target = labels.target(rows[0]).item()
  name = f' ({labels.names[target]})' if labels.names else ''
  table.add_row(Text(text), f'{target:g}{name}')
  return table


def encoder(
  tokenizer: AnyTokenizer, length: int
) -> Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]:
  """Returns `texts -> (ids, types)` [n] with special tokens, cut to length.

  The tokenizer's own template puts the special tokens and tells the texts
  apart; of two texts the longer one is cut first.
  """
  fast = _fast(tokenizer)
  needed = fast.num_special_tokens_to_add(True)
  if length <= needed:
    raise ValueError(
      f'sequence_length must be more than the {needed} special tokens of a '
      f'pair, got {length}'
    )
  fast.enable_truncation(length, strategy='longest_first')

  def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    found = fast.encode(*texts)
    ids_n = checked(tokenizer, np.array(found.ids, np.int32), texts[0])
    return ids_n, np.array(found.type_ids, np.int32)

  return encode


def pad_id(tokenizer: AnyTokenizer) -> int:
  """Returns the token that fills rows, 0 where none is named."""
  name = tokenizer.tokens.get('pad_token')
  found = None if name is None else _fast(tokenizer).token_to_id(name)
  rows = tokenizer.num_rows
  if rows is not None and found is not None and found >= rows:
    raise ValueError(
      f'the pad_token {name!r} has the id {found}, for which a model of '
      f'vocab_size={rows} has no row: name another in tokenizer_config.json'
    )
  return found or 0


def _fast(tokenizer):
  """The library's tokenizer as its file has it, special tokens and all."""
  if not isinstance(tokenizer, JsonTokenizer):
    raise ValueError(
      "a classifier needs a tokenizer.json, whose template has the model's "
      'special tokens; this tokenizer is of sentencepiece: name a directory '
      'that has one with --tokenizer'
    )
  fast = parsed(tokenizer.model)
  if not fast.num_special_tokens_to_add(True):
    raise ValueError(
      'tokenizer.json must have a post_processor that adds special tokens, as '
      'those of BERT and RoBERTa: save it again from transformers'
    )
  return fast


def _rows(examples, tokenizer, labels, length, seed, repeat):
  """Encoded rows in an order fixed by a seed."""
  if isinstance(examples, Indexed) and isinstance(examples.source, list):
    for row in examples.source:
      labels.target(row)
  encode = encoder(tokenizer, length)
  rows = examples.stream(seed=seed, repeat=False)
  texts = (text for row in rows for text in row.texts)
  check_texts(tokenizer, texts, special=True)

  def encoded(row: Row) -> dict[str, np.ndarray]:
    ids_n, types_n = encode(row.texts)
    return {'ids': ids_n, 'types': types_n, 'targets': labels.target(row)}

  return examples.stream(seed=seed, repeat=repeat).map(encoded)


def _noisy(row, rng):
  return row | {'noise': rng.integers(2**32, size=2, dtype=np.uint32)}


def _stack(
  batch_size: int, most: int, fill: int, rows: Sequence[dict]
) -> Batch:
  """A batch of rows of one length, with rows of weight 0 up to batch_size."""
  longest = max(len(row['ids']) for row in rows)
  length = min(most, bucket(longest, _SHORTEST))
  batch = {
    'inputs': np.full((batch_size, length), fill, np.int32),
    'types': np.zeros((batch_size, length), np.int32),
    'segments': np.zeros((batch_size, length), np.int32),
    'targets': np.zeros(batch_size, rows[0]['targets'].dtype),
    'weights': np.zeros(batch_size, np.float32),
  }
  if 'noise' in rows[0]:
    batch['noise'] = np.zeros((batch_size, 2), np.uint32)
  for i, row in enumerate(rows):
    stop = len(row['ids'])
    batch['inputs'][i, :stop], batch['types'][i, :stop] = (
      row['ids'],
      row['types'],
    )
    batch['segments'][i, :stop] = 1
    batch['weights'][i] = 1
    for name in {'targets', 'noise'} & row.keys():
      batch[name][i] = row[name]
  return batch


def _itself(row: Row) -> Row:
  return row


def _crc(row: Row) -> int:
  return zlib.crc32('\0'.join(row.texts).encode())


def _row(record, texts, label, place: str) -> Row:
  """A row of named columns."""
  if texts is None:
    found = (names for names in COLUMNS if set(names) <= set(record))
    texts = next(found, ())
  missing = [name for name in (*texts, label) if name not in record]
  if missing or not texts:
    what = f'no column {missing[0]!r}' if missing else 'no column of texts'
    raise ValueError(
      f'{place}: {what} among {sorted(map(str, record))}; name columns with '
      'corpus.texts and corpus.label'
    )
  found = tuple(_text(record[name], name, place) for name in texts)
  return Row(found, _scalar(record[label]), place)


def _text(value, name, place) -> str:
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if not isinstance(value, str):
    raise ValueError(f'{place}: {name} must be a text, got {value!r}')
  return value


def _scalar(label):
  """A label of Python's types."""
  if isinstance(label, bytes):
    return label.decode('utf-8', 'replace')
  return label.item() if isinstance(label, np.generic | np.ndarray) else label


def _records(path: str) -> Iterator[tuple[dict[str, Any], str]]:
  """Records of a file, and where each is."""
  kinds = records.KINDS
  if records.kind_of(path) not in kinds:
    raise ValueError(
      f'{path} must end in one of {", ".join(kinds)}: rename or convert it'
    )
  unit, numbered = records.read(path)
  for number, record in numbered:
    yield record, f'{path}, {unit} {number}'
