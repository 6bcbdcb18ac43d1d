"""Plans a run: what a training step needs on a GPU that is not there.

`python -m train.plan configs/llama_7b.py --device rtx4090` compiles the step
that `train.pretrain` runs for that config and prints where its bytes go.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich import box
from rich.console import Console
from rich.table import Table

from galore_optax import device, memory
from galore_optax.gpus import GPUS, Gpu
from models.llama import Layers, LlamaConfig
from train import step as step_lib
from train.command import load, user_errors
from train.config import Config
from train.optimizer import Adam8bit, AdamW, Galore, Galore8bit, Lomo
from train.update import Layerwise, WholeTree

PyTree = Any
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where the bytes of one device go."""

  config: str
  """Path of the config."""
  device: str
  """Short name of the card."""
  devices: int
  """How many of them."""
  batch_size: int
  """Sequences in an update."""
  sequence_length: int
  """Tokens in a sequence."""
  parameter_bytes: int
  """Weights but for embeddings and head."""
  vocabulary_bytes: int
  """Embeddings and head."""
  basis_bytes: int
  """Bases of the projections."""
  moment_bytes: int
  """What the optimizer keeps of gradients, and its counters."""
  gradient_bytes: int
  """Gradients that exist at once: all, or the largest one."""
  activation_bytes: int
  """Inputs of the blocks, kept for the backward pass."""
  workspace_bytes: int
  """Allowance for what solvers allocate while they run."""
  capacity_bytes: int
  """Memory of the card."""
  total_bytes: int
  """Peak, workspace included; without a compiler, what is certain."""
  fits: bool
  """Whether the total is at most the capacity."""
  compiled: device.Compiled | None
  """What the compiler says; None for an estimate."""

  def to_json(self) -> dict[str, Any]:
    """Returns a flat dict."""
    plan = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != 'compiled'
    }
    if self.compiled is None:
      return plan | {'estimate': True}
    compiled = self.compiled._asdict()
    for name in ('buffers', 'collectives'):
      compiled[name] = [row._asdict() for row in compiled[name]]
    return plan | {'estimate': False} | compiled


def main(argv: Sequence[str] | None = None) -> int:
  """Prints a plan; returns the exit code."""
  args = parser().parse_args(argv)
  # The plan needs no accelerator, and must not wait for one.
  jax.config.update('jax_platforms', 'cpu')
  with user_errors():
    config = sized(load(args.config), args)
    gpu = GPUS[args.device]
    if args.plot:
      plot(config, gpu, args.plot)
      return 0
    plan = make_plan(config, args, gpu)
  if args.json:
    print(json.dumps(plan.to_json()))
  else:
    show(plan, gpu, Console())
  return 0


def parser() -> argparse.ArgumentParser:
  """Returns the command line's parser."""
  parser = argparse.ArgumentParser(
    'python -m train.plan', description='Plans the memory of a training step.'
  )
  parser.add_argument('config', help='such as configs/llama_7b.py')
  parser.add_argument('--device', choices=sorted(GPUS), default='rtx4090')
  parser.add_argument(
    '--devices', type=int, default=1, help='number of cards (default 1)'
  )
  parser.add_argument('--batch-size', type=int, help='default: the config')
  parser.add_argument('--sequence-length', type=int, help='likewise')
  parser.add_argument('--json', action='store_true', help='print one object')
  parser.add_argument(
    '--estimate', action='store_true', help='byte arithmetic, no compiler'
  )
  parser.add_argument(
    '--plot', type=pathlib.Path, help='write a bar for each method to a file'
  )
  return parser


def sized(config: Config, args: argparse.Namespace) -> Config:
  """Returns the config with the batch that is asked for."""
  if args.devices < 1:
    raise ValueError(f'--devices must be at least 1, got {args.devices}')
  sizes = {
    name: getattr(args, name)
    for name in ('batch_size', 'sequence_length')
    if getattr(args, name) is not None
  }
  config = dataclasses.replace(config, **sizes)
  if config.batch_size % args.devices:
    raise ValueError(
      f'the batch size must be a multiple of --devices {args.devices}, got '
      f'{config.batch_size}'
    )
  return config


def make_plan(config: Config, args: argparse.Namespace, gpu: Gpu) -> Plan:
  """Returns the plan of a config, compiled unless an estimate is wanted."""
  init, step = step_lib.build(config)
  state = jax.eval_shape(init, jax.random.key(0))
  compiled = None
  if not args.estimate:
    compiled = compile_for(config, step, state, gpu, args.devices)
  account = memory.account(state.params, state.optimizer)
  gradients = gradient_bytes(config, state.params)
  activations = activation_bytes(config)
  workspace = workspace_bytes(config)
  total = account.total + gradients + activations
  if compiled:
    total = compiled.total_bytes
  total += workspace
  return Plan(
    config=args.config,
    device=args.device,
    devices=args.devices,
    batch_size=config.batch_size,
    sequence_length=config.sequence_length,
    parameter_bytes=account.parameters,
    vocabulary_bytes=account.vocabulary,
    basis_bytes=account.bases,
    moment_bytes=account.moments + account.counters,
    gradient_bytes=gradients,
    activation_bytes=activations,
    workspace_bytes=workspace,
    capacity_bytes=gpu.memory_bytes,
    total_bytes=total,
    fits=total <= gpu.memory_bytes,
    compiled=compiled,
  )


def compile_for(
  config: Config, step: Any, state: PyTree, gpu: Gpu, devices: int
) -> device.Compiled:
  """Compiles a step for cards that are not there."""
  try:
    mesh = device.topology_mesh(gpu, devices=devices)
  except RuntimeError as error:
    raise ImportError(f'{error}; --estimate needs none') from error
  return device.compile_step(
    step,
    jax.tree.map(lambda x: placed(x, mesh), state),
    jax.tree.map(
      lambda x: placed(x, mesh, PartitionSpec('data')), batch(config)
    ),
  )


def placed(x: Any, mesh: Mesh, spec: PartitionSpec | None = None) -> Any:
  """Returns a shape on a mesh.

  Without a spec, the last axis that the devices divide is shared out, so that
  no layer axis and no small array is.
  """
  if spec is None:
    axes = [i for i, size in enumerate(x.shape) if size % mesh.size == 0]
    large = x.size >= 2**16 and axes
    spec = (
      PartitionSpec(*(None,) * axes[-1], 'data') if large else PartitionSpec()
    )
  sharding = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def batch(config: Config) -> PyTree:
  """Returns the shapes of a batch, as the data side makes it."""
  shape = (config.batch_size, config.sequence_length)
  names = ('inputs', 'targets', 'positions', 'segments')
  tokens = dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
  return tokens | {'weights': jax.ShapeDtypeStruct(shape, jnp.float32)}


def gradient_bytes(config: Config, params: PyTree) -> int:
  """Returns the bytes of the gradients that exist at the same time."""
  shapes = jax.eval_shape(Layers(config.model).init, jax.random.key(0))
  leaves = jax.tree.leaves(shapes)
  if isinstance(config.update, WholeTree):
    return sum(x.size * x.dtype.itemsize for x in leaves)
  per_layer = lambda x: x.size // (x.shape[0] if x.ndim == 3 else 1)
  return max(per_layer(x) * x.dtype.itemsize for x in leaves)


def activation_bytes(config: Config) -> int:
  """Returns the bytes of the inputs of the blocks."""
  tokens = config.batch_size * config.sequence_length
  if isinstance(config.update, WholeTree):
    tokens //= config.microbatches
  tokens //= config.update.accumulate
  model: LlamaConfig = config.model
  element = jnp.dtype(model.dtype).itemsize
  return model.num_layers * tokens * model.width * element


def workspace_bytes(config: Config) -> int:
  """Returns an allowance for the solver that finds a subspace.

  XLA's plan does not hold it. In float32, by the side m of the largest
  square: `svd` and `gram` work on copies and vectors of m x m, `randomized`
  on thin ones; `power` is made of products and needs none.
  """
  finder = getattr(config.optimizer, 'subspace', None)
  m, n = config.model.width, config.model.mlp_width
  floats = {
    'svd': 2 * m * n + 3 * m * m,
    'gram': 3 * m * m,
    'randomized': m * n,
  }
  return 4 * floats.get(finder, 0)


def show(plan: Plan, gpu: Gpu, console: Console) -> None:
  """Prints the tables of a plan."""
  where = gpu.name if plan.devices == 1 else f'{plan.devices} x {gpu.name}'
  table = Table(
    title=f'{plan.config}, {plan.batch_size} x {plan.sequence_length} tokens, '
    f'{where}',
    title_justify='left',
    box=box.SIMPLE_HEAD,
  )
  table.add_column('what')
  table.add_column('GiB', justify='right')
  for name, size in parts(plan).items():
    table.add_row(name, f'{size / GIB:.3f}')
  table.add_section()
  table.add_row('total', f'{plan.total_bytes / GIB:.3f}', style='bold')
  table.add_row('capacity', f'{plan.capacity_bytes / GIB:.3f}')
  table.add_row('fits', 'yes' if plan.fits else 'no', style='bold')
  console.print(table)
  if plan.compiled is None:
    console.print('estimate: exact for weights and state, no temporaries')
    return
  console.print('the largest temporaries:')
  for buffer in plan.compiled.buffers:
    shapes = ', '.join(buffer.shapes)
    console.print(f'{buffer.bytes / 2**20:9.1f} MiB  {shapes}', markup=False)
  for row in plan.compiled.collectives:
    console.print(
      f'{row.op} {row.shape}: {row.count} x {row.bytes:,} bytes', markup=False
    )


def parts(plan: Plan) -> dict[str, int]:
  """Returns the rows of the table, which add up to the total."""
  rows = {
    'parameters': plan.parameter_bytes,
    'embeddings and head': plan.vocabulary_bytes,
    'bases': plan.basis_bytes,
    'moments': plan.moment_bytes,
    'gradients': plan.gradient_bytes,
    'activations kept': plan.activation_bytes,
    'run-time workspace (allowance)': plan.workspace_bytes,
  }
  if plan.devices == 1 and plan.compiled is not None:
    rows['other temporaries'] = plan.total_bytes - sum(rows.values())
  return rows


def methods(config: Config) -> dict[str, Config]:
  """Returns the configs that Figure 1 of the paper compares."""
  rank, gap = 1024, 500
  if isinstance(config.optimizer, Galore | Galore8bit):
    rank, gap = config.optimizer.rank, config.optimizer.gap
  whole = WholeTree()
  low = Galore8bit(rank=rank, gap=gap)
  update = config.update
  layers = update if isinstance(update, Layerwise) else Layerwise(slices=32)
  kinds = {
    'AdamW': (AdamW(), whole),
    '8-bit Adam': (Adam8bit(), whole),
    'GaLore': (Galore(rank=rank, gap=gap, subspace='power'), whole),
    '8-bit GaLore': (low, whole),
    'layer-wise 8-bit GaLore': (low, layers),
    'LOMO': (Lomo(), layers),
  }
  return {
    name: dataclasses.replace(config, optimizer=optimizer, update=update)
    for name, (optimizer, update) in kinds.items()
  }


def plot(config: Config, gpu: Gpu, path: pathlib.Path) -> None:
  """Compiles the step of each method and draws where its bytes go."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  args = argparse.Namespace(config='', device='', devices=1, estimate=False)
  plans = {
    name: make_plan(one, args, gpu) for name, one in methods(config).items()
  }
  figure, axes = pyplot.subplots(figsize=(9, 5))
  below = dict.fromkeys(plans, 0.0)
  for part in parts(next(iter(plans.values()))):
    sizes = [max(0, parts(plan)[part]) / GIB for plan in plans.values()]
    axes.bar(list(plans), sizes, bottom=list(below.values()), label=part)
    below = {
      name: height + size
      for (name, height), size in zip(below.items(), sizes, strict=True)
    }
  axes.axhline(gpu.memory_bytes / GIB, color='black', linestyle='--')
  axes.set_ylabel('GiB')
  axes.set_title(f'{config.batch_size} x {config.sequence_length} tokens')
  axes.tick_params(axis='x', labelrotation=20)
  axes.legend()
  figure.tight_layout()
  figure.savefig(path)


if __name__ == '__main__':
  sys.exit(main())
