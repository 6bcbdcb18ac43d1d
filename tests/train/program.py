"""A model, a corpus and a config that are so small that a run takes seconds."""

import contextlib
import pathlib
import random
import re
import shutil
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from train import pretrain
from train.engine import checkpoint, metrics, step
from train.engine.run import Run
from train.engine.task import task_of

CONFIG = """
from models.llama import LlamaConfig
from train.config import Config
from train.data.corpus import TextFiles
from train.method import Galore

config = Config(
  model=LlamaConfig(
    vocab_size=320, width=16, mlp_width=40, num_heads=2, num_layers=2
  ),
  corpus=TextFiles(train={corpus!r}, holdout=0.2),
  optimizer={optimizer},
  steps=8,
  learning_rate=0.01,
  warmup=0.25,
  batch_size=4,
  sequence_length=24,
  microbatches=2,
  eval_every=4,
  eval_batches=2,
  save_every=5,
)
"""

WORDS = (
  'the a one some red blue old new small dog cat bird tree house river sees '
  'likes finds eats near under over and but then'
).split()


ALL_KERNELS = "Galore(rank=4, gap=3, subspace='power')"
# A step with two kinds of projected kernels compiles faster than with seven.
SOME_KERNELS = (
  "Galore(rank=4, gap=3, subspace='power', targets=('.*/(q|up)/kernel',))"
)


def write_config(directory: pathlib.Path, optimizer: str = ALL_KERNELS) -> str:
  """Writes a corpus and a config, and returns the path of the config."""
  choice = random.Random(0)
  documents = [
    ' '.join(choice.choices(WORDS, k=choice.randint(5, 40))) for _ in range(80)
  ]
  corpus = directory / 'corpus.txt'
  corpus.write_text('\n\n'.join(documents))
  config = directory / 'tiny.py'
  config.write_text(CONFIG.format(corpus=str(corpus), optimizer=optimizer))
  return str(config)


def saved(run: Run) -> tuple[step.State, Any]:
  """Returns the newest checkpoint's arrays, and the position in the data."""
  config = run.config()
  task = task_of(config)
  shapes = jax.eval_shape(step.build(config, task)[0], jax.random.key(0))
  data = task.batches(task.open(run.directory))
  with checkpoint.opened(run.checkpoints_path) as manager:
    state = checkpoint.restore(manager, shapes, data)
  return jax.tree.map(np.asarray, state), data.get_state()


_built: dict[Any, Any] = {}
_placed: dict[Any, Any] = {}


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
  """Lets runs of equal configs share a compiled step.

  Tracing and compiling a step takes most of the time of a short run. A test
  that changes the inside of a step must not use this.
  """
  build, placed = step.build, step.placed

  def build_once(config: Any, task: Any) -> Any:
    if config not in _built:
      _built[config] = build(config, task)
    return _built[config]

  def place_once(function: Any, mesh: Any, places: Any) -> Any:
    # The config, of which there is one function, determines the others.
    if function not in _placed:
      _placed[function] = placed(function, mesh, places)
    return _placed[function]

  with (
    mock.patch.object(step, 'build', build_once),
    mock.patch.object(step, 'placed', place_once),
  ):
    yield


def trained(path: str, directory: pathlib.Path, *options: str) -> Run:
  """Pretrains a config, without a picture of its losses."""
  with shared_steps(), mock.patch.object(metrics, 'plot'):
    assert pretrain.main([path, '--run', str(directory), *options]) == 0
  return Run(directory)


def resumed(run: Run, path: str, directory: pathlib.Path, newest: int) -> Run:
  """Copies a run without its newest checkpoint, and resumes the copy."""
  shutil.copytree(run.directory, directory)
  shutil.rmtree(directory / 'checkpoints' / str(newest))
  return trained(path, directory, '--resume')


def assert_same_end(ours: Run, theirs: Run) -> None:
  """Raises AssertionError unless the newest checkpoints are bit-equal."""
  jax.tree.map(np.testing.assert_array_equal, saved(ours), saved(theirs))


def lines(run: Run) -> list[dict[str, Any]]:
  """Returns the logged metrics of a run, without times and speeds."""
  timed = re.compile('.*_(seconds|per_second)')
  found = [
    {k: v for k, v in line.items() if not timed.fullmatch(k)}
    for line in metrics.read(run.metrics_path)
  ]
  return [line for line in found if line.keys() != {'step'}]
