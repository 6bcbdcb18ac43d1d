"""Documents to batches: shuffled, tokenized, packed, checkpointable.

B sequences of a batch, T tokens of a sequence.
"""

import grain
import numpy as np

from train.corpus import Documents
from train.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


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
  """Training batches without end, every epoch in another order.

  A document is BOS text EOS, cut where a row is full; nothing is padded and
  every token but BOS is a target exactly once.

  The state of the iterator is small JSON: `get_state`, `set_state`, or
  `grain.checkpoint.CheckpointSave(it)` in an Orbax checkpoint. A restored
  iterator goes on bit-equal.

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
  raise NotImplementedError


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

  As `batches`, in an order that is always the same; the last batch is padded
  with weight 0 rather than dropped. Every process packs the whole split and
  takes its rows, so that all see the same number of batches, whose content
  does not depend on the number of processes.

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
  raise NotImplementedError
