"""A model, a corpus and a config that are so small that a run takes seconds."""

import pathlib
import random
import re
import shutil
from typing import Any

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
  optimizer=Galore(rank=4, gap=3, subspace='power'),
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


def write_config(directory: pathlib.Path) -> str:
  """Writes a corpus and a config, and returns the path of the config."""
  choice = random.Random(0)
  documents = [
    ' '.join(choice.choices(WORDS, k=choice.randint(5, 40))) for _ in range(80)
  ]
  corpus = directory / 'corpus.txt'
  corpus.write_text('\n\n'.join(documents))
  config = directory / 'tiny.py'
  config.write_text(CONFIG.format(corpus=str(corpus)))
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


def resumed(run: Run, path: str, directory: pathlib.Path, newest: int) -> Run:
  """Copies a run without its newest checkpoint, and resumes the copy."""
  shutil.copytree(run.directory, directory)
  shutil.rmtree(directory / 'checkpoints' / str(newest))
  assert pretrain.main([path, '--resume', '--run', str(directory)]) == 0
  return Run(directory)


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
