"""Corpora: where documents come from, and the order in which they are read.

A corpus is a small dataclass that a config names. Its method `open(split)`
checks that the data exist and returns `Documents`, which stream texts in an
order fixed by a seed. `train.data.text_files` indexes plain files, and
`train.data.batches` makes batches.
"""

import abc
import contextlib
import dataclasses
import datetime
import functools
import importlib.resources
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import (
  Any,
  ClassVar,
  Generic,
  Literal,
  NamedTuple,
  TypeAlias,
  TypeVar,
  cast,
  overload,
)

import grain
import numpy as np

from train.data.text_files import Texts, index_texts
from train.data.tokenizer import Tokenizer, check_texts

Split: TypeAlias = Literal['train', 'validation']
Source: TypeAlias = Sequence[Any] | grain.sources.RandomAccessDataSource[Any]

T = TypeVar('T')
U = TypeVar('U')

# A tfrecord file has no random access, so its records cannot be shuffled
# globally. Instead, records of this many shards are read alternately.
_INTERLEAVED_SHARDS = 16
# This many of the records read are shuffled together.
_SHUFFLED_RECORDS = 4096


class Example(NamedTuple):
  """A tokenized document or chat."""

  ids_n: np.ndarray
  """Token ids, int32."""
  scored_n: np.ndarray
  """Whether each token counts in the loss, bool. The first token is never a
  target."""
  bytes_n: np.ndarray
  """Number of UTF-8 bytes of text that each token stands for, int32."""


class TextSplit:
  """One split of a corpus of texts of any kind."""

  def templated(
    self, tokenizer: Tokenizer, clock: datetime.datetime | None = None
  ) -> Tokenizer:
    """Returns the tokenizer with the chat template of the data, if any.

    Args:
      tokenizer: of a checkpoint, or trained on the data.
      clock: start time of the run, for templates that print the date. None is
        the current time.
    """
    return tokenizer

  def check(self, tokenizer: Tokenizer) -> list[str]:
    """Checks every example, so that none is rejected in the middle of a run.

    Returns:
      Warnings about data that the model would not learn as its author intended.

    Raises:
      ValueError: an example cannot be encoded.
    """
    return []


class Documents(TextSplit, abc.ABC):
  """The documents of one split, each a str, for a language model."""

  continues: ClassVar[bool] = True
  """Whether a document that does not fit into a row continues in the next row.
  Otherwise rows are padded, and a longer document is truncated."""

  @property
  def num_left_out(self) -> int:
    """Number of lines of the data that have nothing to learn."""
    return 0

  @abc.abstractmethod
  def __len__(self) -> int:
    """Number of documents."""

  @abc.abstractmethod
  def stream(self, *, seed: int, repeat: bool) -> grain.IterDataset[str]:
    """Streams the documents in an order fixed by `seed`.

    Args:
      seed: seed of the shuffle.
      repeat: whether to repeat forever, with another order in each epoch.
        Otherwise the stream is one pass.
    """

  def examples(
    self, tokenizer: Tokenizer, *, seed: int, repeat: bool
  ) -> grain.IterDataset[Example]:
    """Streams tokenized examples in the order of `stream`.

    A document becomes BOS text EOS, and all of its tokens count in the loss.

    Args:
      tokenizer: the tokenizer of the run.
      seed: as in `stream`.
      repeat: as in `stream`.
    """
    encode = functools.partial(_encoded, tokenizer=tokenizer)
    return self.stream(seed=seed, repeat=repeat).map(encode)

  def check(self, tokenizer: Tokenizer) -> list[str]:
    """Raises ValueError if a text has a token that the model has no row for."""
    texts = self.stream(seed=0, repeat=False)
    check_texts(tokenizer, texts, special=False)
    return []


def _encoded(document: str, *, tokenizer: Tokenizer) -> Example:
  """Encodes a document as BOS text EOS.

  The bytes of the tokens add up to the size of the document even if the
  tokenizer adds a space in front or normalizes the text: the first token of the
  text takes the difference.
  """
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  ids_n = np.array(
    [*begin, *tokenizer.encode(document), tokenizer.eos_id], np.int32
  )
  bytes_n = tokenizer.bytes_V[ids_n]
  bytes_n[len(begin)] += len(document.encode()) - bytes_n.sum()
  return Example(ids_n, np.ones(len(ids_n), bool), bytes_n)


@dataclasses.dataclass(frozen=True)
class RandomAccess(Generic[T]):
  """Examples with random access, shuffled globally."""

  source: Source
  """A sequence of items."""
  convert: Callable[[Any], T]
  """Converts an item into an example."""

  num_threads: int = dataclasses.field(default=2, kw_only=True)
  """Number of threads that read items; 0 is faster for items in memory."""

  def __len__(self) -> int:
    """Number of examples."""
    return len(self.source)

  def stream(self, *, seed: int, repeat: bool) -> grain.IterDataset[T]:
    """Streams the examples as `Documents.stream` does."""
    shuffled = _shuffled(self.source, seed)
    ordered = shuffled.repeat() if repeat else shuffled
    return ordered.map(self.convert).to_iter_dataset(
      grain.ReadOptions(
        num_threads=self.num_threads,
        prefetch_buffer_size=64 if self.num_threads else 0,
      )
    )

  def in_memory(self) -> Sequence[T]:
    """Returns the examples if they are in memory, otherwise none."""
    items = self.source if isinstance(self.source, list) else []
    return [self.convert(item) for item in items]

  def mapped(self, function: Callable[[T], U]) -> 'RandomAccess[U]':
    """Returns the examples with a function applied to each."""
    return RandomAccess(
      self.source,
      lambda item: function(self.convert(item)),
      num_threads=self.num_threads,
    )


@dataclasses.dataclass(frozen=True)
class Indexed(RandomAccess[str], Documents):
  """Documents with random access, shuffled globally."""

  convert: Callable[[Any], str] = str
  """Converts an item into a document."""


@dataclasses.dataclass(frozen=True)
class Sharded(Generic[T]):
  """Examples in tfrecord shards, which have no random access.

  The shards are read in random order and interleaved, and their records are
  shuffled within a window. If an epoch is longer than the window, the end of an
  epoch mixes with the beginning of the next one.
  """

  paths: Sequence[str]
  """Paths of the shards."""

  num_records: int
  """Number of records in all shards."""

  convert: Callable[[bytes], T]
  """Converts a record into an example."""

  def __len__(self) -> int:
    """Number of examples."""
    return self.num_records

  def in_memory(self) -> Sequence[T]:
    """Returns none of the examples, because they are in files."""
    return []

  def mapped(self, function: Callable[[T], U]) -> 'Sharded[U]':
    """Returns the examples with a function applied to each."""
    return Sharded(
      self.paths,
      self.num_records,
      lambda record: function(self.convert(record)),
    )

  def stream(self, *, seed: int, repeat: bool) -> grain.IterDataset[T]:
    """Streams the examples as `Documents.stream` does."""
    shuffled = _shuffled(self.paths, seed)
    ordered = shuffled.repeat() if repeat else shuffled
    shards = ordered.map(lambda path: _Shard(path, self.convert))
    records = grain.experimental.InterleaveIterDataset(
      # Grain accepts a MapDataset of datasets, but its annotation does not.
      cast(Sequence[grain.IterDataset[T]], shards),
      cycle_length=min(len(shuffled), _INTERLEAVED_SHARDS),
    )
    # A window longer than an epoch would return some records twice before it
    # has returned all of them once.
    window = max(1, min(self.num_records, _SHUFFLED_RECORDS))
    return grain.experimental.WindowShuffleIterDataset(
      records, window_size=window, seed=seed
    )


@dataclasses.dataclass(frozen=True)
class Examples(Generic[T]):
  """Examples that have random access, or are in tfrecord shards."""

  found: RandomAccess[T] | Sharded[T]
  """The examples."""

  def __len__(self) -> int:
    """Number of examples."""
    return len(self.found)

  def stream(self, *, seed: int, repeat: bool) -> grain.IterDataset[T]:
    """Streams the examples as `Documents.stream` does."""
    return self.found.stream(seed=seed, repeat=repeat)


class _Prepared(Examples[str], Documents):
  """Documents of a data set of TFDS."""


class _Shard(grain.IterDataset[T]):
  """The examples of a tfrecord file."""

  def __init__(self, path: str, convert: Callable[[bytes], T]) -> None:
    super().__init__()
    self._path = path
    self._convert = convert

  def __iter__(self) -> grain.DatasetIterator[T]:
    with _reading(self._path):
      records = iter(grain.experimental.TFRecordIterDataset(self._path))
    return _ShardIterator(self._path, self._convert, records)


class _ShardIterator(grain.DatasetIterator[T]):
  """Iterates over the examples of a file; its state is a file position."""

  def __init__(
    self,
    path: str,
    convert: Callable[[bytes], T],
    records: grain.DatasetIterator[bytes],
  ) -> None:
    super().__init__()
    self._path = path
    self._convert = convert
    self._records = records

  def __next__(self) -> T:
    with _reading(self._path):
      record = next(self._records)
    try:
      return self._convert(record)
    except ValueError as error:
      raise ValueError(f'{self._path}: {error}') from error
    except Exception as error:
      raise _unreadable(self._path, error) from error

  def get_state(self) -> dict[str, Any]:
    return self._records.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._records.set_state(state)


class _Records:
  """Records by random access. Errors name the file of the record."""

  def __init__(self, source: Source, files: Sequence[Any]) -> None:
    self._source = source
    self._files = files
    self._stops = np.cumsum([file.take for file in files])

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    number = int(np.searchsorted(self._stops, index, side='right'))
    path = self._files[number].filename
    with _reading(path):
      record = self._source[index]
      # The library returns None for fields that lie past the end of a truncated
      # file.
      missing = [name for name, value in record.items() if value is None]
      if missing:
        raise ValueError(f'record {index:,} has no {missing[0]!r}')
      return record


@contextlib.contextmanager
def _reading(path: Any) -> Iterator[None]:
  """Names the file in every error that a library raises while it reads it."""
  try:
    yield
  except (StopIteration, FileNotFoundError):
    raise
  except Exception as error:
    raise _unreadable(path, error) from error


def _unreadable(path: Any, error: Exception) -> OSError:
  return OSError(
    f'cannot read {path} ({type(error).__name__}: {str(error)[:200]}): put a '
    'sound file in its place, and go on with --resume'
  )


def _shuffled(source: Source, seed: int) -> grain.MapDataset[Any]:
  """Shuffles items in an order that depends on the seed and the epoch."""
  if not 0 <= seed < 2**31:
    raise ValueError(
      f'seed must be in 0..{2**31 - 1}, got {seed}: any small number will do'
    )
  return grain.MapDataset.source(source).seed(seed).shuffle()


class Corpus(abc.ABC):
  """A source of data that a config names; subclasses are frozen dataclasses."""

  holds: ClassVar[str]
  """What the data are, such as 'texts'. A task accepts some of these."""

  @abc.abstractmethod
  def open(self, split: Split) -> Any:
    """Returns the examples of a split, such as `Documents`.

    Raises:
      FileNotFoundError, ValueError: the data do not exist or cannot be read.
    """


@dataclasses.dataclass(frozen=True)
class Chitchat(Corpus):
  """7,168 dialogues, 12.7 MB (package chitchat-dataset, MIT licence).

  A document is a dialogue with one turn per line. A hash of its id decides
  whether it is in the validation split.
  """

  holds: ClassVar[str] = 'texts'
  """What the data are, for `Task.holds`."""

  holdout: float = 0.05
  """Share of the dialogues that is held out for validation."""

  def open(self, split: Split) -> Documents:
    """Returns the documents of a split.

    Raises:
      ValueError: the package chitchat-dataset is not installed.
    """
    check_holdout(self.holdout)
    return Indexed(
      [
        text
        for name, text in dialogues()
        if in_split(split, zlib.crc32(name.encode()), self.holdout)
      ]
    )


@dataclasses.dataclass(frozen=True)
class TextFiles(Corpus):
  """Your own text files: records with a field 'text', or plain text.

  Records may have any format that `train.data.records` reads. The field or
  column 'text' of a record is a document. All other files are plain UTF-8 text.

  Files are read once when the corpus is opened, to check and index them. Plain
  text and JSON lines are later read from their files. Other files are copied to
  the directory for temporary files ($TMPDIR) while the program runs.
  """

  holds: ClassVar[str] = 'texts'
  """What the data are, for `Task.holds`."""

  train: str
  """Path or glob ('corpus/**/*.jsonl') of the training files."""

  validation: str | None = None
  """Path or glob of the validation files; None holds out training documents."""

  separator: str | None = '\n\n'
  """Text between the documents of a plain text file: blank lines, or for
  example '<|endoftext|>'. With None or '' each file is one document."""

  holdout: float = 0.05
  """Share of the training documents that is held out for validation if
  `validation` is None. A hash of a document's content decides."""

  def open(self, split: Split) -> Documents:
    """Returns the documents of a split.

    Raises:
      FileNotFoundError: no file matches.
      ImportError: Parquet needs the package `datasets`.
      ValueError: a line is not a JSON object with a text (the message names
        file and line), a file is not UTF-8, or the split is empty.
    """
    return Indexed(
      in_files(
        split,
        self.train,
        self.validation,
        self.holdout,
        lambda pattern: index_texts(pattern, self.separator),
      )
    )


@dataclasses.dataclass(frozen=True)
class Tfds(Corpus):
  """A data set that TFDS has prepared, read without TensorFlow.

  Data in the format array_record are read by random access and shuffled
  globally. Data in the format tfrecord are streamed: the shards are read in
  random order and interleaved, and their records are shuffled within a window.
  """

  holds: ClassVar[str] = 'texts'
  """What the data are, for `Task.holds`."""

  name: str = 'c4/en'
  """Name as in tfds.load: name/config, with :version if a version is needed."""

  data_dir: str | None = None
  """Directory of the prepared data; None is TFDS' default,
  ~/tensorflow_datasets."""

  train: str = 'train'
  """The split to train on."""

  validation: str = 'validation'
  """The split to validate on; array_record also has slices ('train[99%:]')."""

  def open(self, split: Split) -> Documents:
    """Returns the documents of a split: the feature 'text' of each example.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ValueError: it does not have this split, or no feature 'text'.
    """
    found = self.records(split)
    features = self.features()
    if 'text' not in features:
      raise ValueError(
        f"{self.name} has no feature 'text', but {sorted(features)}: name a "
        'data set of texts'
      )
    return _Prepared(found.mapped(_text_of_example))

  def features(self) -> Any:
    """Returns the features of TFDS by name, which describe their types.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
    """
    return self._builder().info.features

  def records(
    self, split: Split, undecoded: str | None = None
  ) -> RandomAccess[dict[str, Any]] | Sharded[dict[str, Any]]:
    """Returns the examples of a split with all their features.

    Args:
      split: the split.
      undecoded: a feature that stays as it is stored, as the bytes of an image
        file.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ValueError: it does not have this split.
    """
    name = self.train if split == 'train' else self.validation
    builder = self._builder()
    splits = builder.info.splits
    try:
      info = splits[name]
    except ValueError as error:
      raise ValueError(
        f'{self.name} has no split {name!r}, but {sorted(splits)}: set '
        f"{split} to one of them, or to a slice such as 'train[99%:]'"
      ) from error
    decoders = None if undecoded is None else {undecoded: _stored()}
    if builder.info.file_format.value != 'tfrecord':
      records = builder.as_data_source(name, decoders=decoders)
      return RandomAccess(_Records(records, info.file_instructions), dict)
    if name not in splits:
      raise ValueError(
        f'{split}={name!r} is a slice, which tfrecord does not have: name one '
        f'of {sorted(splits)}, or prepare {self.name} as array_record'
      )
    return Sharded(
      tuple(str(path) for path in info.filepaths),
      info.num_examples,
      functools.partial(
        builder.info.features.deserialize_example_np, decoders=decoders
      ),
    )

  def _builder(self) -> Any:
    return _prepared(self.name, self.data_dir)


def in_files(
  split: Split,
  train: str,
  validation: str | None,
  holdout: float,
  read: Callable[[str], Texts],
) -> Texts:
  """Returns the documents in the files of a split.

  Args:
    split: the split.
    train: path or glob of the training files.
    validation: path or glob of the validation files; None holds out a share of
      the training documents.
    holdout: that share, chosen by a hash of the content.
    read: indexes the files of a path or glob.

  Raises:
    FileNotFoundError: no file matches.
    ValueError: the files, or the split, have no documents.
  """
  check_holdout(holdout)
  pattern = train if split == 'train' or validation is None else validation
  found = read(pattern)
  if not len(found):
    raise ValueError(
      f'no document in the files of {pattern!r}: at least one that is not '
      'blank (of chats: with an answer) is needed; give files with text'
    )
  if validation is not None:
    return found
  share = found.where(lambda crcs_d: in_split(split, crcs_d, holdout))
  if not len(share):
    raise ValueError(
      f'the {split} split of {pattern!r} is empty: holdout={holdout} of '
      f'{len(found)} documents; give a validation file, another holdout, or '
      'more documents (a plain text file is split at `separator`)'
    )
  return share


def check_holdout(holdout: float) -> None:
  """Raises ValueError unless `holdout` is between 0 and 1."""
  if not 0 < holdout < 1:
    raise ValueError(
      f'holdout must be between 0 and 1, got {holdout}: it is the share of '
      'the training data that is held out for validation'
    )


@overload
def in_split(split: Split, crc: int, holdout: float) -> bool: ...
@overload
def in_split(split: Split, crc: np.ndarray, holdout: float) -> np.ndarray: ...
def in_split(
  split: Split, crc: int | np.ndarray, holdout: float
) -> bool | np.ndarray:
  """Returns whether a hash belongs to a split.

  Equal contents have equal hashes, so they are never in both splits.
  """
  return (crc < holdout * 2**32) == (split == 'validation')


@functools.cache
def dialogues() -> list[tuple[str, str]]:
  """Returns the id and the text of each dialogue of chitchat-dataset."""
  try:
    package = importlib.resources.files('chitchat_dataset')
  except ModuleNotFoundError as error:
    raise ValueError(
      'the corpus Chitchat needs the package chitchat-dataset, which is not '
      "installed: pip install 'galore-optax[train]'"
    ) from error
  found = json.loads((package / 'dataset.json').read_bytes())
  return [
    (name, '\n'.join(map(_turn, dialogue['messages'])))
    for name, dialogue in found.items()
  ]


def _turn(messages: list[dict[str, str]]) -> str:
  """Joins the messages of a turn into one line.

  Each line is then a turn, and the next line is the other speaker's.
  """
  return ' '.join(' '.join(m['text'] for m in messages).split())


def _prepared(name: str, data_dir: str | None) -> Any:
  """Returns TFDS' builder of a prepared data set.

  The data set need not be among those that TFDS defines. The result is Any
  because the annotations of TFDS contradict the behaviour of its builders.
  """
  # This import takes a third of a second, which other corpora need not spend.
  from tensorflow_datasets.core import read_only_builder, registered

  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  try:
    return read_only_builder.builder_from_files(name, data_dir=data_dir)
  except registered.DatasetNotFoundError as error:
    raise FileNotFoundError(
      f'no prepared data set {name!r} in {data_dir or "~/tensorflow_datasets"}:'
      f' expected {name}/VERSION/dataset_info.json there; set data_dir, or '
      'prepare it with tfds.builder(...).download_and_prepare()'
    ) from error


def _stored() -> Any:
  """Returns TFDS' decoder that leaves a feature as it is stored."""
  from tensorflow_datasets.core import decode

  return decode.SkipDecoding()


def _text_of_example(example: dict[str, Any]) -> str:
  return example['text'].decode('utf-8', 'replace')
