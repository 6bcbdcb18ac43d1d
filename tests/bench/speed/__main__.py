"""Compares the speed of the library with galore-torch, PyTorch and optax.

Run it with `.venv-parity/bin/python -m tests.bench.speed`; `make parity`
creates this environment. Each row of a table has its own process (`worker`).
All processes use the same cores and environment variables, and only one of them
works at a time. Each round times every row, so that a slow phase of the machine
affects all rows. Each section is added to
tests/bench/results/speed.json when it ends, and speed.md and speed.png are
written from this file. `--only` selects sections.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.bench.speed import ours, report
from tests.bench.speed.worker import HUGE_PAGES, Worker

RESULTS = pathlib.Path(__file__).parents[1] / 'results'
OURS, THEIRS = 'tests.bench.speed.ours', 'tests.bench.speed.theirs'
PEER = 'galore-torch'
FINDERS = ('svd', 'gram', 'randomized', 'power')
STEPS = (
  'Galore()',
  'Galore8bit()',
  'GaloreAdafactor()',
  'GaloreMuon()',
  'Fira()',
  'Apollo()',
  'ScaleSgd()',
  'AdamW()',
)
DEPTHS = ('4', '8', '16', '32')
AT_ONCE = 4
"""Rows of a group; all processes of a group are in memory at the same time."""
Row = dict[str, Any]


def main() -> None:
  """Runs the sections and writes all results so far after each of them."""
  parser = argparse.ArgumentParser('python -m tests.bench.speed')
  parser.add_argument(
    '--only', nargs='+', choices=SECTIONS, default=[*SECTIONS]
  )
  parser.add_argument('--rounds', type=int, default=9)
  args = parser.parse_args()
  path = RESULTS / 'speed.json'
  for name in args.only:
    start = time.perf_counter()
    section = {
      'date': f'{datetime.date.today():%d %B %Y}',
      'machine': machine(),
      'rounds': args.rounds,
      'load': os.getloadavg()[0],
      'rows': SECTIONS[name](args.rounds),
    }
    section['minutes'] = (time.perf_counter() - start) / 60
    found = json.loads(path.read_text()) if path.exists() else {}
    found[name] = section
    path.write_text(json.dumps(found, indent=1) + '\n')
    report.write(found, RESULTS)
    print(f'{name}: {section["minutes"]:.1f} minutes', flush=True)


def machine() -> str:
  """Returns a description of the machine."""
  cores = len(os.sched_getaffinity(0))
  return f'{cores} cores, {platform.machine()}, {HUGE_PAGES}'


def interleaved(
  rows: Mapping[str, Sequence[str]],
  peers: Mapping[str, Sequence[str]],
  rounds: int,
) -> list[Row]:
  """Times workers in interleaved rounds and returns a table row for each.

  The rows are split into groups, so that few processes are in memory. The peers
  are timed in the rounds of every group, and ratios compare a row with
  galore-torch in the same round.

  Args:
    rows: arguments of `Worker`, by row name.
    peers: the same for the programs to compare with.
    rounds: number of rounds for each group.
  """
  everyone: dict[str, Worker] = {}
  times: dict[str, list[float]] = {}
  ratios: dict[str, list[float]] = {}
  peaks: dict[str, int] = {}

  def begin(name: str, arguments: Sequence[str]) -> Worker:
    everyone[name] = Worker(*arguments)
    return everyone[name]

  always = {name: begin(name, arguments) for name, arguments in peers.items()}
  for i in range(0, len(rows), AT_ONCE):
    group = {name: begin(name, rows[name]) for name in [*rows][i : i + AT_ONCE]}
    for _ in range(rounds):
      now = {name: x.time() for name, x in (always | group).items()}
      for name, some in now.items():
        times.setdefault(name, []).extend(some)
        ratio = np.median(some) / np.median(now[PEER])
        ratios.setdefault(name, []).append(float(ratio))
    peaks |= {name: worker.end() for name, worker in group.items()}
    print('.', end='', flush=True)
  peaks |= {name: worker.end() for name, worker in always.items()}
  return [
    {
      'name': name,
      **spread(times[name]),
      'ratio': float(np.median(ratios[name])),
      'peak_bytes': peaks[name],
      **everyone[name].notes,
    }
    for name in [*peers, *rows]
  ]


def spread(times: Sequence[float]) -> Row:
  """Returns the median and the quartiles of times."""
  low, mid, high = np.quantile(times, (0.25, 0.5, 0.75))
  return {'median': float(mid), 'low': float(low), 'high': float(high)}


def rates(rounds: int) -> list[Row]:
  """Measures the flops and bytes per second of the machine."""
  found = []
  for _ in range(rounds):
    worker = Worker(OURS, 'rates')
    found.append(worker.notes)
    worker.end()
  return [
    {'name': name, **spread([x[name] for x in found])}
    for name in ('flops', 'bytes')
  ]


def updates(rounds: int) -> list[Row]:
  """Times the optimizer's update, for every preset and the peers."""
  rows = {name: (OURS, 'update', name, '60m') for name in ours.rows()}
  peers = {
    PEER: (THEIRS, 'update', 'GaLoreAdamW', '60m'),
    'torch AdamW (fused)': (THEIRS, 'update', 'AdamW', '60m'),
    'optax.adamw': (OURS, 'update', 'optax.adamw', '60m'),
  }
  return interleaved(rows, peers, rounds)


def steps(rounds: int) -> list[Row]:
  """Times the whole step of a few presets; others differ only in the update."""
  rows = {name: (OURS, 'step', name, '60m') for name in STEPS}
  return interleaved(rows, step_peers('60m'), max(2, rounds // 2))


def larger(rounds: int) -> list[Row]:
  """Times the whole step of the 130M model."""
  rows = {
    name: (OURS, 'step', name, '130m')
    for name in ('Galore()', 'Galore8bit()', 'AdamW()')
  }
  return interleaved(rows, step_peers('130m'), max(2, rounds // 2))


def step_peers(size: str) -> Mapping[str, Sequence[str]]:
  """Returns workers that train transformers' model with PyTorch optimizers."""
  return {
    PEER: (THEIRS, 'step', 'GaLoreAdamW', size),
    'torch AdamW (fused)': (THEIRS, 'step', 'AdamW', size),
  }


def refreshes(rounds: int) -> list[Row]:
  """Times an update with a warm refresh, minus an update without one."""
  rows = {name: (OURS, 'refresh', name, '60m') for name in FINDERS}
  peers = {
    PEER: (THEIRS, 'update', 'GaLoreAdamW', '60m', '1'),
    'optax.contrib.galore': (OURS, 'update', 'OptaxGalore()', '60m', '1'),
  }
  found = interleaved(rows, peers, max(2, rounds // 3))
  plain = {
    'Galore()': (OURS, 'update', 'Galore()', '60m'),
    'optax.contrib.galore': (OURS, 'update', 'OptaxGalore()', '60m'),
  }
  peer = {PEER: (THEIRS, 'update', 'GaLoreAdamW', '60m')}
  without = {
    row['name']: row['median'] for row in interleaved(plain, peer, rounds)
  }
  for row in found:
    less = without.get(row['name'], without['Galore()'])
    for key in ('median', 'low', 'high'):
      row[key] -= less
  base = next(row['median'] for row in found if row['name'] == PEER)
  return [row | {'ratio': row['median'] / base} for row in found]


def first(rounds: int) -> list[Row]:
  """Times the start of a process up to the end of its first step."""
  found: dict[str, list[Row]] = {}
  for _ in range(max(2, rounds // 3)):
    with tempfile.TemporaryDirectory() as cache:
      for name in ('empty compile cache', 'full compile cache'):
        # The first step contains a refresh, here by power iteration.
        worker = Worker(OURS, 'first', '60m', cache)
        found.setdefault(name, []).append(worker.notes)
        worker.end()
    for name in ('GaLoreAdamW', 'AdamW'):
      worker = Worker(THEIRS, 'step', name, '60m')
      found.setdefault(f'torch {name}', []).append(worker.notes)
      worker.end()
  return [
    {
      'name': name,
      **spread([x['ready'] for x in notes]),
      'step': float(np.median([x['first'] for x in notes])),
    }
    for name, notes in found.items()
  ]


def program(rounds: int) -> list[Row]:
  """Times the quickstart's training from its start to its first metrics."""
  found: dict[str, list[float]] = {}
  for _ in range(max(2, rounds // 3)):
    with tempfile.TemporaryDirectory() as folder:
      run = pathlib.Path(folder, 'run')
      for name in ('empty compile cache', 'resumed, full cache'):
        resume = ['--resume'] if run.exists() else []
        seconds = until_metrics(run, *resume, XDG_CACHE_HOME=folder)
        found.setdefault(name, []).append(seconds)
      again = run.with_name('again')
      seconds = until_metrics(again, XDG_CACHE_HOME=folder)
      found.setdefault('full compile cache', []).append(seconds)
  return [{'name': name, **spread(times)} for name, times in found.items()]


def until_metrics(run: pathlib.Path, *options: str, **env: str) -> float:
  """Starts a training, stops it at its first metrics, returns the seconds."""
  path = run / 'metrics.jsonl'

  def lines() -> int:
    return path.read_text().count('\n') if path.exists() else 0

  before, start = lines(), time.perf_counter()
  command = ['-m', 'train.pretrain', 'configs/quickstart.py', '--run', str(run)]
  process = subprocess.Popen(
    [sys.executable, *command, *options],
    env=os.environ | {'GLIBC_TUNABLES': HUGE_PAGES} | env,
    stdout=subprocess.DEVNULL,
  )
  while lines() == before:
    if process.poll() is not None:
      raise RuntimeError(f'{command} ended with {process.returncode}')
    time.sleep(0.02)
  seconds = time.perf_counter() - start
  process.send_signal(signal.SIGTERM)
  process.wait()
  return seconds


def compilation(rounds: int) -> list[Row]:
  """Times the compilation of updates, by number of layers and of shapes."""
  del rounds
  works = [
    *(
      ('stacked', finder, depth)
      for finder in ('svd', 'power')
      for depth in DEPTHS
    ),
    *(('separate', finder, depth) for finder in FINDERS for depth in DEPTHS),
    *(('shapes', 'power', count) for count in ('1', '2', '4', '8', '16')),
  ]
  rows = []
  for kind, finder, count in works:
    worker = Worker(OURS, f'compile_{kind}', finder, count)
    times = worker.time(2)
    worker.end()
    rows.append({'name': f'{kind}, {finder}, {count}', **spread(times)})
  return rows


def staggered(rounds: int) -> list[Row]:
  """Times all steps of two gaps, whose refreshes are spread over the steps."""
  del rounds
  # 'svd' is the slowest finder.
  worker = Worker(OURS, 'staggered_step', 'svd', '60m')
  times = worker.time(2 * ours.STAGGERED_GAP)
  worker.end()
  # The minimum over both gaps ignores random pauses of the machine, but not the
  # refreshes, which recur at the same step of each gap.
  slowest = float(np.max(np.min(np.reshape(times, (2, -1)), axis=0)))
  median = float(np.median(times))
  row = {'median': median, 'slowest': slowest, 'ratio': slowest / median}
  return [{'name': 'Staggered, svd', **row}]


SECTIONS = {
  'rates': rates,
  'updates': updates,
  'steps': steps,
  '130m': larger,
  'refreshes': refreshes,
  'first': first,
  'program': program,
  'staggered': staggered,
  'compilation': compilation,
}


if __name__ == '__main__':
  main()
