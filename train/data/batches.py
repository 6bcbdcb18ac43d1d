"""Data pipelines that turn documents and chats into batches of tokens.

They shuffle, tokenize and pack, and their position can be saved.

Shapes: B sequences of a batch, T tokens of a sequence, n tokens of an example.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from train.data.corpus import Documents, Example
from train.data.tokenizer import Tokenizer
from train.data.window import ConcatThenSplit, ShuffledRows, num_rows

Batch = dict[str, np.ndarray]

# Number of batches made ahead: one is ready while another one is being made.
AHEAD = 2

# Number of rows that are filled at the same time. More rows need less padding.
_OPEN_ROWS = 64

# Number of tokens beyond a truncated chat's end that `shown` still prints.
_BEYOND = 50


def batches(
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
  window: int = 0,
  put: Callable[[Batch], Batch] = jax.device_put,
  log: Callable[[str], None] = print,
) -> grain.DatasetIterator[Batch]:
  """Returns an endless iterator of training batches on the device.

  A thread makes the batches and sends them to the device while the previous
  step runs. Every epoch has another order. Documents are shuffled and packed
  into rows. The rows are shuffled again within a window, so that a batch holds
  rows of many documents.

  A document is encoded as BOS text EOS. If a row is full, the document
  continues in the next row. Nothing is padded, and every token except BOS is a
  target exactly once. (If the tokenizer has no BOS, the first token of the text
  is not a target.)

  A chat does not continue in another row: rows are filled with whole chats and
  padded. A chat that is longer than a row is truncated to one row. A chat is
  left out if none of its tokens in that row counts in the loss.

  The state of the iterator is a small JSON object. Use `get_state` and
  `set_state`, or save it in an Orbax checkpoint by
  `grain.checkpoint.CheckpointSave(it)`. It counts the batches that were
  returned, not those that were made ahead. A restored iterator returns the same
  batches, bit for bit.

  Args:
    documents: `corpus.open('train')`.
    tokenizer: the tokenizer of the run.
    batch_size: B.
    sequence_length: T.
    seed: seed of the order of documents and rows.
    window: number of tokens in the window in which rows are shuffled, at most
      about an epoch; 0 keeps the order of packing. Each token takes 24 bytes of
      host memory.
    put: sends a batch to one or several devices.
    log: receives a line when `set_state` has filled the window again.

  Returns:
    An iterator of dicts: `inputs`, `targets`, `positions` (restart at each
      document), `segments` (one number per document of a row, from 1; 0 is
      padding), all [B, T] int32, and `weights` [B, T] float32 (1 on targets
      that count in the loss, 0 on other targets and on padding). Every row has
      a target of weight 1.

  Raises:
    ValueError: a size is wrong, no chat counts in the loss within a row, or the
      template refuses a chat.
  """
  _check_batch_size(batch_size)
  rows = _packed(documents, tokenizer, sequence_length, seed=seed, repeat=True)
  one_pass = _pieces(
    documents, tokenizer, sequence_length, seed=0, repeat=False
  )
  in_window = num_rows(
    (len(piece['pairs']) for piece in one_pass),
    len(documents),
    window,
    sequence_length,
  )
  rows = ShuffledRows(
    rows, num_rows=in_window, length=sequence_length, seed=seed, log=log
  )
  found = rows.batch(batch_size, drop_remainder=True).map(_training_batch)
  return iter(ahead(found.map(put)))


def validation_batches(
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  sequence_length: int,
  num_batches: int | None = None,
) -> grain.IterDataset[Batch]:
  """Returns one pass over a split, with the same batches each time.

  The batches are those of `batches`, but in a fixed order and in host memory.
  The last batch is padded with rows of weight 0 instead of being dropped.

  Each batch has one more array, `bytes` [B, T] int32: the number of UTF-8 bytes
  of text that each target stands for (0 for EOS). Over a whole split of
  documents, sum(weights * bytes) is the size of its text. (For chats it is the
  size of the text that counts in the loss.) Therefore

    bits_per_byte = sum(weights * nll) / log(2) / sum(weights * bytes)

  Args:
    documents: `corpus.open('validation')`.
    tokenizer: the tokenizer of the run.
    batch_size: B.
    sequence_length: T.
    num_batches: number of batches after which the pass stops; None takes the
      whole split.
  """
  _check_batch_size(batch_size)
  rows = _packed(documents, tokenizer, sequence_length, seed=0, repeat=False)
  padded = rows.batch(
    batch_size,
    drop_remainder=False,
    batch_fn=functools.partial(_stack_padded, batch_size),
  )
  if num_batches is not None:
    padded = grain.experimental.LimitIterDataset(padded, num_batches)
  return ahead(padded.map(_batch))


def ahead(found: grain.IterDataset) -> grain.IterDataset:
  """Returns the same dataset, whose items a thread makes ahead of time."""
  return grain.experimental.ThreadPrefetchIterDataset(
    found, prefetch_buffer_size=AHEAD
  )


def bucket(size: int, least: int = 16) -> int:
  """Returns the next power of two, at least `least`.

  Arrays that are padded to these sizes have few different shapes, and each
  shape is a compilation.

  >>> bucket(3), bucket(16), bucket(17)
  (16, 16, 32)
  """
  return max(least, 1 << (size - 1).bit_length())


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}')


def _packed(
  documents: Documents,
  tokenizer: Tokenizer,
  sequence_length: int,
  **order: Any,
) -> grain.IterDataset[dict[str, np.ndarray]]:
  """Returns rows of T pairs of input and target, as described in `_pairs`.

  Pairs are made before packing. Packing rows of T + 1 tokens and splitting them
  into inputs and targets afterwards would lose one target per row.
  """
  if sequence_length < 1:
    raise ValueError(
      f'sequence_length must be at least 1, got {sequence_length}: 256 is a '
      'usual choice for a small model'
    )
  documents.check(tokenizer)
  length = {'pairs': sequence_length}
  found = _pieces(documents, tokenizer, sequence_length, **order)
  if documents.continues:
    return ConcatThenSplit(found, length)
  _check_scored(documents, tokenizer, sequence_length)
  return grain.experimental.FirstFitPackIterDataset(
    found.filter(_has_pairs),
    length_struct=length,
    num_packing_bins=_OPEN_ROWS,
    seed=order['seed'],
  )


def _pairs(example: Example) -> dict[str, np.ndarray]:
  """Returns the pairs of input and target of an example, [n - 1, 4] int32.

  The columns are the input's id, the target's id, the target's UTF-8 bytes, and
  whether the target counts in the loss.
  """
  ids_n, scored_n, bytes_n = example
  columns = (ids_n[:-1], ids_n[1:], bytes_n[1:], scored_n[1:])
  return {'pairs': np.stack(columns, axis=-1, dtype=np.int32)}


def _pieces(
  documents: Documents,
  tokenizer: Tokenizer,
  length: int,
  **order: Any,
) -> grain.IterDataset[dict[str, np.ndarray]]:
  """Returns the pairs of each example, as they are packed into rows.

  A chat is truncated to `length` pairs, or to none if none of these counts in
  the loss.
  """
  found = documents.examples(tokenizer, **order).map(_pairs)
  if documents.continues:
    return found
  return found.map(functools.partial(_cut, length))


def _cut(length: int, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  pairs = row['pairs'][:length]
  return {'pairs': pairs if pairs[:, 3].any() else pairs[:0]}


def _has_pairs(row: dict[str, np.ndarray]) -> bool:
  return len(row['pairs']) > 0


def _check_scored(
  documents: Documents, tokenizer: Tokenizer, sequence_length: int
) -> None:
  """Raises ValueError if every chat is left out: packing would never end."""
  for example in documents.examples(tokenizer, seed=0, repeat=False):
    if example.scored_n[1 : sequence_length + 1].any():
      return
  raise ValueError(
    f'sequence_length {sequence_length} ends each of the {len(documents)} '
    'chats before its first answer: raise it'
  )


def _stack_padded(
  batch_size: int, rows: Sequence[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """Stacks rows and appends rows of zeros up to `batch_size`."""
  missing = batch_size - len(rows)
  return {
    key: np.stack([row[key] for row in rows] + missing * [0 * rows[0][key]])
    for key in rows[0]
  }


def _batch(packed: dict[str, np.ndarray]) -> Batch:
  """Returns the model's inputs from packed pairs [B, T, 4]."""
  inputs_BT, targets_BT, bytes_BT, scored_BT = np.moveaxis(
    packed['pairs'], -1, 0
  )
  return {
    'inputs': np.ascontiguousarray(inputs_BT),
    'targets': np.ascontiguousarray(targets_BT),
    'weights': scored_BT.astype(np.float32),  # 0 on padding
    'positions': packed['pairs_positions'],
    'segments': packed['pairs_segment_ids'],
    'bytes': np.ascontiguousarray(bytes_BT),
  }


def _training_batch(packed: dict[str, np.ndarray]) -> Batch:
  batch = _batch(packed)
  del batch['bytes']
  return batch


def shown(
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  sequence_length: int,
  seed: int = 0,
  counted: int = 200,
) -> Table:
  """Returns a table with an example, in which text in the loss is green.

  Args:
    documents: `corpus.open('train')`.
    tokenizer: the tokenizer of the run.
    sequence_length: T. The tokens of a chat beyond it are struck out, and only
      the first of them are shown.
    seed: seed of the order; the first example is shown.
    counted: number of examples for the statistics below the example.
  """
  stream = documents.examples(tokenizer, seed=seed, repeat=False)
  found = list(itertools.islice(stream, counted))
  targets = [example.scored_n[1:] for example in found]
  long = sum(len(scored_n) > sequence_length for scored_n in targets)
  empty = sum(not scored_n[:sequence_length].any() for scored_n in targets)
  scored = sum(x.sum() for x in targets)
  total = sum(map(len, targets))
  caption = (
    f'{scored / total:.0%} of the tokens of {len(found):,} examples are scored;'
    f' {long:,} are longer than {sequence_length:,} tokens'
  )
  is_cut = not documents.continues
  if is_cut:
    caption += (
      f'; {empty:,} have no answer before that and are left out, as '
      f'{documents.num_left_out:,} lines without an answer are'
    )
  table = Table(
    title='an example: what is scored is green',
    title_justify='left',
    caption=caption,
    caption_justify='left',
    show_header=False,
    expand=True,
  )
  table.add_row(_coloured(found[0], tokenizer, sequence_length, is_cut))
  return table


def _coloured(
  example: Example,
  tokenizer: Tokenizer,
  sequence_length: int,
  is_cut: bool,
) -> Text:
  """Returns the text of an example, decoded in runs of tokens of one style."""
  special = {i: text for text, i in tokenizer.specials.items()}
  shown_tokens = slice(sequence_length + _BEYOND)
  ids_n = example.ids_n[shown_tokens]
  scored_n = example.scored_n[shown_tokens]
  styles = [
    ('bold green' if scored and i else 'dim')
    + (' strike' if is_cut and i > sequence_length else '')
    for i, scored in enumerate(scored_n)
  ]
  keys = [
    (style, special.get(int(id_)))
    for style, id_ in zip(styles, ids_n, strict=True)
  ]
  text = Text()
  start = 0
  for (style, name), run in itertools.groupby(keys):
    stop = start + len(list(run))
    said = tokenizer.decode(ids_n[start:stop].tolist())
    text.append(said if name is None else (stop - start) * name, style)
    start = stop
  return text
