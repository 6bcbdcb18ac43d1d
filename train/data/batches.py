"""Documents to batches: shuffled, tokenized, packed, checkpointable.

B sequences of a batch, T tokens of a sequence, n tokens of a document.
"""

import functools
from collections.abc import Sequence

import grain
import jax
import numpy as np

from train.data.corpus import Documents
from train.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]

# Batches made while the device works: one is next, one is under way.
AHEAD = 2


def batches(
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
  """Training batches without end, every epoch in another order, on the device.

  A thread makes them and sends them there while the step before is computed.

  A document is BOS text EOS, cut where a row is full; nothing is padded and
  every token but BOS is a target exactly once.

  The state of the iterator is small JSON: `get_state`, `set_state`, or
  `grain.checkpoint.CheckpointSave(it)` in an Orbax checkpoint. It counts what
  was taken, not what was made. A restored iterator goes on bit-equal.

  Args:
    documents: `corpus.open('train')`.
    tokenizer: of the run.
    batch_size: B over all processes; each gets B / process_count rows.
    sequence_length: T.
    seed: of the order of the documents.
    process_index: usually jax.process_index().
    process_count: usually jax.process_count().

  Returns:
    An iterator of dicts: `inputs`, `targets`, `positions` (restart at each
    document), `segments` (one number per document of a row, from 1; 0 is
    padding), all [B, T] int32, and `weights` [B, T] float32 (0 on padding).
  """
  num_rows = _rows_of_a_process(batch_size, process_count)
  stream = documents.stream(
    seed=seed,
    repeat=True,
    process_index=process_index,
    process_count=process_count,
  )
  rows = _packed(stream, tokenizer, sequence_length)
  found = rows.batch(num_rows, drop_remainder=True).map(_training_batch)
  return iter(_ahead(found.map(jax.device_put)))


def validation_batches(
  documents: Documents,
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  sequence_length: int,
  num_batches: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset[Batch]:
  """One pass over a split, the same batches each time it is iterated.

  As `batches`, but on the host and in an order that is always the same; the
  last batch is padded with weight 0 rather than dropped. Every process packs
  the whole split and takes its rows, so that all see the same number of
  batches, whose content does not depend on the number of processes.

  Each batch has one more array, `bytes` [B, T] int32: the UTF-8 bytes of text
  that each target stands for (0 for EOS). Over a whole split,
  sum(weights * bytes) is the size of its text, so

    bits_per_byte = sum(weights * nll) / log(2) / sum(weights * bytes)

  Args:
    documents: `corpus.open('validation')`.
    tokenizer: of the run.
    batch_size: B over all processes; each gets B / process_count rows.
    sequence_length: T.
    num_batches: stop after so many; None takes the whole split.
    process_index: usually jax.process_index().
    process_count: usually jax.process_count().
  """
  num_rows = _rows_of_a_process(batch_size, process_count)
  start = process_index * num_rows
  rows = _packed(
    documents.stream(seed=0, repeat=False), tokenizer, sequence_length
  )
  padded = rows.batch(
    batch_size,
    drop_remainder=False,
    batch_fn=functools.partial(_stack_padded, batch_size),
  )
  if num_batches is not None:
    padded = grain.experimental.LimitIterDataset(padded, num_batches)
  return _ahead(
    padded.map(
      lambda batch: _batch(
        {k: x[start : start + num_rows] for k, x in batch.items()}
      )
    )
  )


def _ahead(found: grain.IterDataset) -> grain.IterDataset:
  """The same, made by a thread before it is asked for."""
  return grain.experimental.ThreadPrefetchIterDataset(
    found, prefetch_buffer_size=AHEAD
  )


def _rows_of_a_process(batch_size: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size must be a positive multiple of the {process_count} '
      f'processes, got {batch_size}: change batch_size'
    )
  return batch_size // process_count


def _packed(
  stream: grain.IterDataset, tokenizer: Tokenizer, sequence_length: int
) -> grain.IterDataset:
  """Rows of T pairs of input and target, with the target's bytes.

  Pairs are made before packing: cutting token rows of T + 1 afterwards would
  lose the target at every cut.
  """
  if sequence_length < 1:
    raise ValueError(
      f'sequence_length must be at least 1, got {sequence_length}: 256 is a '
      'usual choice for a small model'
    )
  return grain.experimental.ConcatThenSplitIterDataset(
    stream.map(functools.partial(_pairs, tokenizer=tokenizer)),
    length_struct={'pairs': sequence_length},
  )


def _pairs(document: str, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """[n + 1, 3]: input, target, UTF-8 bytes of the target.

  The bytes of a document add up to its size whatever the model does to it (a
  space added in front, normalization): its first token takes the difference.
  """
  ids_n = tokenizer.encode(document)
  pairs = np.empty((len(ids_n) + 1, 3), np.int32)
  pairs[0, 0], pairs[1:, 0] = tokenizer.bos_id, ids_n
  pairs[:-1, 1], pairs[-1, 1] = ids_n, tokenizer.eos_id
  pairs[:-1, 2], pairs[-1, 2] = tokenizer.bytes_V[ids_n], 0
  pairs[0, 2] += len(document.encode()) - pairs[:, 2].sum()
  return {'pairs': pairs}


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
  """What the model reads, from packed pairs [B, T, 3]."""
  inputs_BT, targets_BT, bytes_BT = np.moveaxis(packed['pairs'], -1, 0)
  segments_BT = packed['pairs_segment_ids']
  return {
    'inputs': np.ascontiguousarray(inputs_BT),
    'targets': np.ascontiguousarray(targets_BT),
    'weights': (segments_BT > 0).astype(np.float32),
    'positions': packed['pairs_positions'],
    'segments': segments_BT,
    'bytes': np.ascontiguousarray(bytes_BT),
  }


def _training_batch(packed: dict[str, np.ndarray]) -> Batch:
  batch = _batch(packed)
  del batch['bytes']
  return batch
