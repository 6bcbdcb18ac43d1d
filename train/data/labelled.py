"""Turns labelled texts, one or two per row, into batches for a classifier.

A corpus is a dataclass that a config names, as in `train.data.corpus`, but it
streams `Row`s. `Labels` maps their labels to targets of the model.

Shapes: B rows of a batch, T tokens of a row.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import grain
import jax
import numpy as np
import tokenizers
from rich.table import Table
from rich.text import Text

from train.data import corpus
from train.data.batches import Batch, ahead, bucket
from train.data.classifier_metrics import Metric
from train.data.corpus import RandomAccess, Split
from train.data.pretrained import parsed
from train.data.records import READERS, expand, kind_of, records
from train.data.tokenizer import Tokenizer, check_texts, checked

EncodedRow: TypeAlias = dict[str, Any]
"""The arrays 'ids', 'types' and 'targets' of a row, and 'noise' if wanted."""

COLUMNS = (
  ('sentence1', 'sentence2'),
  ('question1', 'question2'),
  ('premise', 'hypothesis'),
  ('question', 'sentence'),
  ('question', 'passage'),
  ('sentence',),
  ('text',),
)
"""Names of text columns, as in the data sets of GLUE and SuperGLUE. The first
entry whose names are all columns of a data set is used."""

# Batches are as long as their longest row, rounded up to a power of two that is
# at least this. Each length is a compilation.
_SHORTEST = 32


class Row(NamedTuple):
  """An example as it is in the data."""

  texts: tuple[str, ...]
  """One or two texts."""
  label: Any
  """The label: an int, a float or a str."""
  place: str
  """Where the row is, for errors."""


class Labels(NamedTuple):
  """The classes of a classifier, or a number to predict."""

  count: int
  """Number of classes. 1 means that the label is a number to predict."""
  names: tuple[str, ...] | None = None
  """Names of the classes, in order."""

  def target(self, row: Row) -> np.int32 | np.float32:
    """Returns the index of the row's class, int32, or its number, float32.

    Raises:
      ValueError: the label is not a class or a finite number.
    """
    label = row.label
    dtype = np.float32 if self.count == 1 else np.int32
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


class Examples(corpus.Examples[Row], corpus.TextSplit):
  """The rows of one split."""

  def check_labels(self, labels: Labels) -> None:
    """Raises ValueError for an unknown label, if the rows are in memory."""
    for row in self.found.in_memory():
      labels.target(row)


class Labelled(corpus.Corpus):
  """A corpus of labelled texts."""

  holds: ClassVar[str] = 'labelled texts'
  """What the data are, for `Task.holds`."""
  metric: Metric
  """Metric that decides which validation result is the best."""


@dataclasses.dataclass(frozen=True)
class LabelledFiles(Labelled):
  """Labelled texts in files of any format that `train.data.records` reads.

  The rows are held in memory, because every label is checked before training.
  The texts are in columns such as `text`, `sentence`, `sentence1` and
  `sentence2`, `premise` and `hypothesis`, `question` and `passage`.
  """

  train: str
  """Path or glob of the training files."""

  validation: str | None = None
  """Path or glob of the validation files; None holds out training rows."""

  texts: tuple[str, ...] | None = None
  """Names of one or two text columns; None looks for common names."""

  label: str = 'label'
  """Column of the label: a class's index from 0, its name, or a number to
  predict."""

  metric: Metric = 'accuracy'
  """Metric that decides which validation result is the best."""

  holdout: float = 0.1
  """Share of the training rows that is held out for validation if `validation`
  is None. A hash of a row's texts decides."""

  def open(self, split: Split) -> Examples:
    """Returns the rows of a split.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a column is missing, a line is not a row, or the split is
        empty.
    """
    check_columns(self.texts)
    if self.validation is not None:
      pattern = self.train if split == 'train' else self.validation
      return Examples(RandomAccess(self._rows(pattern), _itself))
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
    return Examples(RandomAccess(kept, _itself))

  def _rows(self, pattern: str) -> list[Row]:
    _check_kinds(pattern)
    rows = [
      _row(entry.record, self.texts, self.label, entry.place)
      for entry in records(pattern)
    ]
    if not rows:
      raise ValueError(
        f'no row in the files of {pattern!r}: at least one is needed; give '
        'files with rows'
      )
    return rows


@dataclasses.dataclass(frozen=True)
class LabelledTfds(Labelled):
  """A labelled data set that TFDS has prepared, read without TensorFlow."""

  name: str = 'glue/cola'
  """Name as in tfds.load: name/config, with :version if a version is needed."""

  data_dir: str | None = None
  """Directory of the prepared data; None is TFDS' default,
  ~/tensorflow_datasets."""

  train: str = 'train'
  """The split to train on."""

  validation: str = 'validation'
  """The split to validate on; array_record also has slices ('train[99%:]')."""

  texts: tuple[str, ...] | None = None
  """Names of one or two text features; None looks for common names."""

  label: str = 'label'
  """Feature of the label."""

  metric: Metric = 'accuracy'
  """Metric that decides which validation result is the best."""

  def open(self, split: Split) -> Examples:
    """Returns the rows of a split.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ValueError: it does not have this split, or these features.
    """
    check_columns(self.texts)
    source = corpus.Tfds(self.name, self.data_dir, self.train, self.validation)
    read = functools.partial(
      _row, texts=self.texts, label=self.label, place=self.name
    )
    found = source.records(split)
    first = next(iter(found.stream(seed=0, repeat=False)))
    read(first)  # Raises ValueError now if a feature is missing.
    return Examples(found.mapped(read))


def check_columns(texts: Sequence[str] | None) -> None:
  """Raises ValueError unless `texts` is None or has one or two names."""
  if texts is not None and len(texts) not in (1, 2):
    raise ValueError(f'texts must be one or two columns, got {texts}')


def batches(
  examples: Examples,
  tokenizer: Tokenizer,
  labels: Labels,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
  noise: bool = False,
  put: Callable[[Batch], Batch] = jax.device_put,
) -> grain.DatasetIterator[Batch]:
  """Returns an endless iterator of training batches on the device.

  A thread makes the batches while the previous step runs. Every epoch has
  another order. The state of the iterator is a small JSON object. A restored
  iterator returns the same batches, bit for bit.

  Args:
    examples: `corpus.open('train')`.
    tokenizer: the tokenizer of the run, from a tokenizer.json.
    labels: the classes.
    batch_size: B.
    sequence_length: largest number of tokens in a row. Longer texts are
      truncated.
    seed: seed of the order and of the noise.
    noise: whether batches have random bits for dropout.
    put: sends a batch to one or several devices.

  Returns:
    An iterator of dicts: `inputs`, `types` (0, and 1 in the second text),
      `segments` (1, and 0 on padding), all [B, T] int32, `targets` [B] (int32
      or float32), `weights` [B] float32 ones, and with `noise`, `noise` [B, 2]
      uint32.

  Raises:
    ValueError: the tokenizer is not suitable for a classifier, or a label is
      unknown.
  """
  rows = _rows(
    examples, tokenizer, labels, sequence_length, seed=seed, repeat=True
  )
  if noise:
    rows = rows.random_map(_noisy, seed=seed)
  fill = pad_id(tokenizer)
  stack = functools.partial(_stack, batch_size, sequence_length, fill)
  found = rows.batch(batch_size, drop_remainder=True, batch_fn=stack)
  return iter(ahead(found.map(put)))


def validation_batches(
  examples: Examples,
  tokenizer: Tokenizer,
  labels: Labels,
  *,
  batch_size: int,
  sequence_length: int,
  num_batches: int | None = None,
) -> grain.IterDataset[Batch]:
  """Returns one pass over a split, with the same batches each time.

  The batches are those of `batches`, but in a fixed order and in host memory.
  The last batch is padded with rows of weight 0.
  """
  rows = _rows(
    examples, tokenizer, labels, sequence_length, seed=0, repeat=False
  )
  fill = pad_id(tokenizer)
  stack = functools.partial(_stack, batch_size, sequence_length, fill)
  found = rows.batch(batch_size, drop_remainder=False, batch_fn=stack)
  if num_batches is not None:
    found = grain.experimental.LimitIterDataset(found, num_batches)
  return ahead(found)


def shown(
  examples: Examples,
  tokenizer: Tokenizer,
  labels: Labels,
  *,
  sequence_length: int,
  seed: int = 0,
  counted: int = 1000,
) -> Table:
  """Returns a table with the tokens and the label of one example.

  Args:
    examples: `corpus.open('train')`.
    tokenizer: the tokenizer of the run.
    labels: the classes.
    sequence_length: T.
    seed: seed of the order; the first example is shown.
    counted: number of examples among which truncated ones are counted.
  """
  encode = encoder(tokenizer, sequence_length)
  fast = _fast(tokenizer)
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
  target = labels.target(rows[0])
  name = f' ({labels.names[int(target)]})' if labels.names else ''
  table.add_row(Text(text), f'{target:g}{name}')
  return table


def encoder(
  tokenizer: Tokenizer, length: int
) -> Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]:
  """Returns `texts -> (ids, types)`, both [n], with special tokens.

  The template in tokenizer.json adds the special tokens and numbers the texts
  (0 or 1). The ids are truncated to `length`; the longer one of two texts is
  truncated first.
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
    second = texts[1] if len(texts) > 1 else None
    found = fast.encode(texts[0], second)
    ids_n = checked(tokenizer, np.array(found.ids, np.int32), texts[0])
    return ids_n, np.array(found.type_ids, np.int32)

  return encode


def pad_id(tokenizer: Tokenizer) -> int:
  """Returns the id of the padding token, 0 if the tokenizer has none."""
  name = tokenizer.tokens.get('pad_token')
  found = None if name is None else _fast(tokenizer).token_to_id(name)
  rows = tokenizer.num_rows
  if rows is not None and found is not None and found >= rows:
    raise ValueError(
      f'the pad_token {name!r} has the id {found}, for which a model of '
      f'vocab_size={rows} has no row: name another in tokenizer_config.json'
    )
  return found or 0


def _fast(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
  """Returns the `tokenizers` object of tokenizer.json, template included."""
  fast = parsed(tokenizer.model)
  if not fast.num_special_tokens_to_add(True):
    raise ValueError(
      'a classifier needs a tokenizer.json with a post_processor that adds '
      'special tokens, as those of BERT and RoBERTa: save it again from '
      'transformers, or name a directory that has one with --tokenizer'
    )
  return fast


def _rows(
  examples: Examples,
  tokenizer: Tokenizer,
  labels: Labels,
  length: int,
  *,
  seed: int,
  repeat: bool,
) -> grain.IterDataset[EncodedRow]:
  """Returns encoded rows in an order fixed by a seed."""
  examples.check_labels(labels)
  encode = encoder(tokenizer, length)
  rows = examples.stream(seed=seed, repeat=False)
  texts = (text for row in rows for text in row.texts)
  check_texts(tokenizer, texts, special=True)

  def encoded(row: Row) -> EncodedRow:
    ids_n, types_n = encode(row.texts)
    return {'ids': ids_n, 'types': types_n, 'targets': labels.target(row)}

  return examples.stream(seed=seed, repeat=repeat).map(encoded)


def _noisy(row: EncodedRow, rng: np.random.Generator) -> EncodedRow:
  return row | {'noise': rng.integers(2**32, size=2, dtype=np.uint32)}


def _stack(
  batch_size: int, most: int, fill: int, rows: Sequence[EncodedRow]
) -> Batch:
  """Stacks rows, padded to one length, and adds empty rows up to `batch_size`.

  The weights of the added rows are 0.
  """
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
    batch['inputs'][i, :stop] = row['ids']
    batch['types'][i, :stop] = row['types']
    batch['segments'][i, :stop] = 1
    batch['weights'][i] = 1
    for name in {'targets', 'noise'} & row.keys():
      batch[name][i] = row[name]
  return batch


def _itself(row: Row) -> Row:
  return row


def _crc(row: Row) -> int:
  return zlib.crc32('\0'.join(row.texts).encode())


def _row(
  record: Mapping[str, Any],
  texts: Sequence[str] | None,
  label: str,
  place: str,
) -> Row:
  """Returns the row in a record with named columns."""
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


def _text(value: Any, name: str, place: str) -> str:
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if not isinstance(value, str):
    raise ValueError(f'{place}: {name} must be a text, got {value!r}')
  return value


def _scalar(label: Any) -> Any:
  """Returns a label as a Python str, int or float."""
  if isinstance(label, bytes):
    return label.decode('utf-8', 'replace')
  return label.item() if isinstance(label, np.generic | np.ndarray) else label


def _check_kinds(pattern: str) -> None:
  """Raises ValueError unless each file's ending names a kind of records."""
  for path in expand(pattern):
    if kind_of(path) not in READERS:
      raise ValueError(
        f'{path} must end in one of {", ".join(READERS)}: rename or convert it'
      )
