"""Counts the bytes that each part of a config's training step takes.

`make_plan` compiles the step that `train.pretrain` runs and reads the sizes
from the compiler. An estimate adds up sizes of shapes without a compiler.
"""

import dataclasses
import math
from typing import Any

import jax

import galore_optax
from galore_optax.memory import Row
from train.config import Config, WholeTree
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib
from train.engine.command import check_least
from train.engine.machine import MEMORY_SHARE
from train.engine.step import State
from train.engine.task import Batch, Task, task_of
from train.plan import cards as cards_lib
from train.plan.account import account
from train.plan.cards import GPUS

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Cards:
  """The GPUs that a step is planned for."""

  device: str
  """Short name of the GPU, a key of `train.plan.cards.GPUS`."""
  devices: int | None = None
  """Number of GPUs that share the state by FSDP; None uses the config's
  mesh."""
  estimate: bool = False
  """Whether to estimate without the compiler."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """The memory that a training step takes on each device, by part."""

  config: str
  """Path of the config."""
  method: str
  """Name of the optimizer."""
  device: str
  """Short name of the GPU."""
  devices: int
  """Number of GPUs that share the step."""
  batch_size: int
  """Rows in an update, on all devices together."""
  sequence_length: int | None
  """Tokens in a row; None if the data have no tokens."""
  batch: str
  """The shape of a batch as text, such as '16 x 256 tokens'."""
  attention: str
  """'cudnn', 'blockwise' or 'none'. cuDNN's kernel may allocate a workspace
  that the plan does not include."""
  parameter_bytes: int
  """Weights except embeddings and head."""
  vocabulary_bytes: int
  """Embeddings and head."""
  basis_bytes: int
  """Bases of the projections."""
  moment_bytes: int
  """Moments and counters of the optimizer, and the average of the weights."""
  gradient_bytes: int
  """Gradients that exist at the same time. In a layer-wise update these are the
  largest one and the sums that accumulate gradients."""
  activation_bytes: int
  """Inputs of the layers, kept for the backward pass."""
  workspace_bytes: int
  """Allowance for memory that linear algebra solvers allocate while they
  run."""
  capacity_bytes: int
  """The GPU's memory that programs may use."""
  total_bytes: int
  """Peak memory, workspace included. An estimate has no temporaries, so it is a
  lower bound."""
  fits: bool | None
  """Whether the total is at most the capacity. None means unknown: an estimate
  is a lower bound, so it cannot prove that a plan fits."""
  compiled: cards_lib.Compiled | None
  """Sizes from the compiler; None for an estimate."""

  @property
  def state_bytes(self) -> int:
    """Bytes of weights and optimizer state."""
    weights = self.parameter_bytes + self.vocabulary_bytes
    return weights + self.basis_bytes + self.moment_bytes

  @property
  def parts(self) -> dict[str, int]:
    """Bytes of each part of the total. An estimate has no other temporaries."""
    gradients = self.gradient_bytes
    activations = self.activation_bytes
    temporaries = self.total_bytes - self.workspace_bytes - self.state_bytes
    if self.compiled is not None:
      # XLA may free some gradients before it computes the others.
      activations = min(activations, temporaries)
      gradients = min(gradients, temporaries - activations)
    return {
      'parameters': self.parameter_bytes,
      'embeddings and head': self.vocabulary_bytes,
      'bases': self.basis_bytes,
      'moments': self.moment_bytes,
      'gradients': gradients,
      'activations kept': activations,
      'other temporaries': temporaries - gradients - activations,
      'run-time workspace (allowance)': self.workspace_bytes,
    }

  def to_json(self) -> dict[str, Any]:
    """Returns a flat dict of the fields, including those of `compiled`."""
    plan = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name != 'compiled'
    }
    if self.compiled is None:
      return (
        dict.fromkeys(cards_lib.Compiled._fields) | plan | {'estimate': True}
      )
    compiled = self.compiled._asdict()
    for name in ('buffers', 'collectives'):
      compiled[name] = [row._asdict() for row in compiled[name]]
    return plan | {'estimate': False} | compiled


@cards_lib.cudnn()
def make_plan(
  config: Config, cards: Cards, *, path: str = '', method: str = ''
) -> Plan:
  """Returns the plan of a config, compiled unless `cards.estimate` is set.

  Args:
    config: the training config.
    cards: the GPUs to plan for.
    path: path of the config, for the printed tables.
    method: name of the optimizer; the default is its class's name.
  """
  config = on_card(shared(config, cards))
  task = task_of(config)
  mesh = mesh_lib.absent(config.mesh)
  if not cards.estimate:
    mesh = mesh_of(config, cards)
  step, state, inputs = placed_step(config, task, mesh)
  compiled = None
  if not cards.estimate:
    compiled = cards_lib.compile_step(step, state, inputs)
  sums = account(part(state.params), part(state.optimizer))
  average = sum(map(_size, jax.tree.leaves(part(state.average))))
  gradients = gradient_bytes(config, task, state, mesh)
  activations = activation_bytes(config, inputs)
  workspace = workspace_bytes(config, task)
  total = sums.total + average + gradients + activations
  if compiled:
    total = compiled.total_bytes
  total += workspace
  capacity = int(MEMORY_SHARE * GPUS[cards.device].memory_bytes)
  return Plan(
    config=path,
    method=method or type(config.optimizer).__name__,
    device=cards.device,
    devices=config.mesh.size,
    batch_size=config.batch_size,
    sequence_length=task.length,
    batch=task.describe_batch(),
    attention=config.resolved_model.attention_kind,
    parameter_bytes=sums.parameters,
    vocabulary_bytes=sums.vocabulary,
    basis_bytes=sums.bases,
    moment_bytes=sums.moments + sums.counters + average,
    gradient_bytes=gradients,
    activation_bytes=activations,
    workspace_bytes=workspace,
    capacity_bytes=capacity,
    total_bytes=total,
    fits=None if cards.estimate and total <= capacity else total <= capacity,
    compiled=compiled,
  )


def shared(config: Config, cards: Cards) -> Config:
  """Returns the config with a mesh of `cards.devices` devices.

  Raises:
    ValueError: the config's mesh has another number of devices, or the devices
      cannot share a batch.
  """
  if cards.devices is None:
    return config
  check_least(1, devices=cards.devices)
  if config.mesh.size not in (1, cards.devices):
    raise ValueError(
      f'--devices must be {config.mesh.size}, as the mesh '
      f'{mesh_lib.described(config.mesh)} has them, got {cards.devices}: leave '
      'one of the two out'
    )
  if config.mesh.size == 1:
    mesh = mesh_lib.Mesh(fsdp=cards.devices)
    config = dataclasses.replace(config, mesh=mesh)
  return config


def on_card(config: Config) -> Config:
  """Returns the config with attention 'auto' resolved as on a GPU.

  Call it, and trace the step of the returned config, inside `cards.cudnn()`.
  """
  model = config.resolved_model.on_gpu(task_of(config).inputs())
  return dataclasses.replace(config, model=model)


def mesh_of(config: Config, cards: Cards) -> jax.sharding.Mesh:
  """Returns a mesh of absent GPUs, to compile for.

  Raises:
    ImportError: the compiler is not installed.
  """
  try:
    return cards_lib.topology_mesh(GPUS[cards.device], config.mesh)
  except RuntimeError as error:
    raise ImportError(f'{error}; --estimate needs none') from error


def placed_step(
  config: Config, task: Task, mesh: Any
) -> tuple[step_lib.Step, State, PyTree]:
  """Returns the jitted step and its abstract state and batch, on a mesh."""
  init, step = step_lib.build(config, task)
  places = step_lib.shardings(init, config, task, mesh)
  state = mesh_lib.at(jax.eval_shape(init, jax.random.key(0)), places)
  inputs = task.inputs()
  rows = jax.tree.map(lambda _: mesh_lib.of_batch(mesh), inputs)
  step = step_lib.placed(step, mesh, places)
  return step, state, mesh_lib.at(inputs, rows)


def part(tree: PyTree) -> PyTree:
  """Returns the shapes that each device holds of sharded arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype),
    tree,
  )


def gradient_bytes(config: Config, task: Task, state: State, mesh: Any) -> int:
  """Returns the bytes of the gradients that exist at once, and of their sums.

  A layer-wise update has the gradients of one layer at a time, or the gradient
  of one weight outside the stack. The sums are those of a layer-wise update
  that accumulates gradients.
  """
  moving, _ = step_lib.split_trained(task.shapes, task.trained)
  placed = mesh_lib.at(moving, mesh_lib.of_params(moving, mesh))
  tree = part(placed)
  if isinstance(config.update, WholeTree):
    return sum(map(_size, jax.tree.leaves(tree)))
  update = step_lib.make_layerwise(config, task)
  params, _ = step_lib.split_trained(state.params, task.trained)
  sums = jax.eval_shape(update.sums, params, state.optimizer)
  layer = sum(_size(x) // x.shape[0] for x in jax.tree.leaves(tree['blocks']))
  outside = {name: x for name, x in tree.items() if name != 'blocks'}
  largest = max([layer, *map(_size, jax.tree.leaves(outside))])
  # The sums are sharded as the moments are, over the axes fsdp and tensor.
  shards = config.mesh.fsdp * config.mesh.tensor
  return largest + sum(map(_size, sums)) // shards


def _size(x: Any) -> int:
  """Returns the bytes of an array, or of a shape."""
  return x.size * x.dtype.itemsize


def activation_bytes(config: Config, inputs: Batch) -> int:
  """Returns the bytes of the layers' inputs in one backward pass of a device.

  Args:
    config: the training config.
    inputs: the shapes of a batch.
  """
  parts = config.update.accumulate * config.mesh.data * config.mesh.fsdp
  if isinstance(config.update, WholeTree):
    parts *= config.microbatches

  def of_device(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    rows, *others = x.shape
    return jax.ShapeDtypeStruct((rows // parts, *others), x.dtype)

  return config.resolved_model.kept_bytes(jax.tree.map(of_device, inputs))


def workspace_bytes(config: Config, task: Task) -> int:
  """Returns an allowance for the solver that refreshes a basis.

  XLA's buffer assignment does not include this workspace. The sizes are those
  of float32 arrays for the largest projected matrix, m x n with m <= n: `svd`
  and `gram` use copies and vectors of size m x m, and `randomized` uses thin
  matrices. `power` consists of matmuls and needs no workspace.
  """
  finder = getattr(config.optimizer, 'subspace', None)
  if finder not in ('svd', 'gram', 'randomized'):
    return 0
  moving, _ = step_lib.split_trained(task.shapes, task.trained)
  rows = galore_optax.describe(config.transformation(), moving)
  found = [_floats(finder, row) for row in rows if row.projected_shape]
  return 4 * max(found, default=0)


def _floats(finder: str, row: Row) -> int:
  """Returns the number of floats in the workspace of a solver.

  Args:
    finder: name of the solver.
    row: a projected weight.
  """
  assert row.projected_shape is not None
  *batch, _, long = row.projected_shape
  size = math.prod(row.shape) // math.prod(batch)
  # If both sides are projected, the projected shape has neither of them.
  n = long if long in row.shape else row.shape[-1]
  m, n = sorted((n, size // n))
  return {
    'svd': 2 * m * n + 3 * m * m,
    'gram': 3 * m * m,
    'randomized': m * n,
  }[finder]
