"""What steps take on the card that is here, beside what was planned.

`python -m tests.bench.card` runs the steps of the 60M, 1B and 7B configs on
made-up weights and tokens, each in a process of its own, as a peak of memory
never falls. It writes the real peak, the plan's total, the time of a step, of a
refresh and tokens per second to tests/bench/results/card.md. `--small` runs a
tiny step on whatever is here, and only prints.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train import step as step_lib
from train.command import parse
from train.config import Config
from train.plan.cards import GPUS
from train.plan.footprint import batch
from train.task import language_model

PAGE = pathlib.Path(__file__).parent / 'results' / 'card.md'

CASES = {
  '60M': ['configs/llama_60m.py'],
  '1B': ['configs/llama_1b.py'],
  '7B': ['configs/llama_7b.py', '--batch-size', '2'],
  '7B, 16 GB': ['configs/llama_7b_16gb.py'],
}
SMALL = {
  'small': [
    *('configs/quickstart.py', '--batch-size', '2', '--sequence-length', '32'),
    *('--model.vocab-size', '256', '--model.width', '64'),
    *('--model.mlp-width', '160', '--model.num-layers', '2'),
    *('--optimizer.rank', '16'),
  ]
}


class Measured(NamedTuple):
  """What one config took."""

  device: str  # as it calls itself
  peak_bytes: int | None  # None where the device does not count
  step_seconds: float  # median, between two refreshes
  refresh_seconds: float  # what the first step took longer
  tokens: int  # in a step


def measure(config: Config, steps: int) -> Measured:
  """Returns what a config takes on the first device."""
  init, step = step_lib.build(config, language_model(config))
  shapes = jax.eval_shape(init, jax.random.key(0))
  inputs = jax.tree.map(made_up, batch(config))
  # Compiled before anything is there, so that the peak is the step's own.
  step = step.lower(shapes, inputs).compile()
  state = jax.jit(lambda: filled(shapes))()
  seconds = []
  for _ in range(1 + steps):
    start = time.perf_counter()
    state, _metrics = jax.block_until_ready(step(state, inputs))
    seconds.append(time.perf_counter() - start)
  device = jax.devices()[0]
  usual = float(np.median(seconds[1:]))
  return Measured(
    device=device.device_kind,
    peak_bytes=(device.memory_stats() or {}).get('peak_bytes_in_use'),
    step_seconds=usual,
    refresh_seconds=seconds[0] - usual,
    tokens=config.batch_size * config.sequence_length,
  )


def filled(shapes: step_lib.State) -> step_lib.State:
  """Returns a state before the first update: waves for weights, else zeros.

  Real initial weights would need more memory for a moment than a step.
  """
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  wave = lambda x: jnp.cos(
    jax.lax.broadcasted_iota(jnp.float32, x.shape, x.ndim - 1)
  )
  weights = jax.tree.map(
    lambda x: (0.02 * wave(x)).astype(x.dtype), shapes.params
  )
  return zeros._replace(params=weights)


def made_up(x: jax.ShapeDtypeStruct) -> np.ndarray:
  """Returns an input of small numbers; as weights, ones."""
  if x.dtype == jnp.float32:
    return np.ones(x.shape, x.dtype)
  return np.resize(np.arange(x.shape[-1]), x.shape).astype(x.dtype) % 128


def measured(argv: Sequence[str], steps: int) -> Measured:
  """Measures in a process of its own."""
  options = ['--steps', str(steps), '--measure', *argv]
  command = [sys.executable, '-m', 'tests.bench.card', *options]
  run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  return Measured(**json.loads(run.stdout.splitlines()[-1]))


def planned_bytes(argv: Sequence[str], device: str) -> int | None:
  """Returns the plan's total; None for a card that it does not know."""
  known = {gpu.name: key for key, gpu in GPUS.items()}
  if device not in known:
    return None
  command = [sys.executable, '-m', 'train.plan', *argv, '--json']
  command += ['--device', known[device]]
  run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
  found: dict[str, Any] = json.loads(run.stdout)
  return found['total_bytes'] - found['workspace_bytes']


def gib(size: int | None) -> str:
  """Returns bytes in GiB, or '-'."""
  return '-' if size is None else f'{size / 2**30:.2f}'


def page(cases: dict[str, list[str]], steps: int) -> str:
  """Returns the table of all cases, measured now."""
  heads = ('step', 'peak, GiB', 'plan, GiB', 'step, s', 'refresh, s')
  rows = [(*heads, 'tokens/s', '`train.plan` or `train.pretrain`')]
  rows.append(('---',) * len(rows[0]))
  devices = set()
  for name, argv in cases.items():
    found = measured(argv, steps)
    devices.add(found.device)
    rows.append(
      (
        name,
        gib(found.peak_bytes),
        gib(planned_bytes(argv, found.device)),
        f'{found.step_seconds:.3f}',
        f'{found.refresh_seconds:.3f}',
        f'{found.tokens / found.step_seconds:,.0f}',
        f'`{" ".join(argv)}`',
      )
    )
  table = '\n'.join(f'| {" | ".join(row)} |' for row in rows)
  return (
    f'# Steps on a card\n\n{", ".join(sorted(devices))}, jax '
    f'{jax.__version__}: `python -m tests.bench.card`. Made-up weights and '
    'tokens; a\nstep is the median between two refreshes, a refresh what the '
    'first step took\nlonger; the plan is without its allowance for a solver.'
    f'\n\n{table}\n'
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, and writes the page."""
  parser = argparse.ArgumentParser('python -m tests.bench.card')
  parser.add_argument('--small', action='store_true')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--measure', nargs=argparse.REMAINDER)
  args = parser.parse_args(argv)
  if args.measure:
    config = parse(args.measure).config
    print(json.dumps(measure(config, args.steps)._asdict()))
    return
  found = page(SMALL if args.small else CASES, args.steps)
  print(found)
  if not args.small:
    PAGE.write_text(found)


if __name__ == '__main__':
  main()
