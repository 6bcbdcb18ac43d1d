"""Computes the memory and the communication of each device of a mesh.

`python -m tests.bench.scaling` simulates a mesh with devices of the CPU. It
computes from shapes how many bytes of weights and optimizer state each device
holds, with FSDP and with data parallelism only. From the compiled program it
counts the bytes that collectives return in a step, with and without a refresh.
The table is written to tests/bench/results/scaling.md.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from models.llama import LlamaConfig
from train.config import Config
from train.data.corpus import Chitchat
from train.engine import mesh as mesh_lib
from train.engine.mesh import Mesh
from train.engine.task import task_of
from train.method import AdamW, Apollo, Galore, Galore8bit
from train.plan import program
from train.plan.account import account
from train.plan.footprint import part, placed_step

RESULTS = pathlib.Path(__file__).parent / 'results'

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)


class Row(NamedTuple):
  """One method on one mesh, in bytes per device."""

  method: str
  axis: str
  """Mesh axis that has all devices."""
  devices: int
  """Number of devices."""
  weights: int
  state: int
  step: int | None = None
  """Bytes that collectives return in a step without a refresh."""
  refresh: int | None = None
  """Bytes that collectives return in a step with a refresh."""


def configs(width: int, num_layers: int) -> dict[str, Config]:
  """Returns a config for each method, with a rank of a quarter of the width."""
  model = LlamaConfig(
    vocab_size=8 * width,
    width=width,
    mlp_width=3 * width,
    num_heads=8,
    num_layers=num_layers,
  )
  rank = width // 4
  methods = {
    'AdamW': AdamW(),
    'GaLore': Galore(rank=rank, subspace='power'),
    '8-bit GaLore': Galore8bit(rank=rank, subspace='power'),
    'APOLLO': Apollo(rank=rank),
  }
  return {
    name: Config(
      model=model,
      corpus=Chitchat(),
      optimizer=optimizer,
      steps=1000,
      learning_rate=1e-3,
      batch_size=16,
      sequence_length=64,
      # Clipping by the norm would need the whole gradients on every device.
      clip_norm=None,
    )
    for name, optimizer in methods.items()
  }


def measured(
  name: str, config: Config, axis: str, devices: int, *, compiles: bool
) -> Row:
  """Returns the bytes of a device; those of collectives only if `compiles`."""
  config = dataclasses.replace(config, mesh=Mesh(**{axis: devices}))
  mesh = mesh_lib.devices(config.mesh)
  step, state, batch = placed_step(config, task_of(config), mesh)
  held = account(part(state.params), part(state.optimizer))
  row = Row(name, axis, devices, held.weights, held.state)
  if not compiles:
    return row
  text = step.lower(state, batch).compile().as_text()
  return row._replace(step=sent(text, min), refresh=sent(text, max))


def sent(text: str, choose: Callable) -> int:
  """Returns the bytes that the collectives of a program return.

  A collective in a loop is counted once for each iteration.

  Args:
    text: the compiled program's HLO.
    choose: `min` takes the branch of each conditional that moves fewer bytes,
      which is a step without a refresh; `max` gives a step with a refresh.
  """
  return sum(
    kernel.times * program.size(kernel.shape)
    for kernel in program.kernels(text, choose=choose)
    if kernel.op in COLLECTIVES
  )


def written(rows: Sequence[Row], width: int, num_layers: int) -> str:
  """Returns the results page in Markdown."""

  def kib(size: int | None) -> str:
    return '-' if size is None else f'{size / 2**10:,.0f}'

  lines = [
    '# Memory and communication on several devices\n',
    f'By `python -m tests.bench.scaling`: a LLaMA with width {width}, MLP '
    f'width {3 * width}, {num_layers} layers and a vocabulary of {8 * width} '
    'tokens, in float32; batches of 16 sequences of 64 tokens; rank '
    f'{width // 4} with `power`; no clipping. The mesh has devices of the CPU. '
    '`fsdp` shards weights, optimizer state and batch; `data` shards only the '
    'batch. All figures are in KiB per device. Weights and state are computed '
    'from shapes. The last two columns are the results of the collectives in '
    f'the compiled program (jax {jax.__version__}), in a step without and with '
    'a refresh (-: not compiled).\n',
    '| method | mesh | weights | state | collectives | with a refresh |',
    '|---|---|---:|---:|---:|---:|',
    *(
      f'| {x.method} | {x.axis} {x.devices} | {kib(x.weights)} | '
      f'{kib(x.state)} | {kib(x.step)} | {kib(x.refresh)} |'
      for x in rows
    ),
  ]
  return '\n'.join(lines) + '\n'


def main(argv: Sequence[str] | None = None) -> None:
  """Computes all rows and writes the page."""
  options = argparse.ArgumentParser('python -m tests.bench.scaling')
  options.add_argument('--width', type=int, default=256)
  options.add_argument('--layers', type=int, default=2)
  options.add_argument('--devices', type=int, nargs='+', default=[1, 2, 4, 8])
  options.add_argument(
    '--compiled',
    type=int,
    nargs='+',
    help='numbers of devices to compile programs for (default: all)',
  )
  args = options.parse_args(argv)
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(args.devices))
  compiled = args.compiled or args.devices
  rows = []
  for name, config in configs(args.width, args.layers).items():
    for axis in ('fsdp', 'data'):
      for devices in args.devices:
        compiles = devices in compiled
        row = measured(name, config, axis, devices, compiles=compiles)
        print(row, flush=True)
        rows.append(row)
  text = written(rows, args.width, args.layers)
  (RESULTS / 'scaling.md').write_text(text)


if __name__ == '__main__':
  main()
