"""Tests the shuffle of packed rows, and exact resumes from any step."""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from tests.train.data.test_chats import chats_file, make
from train.data import batches as batches_lib
from train.data import window as window_lib
from train.data.batches import batches
from train.data.chats import Chats
from train.data.corpus import Indexed
from train.engine import checkpoint

LENGTH = 8


class Letters:
  """A tokenizer whose ids are code points; BOS is 1 and EOS is 2."""

  bos_id, eos_id = 1, 2
  num_rows = None
  bytes_V = np.r_[np.zeros(3, np.int32), np.ones(125, np.int32)]

  def encode(self, text):
    return [ord(letter) for letter in text]


# Each document repeats one letter. BOS is not a target, so the targets of 15
# letters and EOS fill exactly two rows of eight.
EXACT = Indexed([chr(ord('A') + i) * 15 for i in range(24)])
MIXED = Indexed([chr(ord('A') + i) * (3 + 9 * i % 40) for i in range(24)])


def training(documents, window, log=lambda line: None, batch_size=2):
  return batches(
    documents,
    Letters(),
    batch_size=batch_size,
    sequence_length=LENGTH,
    seed=7,
    window=window,
    log=log,
  )


handler = checkpoint.PositionHandler()  # saves the position as JSON


def assert_next_are_equal(ours, theirs, count):
  for a, b in itertools.islice(zip(ours, theirs, strict=False), count):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
  'documents',
  [EXACT, pytest.param(MIXED, marks=pytest.mark.slow)],
  ids=['exact', 'mixed'],
)
@pytest.mark.parametrize('window', [0, 4 * LENGTH])
def test_a_stop_at_any_step_resumes_bit_equal(documents, window, tmp_path):
  # A window of four rows holds two batches, so these stops are in three
  # windows.
  iterator, found = training(documents, window), []
  for taken in range(5 + 6):
    if taken < 5:
      through = tmp_path / str(taken)
      through.mkdir()
      handler.save(through, checkpoint.PositionSave(iterator))
    found.append(next(iterator))
  for taken in range(5):
    fresh = checkpoint.PositionRestore(training(documents, window))
    resumed = handler.restore(tmp_path / str(taken), fresh)
    assert_next_are_equal(resumed, found[taken:], 6)


@pytest.mark.parametrize('taken', [pytest.param(1, marks=pytest.mark.slow), 5])
def test_chats_resume_bit_equal_within_the_window(taken, tmp_path):
  tokenizer, path = make('chatml', tmp_path), chats_file(tmp_path)
  dialogues = Chats(path, path).open('train')

  def fresh():
    shape = {'batch_size': 4, 'sequence_length': 90, 'seed': 3}
    quiet = lambda line: None
    return batches(dialogues, tokenizer, **shape, window=12 * 90, log=quiet)

  iterator = fresh()
  for _ in range(taken):
    next(iterator)
  handler.save(tmp_path, checkpoint.PositionSave(iterator))
  resumed = handler.restore(tmp_path, checkpoint.PositionRestore(fresh()))
  assert_next_are_equal(resumed, iterator, 10)


def test_chats_are_shuffled_whole(tmp_path):
  """The rows of a window are those of first-fit packing, in another order."""
  tokenizer, path = make('chatml', tmp_path), chats_file(tmp_path)
  dialogues = Chats(path, path).open('train')
  shape = {'batch_size': 1, 'sequence_length': 90, 'seed': 3}

  def rows(window):
    found = batches(dialogues, tokenizer, **shape, window=window)
    return [
      b['inputs'].tobytes() + b['segments'].tobytes() + b['weights'].tobytes()
      for b in map(jax.device_get, itertools.islice(found, 12))
    ]

  packed, shuffled = rows(0), rows(12 * 90)
  assert packed != shuffled and sorted(packed) == sorted(shuffled)


def test_a_batch_holds_rows_of_many_documents():
  # A document has ten rows. Without the window, a batch of eight rows has at
  # most two documents.
  long = Indexed([chr(ord('A') + i) * 79 for i in range(24)])

  def distinct(window):
    found = itertools.islice(training(long, window, batch_size=8), 12)
    return [len(set(np.unique(b['inputs'])) - {0, 1, 2}) for b in found]

  assert max(distinct(0)) <= 2
  # The expected number of documents in eight rows, drawn from 240 rows of 24
  # documents, is 6.9.
  assert np.mean(distinct(240 * LENGTH)) > 5


def test_each_row_of_an_epoch_is_read_once():
  shuffled = itertools.islice(training(EXACT, 10**6), 24)
  letters = np.concatenate([b['targets'].ravel() for b in shuffled])
  found, counts = np.unique(letters, return_counts=True)
  assert found[1:].tolist() == [ord('A') + i for i in range(24)]
  assert set(counts[1:]) == {15}


def test_a_window_is_at_most_an_epoch():
  tokens = 24 * 16
  for window, expected in ((10**9, tokens), (80, 80), (0, LENGTH), (9, LENGTH)):
    found = EXACT.examples(Letters(), seed=0, repeat=False)
    sizes = (len(example.ids_n) - 1 for example in found)
    rows = window_lib.num_rows(sizes, len(EXACT), window, LENGTH)
    assert rows == expected // LENGTH


def test_the_window_of_chats_counts_the_tokens_of_their_rows(
  tmp_path: pathlib.Path,
) -> None:
  """A chat is truncated to a row, and left out if no answer remains."""
  tokenizer, path = make('chatml', tmp_path), chats_file(tmp_path)
  dialogues = Chats(path, path).open('train')
  length = 40
  pieces = batches_lib._pieces(
    dialogues, tokenizer, length, seed=0, repeat=False
  )
  sizes = [len(piece['pairs']) for piece in pieces]
  rows = batches_lib._packed(dialogues, tokenizer, length, seed=0, repeat=False)
  held = sum(np.count_nonzero(row['pairs_segment_ids']) for row in rows)
  assert sum(sizes) == held and len(sizes) == len(dialogues) and 0 in sizes
  whole = dialogues.examples(tokenizer, seed=0, repeat=False)
  assert sum(len(chat.ids_n) - 1 for chat in whole) > 2 * held


def test_a_large_corpus_is_measured_by_a_sample():
  read = []

  def sizes() -> Iterator[int]:
    for i in range(10**6):
      read.append(i)
      yield 4

  assert window_lib.num_rows(sizes(), 10**6, 10**9, 100) == 4 * 10**4
  assert len(read) == window_lib.SAMPLED


def test_the_stated_memory_is_that_of_the_rows():
  rows = batches_lib._packed(EXACT, Letters(), LENGTH, seed=0, repeat=True)
  num_bytes = sum(x.nbytes for x in next(iter(rows)).values())
  assert num_bytes == window_lib.BYTES_PER_TOKEN * LENGTH


def test_filling_the_window_again_is_logged_once():
  lines = []
  stopped = training(EXACT, 12 * LENGTH)
  next(stopped)
  resumed = training(EXACT, 12 * LENGTH, log=lines.append)
  resumed.set_state(stopped.get_state())
  next(resumed)
  [line] = lines
  assert re.fullmatch(
    r'the shuffle window of 12 rows \(0\.0 MB\) was filled again in .* s', line
  )


def test_a_branch_may_have_another_window() -> None:
  """A run may continue from another run's checkpoint with another window.

  A window of one row has the state of unshuffled rows.
  """

  def rows(batches: Iterator[Any], count: int) -> list[bytes]:
    found = map(jax.device_get, itertools.islice(batches, count))
    return [row.tobytes() for b in found for row in b['targets']]

  def after(source: Any, window: int) -> Any:
    state = json.loads(json.dumps(source.get_state()))
    branch = training(MIXED, window)
    branch.set_state(state)
    return branch

  packed, shuffled = training(MIXED, 0), training(MIXED, 6 * LENGTH)
  order = rows(training(MIXED, 0), 6)
  for source in (packed, shuffled):
    rows(source, 2)
  assert rows(after(shuffled, 0), 4) == order[4:]
  assert rows(after(shuffled, LENGTH), 4) == order[4:]
  ours = rows(after(packed, 4 * LENGTH), 4)
  assert sorted(ours[:4]) == sorted(order[4:8])
  assert sorted(ours[4:]) == sorted(order[8:]) and ours != order[4:]
