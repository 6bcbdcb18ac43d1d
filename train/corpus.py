"""Where documents come from: small dataclasses that a config names.

A corpus has one method, `open(split)` with split 'train' or 'validation', which
checks that the data is there and returns `Documents`.
"""

import dataclasses
from typing import Literal, Protocol

import grain

Split = Literal['train', 'validation']


class Documents(Protocol):
  """The documents of one split, each a str that is not blank."""

  def stream(
    self,
    *,
    seed: int,
    repeat: bool,
    process_index: int = 0,
    process_count: int = 1,
  ) -> grain.IterDataset:
    """Documents in an order fixed by `seed`.

    Args:
      seed: of the shuffle.
      repeat: forever, every epoch in another order; else one pass.
      process_index: which share of the documents, in 0..process_count-1.
      process_count: how many shares; they do not overlap.
    """
    ...


class Corpus(Protocol):
  """What a config names."""

  def open(self, split: Split) -> Documents:
    """Documents of a split; ValueError or FileNotFoundError if not there."""
    ...


@dataclasses.dataclass(frozen=True)
class Chitchat:
  """7,168 dialogues, 12.7 MB (package chitchat-dataset, MIT licence).

  One document per dialogue, one turn a line. A dialogue is in the validation
  split by a hash of its id.
  """

  holdout: float = 0.05
  """Share of the dialogues that is kept for validation."""

  def open(self, split: Split) -> Documents:
    """Documents of a split; ValueError if the package is not installed."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """Text files of one's own: .jsonl (field 'text'), or plain text.

  A file whose name ends in .jsonl holds one JSON object a line; its field
  'text' is a document. Any other file is plain UTF-8 text.
  """

  train: str
  """Path or glob ('corpus/**/*.jsonl') of the training files."""

  validation: str | None = None
  """Path or glob of the validation files; None holds out `holdout`."""

  separator: str | None = '\n\n'
  """What separates the documents of a plain text file: blank lines; or say
  another text, such as '<|endoftext|>'; None makes each file one document."""

  holdout: float = 0.05
  """Share of the training documents kept for validation, chosen by a hash of
  their content, where `validation` is None."""

  def open(self, split: Split) -> Documents:
    """Documents of a split; reads every file once, to check and to index."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A data set that TFDS has prepared, read without TensorFlow.

  array_record is read by random access and shuffled globally; tfrecord is
  streamed: shards in random order, interleaved, shuffled within a window.
  """

  name: str = 'c4/en'
  """As in tfds.load: name/config, with :version where it matters."""

  data_dir: str | None = None
  """Where it is prepared; None is TFDS' own default, ~/tensorflow_datasets."""

  train: str = 'train'
  """The split to train on."""

  validation: str = 'validation'
  """The split to validate on; array_record takes slices ('train[99%:]')."""

  def open(self, split: Split) -> Documents:
    """Documents of a split: the feature 'text' of each example."""
    raise NotImplementedError
