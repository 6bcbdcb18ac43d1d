"""Measures time and memory of steps and updates on the GPU of this machine.

`python -m tests.bench.card` compiles all JAX rows, several at a time. Then it
measures the rows one after the other, each in its own process, and adds each
result to tests/bench/results/card.json. The PyTorch rows need the packages
torch, transformers, galore-torch and bitsandbytes. `--small` measures tiny rows
on any device and only prints the results.

`.venv-plan/bin/python -m tests.bench.card --page` writes card.md, which
compares each JAX row with the estimates of `train.plan`. This needs JAX's
compiler for GPUs (`make plan` installs it), but not a GPU.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import fcntl
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from train.plan.__main__ import main as plan
from train.plan.cards import GPUS

RESULTS = pathlib.Path(__file__).parents[1] / 'results'
OURS, THEIRS = 'tests.bench.card.ours', 'tests.bench.card.theirs'
Row: TypeAlias = dict[str, Any]

LOW = ('--optimizer.rank', '1024', '--optimizer.gap', '500')
POWER = ('--optimizer.subspace', 'power')
FLOAT32 = ('--model.param-dtype', 'float32', '--update.weights', 'arrays')
AT_ONCE = 5
"""Number of processes that compile at the same time."""
SIZES = {'half of 7B': '16', 'one layer of 7B': '1'}


def step(path: str, *argv: str) -> tuple[str, ...]:
  """Returns the command that measures a full training step of a config."""
  return (OURS, 'step', path, *argv)


def update(layers: str, *argv: str) -> tuple[str, ...]:
  """Returns the command that measures an update of some layers of LLaMA-7B."""
  options = ('--model.num-layers', layers, '--clip-norm', 'None')
  return (OURS, 'update', 'configs/llama_7b.py', *options, *argv)


def their_update(optimizer: str, dtype: str) -> tuple[str, ...]:
  """Returns the command that measures PyTorch's update of one layer of 7B."""
  options = (dtype, SIZES['one layer of 7B'])
  return (THEIRS, 'update', optimizer, 'configs/llama_7b.py', *options)


def updates() -> dict[str, tuple[str, ...]]:
  """Returns the workloads of the JAX updates, by row name."""
  found = {}
  for size, layers in SIZES.items():
    for name, argv in {
      'AdamW': (),
      'Galore': (*LOW, *POWER),
      'Galore8bit': (*LOW, *POWER),
    }.items():
      named = ('--optimizer', name, *argv)
      found[f'update of {size}, {name}, float32'] = update(
        layers, *named, *FLOAT32
      )
      found[f'update of {size}, {name}'] = update(layers, *named)
  layers = SIZES['one layer of 7B']
  for finder in ('svd', 'gram', 'randomized'):
    argv = ('--optimizer', 'Galore', *LOW, '--optimizer.subspace', finder)
    found[f'update of one layer of 7B, Galore {finder}'] = update(layers, *argv)
  return found


M60 = 'configs/llama_60m.py'
ROWS = {
  'rates': (OURS, 'rates'),
  'step of 60M': step(M60),
  'step of 60M, AdamW': step(M60, '--optimizer', 'AdamW'),
  'step of 60M, 8-bit': step(
    M60, '--optimizer', 'Galore8bit', '--optimizer.rank', '128'
  ),
  'step of 1B, power': step('configs/llama_1b.py', *POWER),
  'step of 7B, batch 2': step('configs/llama_7b.py', '--batch-size', '2'),
  'step of 7B': step('configs/llama_7b.py'),
  'step of 7B, 16 GB': step('configs/llama_7b_16gb.py'),
  'step of 60M, PyTorch AdamW': (THEIRS, 'step', 'AdamW', M60),
  'step of 60M, galore-torch': (THEIRS, 'step', 'GaLore', M60),
  'step of 60M, galore-torch 8-bit': (THEIRS, 'step', '8-bit GaLore', M60),
  **updates(),
  **{
    f'update of one layer of 7B, {name}': their_update(kind, dtype)
    for name, kind, dtype in (
      ('PyTorch AdamW, float32', 'AdamW', 'float32'),
      ('galore-torch, float32', 'GaLore', 'float32'),
      ('galore-torch 8-bit', '8-bit GaLore', 'bfloat16'),
    )
  },
}
RATES = ('bandwidth', 'bfloat16', 'float32 as it is', 'float32, highest')
STEP_HEADS = (
  'step of',
  'tokens/s',
  's',
  'least, s',
  'kernels',
  'first, s',
  'peak, GiB',
  'plan, GiB',
  'note',
)
UPDATE_HEADS = (
  'update of',
  'ms',
  'least, ms',
  'kernels',
  'first, s',
  'peak, GiB',
  'note',
)
TINY = (
  '--batch-size',
  '2',
  '--sequence-length',
  '32',
  '--model.vocab-size',
  '256',
  '--model.width',
  '64',
  '--model.mlp-width',
  '160',
  '--model.num-layers',
  '2',
)
SMALL = {
  'small step': step('configs/quickstart.py', *TINY, '--optimizer.rank', '16'),
  'small update': (
    OURS,
    'update',
    'configs/quickstart.py',
    *TINY,
    '--optimizer.rank',
    '16',
  ),
  'no such config': step('configs/none.py'),
}


def compile_all(rows: Mapping[str, Sequence[str]], cache: str) -> None:
  """Fills JAX's compilation cache with the programs of the JAX rows.

  Separate processes compile, because XLA times kernels on the GPU while it
  compiles and does not free the memory afterwards.
  """
  ours = [x for x in rows.values() if x[0] != THEIRS]
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    list(pool.map(lambda x: child('compile', x, 1, cache), ours))


def measure_all(
  rows: Mapping[str, Sequence[str]], steps: int, cache: str
) -> Iterator[tuple[str, Row]]:
  """Yields names and results of rows.

  While one process measures, the next one starts and waits for the GPU.
  """
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = pool.map(lambda x: measure(x, steps, cache), rows.values())
    yield from zip(rows, found, strict=True)


def measure(workload: Sequence[str], steps: int, cache: str) -> Row:
  """Returns the result of a row, or the end of its error output."""
  done = child('measure', workload, steps, cache)
  lines = done.stdout.splitlines()
  failed = {'failed': done.stderr[-1500:]}
  row = failed if done.returncode else json.loads(lines[-1])
  today = f'{datetime.date.today():%d %B %Y}'
  return row | {'date': today, 'workload': [*workload]}


def child(
  what: str, workload: Sequence[str], steps: int, cache: str
) -> subprocess.CompletedProcess:
  """Compiles or measures a row in a new process (`what` selects)."""
  module, function, *argv = workload
  command = [module, function, str(steps), *argv]
  return subprocess.run(
    [sys.executable, '-m', 'tests.bench.card', '--child', what, *command],
    capture_output=True,
    check=False,
    text=True,
    env=os.environ
    | {
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      # Allocate memory only when it is needed, so that the peak is the
      # program's own.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    },
  )


def in_child(what: str, module: str, function: str, *argv: str) -> None:
  """Compiles a workload; to measure it, waits for the GPU and prints a result.

  This is the entry point of the processes that `child` starts.
  """
  workload = getattr(importlib.import_module(module), function)(*argv)
  next(workload)
  if what == 'compile':
    return
  with open(f'{os.environ["JAX_COMPILATION_CACHE_DIR"]}/turn', 'w') as turn:
    fcntl.flock(turn, fcntl.LOCK_EX)
    print(json.dumps(next(workload)))


def planned(row: Row, *options: str) -> Row | None:
  """Returns the output of `train.plan` for a JAX row and its GPU, if known."""
  module, function, *argv = row['workload']
  known = {gpu.name: key for key, gpu in GPUS.items()}
  if module != OURS or function == 'rates' or row.get('device') not in known:
    return None
  device = known[row['device']]
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    plan([*argv, '--json', '--device', device, *options])
  return json.loads(out.getvalue()) | {'short': device}


def gib(size: int | None) -> str:
  """Returns a number of bytes as text in GiB, or '-' for None."""
  return '-' if size is None else f'{size / 2**30:.2f}'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table."""
  lines = [heads, ['---'] * len(heads), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def bill(row: Row) -> Row | None:
  """Returns the estimated cost of a row's program; 'least' is in seconds."""
  made = planned(row, '--cost')
  if made is None:
    return None
  cost = made[row['workload'][1]]
  return cost | {'least': cost[f'estimate_{made["short"]}']}


def step_row(name: str, row: Row) -> list[str]:
  """Returns the table cells of a training step."""
  memory, cost = planned(row), bill(row)
  total = None
  if memory is not None:
    total = memory['total_bytes'] - memory['workspace_bytes']
  return [
    name.removeprefix('step of '),
    f'{row["tokens"] / row["seconds"]:,.0f}',
    f'{row["seconds"]:.3f}',
    f'{cost["least"]:.3f}' if cost else '-',
    f'{cost["launches"]:,}' if cost else '-',
    f'{row["first"]:.1f}',
    gib(row['peak_bytes']),
    gib(total),
    row.get('note', ''),
  ]


def update_row(name: str, row: Row) -> list[str]:
  """Returns the table cells of an update."""
  cost = bill(row)
  return [
    name.removeprefix('update of '),
    f'{1e3 * row["seconds"]:.2f}',
    f'{1e3 * cost["least"]:.2f}' if cost else '-',
    f'{cost["launches"]:,}' if cost else '-',
    f'{row["first"]:.2f}',
    gib(row['peak_bytes']),
    row.get('note', ''),
  ]


def page(found: Mapping[str, Row]) -> str:
  """Returns the results page in Markdown, with measured and planned values."""
  done = {k: x for k, x in found.items() if 'failed' not in x}
  kinds = {
    kind: {k: x for k, x in done.items() if x['workload'][1] == kind}
    for kind in ('rates', 'step', 'update')
  }

  def known(key: str) -> str:
    return '; '.join(dict.fromkeys(x[key] for x in done.values()))

  text = [
    f'# Measurements on a GPU\n\n{known("device")}; {known("software")}; '
    f'{known("date")}.\nBy `python -m tests.bench.card`, with made-up tokens '
    'and weights. *Least* is the\nestimate of `train.plan --cost`, from the '
    "GPU's public figures and without the\noverhead of kernel launches. *Plan* "
    "is the memory by `train.plan`, without its\nallowance for a solver's "
    f'workspace (jax {jax.__version__}). *First* is the first step or\nupdate, '
    'which contains the first refresh.\n',
  ]
  for row in kinds['rates'].values():
    moved, *flops = (f'{row[k] / 1e12:.3g}' for k in RATES)
    text.append(
      f'The GPU moves {moved} TB/s. It multiplies at {flops[0]} TFLOP/s in '
      f'bfloat16,\nat {flops[1]} in float32 with the default precision of JAX, '
      f'and at {flops[2]} with the\nhighest precision.\n'
    )
  text += [
    table(STEP_HEADS, [step_row(*x) for x in kinds['step'].items()]),
    table(UPDATE_HEADS, [update_row(*x) for x in kinds['update'].items()]),
  ]
  return '\n'.join(text)


def main(argv: Sequence[str] | None = None) -> None:
  """Measures rows, or writes the page of the results."""
  parser = argparse.ArgumentParser('python -m tests.bench.card')
  parser.add_argument(
    '--small', action='store_true', help='measure tiny rows, on any device'
  )
  parser.add_argument('--page', action='store_true', help='write card.md')
  parser.add_argument(
    '--only', nargs='+', help='measure rows whose names start with one of these'
  )
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  parser.add_argument('--steps', type=int, default=12)
  parser.add_argument('--child', nargs=argparse.REMAINDER)
  args = parser.parse_args(argv)
  if args.child:
    in_child(*args.child)
    return
  file = args.results / 'card.json'
  found = {} if args.small else read(file)
  if args.page:
    (args.results / 'card.md').write_text(page(found))
    return
  wanted = {
    name: row
    for name, row in (SMALL if args.small else ROWS).items()
    if args.only is None or name.startswith(tuple(args.only))
  }
  if not wanted:
    parser.error(f'no row starts with {args.only}; the rows are {[*ROWS]}')
  with tempfile.TemporaryDirectory() as cache:
    compile_all(wanted, cache)
    for name, row in measure_all(wanted, args.steps, cache):
      found[name] = row
      print(name, json.dumps(row), flush=True)
      if not args.small:
        file.write_text(json.dumps(found, indent=1) + '\n')


def read(file: pathlib.Path) -> dict[str, Row]:
  """Returns the earlier results of a file, if it exists."""
  return json.loads(file.read_text()) if file.exists() else {}


if __name__ == '__main__':
  main()
