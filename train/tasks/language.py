"""Pre-training and fine-tuning of language models.

Axes: B sequences of a batch, T tokens of a sequence.
"""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import ClassVar

import grain
import jax
import numpy as np
from rich.console import RenderableType
from rich.rule import Rule
from rich.text import Text as RichText

from train.data.batches import batches, shown, validation_batches
from train.engine import cluster
from train.engine import mesh as mesh_lib
from train.engine.task import Batch, Loss, Metrics, PyTree
from train.tasks.text import Text, TextTask

INPUTS = ('inputs', 'targets', 'weights', 'positions', 'segments')
"""The arrays of a batch that a language model reads."""


class LanguageModel(TextTask):
  """Predicting the next token of documents or chats."""

  unit: ClassVar[str] = 'tokens'
  holds: ClassVar[tuple[str, ...]] = ('texts', 'chats')
  sampler: ClassVar[str | None] = 'train.tasks.text_sampling'
  loss_label: ClassVar[str] = 'loss (nats per token)'

  def inputs(self) -> Batch:
    """Returns the shapes of a batch."""
    shape = self.config.batch_size, self.sequence_length
    tokens = dict.fromkeys(INPUTS, jax.ShapeDtypeStruct(shape, np.int32))
    return tokens | {'weights': jax.ShapeDtypeStruct(shape, np.float32)}

  def batches(self, data: Text) -> grain.DatasetIterator:
    """Returns packed rows of tokens, without end."""
    config = self.config
    return batches(
      data.train,
      data.tokenizer,
      batch_size=config.batch_size,
      sequence_length=self.sequence_length,
      seed=config.seed,
      window=config.window,
      put=mesh_lib.deal(config.mesh),
      log=cluster.announce,
    )

  def evaluate(self, data: Text) -> Callable[[PyTree], Metrics]:
    """Returns a function that computes loss, perplexity and bits per byte."""
    loss = mesh_lib.measure(self.loss, self.config.mesh)
    rows = self.validation_rows(data)
    return functools.partial(perplexity, loss, batches=rows)

  def validation_rows(self, data: Text) -> grain.IterDataset[Batch]:
    """Returns validation batches, each the size of one part of a batch.

    The number of parts does not change the rows.
    """
    config = self.config
    num_batches = config.eval_batches
    if num_batches is not None:
      num_batches *= config.parts
    return validation_batches(
      data.validation,
      data.tokenizer,
      batch_size=config.batch_size // config.parts,
      sequence_length=self.sequence_length,
      num_batches=num_batches,
    )

  def example(self, data: Text) -> RenderableType:
    """Returns an example, in which scored tokens are green."""
    return shown(
      data.train,
      data.tokenizer,
      sequence_length=self.sequence_length,
      seed=self.config.seed,
    )

  def samples(
    self, params: PyTree, data: Text, run: pathlib.Path
  ) -> list[RenderableType]:
    """Writes and returns continuations of three held-out texts."""
    from train.tasks.text_sampling import continuations

    if jax.process_count() > 1:  # each process has only a part of the weights
      return []
    config = self.config
    documents = data.validation.stream(seed=config.seed, repeat=False)
    prompts = [document[:60] for document in itertools.islice(documents, 3)]
    texts = continuations(
      self.stored_layers,
      params,
      data.tokenizer,
      prompts,
      window=self.sequence_length,
      seed=config.seed,
    )
    pairs = list(zip(prompts, texts, strict=True))
    (run / 'samples.json').write_text(json.dumps(pairs, indent=2) + '\n')
    printed = []
    for prompt, said in pairs:
      printed.append(Rule('sample', align='left'))
      printed.append(RichText.assemble((prompt, 'bold'), said))
    return [*printed, Rule()]

  def export(self, run: pathlib.Path, directory: pathlib.Path) -> None:
    """Writes the tokenizer, and the tokens that end a text."""
    from train.tasks import text_export

    is_chat = self.config.corpus.holds == 'chats'
    text_export.write_language(run, directory, is_chat=is_chat)


def perplexity(
  loss: Loss, params: PyTree, *, batches: Iterable[Batch]
) -> Metrics:
  """Computes the loss, the perplexity per token and the bits per byte.

  Every scored token has the same weight: the sum over all batches is divided
  once, by the number of scored tokens. All batches are queued on the device
  before the first result is read.
  """
  found = []
  num_bytes = 0.0
  for batch in batches:
    _, sums = loss(params, {name: batch[name] for name in INPUTS})
    found.append((sums['nll'], sums['weight']))
    num_bytes += float(np.sum(batch['weights'] * batch['bytes']))
  totals = np.array(jax.device_get(found), np.float64).sum(axis=0)
  nll, weight = totals.tolist()
  mean = nll / weight
  return {
    'loss': mean,
    'perplexity': math.exp(mean) if mean < 700 else math.inf,
    'bits_per_byte': nll / math.log(2) / num_bytes,
  }
