"""Opens a trained model: a run, or a directory in the format of transformers.

`train.sample` and `train.evaluate` use it for the path in their command line.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tyro

from models import huggingface
from models.llama import Layers
from models.model import ModelConfig
from train.data import tokenizer as tokenizers
from train.data.tokenizer import Tokenizer
from train.engine import checkpoint
from train.engine.run import Run, is_directory
from train.engine.task import PyTree
from train.tasks.language import LanguageModel
from train.tasks.text import tokenizer_of


class Model(NamedTuple):
  """A language model with everything that it takes to read and write text."""

  layers: Layers
  """The model."""
  params: PyTree
  """The parameters, as `layers` reads them."""
  tokenizer: Tokenizer
  """The tokenizer."""
  window: int
  """Number of tokens that the model was trained to read at once."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
  """The options that select a model for `opened`."""

  path: tyro.conf.Positional[pathlib.Path]
  """Directory of a run, or of a model in the format of transformers."""
  best: bool = False
  """Read the checkpoint of a run with the best validation instead of the newest
  one."""


def opened(path: str | pathlib.Path, *, best: bool = False) -> Model:
  """Reads a model and its tokenizer.

  Args:
    path: a run, whose newest checkpoint is read, or a directory in the format
      of transformers.
    best: whether to read the checkpoint of a run with the best validation
      instead.

  Raises:
    FileNotFoundError: the path is neither, or a file is missing.
    ValueError: a file cannot be read; the message names it.
  """
  path = pathlib.Path(path)
  return of_directory(path) if is_directory(path) else of_run(Run(path), best)


def of_run(run: Run, best: bool) -> Model:
  """Reads a run's newest checkpoint, or the one with the best validation."""
  config = run.config()
  check_writes(run.directory, config.resolved_model)
  task = LanguageModel(config)
  params = checkpoint.restore_params(run.checkpoints_path, task, best=best)
  tokenizer = tokenizer_of(run.directory, config)
  return Model(task.stored_layers, params, tokenizer, task.sequence_length)


def of_directory(path: pathlib.Path) -> Model:
  """Reads a model in the format of transformers."""
  tokenizer = tokenizers.load(path)
  config = huggingface.read_config(path)
  check_writes(path, config)
  model: Any = config
  tokenizer = tokenizers.fitted(
    tokenizer,
    model.vocab_size,
    origin=str(path),
    remedy='copy the tokenizer of this model into it',
  )
  config, params = huggingface.load(path)
  fields = huggingface.read_json(path / 'config.json')
  window = fields.get('max_position_embeddings') or 2048
  return Model(config.layers(), params, tokenizer, window)


def check_writes(path: pathlib.Path, config: ModelConfig) -> None:
  """Raises ValueError unless the model is a language model."""
  if config.task != 'language':
    raise ValueError(
      f'{path} must hold a model that writes text, got '
      f'{type(config).__name__}; python -m train.evaluate RUN measures one'
    )


def shared(row: list[int], old: list[int]) -> int:
  """Returns the length of the common beginning of two rows of tokens.

  >>> shared([1, 2, 3, 4], [1, 2, 7]), shared([1, 2], [1, 2, 3])
  (2, 2)
  """
  length = min(len(row), len(old))
  if row[:length] == old[:length]:
    return length
  return int(np.argmin(np.equal(row[:length], old[:length])))
