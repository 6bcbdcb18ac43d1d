"""Saves and restores checkpoints, and detects damaged files.

An Orbax checkpoint has four items: the parameters, the optimizer's state with
the step, the position in the data, and the configuration. If a run keeps a
moving average of the parameters, it is a fifth item. A save copies the state to
host memory, and a thread writes it while training continues. The thread writes
a temporary directory and renames it at the end, so a save that fails leaves
earlier checkpoints intact.

Before the rename, a file with the SHA-256 digests of all other files is
written. Reading a checkpoint compares the digests first, and falls back to an
earlier checkpoint if a file has changed.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from train.config import Config
from train.engine.cluster import leads, together
from train.engine.config_json import from_json, to_json
from train.engine.step import State
from train.engine.task import PyTree, Task

# Checkpoints to keep: two, in case the newest is damaged, and the best.
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


DIGESTS = 'digests.json'
"""Name of the file that holds the digests of a checkpoint."""

# Files without a digest: the digests themselves, and those that Orbax writes
# during the rename. None of them is restored.
UNREAD = {DIGESTS, '_CHECKPOINT_METADATA', 'commit_success.txt'}

# Path of the configuration inside a checkpoint.
CONFIG = ('config', 'metadata')


@contextlib.contextmanager
def opened(
  directory: pathlib.Path, *, begun: int | None = None
) -> Iterator[ocp.CheckpointManager]:
  """Yields a manager that saves to a directory; waits for the last save.

  Args:
    directory: the checkpoint directory.
    begun: the step that a run continues from. Damaged checkpoints and those of
      later steps move to the directory `damaged`, because the run will save
      these steps again.

  Raises:
    OSError: a save failed, as in `save`.
  """
  # Wait until no process reads or lists the checkpoints that are moved.
  together('checkpoints are read')
  for step in steps(directory) if leads() else ():
    damaged = fault(directory / str(step), 'metrics') is not None
    if damaged or (begun is not None and step > begun):
      set_aside(directory / str(step))
  together('checkpoints are set aside')
  written = ocp.AsyncOptions(
    post_finalization_callback=lambda: write_digests(directory)
  )
  options = ocp.CheckpointManagerOptions(
    preservation_policy=KEPT,
    best_fn=lambda found: found['score'],
    best_mode='min',
    # Remove what interrupted saves left; no save is running at this time.
    cleanup_tmp_directories=True,
    async_options=written,
  )
  with quietly(directory, options) as manager:
    try:
      yield manager
    finally:
      finish(manager)


@contextlib.contextmanager
def reading(directory: pathlib.Path) -> Iterator[ocp.CheckpointManager]:
  """Yields a manager that changes nothing, since a run may be saving."""
  # With other options, Orbax warns about changes that a reader skips.
  options = ocp.CheckpointManagerOptions(
    read_only=True,
    lightweight_initialize=True,
    create=False,
    save_interval_steps=0,
  )
  with quietly(directory, options) as manager:
    yield manager


@contextlib.contextmanager
def quietly(
  directory: pathlib.Path, options: ocp.CheckpointManagerOptions
) -> Iterator[ocp.CheckpointManager]:
  """Yields a manager without Orbax's logs, which repeat raised errors."""
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
    yield manager


def steps(directory: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints in a directory, the newest first."""
  if not directory.is_dir():
    return []
  names = (path.name for path in directory.iterdir() if path.is_dir())
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def exists(directory: pathlib.Path) -> bool:
  """Whether a directory contains a checkpoint."""
  return bool(steps(directory))


def newest_sound(directory: pathlib.Path) -> pathlib.Path | None:
  """Returns the newest checkpoint without a damaged file; None if none is."""
  paths = (directory / str(step) for step in steps(directory))
  return next((path for path in paths if fault(path) is None), None)


def set_aside(path: pathlib.Path) -> None:
  """Moves a checkpoint to the directory `damaged` of its run."""
  place = path.parent.parent / 'damaged'
  place.mkdir(exist_ok=True)
  taken = sum(x.name.split('.')[0] == path.name for x in place.iterdir())
  path.rename(place / (f'{path.name}.{taken}' if taken else path.name))


def write_digests(directory: pathlib.Path) -> None:
  """Writes the digests of a checkpoint before it gets its final name."""
  # Orbax calls this in a thread. Only one save runs at a time, so the temporary
  # directory is the one of that save.
  for path in directory.glob('*.orbax-checkpoint-tmp'):
    files = digests(path)
    content = {'sha256': files, 'of_these': digest_of(files)}
    (path / DIGESTS).write_text(json.dumps(content, indent=1))


def digests(path: pathlib.Path, item: str = '') -> dict[str, str]:
  """Returns the SHA-256 of each file of a checkpoint, or of one of its items.

  Args:
    path: the checkpoint.
    item: name of the item; '' for all files.
  """
  files = sorted(x for x in (path / item).rglob('*') if x.is_file())
  names = [x.relative_to(path).as_posix() for x in files]
  with concurrent.futures.ThreadPoolExecutor() as threads:
    found = dict(zip(names, threads.map(digest, files), strict=True))
  return {name: found[name] for name in names if name not in UNREAD}


def digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def digest_of(files: dict[str, str]) -> str:
  """Returns the SHA-256 of the digests, which protects their own file."""
  return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def checked(path: pathlib.Path) -> bool:
  """Whether a checkpoint has digests; older versions wrote none."""
  return (path / DIGESTS).exists()


def fault(path: pathlib.Path, item: str = '') -> str | None:
  """Describes the damage of a checkpoint, or of one of its items.

  Returns:
    A description; None if all files match their digests, or if the checkpoint
    has none.
  """
  if not checked(path):
    return None
  try:
    content = json.loads((path / DIGESTS).read_bytes())
    written = content['sha256']
    whole = content['of_these'] == digest_of(written)
  except (OSError, ValueError, TypeError, KeyError):
    whole = False
  if not whole:
    return f'{DIGESTS} is not as it was written'
  try:
    found = digests(path, item)
  except OSError as error:
    return f'{error.filename} cannot be read: {error.strerror}'
  for name, wanted in written.items():
    if item in ('', name.split('/')[0]) and found.get(name) != wanted:
      changed = 'not as it was written' if name in found else 'missing'
      return f'{name} is {changed}'
  return None


def save(
  manager: ocp.CheckpointManager,
  state: State,
  batches: grain.DatasetIterator,
  config: Config,
  score: float | None = None,
) -> None:
  """Saves everything that a run needs to continue.

  The function returns before the files are written; the state may then be
  donated. It first waits for the previous save.

  Raises:
    OSError: this save, or the previous one, could not be written; earlier
      checkpoints are intact.
  """
  finish(manager)
  step = int(state.step)
  items = ocp.args.Composite(
    **array_items(state, ocp.args.StandardSave),
    data=PositionSave(batches),
    config=ocp.args.JsonSave(to_json(config)),
  )
  found = None if score is None else {'score': score}
  with failures(manager, step):
    manager.save(step, args=items, metrics=found)


def array_items(
  state: State, wrap: Callable[[PyTree], ocp.args.CheckpointArgs]
) -> dict[str, ocp.args.CheckpointArgs]:
  """Returns the items of a checkpoint that hold the arrays of a state."""
  items = {
    'params': state.params,
    'optimizer': {'step': state.step, 'state': state.optimizer},
    'average': state.average,
  }
  return {name: wrap(x) for name, x in items.items() if x is not None}


def best_score(manager: ocp.CheckpointManager) -> float:
  """Returns the lowest score of any checkpoint; infinity if none has one."""
  return min(scores(manager).values(), default=math.inf)


def finish(manager: ocp.CheckpointManager) -> None:
  """Waits until the last save is written; raises OSError if it failed."""
  # `latest_step` includes a save that is still running.
  with failures(manager, manager.latest_step()):
    manager.wait_until_finished()


@contextlib.contextmanager
def failures(
  manager: ocp.CheckpointManager, step: int | None
) -> Iterator[None]:
  """Adds the step, and advice for the user, to errors of a save."""
  try:
    yield
  except (OSError, ValueError) as error:
    # On a full disk, writing an array raises ValueError.
    raise OSError(
      f'cannot save step {step}: {error}. The checkpoints before it are '
      f'intact: make room, and go on with --run {manager.directory.parent} '
      '--resume'
    ) from error


def restore(
  manager: ocp.CheckpointManager, state: State, batches: grain.DatasetIterator
) -> State:
  """Returns the state of the newest intact checkpoint, and moves `batches`.

  Args:
    manager: a manager of a directory that has a checkpoint.
    state: shapes of the saved state, with the shardings to restore to.
    batches: an iterator made like the saved one; it moves to the saved
      position.
  """
  items = ocp.args.Composite(
    **array_items(on_device(state), ocp.args.StandardRestore),
    data=PositionRestore(batches),
  )
  found = read(manager, items)
  return State(
    found.optimizer['step'],
    found.params,
    found.optimizer['state'],
    None if state.average is None else found.average,
  )


def restore_params(
  directory: pathlib.Path, task: Task, *, best: bool = False
) -> PyTree:
  """Returns the parameters of the newest intact checkpoint, or their average.

  If the run keeps an average, it is returned in the types of the parameters.

  Args:
    directory: the checkpoint directory.
    task: the task that was trained.
    best: whether to take the checkpoint with the best validation; if none was
      validated, the newest is taken.

  Raises:
    FileNotFoundError: the directory has no checkpoint.
    ValueError: no checkpoint can be read.
  """
  if not exists(directory):
    raise FileNotFoundError(f'no checkpoint in {directory} yet')
  shapes = on_device(jax.eval_shape(task.init, jax.random.key(0)))
  with reading(directory) as manager:
    if task.config.average is None:
      items = ocp.args.Composite(params=ocp.args.StandardRestore(shapes))
      return read(manager, items, best=best).params
    means = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=x.sharding),
      shapes,
    )
    items = ocp.args.Composite(average=ocp.args.StandardRestore(means))
    found = read(manager, items, best=best).average
    return jax.tree.map(lambda mean, x: mean.astype(x.dtype), found, shapes)


def restore_config(directory: pathlib.Path) -> Config | None:
  """Returns the configuration of the newest intact checkpoint, if there is one.

  It is read without Orbax, whose restore of the other items needs a task, and
  the task needs a configuration.
  """
  for step in steps(directory):
    path = directory / str(step)
    if fault(path, 'config') is None:
      with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return from_json(Config, json.loads(path.joinpath(*CONFIG).read_text()))
  return None


def scores(manager: ocp.CheckpointManager) -> dict[int, float]:
  """Returns the scores of the checkpoints that have one, by step."""
  directory = pathlib.Path(manager.directory)
  found = {
    step: manager.metrics(step)
    for step in steps(directory)
    if fault(directory / str(step), 'metrics') is None
  }
  return {step: x['score'] for step, x in found.items() if x}


def read(
  manager: ocp.CheckpointManager,
  items: ocp.args.Composite,
  *,
  best: bool = False,
) -> Any:
  """Restores items of the newest intact checkpoint, or of the best one.

  Damaged checkpoints are skipped; a line on standard error names them.

  Raises:
    ValueError: another version of the program wrote the checkpoint, or none is
      intact.
    FileNotFoundError: the directory has no checkpoint.
  """
  directory = pathlib.Path(manager.directory)
  skipped = []
  found = scores(manager) if best else {}
  order = sorted(found, key=lambda step: found[step])
  order += [step for step in steps(directory) if step not in found]
  for step in order:
    path = directory / str(step)
    wrong = fault(path)
    if wrong is None:
      try:
        taken = manager.restore(step, args=items)
      # Orbax and grain raise many types of errors for another layout.
      except Exception as error:
        reason = str(error).strip().split('\n')[0][:200]
        wrong = f'{type(error).__name__}: {reason}'
        if checked(path):
          raise other_layout(path, wrong) from error
      else:
        print_skipped(path, skipped)
        return taken
    skipped.append(f'checkpoint {step} is damaged ({wrong})')
  if skipped:
    raise other_layout(directory / str(order[0]), '; '.join(skipped))
  raise FileNotFoundError(f'no checkpoint in {directory} yet')


def other_layout(path: pathlib.Path, reason: str) -> ValueError:
  """Returns the error for a checkpoint that cannot be read."""
  return ValueError(
    f'cannot read the checkpoint {path}: it is damaged, or of another version '
    f'of this program, whose state has another layout ({reason}). Go on with '
    'the version that wrote it, or start a new run without --resume'
  )


def print_skipped(path: pathlib.Path, skipped: list[str]) -> None:
  """Prints which checkpoints were skipped, or that one has no digests."""
  lines = list(skipped)
  if not checked(path):
    lines.append(f'checkpoint {path.name} has no {DIGESTS} to check it by')
  if lines:
    what = f'{"; ".join(lines)}: taken is checkpoint {path.name}'
    print(f'{path.parent}: {what}', file=sys.stderr)


def on_device(shapes: PyTree) -> PyTree:
  """Adds shardings to shapes without one: the first device."""
  first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first)

  return jax.tree.map(placed, shapes)


class PositionHandler(ocp.CheckpointHandler):
  """Saves the position in the data, which is the same in all processes."""

  def save(self, directory: Any, args: Any) -> None:
    """Writes the position, in the first process only."""
    if leads():
      position = json.dumps(args.item.get_state(), indent=4)
      (directory / POSITION).write_text(position)

  def restore(self, directory: Any, args: Any) -> Any:
    """Moves an iterator to the saved position."""
    args.item.set_state(json.loads((directory / POSITION).read_text()))
    return args.item


@ocp.args.register_with_handler(PositionHandler, for_save=True)
@dataclasses.dataclass
class PositionSave(ocp.args.CheckpointArgs):
  """Arguments to save the position of an iterator."""

  item: grain.DatasetIterator
  """The iterator."""


@ocp.args.register_with_handler(PositionHandler, for_restore=True)
@dataclasses.dataclass
class PositionRestore(ocp.args.CheckpointArgs):
  """Arguments to move an iterator to a saved position."""

  item: grain.DatasetIterator
  """The iterator, which moves."""


# The name that grain itself uses for a single process.
POSITION = 'process_0-of-1.json'
