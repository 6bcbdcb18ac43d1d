"""What a bench has run: a file by which it goes on, and which calls share."""

import fcntl
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Hashable, Iterator
from typing import Any

import jax


class Runs:
  """Runs by their job, a named tuple; each is written as it is added.

  >>> import tempfile, typing
  >>> Job = typing.NamedTuple('Job', [('method', str), ('seed', int)])
  >>> with tempfile.TemporaryDirectory() as where:
  ...   file = pathlib.Path(where) / 'a.json'
  ...   Runs(file, Job, {'rank': 4}).add(Job('GaLore', 0), {'bits': 2.5})
  ...   print(Runs(file, Job, {'rank': 4}).done[Job('GaLore', 0)]['bits'])
  2.5
  """

  def __init__(self, file: pathlib.Path, job: Any, shared: dict[str, Any]):
    """Reads what there is.

    Args:
      file: of the runs; its directory is made with the first one.
      job: the named tuple's class.
      shared: what all runs have in common, such as a model's size.

    Raises:
      SystemExit: the file holds runs that share something else.
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

  def add(self, job: Hashable, run: dict[str, Any]) -> None:
    """Writes a run, and reads what other calls have written since."""
    fields = dict(zip(self.job._fields, job, strict=True))  # pyright: ignore
    self.done[job] = fields | run | {'machine': jax.devices()[0].device_kind}
    self.file.parent.mkdir(parents=True, exist_ok=True)
    directory = os.open(self.file.parent, os.O_RDONLY)
    try:
      # Until it is closed.
      fcntl.flock(directory, fcntl.LOCK_EX)
      self.done |= self._read()
      content = self.shared | {'runs': [*self.done.values()]}
      save(self.file, json.dumps(content) + '\n')
    finally:
      os.close(directory)


def save(path: pathlib.Path, text: str) -> None:
  """Writes a file at once, so that a stop leaves the old one."""
  # Of this thread of this process: another may write the same file.
  new = path.with_name(f'{path.name}.{threading.get_native_id()}')
  new.write_text(text)
  new.replace(path)


def until(jobs: Iterator[Any], hours: float | None) -> Iterator[Any]:
  """Yields what is to run, while there is time."""
  end = time.monotonic() + 3600 * (math.inf if hours is None else hours)
  for job in jobs:
    if time.monotonic() >= end:
      return
    yield job
