"""A process that holds one workload and times it when it is told to.

`python -m tests.bench.speed.worker MODULE FUNCTION ARGUMENTS...` answers on
standard output, an object a line: first `ready`, with the seconds from the
start of the process; then, for each number that it reads, the seconds of so
many runs in a row; at the end of its input the peak of its memory.
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
"""What `make train` sets; here every process has it, the peers' too."""


def main() -> None:
  """Runs the workload that the command line names."""
  # Nothing else may write between the answers.
  answers, sys.stdout = sys.stdout, sys.stderr
  answer = lambda **values: print(json.dumps(values), file=answers, flush=True)
  module, function, *arguments = sys.argv[1:]
  workload = getattr(importlib.import_module(module), function)
  run, notes = workload(*arguments)
  answer(ready=time.time() - float(os.environ['STARTED']), **notes)
  for count in sys.stdin:
    # As in training, one follows the other: the first after a pause finds
    # neither its data in the caches nor the memory that it gave back.
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
  """The other end: starts the process, and asks it for times."""

  def __init__(self, module: str, function: str, *arguments: str, **env: str):
    """Starts it and waits until it is ready."""
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
    """Returns the seconds of runs in a row, after one that is not timed."""
    assert self._process.stdin
    self._process.stdin.write(f'{count}\n')
    self._process.stdin.flush()
    return self._read()['seconds']

  def end(self) -> int:
    """Ends the process; returns the most bytes that it held."""
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
