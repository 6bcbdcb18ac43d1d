"""Writes a run for transformers: `python -m train.export RUN DIR`."""

from train import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import jax

from galore_optax.layerwise.weights import is_stored
from models import huggingface, lowrank
from models.llama import LlamaConfig
from train import checkpoint
from train.command import add_flag, user_errors
from train.data.tokenizer import TEMPLATE
from train.run import Run
from train.task import task_of


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the weights of a run as a directory that transformers reads."""
  parser = argparse.ArgumentParser(
    'python -m train.export', description=main.__doc__
  )
  parser.add_argument('run', type=pathlib.Path, help='directory of the run')
  parser.add_argument('directory', type=pathlib.Path, help='to be made')
  add_flag(
    parser,
    'newest',
    help='the newest checkpoint (default: the best, if any was validated)',
  )
  parser.add_argument(
    '--dtype',
    choices=('float32', 'bfloat16'),
    help="type of the weights (default: the run's)",
  )
  add_flag(
    parser,
    'adapter',
    help="the factors of a LoRA alone, in PEFT's format (default: merged)",
  )
  args = parser.parse_args(argv)
  with user_errors():
    if args.adapter and args.dtype:
      raise ValueError(
        f'--dtype {args.dtype} is of weights, and --adapter writes none: leave '
        'out one of the two'
      )
    export(
      Run(args.run),
      args.directory,
      best=not args.newest,
      dtype=args.dtype,
      factors=args.adapter,
    )
  print(f'written: {args.directory}')


def export(
  run: Run,
  directory: pathlib.Path,
  *,
  best: bool,
  dtype: str | None = None,
  factors: bool = False,
) -> None:
  """Writes config.json, safetensors and the tokenizer's files.

  Factors of low rank are merged into the weights.

  Args:
    run: what was trained.
    directory: must hold no checkpoint.
    best: whether the best validation is taken, and not the newest weights.
    dtype: of the weights; None is the run's.
    factors: whether they are written alone, for PEFT.

  Raises:
    FileNotFoundError: there is no such run, or no checkpoint in it.
    FileExistsError: the directory has a checkpoint.
    ValueError: the run has no factors to write alone.
  """
  config = run.config()
  adapter = config.adapter
  alone = isinstance(config.model, LlamaConfig)
  if factors and not (alone and isinstance(adapter, lowrank.Lora)):
    raise ValueError(
      f'{run.directory} has no factors beside the weights of a language model; '
      'leave out --adapter'
    )
  if not factors:
    huggingface.check_new(directory)
  params = checkpoint.restore_params(
    run.checkpoints_path, task_of(config), best=best
  )
  read, model = config.weights().read, config.model
  params = jax.tree.map(read, params, is_leaf=is_stored)
  if factors:
    lowrank.save_adapter(directory, params, adapter, base=config.checkpoint)
    return
  if adapter is not None:
    params = lowrank.merge(params, adapter)
  if dtype is not None:
    model = dataclasses.replace(model, param_dtype=dtype)
    params = jax.tree.map(lambda w: w.astype(dtype), params)
  huggingface.save(directory, model, params, source=run.source())
  if run.source() is None:
    run.tokenizer().save(directory)
  elif isinstance(config.model, LlamaConfig):
    # What the chats were rendered by need not be the checkpoint's own.
    template = run.tokenizer().files.get(TEMPLATE)
    if template is not None:
      (directory / TEMPLATE).write_bytes(template)


if __name__ == '__main__':
  main()
