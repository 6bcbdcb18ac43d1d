"""A process that holds one workload and times it on request.

`python -m tests.bench.speed.worker MODULE FUNCTION ARGUMENTS...` writes JSON
objects to standard output, one in a line. The first object has `ready`, the
seconds since the start of the process. For each number on standard input, the
process times this many consecutive runs and writes their `seconds`. When the
input ends, it writes its peak memory.
"""

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

HUGE_PAGES = 'glibc.malloc.hugetlb=1'
"""Setting of `make train`. Here all processes use it, including the peers."""


def main() -> None:
  """Runs the workload that the command line names."""
  # Redirect other output to standard error, to keep it out of the answers.
  answers, sys.stdout = sys.stdout, sys.stderr

  def answer(**values: Any) -> None:
    print(json.dumps(values), file=answers, flush=True)

  module, function, *arguments = sys.argv[1:]
  workload = getattr(importlib.import_module(module), function)
  run, notes = workload(*arguments)
  answer(ready=time.time() - float(os.environ['STARTED']), **notes)
  for count in sys.stdin:
    # In training, steps follow each other without a pause. The first run after
    # a pause is slower, because its data has left the caches and its freed
    # memory must be allocated again. Do not time it.
    run()
    times = []
    for _ in range(int(count)):
      start = time.perf_counter()
      run()
      times.append(time.perf_counter() - start)
    answer(seconds=times)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  answer(peak_bytes=1024 * peak)


class Worker:
  """Starts a worker process and requests times from it."""

  def __init__(
    self, module: str, function: str, *arguments: str, **env: str
  ) -> None:
    """Starts the process and waits until its workload is ready."""
    self._process = subprocess.Popen(
      [sys.executable, '-m', __name__, module, function, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ
      | {
        'JAX_PLATFORMS': 'cpu',
        'OMP_NUM_THREADS': str(len(os.sched_getaffinity(0))),
        'GLIBC_TUNABLES': HUGE_PAGES,
        'STARTED': str(time.time()),
      }
      | env,
    )
    self.notes = self._read()

  def time(self, count: int = 3) -> list[float]:
    """Returns the seconds of `count` consecutive runs after an untimed one."""
    assert self._process.stdin
    self._process.stdin.write(f'{count}\n')
    self._process.stdin.flush()
    return self._read()['seconds']

  def end(self) -> int:
    """Ends the process and returns its peak memory in bytes."""
    assert self._process.stdin
    self._process.stdin.close()
    peak = self._read()['peak_bytes']
    self._process.wait()
    for pipe in (self._process.stdout, self._process.stderr):
      assert pipe
      pipe.close()
    return peak

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      _, said = self._process.communicate()
      raise RuntimeError(said[-2000:])
    return json.loads(line)


if __name__ == '__main__':
  main()
