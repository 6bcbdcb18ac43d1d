"""Checkpoints: what they contain, saved and restored.

One Orbax checkpoint has four items: the parameters, the optimizer's state
with the step, the position in the data, and the configuration. A save copies
the state to the host, and a thread writes it while training goes on: into a
temporary directory that is renamed at the end, so a save that fails leaves the
checkpoints before it as they were.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.config import Config, to_json
from train.step import State
from train.task import PyTree, Task

# Checkpoints kept: the newest, one should that be damaged, and the best.
KEPT = preservation_policy.AnyPreservationPolicy(
  [
    preservation_policy.LatestN(2),
    preservation_policy.BestN(
      get_metric_fn=lambda found: found['score'],
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    ),
  ]
)


@contextlib.contextmanager
def opened(directory: pathlib.Path) -> Iterator[ocp.CheckpointManager]:
  """Yields the manager of a directory of checkpoints; waits for the last save.

  Raises:
    OSError: as of `save`.
  """
  # Orbax logs there, with a traceback, what it raises too.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  options = ocp.CheckpointManagerOptions(
    preservation_policy=KEPT,
    best_fn=lambda found: found['score'],
    best_mode='min',
  )
  with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
    try:
      yield manager
    finally:
      finish(manager)


def exists(directory: pathlib.Path) -> bool:
  """Whether a directory holds a checkpoint."""
  if not directory.is_dir():
    return False
  with opened(directory) as manager:
    return manager.latest_step() is not None


def save(
  manager: ocp.CheckpointManager,
  state: State,
  batches: grain.DatasetIterator,
  config: Config,
  score: float | None = None,
) -> None:
  """Saves everything that a run needs to go on; the state may then be donated.

  Returns before it is written, and waits for the save before.

  Raises:
    OSError: this save, or the one before, could not be written; the checkpoints
      before it are intact.
  """
  finish(manager)
  step = int(state.step)
  items = ocp.args.Composite(
    params=ocp.args.StandardSave(state.params),
    optimizer=ocp.args.StandardSave(
      {'step': state.step, 'state': state.optimizer}
    ),
    data=PositionSave(batches),
    config=ocp.args.JsonSave(to_json(config)),
  )
  found = None if score is None else {'score': score}
  with failures(manager, step):
    manager.save(step, args=items, metrics=found)


def best_score(manager: ocp.CheckpointManager) -> float:
  """Returns the lowest score of a checkpoint; infinity where none has one."""
  step = best_step(manager)
  return math.inf if step is None else manager.metrics(step)['score']


def finish(manager: ocp.CheckpointManager) -> None:
  """Waits until what was saved is written; OSError where it cannot be."""
  # Orbax counts a checkpoint from when its save starts.
  with failures(manager, manager.latest_step()):
    manager.wait_until_finished()


@contextlib.contextmanager
def failures(
  manager: ocp.CheckpointManager, step: int | None
) -> Iterator[None]:
  """Tells the user what to do where a step cannot be saved."""
  try:
    yield
  except (OSError, ValueError) as error:
    # A full disk is a ValueError where an array did not fit.
    raise OSError(
      f'cannot save step {step}: {error}. The checkpoints before it are '
      f'intact: make room, and go on with --run {manager.directory.parent} '
      '--resume'
    ) from error


def restore(
  manager: ocp.CheckpointManager, state: State, batches: grain.DatasetIterator
) -> State:
  """Returns the newest state, and moves `batches` to where it was.

  Args:
    manager: of a directory that holds a checkpoint.
    state: shapes of what was saved, with the shardings to restore to.
    batches: an iterator made as the saved one was.
  """
  state = on_device(state)
  items = ocp.args.Composite(
    params=ocp.args.StandardRestore(state.params),
    optimizer=ocp.args.StandardRestore(
      {'step': state.step, 'state': state.optimizer}
    ),
    data=PositionRestore(batches),
  )
  found = read(manager, items)
  return State(found.optimizer['step'], found.params, found.optimizer['state'])


def restore_params(
  directory: pathlib.Path, task: Task, *, best: bool = False
) -> PyTree:
  """Returns the parameters of the newest checkpoint, and nothing else.

  Args:
    directory: of the checkpoints.
    task: what was trained.
    best: of the checkpoint whose validation was the best instead; the newest
      where none was validated.
  """
  if not exists(directory):
    raise FileNotFoundError(f'no checkpoint in {directory} yet')
  shapes = on_device(jax.eval_shape(task.init, jax.random.key(0)))
  with opened(directory) as manager:
    items = ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
    return read(manager, items, best_step(manager) if best else None).params


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """Returns the step whose score is the lowest, None where none has one."""
  found = {step: manager.metrics(step) for step in manager.all_steps()}
  scores = {step: x['score'] for step, x in found.items() if x}
  return min(scores, key=lambda step: scores[step], default=None)


def read(
  manager: ocp.CheckpointManager,
  items: ocp.args.Composite,
  step: int | None = None,
) -> Any:
  """Returns items of a checkpoint, by default the newest.

  Raises:
    ValueError: they are not what this version of the program would save.
  """
  step = manager.latest_step() if step is None else step
  try:
    return manager.restore(step, args=items)
  # Orbax and grain have no error of their own for a state of another layout.
  except Exception as error:
    reason = str(error).strip().split('\n')[0][:200]
    raise ValueError(
      f'cannot read the checkpoint {manager.directory / str(step)}: it is '
      'damaged, or of another version of this program, whose state has another '
      f'layout ({type(error).__name__}: {reason}). Go on with the version that '
      'wrote it, or start a new run without --resume'
    ) from error


def on_device(shapes: PyTree) -> PyTree:
  """Returns shapes that say where to restore to: else the first device."""
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda x: getattr(x, 'sharding', None) or first
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), shapes
  )


class PositionHandler(ocp.CheckpointHandler):
  """The position in the data: the same in all processes, so one file."""

  def save(self, directory: Any, args: Any) -> None:
    """Writes it, once."""
    if jax.process_index() == 0:
      position = json.dumps(args.item.get_state(), indent=4)
      (directory / POSITION).write_text(position)

  def restore(self, directory: Any, args: Any) -> Any:
    """Moves an iterator there, however many processes there were."""
    args.item.set_state(json.loads((directory / POSITION).read_text()))
    return args.item


@ocp.args.register_with_handler(PositionHandler, for_save=True)
@dataclasses.dataclass
class PositionSave(ocp.args.CheckpointArgs):
  """Saves where an iterator is."""

  item: grain.DatasetIterator


@ocp.args.register_with_handler(PositionHandler, for_restore=True)
@dataclasses.dataclass
class PositionRestore(ocp.args.CheckpointArgs):
  """Moves an iterator to where one was."""

  item: grain.DatasetIterator


# As grain itself calls what a single process saves.
POSITION = 'process_0-of-1.json'
