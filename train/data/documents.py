"""Documents of one split, and the order in which they are read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain

# tfrecord: shards read at once, and records shuffled at once. Together they
# stand in for the global shuffle that needs random access.
_INTERLEAVED_SHARDS = 16
_SHUFFLED_RECORDS = 4096


class Documents(Protocol):
  """The documents of one split, each a str."""

  def stream(
    self,
    *,
    seed: int,
    repeat: bool,
    process_index: int = 0,
    process_count: int = 1,
  ) -> grain.IterDataset[str]:
    """Documents in an order fixed by `seed`.

    Args:
      seed: of the shuffle.
      repeat: forever, every epoch in another order; else one pass.
      process_index: which share of the documents, in 0..process_count-1.
      process_count: how many shares; they do not overlap.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Indexed:
  """Documents by random access, shuffled globally."""

  source: grain.sources.RandomAccessDataSource
  """What has a length and items."""

  text: Callable[[Any], str] = str
  """What turns an item into a document."""

  def stream(
    self,
    *,
    seed: int,
    repeat: bool,
    process_index: int = 0,
    process_count: int = 1,
  ) -> grain.IterDataset[str]:
    """As in `Documents`."""
    shuffled = _share(self.source, seed, process_index, process_count)
    ordered = shuffled.repeat() if repeat else shuffled
    return ordered.map(self.text).to_iter_dataset(
      grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
    )


@dataclasses.dataclass(frozen=True)
class Sharded:
  """Documents in tfrecord shards: shards shuffled, interleaved, windowed.

  Where an epoch is longer than a window, or shared among processes, its end
  mixes with the beginning of the next.
  """

  paths: Sequence[str]
  """The shards."""

  num_records: int
  """In all shards."""

  text: Callable[[bytes], str]
  """What turns a record into a document."""

  def stream(
    self,
    *,
    seed: int,
    repeat: bool,
    process_index: int = 0,
    process_count: int = 1,
  ) -> grain.IterDataset[str]:
    """As in `Documents`; a process has whole shards."""
    shuffled = _share(self.paths, seed, process_index, process_count)
    ordered = shuffled.repeat() if repeat else shuffled
    records = grain.experimental.InterleaveIterDataset(
      ordered.map(grain.experimental.TFRecordIterDataset),
      cycle_length=min(len(shuffled), _INTERLEAVED_SHARDS),
    )
    # No longer than an epoch, which a small data set would see twice in one.
    window = max(1, min(self.num_records // process_count, _SHUFFLED_RECORDS))
    windowed = grain.experimental.WindowShuffleIterDataset(
      records, window_size=window, seed=seed
    )
    return windowed.map(self.text)


def _share(
  source: grain.sources.RandomAccessDataSource,
  seed: int,
  process_index: int,
  process_count: int,
) -> grain.MapDataset:
  """Shuffled (by seed and epoch), then every process_count-th item."""
  if not 0 <= seed < 2**31:
    raise ValueError(
      f'seed must be in 0..{2**31 - 1}, got {seed}: any small number will do'
    )
  if len(source) < process_count:
    raise ValueError(
      f'{process_count} processes need as many documents (or shards), got '
      f'{len(source)}: use fewer processes, or more files'
    )
  shuffled = grain.MapDataset.source(source).seed(seed).shuffle()
  return shuffled[process_index::process_count]
