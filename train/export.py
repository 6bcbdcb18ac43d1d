"""Exports a run for transformers: `python -m train.export RUN DIR`."""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import jax
import tyro

from galore_optax.quantized.array import is_quantized
from models import huggingface, huggingface_config, lowrank, peft
from train.engine import checkpoint
from train.engine.command import parse_options, user_errors
from train.engine.run import Run
from train.engine.task import task_of


@dataclasses.dataclass(frozen=True)
class Options:
  """Writes the weights of a run as a directory that transformers reads."""

  program: ClassVar[str] = 'train.export'
  run: Annotated[
    pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar='RUN')
  ]
  """Directory of the run."""
  directory: Annotated[
    pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar='DIRECTORY')
  ]
  """Directory to write."""
  newest: bool = False
  """Export the newest checkpoint instead of the best one, if any was
  validated."""
  dtype: Literal['float32', 'bfloat16'] | None = None
  """Data type of the weights; None is the run's."""
  adapter: bool = False
  """Write only the factors of a LoRA, in PEFT's format, instead of merging them
  into the weights."""

  def __post_init__(self) -> None:
    """Raises ValueError if an option contradicts another."""
    if self.adapter and self.dtype:
      raise ValueError(
        f'--dtype {self.dtype} is of weights, and --adapter writes none: leave '
        'out one of the two'
      )


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the weights of a run as a directory that transformers reads."""
  with user_errors():
    args = parse_options(Options, sys.argv[1:] if argv is None else argv)
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
  """Writes config.json, the weights as safetensors, and the task's own files.

  Low-rank factors are merged into the weights.

  Args:
    run: the run.
    directory: where to write; it must not contain a checkpoint.
    best: whether to export the checkpoint with the best validation instead of
      the newest one.
    dtype: data type of the weights; None keeps the run's.
    factors: whether to write only the factors, in PEFT's format.

  Raises:
    FileNotFoundError: the run does not exist, or has no checkpoint.
    FileExistsError: the directory contains a checkpoint.
    ValueError: the run has no factors that could be written by themselves.
  """
  config = run.config()
  adapter = config.adapter
  model = config.resolved_model
  lora = None
  if model.has_peft_names and isinstance(adapter, lowrank.Lora):
    lora = adapter
  if factors and lora is None:
    raise ValueError(
      f'{run.directory} has no factors beside the weights of a language model; '
      'leave out --adapter'
    )
  if not factors:
    # Both raise errors before the weights are read, which takes long.
    huggingface.check_new(directory)
    huggingface_config.architecture_of(model)
  task = task_of(config)
  params = checkpoint.restore_params(run.checkpoints_path, task, best=best)
  params = jax.tree.map(config.weights().read, params, is_leaf=is_quantized)
  if factors and lora is not None:
    peft.save_adapter(directory, params, lora, base=config.checkpoint)
    return
  if adapter is not None:
    params = lowrank.merge(params, adapter)
  if dtype is not None:
    model = dataclasses.replace(model, param_dtype=dtype)
    params = jax.tree.map(lambda w: w.astype(dtype), params)
  huggingface.save(directory, model, params, source=run.source())
  task.export(run.directory, directory)


if __name__ == '__main__':
  main()
