"""The results file of a study, which several processes may share."""

import fcntl
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax


class Runs:
  """The finished runs of a study, in memory and in a JSON file.

  `done` maps a job, a named tuple of settings, to the record of its run. Each
  run is written to the file when it is added.

  >>> import tempfile, typing
  >>> Job = typing.NamedTuple('Job', [('method', str), ('seed', int)])
  >>> with tempfile.TemporaryDirectory() as where:
  ...   file = pathlib.Path(where) / 'a.json'
  ...   Runs(file, Job, {'rank': 4}).add(Job('GaLore', 0), {'bits': 2.5})
  ...   print(Runs(file, Job, {'rank': 4}).done[Job('GaLore', 0)]['bits'])
  2.5
  """

  def __init__(
    self, file: pathlib.Path, job: Any, shared: dict[str, Any]
  ) -> None:
    """Reads the file if it exists.

    Args:
      file: path of the JSON file; `add` creates its directory.
      job: class of the named tuple that identifies a run.
      shared: settings that all runs in the file share, such as the model size.

    Raises:
      SystemExit: the runs in the file have other shared settings.
    """
    self.file, self.job = file, job
    self.shared = json.loads(json.dumps(shared))
    self.done: dict[Any, dict[str, Any]] = self._read()

  def _read(self) -> dict[Any, dict[str, Any]]:
    if not self.file.exists():
      return {}
    saved = json.loads(self.file.read_text())
    runs = saved.pop('runs')
    if saved != self.shared:
      raise SystemExit(
        f'{self.file} holds runs of {saved}, not of {self.shared}: ask for the '
        'same again, move the file away, or name another --results'
      )
    return {self.job(*(run[x] for x in self.job._fields)): run for run in runs}

  def add(self, job: Any, run: dict[str, Any]) -> None:
    """Adds a run to the file, and reads runs that other processes added."""
    fields: dict[str, Any] = job._asdict()
    self.done[job] = fields | run | {'machine': jax.devices()[0].device_kind}
    self.file.parent.mkdir(parents=True, exist_ok=True)
    directory = os.open(self.file.parent, os.O_RDONLY)
    try:
      # Closing the directory releases the lock.
      fcntl.flock(directory, fcntl.LOCK_EX)
      self.done |= self._read()
      content = self.shared | {'runs': [*self.done.values()]}
      save(self.file, json.dumps(content) + '\n')
    finally:
      os.close(directory)


def save(path: pathlib.Path, text: str) -> None:
  """Replaces a file atomically, so that an interruption keeps the old one."""
  # Another thread or process may write the same file at the same time, so the
  # name of the temporary file contains the id of this thread.
  new = path.with_name(f'{path.name}.{threading.get_native_id()}')
  new.write_text(text)
  new.replace(path)


def finite(x: Any) -> float:
  """Returns a number, or 99 if it is not finite: JSON has no infinity.

  >>> finite(float('nan'))
  99.0
  """
  return float(x) if math.isfinite(x) else 99.0


def until(jobs: Iterator[Any], hours: float | None) -> Iterator[Any]:
  """Yields jobs until the given hours are over; None sets no limit."""
  end = time.monotonic() + 3600 * (math.inf if hours is None else hours)
  for job in jobs:
    if time.monotonic() >= end:
      return
    yield job
