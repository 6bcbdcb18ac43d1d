"""This module holds validation: `python -m train.evaluate RUN`.

Every scored token counts the same, whichever batch it falls into, and the sum
is divided by their number and nothing else.
"""

import argparse
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import grain
import jax
import numpy as np

from models.llama import Layers
from train import checkpoint, step
from train.command import user_errors
from train.config import Config
from train.data.batches import Batch, validation_batches
from train.data.documents import Documents
from train.data.tokenizer import Tokenizer
from train.run import Run
from train.step import PyTree

Sums: TypeAlias = Callable[[PyTree, Batch], dict[str, jax.Array]]
INPUTS = ('inputs', 'targets', 'weights', 'positions', 'segments')


def make_sums(layers: Layers) -> Sums:
  """Returns the jitted `(params, batch) -> {'nll', 'weight'}`."""
  return jax.jit(lambda params, batch: layers(params, batch)[1])


def evaluate(
  sums: Sums, params: PyTree, batches: Iterable[Batch]
) -> dict[str, float]:
  """Returns the loss, the perplexity per token and the bits per byte."""
  nll = weight = num_bytes = 0.0
  for batch in batches:
    inputs = {name: batch[name] for name in INPUTS}
    aux = sums(params, inputs)
    nll += float(aux['nll'])
    weight += float(aux['weight'])
    num_bytes += float(np.sum(batch['weights'] * batch['bytes']))
  loss = nll / weight
  return {
    'validation_loss': loss,
    'validation_perplexity': math.exp(loss) if loss < 700 else math.inf,
    'validation_bits_per_byte': nll / math.log(2) / num_bytes,
  }


def describe(values: dict[str, float]) -> str:
  """Returns the validation line."""
  return (
    f'validation: loss {values["validation_loss"]:.4f}, '
    f'perplexity {values["validation_perplexity"]:.2f} per token, '
    f'{values["validation_bits_per_byte"]:.4f} bits per byte'
  )


def held_out(
  config: Config,
  documents: Documents,
  tokenizer: Tokenizer,
  num_batches: int | None,
) -> grain.IterDataset[Batch]:
  """Returns the validation batches of a config, in parts as in training.

  The rows are the same, however many parts there are.
  """
  if num_batches is not None:
    num_batches *= config.parts
  return validation_batches(
    documents,
    tokenizer,
    batch_size=config.batch_size // config.parts,
    sequence_length=config.sequence_length,
    num_batches=num_batches,
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the perplexity of a run's newest checkpoint."""
  parser = argparse.ArgumentParser(
    'python -m train.evaluate', description=main.__doc__
  )
  parser.add_argument('run', type=pathlib.Path, help='directory of the run')
  parser.add_argument(
    '--batches',
    type=int,
    help='number of batches (default: the whole validation split)',
  )
  args = parser.parse_args(argv)
  with user_errors():
    run = Run(args.run)
    config = run.config()
    documents = config.corpus.open('validation')
    batches = held_out(config, documents, run.tokenizer(), args.batches)
    params = checkpoint.restore_params(run.checkpoints_path, config)
  sums = make_sums(step.model(config))
  print(describe(evaluate(sums, params, batches)))


if __name__ == '__main__':
  main()
