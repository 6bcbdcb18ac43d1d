"""Shuffles packed rows within a window; its state survives JSON.

Packing writes the pieces of a document into consecutive rows. Without this
shuffle a batch would hold only a few documents. `train.data.batches` applies
it.

Shapes: T tokens of a row.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import grain

BYTES_PER_TOKEN = 24
"""Host memory of a token in the window. Input, target, bytes, weight, segment
and position are int32 each."""

SAMPLED = 256
"""Number of examples whose mean length estimates the number of tokens in an
epoch."""


def num_rows(
  sizes: Iterable[int], num_examples: int, window: int, length: int
) -> int:
  """Returns the rows of a window of `window` tokens, at most about an epoch.

  A longer window would repeat the examples of a small corpus.

  Args:
    sizes: number of tokens that each example of an epoch adds to the rows. Only
      the first `SAMPLED` of them are read.
    num_examples: number of examples in an epoch.
    window: number of tokens in the window, 0 for no shuffle.
    length: T.

  >>> num_rows([10] * 8, 8, 1000, 5), num_rows([10] * 8, 8, 40, 5)
  (16, 8)
  """
  seen = 0
  tokens = 0
  for size in itertools.islice(sizes, SAMPLED if window else 0):
    seen += 1
    tokens += size
    if tokens >= window:
      break
  epoch = tokens * num_examples // max(seen, 1)
  return max(1, min(window, epoch) // length)


class ShuffledRows(grain.IterDataset):
  """Packed rows in random order within a window.

  A window is filled, emptied in an order that depends on the seed and on the
  number of the window, and filled again. The state of the iterator consists of
  the state of the rows at the start of the window, and a position in the
  window. `set_state` makes the rows of the window again. A window of one row
  keeps the order of packing, and its state is the state of the rows.
  """

  def __init__(
    self,
    rows: grain.IterDataset,
    *,
    num_rows: int,
    length: int,
    seed: int,
    log: Callable[[str], None],
  ) -> None:
    """Initializes the shuffle.

    Args:
      rows: packed rows.
      num_rows: number of rows in a window.
      length: T.
      seed: seed of the shuffle.
      log: receives a line with time and memory after `set_state`.
    """
    shuffled = rows
    if num_rows > 1:
      shuffled = grain.experimental.WindowShuffleIterDataset(
        rows, window_size=num_rows, seed=seed
      )
    super().__init__(shuffled)
    self._shuffled = shuffled
    self._log = log
    self._num_rows = num_rows
    self._length = length

  def __iter__(self) -> grain.DatasetIterator:  # noqa: D105
    shuffled = iter(self._shuffled)
    if self._num_rows == 1:
      return _InOrder(shuffled)
    return _Refilled(shuffled, self._num_rows, self._length, self._log)


# The key in grain's state that has the state of the rows at the window's start.
_START = 'parent_window_start_state'


class _Wrapped(grain.DatasetIterator):
  """Forwards the rows and the state of another iterator."""

  def __init__(self, rows: grain.DatasetIterator) -> None:
    super().__init__(rows)
    self._rows = rows

  def __next__(self) -> Any:
    return next(self._rows)

  def get_state(self) -> dict[str, Any]:
    return self._rows.get_state()

  def set_state(self, state: dict[str, Any]) -> None:
    self._rows.set_state(state)


class _InOrder(_Wrapped):
  """Rows in packing order; `set_state` also accepts a shuffled run's state.

  A run that starts from another run's checkpoint may have another window. The
  state of a shuffled run records how many rows of the window were returned, but
  not which ones, so `set_state` skips that number of rows.
  """

  def set_state(self, state: dict[str, Any]) -> None:
    if _START not in state:
      super().set_state(state)
      return
    super().set_state(state[_START])
    for _ in range(state['pos_in_window']):
      next(self._rows)


class _Refilled(_Wrapped):
  """Logs the time in which `set_state` fills the window again."""

  def __init__(
    self,
    rows: grain.DatasetIterator,
    num_rows: int,
    length: int,
    log: Callable[[str], None],
  ) -> None:
    super().__init__(rows)
    self._num_rows = num_rows
    self._length = length
    self._log = log

  def set_state(self, state: dict[str, Any]) -> None:
    if _START not in state:
      # This is the state of an unshuffled run: start a window at its next row.
      state = {_START: state, 'window_index': 0, 'pos_in_window': 0}
    start = time.perf_counter()
    super().set_state(state)
    seconds = time.perf_counter() - start
    size = self._num_rows * self._length * BYTES_PER_TOKEN
    self._log(
      f'the shuffle window of {self._num_rows:,} rows ({size / 1e6:,.1f} MB) '
      f'was filled again in {seconds:.1f} s'
    )


class ConcatThenSplit(grain.IterDataset):
  """Rows of T tokens, cut from the concatenation of all examples.

  It is grain's dataset of this name with a state that survives JSON. Grain
  compares the slices in its state with the tuple (-1, -1), which stands for "no
  remainder". JSON turns tuples into lists, so grain would take a restored "no
  remainder" for a remainder and drop a document.
  """

  def __init__(
    self, examples: grain.IterDataset, length: dict[str, int]
  ) -> None:
    """Packs the arrays of `examples`; `length` is T, by the array's name."""
    rows = grain.experimental.ConcatThenSplitIterDataset(
      examples, length_struct=length
    )
    super().__init__(rows)
    self._rows = rows

  def __iter__(self) -> grain.DatasetIterator:  # noqa: D105
    return _WithTuples(iter(self._rows))


class _WithTuples(_Wrapped):
  """Restores the tuples in the state of grain's ConcatThenSplit."""

  def set_state(self, state: dict[str, Any]) -> None:
    slices = {k: tuple(x) for k, x in state['remainder_slices'].items()}
    super().set_state({**state, 'remainder_slices': slices})
