"""Documents and chats to batches: shuffled, tokenized, packed, checkpointable.

B sequences of a batch, T tokens of a sequence, n tokens of an example.
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

from train.data.chats import Dialogues, Example
from train.data.corpus import Documents
from train.data.tokenizer import AnyTokenizer, check_texts
from train.data.window import ConcatThenSplit, ShuffledRows, num_rows

Batch = dict[str, np.ndarray]

# Batches made while the device works: one is next, one is under way.
AHEAD = 2

# Rows that examples are packed into at once: the more, the less is padded.
_OPEN_ROWS = 64

# Tokens that are shown of what is cut off.
_BEYOND = 50


def batches(
  documents: Documents | Dialogues,
  tokenizer: AnyTokenizer,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
  window: int = 0,
  put: Callable[[Batch], Batch] = jax.device_put,
  log: Callable[[str], None] = print,
) -> grain.DatasetIterator[Batch]:
  """Training batches without end, every epoch in another order, on the device.

  A thread makes them and sends them there while the step before is computed.
  Documents are shuffled, then packed into rows; the rows are shuffled again
  within a window, so that a batch holds rows of many documents.

  A document is BOS text EOS, cut where a row is full; nothing is padded and
  every token but BOS is a target exactly once. (Where a tokenizer has no BOS,
  the first token is none.) A chat is never cut, unless it is longer than a row,
  which then holds its beginning alone: rows are filled with whole chats and
  padded. One that has no scored token in its row is left out.

  The state of the iterator is small JSON: `get_state`, `set_state`, or
  `grain.checkpoint.CheckpointSave(it)` in an Orbax checkpoint. It counts what
  was taken, not what was made. A restored iterator goes on bit-equal.

  Args:
    documents: `corpus.open('train')`.
    tokenizer: of the run.
    batch_size: B.
    sequence_length: T.
    seed: of the order of documents and rows.
    window: tokens of the window in which rows are shuffled, at most about an
      epoch; 0 keeps the order of packing. Each takes 24 bytes of host memory.
    put: sends a batch to the device, or to many.
    log: receives one line when `set_state` has filled the window again.

  Returns:
    An iterator of dicts: `inputs`, `targets`, `positions` (restart at each
    document), `segments` (one number per document of a row, from 1; 0 is
    padding), all [B, T] int32, and `weights` [B, T] float32 (1 on targets that
    are scored, 0 on others and on padding). No row is without a scored target.

  Raises:
    ValueError: a size is wrong, no chat has a scored token in its row, or the
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
  documents: Documents | Dialogues,
  tokenizer: AnyTokenizer,
  *,
  batch_size: int,
  sequence_length: int,
  num_batches: int | None = None,
) -> grain.IterDataset[Batch]:
  """One pass over a split, the same batches each time it is iterated.

  As `batches`, but on the host and in an order that is always the same; the
  last batch is padded with weight 0 rather than dropped.

  Each batch has one more array, `bytes` [B, T] int32: the UTF-8 bytes of text
  that each target stands for (0 for EOS). Over a whole split of documents,
  sum(weights * bytes) is the size of its text (of chats, of what is scored), so

    bits_per_byte = sum(weights * nll) / log(2) / sum(weights * bytes)

  Args:
    documents: `corpus.open('validation')`.
    tokenizer: of the run.
    batch_size: B.
    sequence_length: T.
    num_batches: stop after so many; None takes the whole split.
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
  """The same, made by a thread before it is asked for."""
  return grain.experimental.ThreadPrefetchIterDataset(
    found, prefetch_buffer_size=AHEAD
  )


def bucket(size: int, least: int = 16) -> int:
  """Returns the next power of two: what has a few sizes is compiled few times.

  >>> bucket(3), bucket(16), bucket(17)
  (16, 16, 32)
  """
  return max(least, 1 << (size - 1).bit_length())


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}')


def _packed(
  documents: Documents | Dialogues,
  tokenizer: AnyTokenizer,
  sequence_length: int,
  **order,
) -> grain.IterDataset:
  """Rows of T pairs of input and target, with the target's bytes and score.

  Pairs are made before packing: cutting token rows of T + 1 afterwards would
  lose the target at every cut.
  """
  if sequence_length < 1:
    raise ValueError(
      f'sequence_length must be at least 1, got {sequence_length}: 256 is a '
      'usual choice for a small model'
    )
  texts = documents.stream(seed=0, repeat=False)
  check_texts(tokenizer, texts, special=isinstance(documents, Dialogues))
  length = {'pairs': sequence_length}
  found = _pieces(documents, tokenizer, sequence_length, **order)
  if not isinstance(documents, Dialogues):
    return ConcatThenSplit(found, length)
  documents.check(tokenizer)
  _check_scored(documents, tokenizer, sequence_length)
  return grain.experimental.FirstFitPackIterDataset(
    found.filter(_has_pairs),
    length_struct=length,
    num_packing_bins=_OPEN_ROWS,
    seed=order['seed'],
  )


def examples(
  documents: Documents | Dialogues, tokenizer: AnyTokenizer, **order
) -> grain.IterDataset[Example]:
  """Returns what a model reads, whole, in an order fixed by a seed.

  Args:
    documents: of a corpus, opened.
    tokenizer: of the run.
    **order: as in `Documents.stream`.
  """
  if isinstance(documents, Dialogues):
    return documents.examples(tokenizer, **order)
  encoded = functools.partial(_document, tokenizer=tokenizer)
  return documents.stream(**order).map(encoded)


def _document(document: str, *, tokenizer: AnyTokenizer) -> Example:
  """BOS text EOS, all of it scored.

  The bytes of a document add up to its size whatever the tokenizer does to it
  (a space added in front, normalization): its first token takes the difference.
  """
  begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  ids_n = np.array(
    [*begin, *tokenizer.encode(document), tokenizer.eos_id], np.int32
  )
  bytes_n = tokenizer.bytes_V[ids_n]
  bytes_n[len(begin)] += len(document.encode()) - bytes_n.sum()
  return Example(ids_n, np.ones(len(ids_n), bool), bytes_n)


def _pairs(example: Example) -> dict[str, np.ndarray]:
  """[n - 1, 4]: input, target, UTF-8 bytes of the target, whether scored."""
  ids_n, scored_n, bytes_n = example
  columns = (ids_n[:-1], ids_n[1:], bytes_n[1:], scored_n[1:])
  return {'pairs': np.stack(columns, axis=-1, dtype=np.int32)}


def _pieces(
  documents: Documents | Dialogues,
  tokenizer: AnyTokenizer,
  length: int,
  **order: Any,
) -> grain.IterDataset[dict[str, np.ndarray]]:
  """Returns the pairs of each example that are packed into rows.

  A chat is truncated to `length` pairs, or to none if none of these is scored.
  """
  found = examples(documents, tokenizer, **order).map(_pairs)
  if not isinstance(documents, Dialogues):
    return found
  return found.map(functools.partial(_cut, length))


def _cut(length: int, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  pairs = row['pairs'][:length]
  return {'pairs': pairs if pairs[:, 3].any() else pairs[:0]}


def _has_pairs(row: dict[str, np.ndarray]) -> bool:
  return len(row['pairs']) > 0


def _check_scored(
  documents: Dialogues, tokenizer: AnyTokenizer, sequence_length: int
) -> None:
  """Raises ValueError where all chats are left out, which would never end."""
  encode = documents.encoder(tokenizer)
  for i in range(len(documents.source)):
    example = encode(documents.source[i])
    if example.scored_n[1 : sequence_length + 1].any():
      return
  raise ValueError(
    f'sequence_length {sequence_length} ends each of the '
    f'{len(documents.source)} chats before its first answer: raise it'
  )


def _stack_padded(
  batch_size: int, rows: Sequence[dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
  """Stacks rows and adds rows of zeros up to batch_size."""
  missing = batch_size - len(rows)
  return {
    key: np.stack([row[key] for row in rows] + missing * [0 * rows[0][key]])
    for key in rows[0]
  }


def _batch(packed: dict[str, np.ndarray]) -> Batch:
  """What the model reads, from packed pairs [B, T, 4]."""
  inputs_BT, targets_BT, bytes_BT, scored_BT = np.moveaxis(
    packed['pairs'], -1, 0
  )
  return {
    'inputs': np.ascontiguousarray(inputs_BT),
    'targets': np.ascontiguousarray(targets_BT),
    'weights': scored_BT.astype(np.float32),  # padding is not
    'positions': packed['pairs_positions'],
    'segments': packed['pairs_segment_ids'],
    'bytes': np.ascontiguousarray(bytes_BT),
  }


def _training_batch(packed: dict[str, np.ndarray]) -> Batch:
  batch = _batch(packed)
  del batch['bytes']
  return batch


def shown(
  documents: Documents | Dialogues,
  tokenizer: AnyTokenizer,
  *,
  sequence_length: int,
  seed: int = 0,
  counted: int = 200,
) -> Table:
  """Returns a table with one example, coloured by what is scored.

  Args:
    documents: `corpus.open('train')`.
    tokenizer: of the run.
    sequence_length: T; what a chat has beyond it is struck out, and left out
      where it is long.
    seed: of the order; the first example is shown.
    counted: of how many examples the lengths are counted.
  """
  stream = examples(documents, tokenizer, seed=seed, repeat=False)
  found = list(itertools.islice(stream, counted))
  targets = [example.scored_n[1:] for example in found]
  long = sum(len(scored_n) > sequence_length for scored_n in targets)
  empty = sum(not scored_n[:sequence_length].any() for scored_n in targets)
  scored, total = sum(x.sum() for x in targets), sum(map(len, targets))
  caption = (
    f'{scored / total:.0%} of the tokens of {len(found):,} examples are scored;'
    f' {long:,} are longer than {sequence_length:,} tokens'
  )
  is_cut = isinstance(documents, Dialogues)
  if is_cut:
    caption += (
      f'; {empty:,} have no answer before that and are left out, as '
      f'{documents.reading.num_left_out:,} lines without an answer are'
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
  tokenizer: AnyTokenizer,
  sequence_length: int,
  is_cut: bool,
) -> Text:
  """The text of an example in runs of tokens of one style."""
  special = {i: text for text, i in tokenizer.specials.items()}
  ids_n, scored_n, _ = (x_n[: sequence_length + _BEYOND] for x_n in example)
  styles = [
    ('bold green' if scored and i else 'dim')
    + (' strike' if is_cut and i > sequence_length else '')
    for i, scored in enumerate(scored_n)
  ]
  keys = [
    (style, special.get(int(id_)))
    for style, id_ in zip(styles, ids_n, strict=True)
  ]
  text, start = Text(), 0
  for (style, name), run in itertools.groupby(keys):
    stop = start + len(list(run))
    said = tokenizer.decode(ids_n[start:stop])
    text.append(said if name is None else (stop - start) * name, style)
    start = stop
  return text
