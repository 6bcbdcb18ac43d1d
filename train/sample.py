"""Samples from a trained model: `python -m train.sample PATH`.

The task of the model decides what a sample is: a language model continues
texts, or chats (`train.tasks.text_sampling`).
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
from train.engine.task import Task, task_class
from train.tasks.language import LanguageModel


def main(argv: Sequence[str] | None = None) -> None:
  """Samples from a model."""
  argv = list(sys.argv[1:] if argv is None else argv)
  with user_errors():
    sampler = sampler_for(argv)
  sampler(argv)


def sampler_for(argv: Sequence[str]) -> Callable[[Sequence[str]], None]:
  """Returns the program that samples from the model on a command line.

  Without a path, it is the program of language models, which prints how it is
  used.

  Raises:
    ValueError: a model of this kind has nothing to sample.
  """
  task: type[Task] = LanguageModel
  path = next(filter(pathlib.Path.is_dir, map(pathlib.Path, argv)), None)
  if path is not None:
    model = model_at(path)
    task = task_class(model)
  if task.sampler is None:
    raise ValueError(
      f'{path} must hold a model that makes samples, got '
      f'{type(model).__name__}; python -m train.evaluate RUN measures one'
    )
  return importlib.import_module(task.sampler).main


def model_at(path: pathlib.Path) -> ModelConfig:
  """Returns the model of a run, or of a directory of transformers."""
  if is_directory(path):
    return huggingface.read_config(path)
  return Run(path).config().resolved_model


if __name__ == '__main__':
  main()
