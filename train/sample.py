"""Samples from a trained model: `python -m train.sample PATH`.

A sample depends on the task of the model: a language model continues texts, or
chats (`train.tasks.text_sampling`).
"""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import importlib
import pathlib
import sys
from collections.abc import Callable, Sequence

from models import huggingface
from models.model import ModelConfig
from train.engine.command import user_errors
from train.engine.run import Run, is_directory
from train.engine.task import task_class


def main(argv: Sequence[str] | None = None) -> None:
  """Samples from a model."""
  argv = list(sys.argv[1:] if argv is None else argv)
  with user_errors():
    sampler = sampler_for(argv)
  sampler(argv)


def sampler_for(argv: Sequence[str]) -> Callable[[Sequence[str]], None]:
  """Returns the program that samples from the model on a command line.

  Other words may name directories too, such as a prompt, or the run of a
  classifier. The model is therefore the first that has something to sample.
  Without a path, it is the program of language models, which prints how it is
  used.

  Raises:
    FileNotFoundError: the first directory has no model.
    ValueError: a model of this kind has nothing to sample.
  """
  refused: Exception | None = None
  for path in filter(pathlib.Path.is_dir, map(pathlib.Path, argv)):
    try:
      return sampler_of(path)
    except (FileNotFoundError, ValueError) as error:
      refused = refused or error
  if refused is not None:
    raise refused
  from train.tasks import text_sampling

  return text_sampling.main


def sampler_of(path: pathlib.Path) -> Callable[[Sequence[str]], None]:
  """Returns the program that samples from the model in a directory."""
  model = model_at(path)
  sampler = task_class(model).sampler
  if sampler is None:
    raise ValueError(
      f'{path} must hold a model that makes samples, got '
      f'{type(model).__name__}; python -m train.evaluate RUN measures one'
    )
  return importlib.import_module(sampler).main


def model_at(path: pathlib.Path) -> ModelConfig:
  """Returns the model of a run, or of a directory of transformers."""
  if is_directory(path):
    return huggingface.read_config(path)
  return Run(path).config().resolved_model


if __name__ == '__main__':
  main()
