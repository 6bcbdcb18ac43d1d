"""Where the bytes of a config's training step go.

`make_plan` adds them up from shapes and, where a compiler is at hand, asks it
for the rest; the step is the one that `train.pretrain` runs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import attention
from train import mesh as mesh_lib
from train import step as step_lib
from train.command import check_least
from train.config import Config, WholeTree
from train.machine import MEMORY_SHARE
from train.plan import cards as cards_lib
from train.plan.account import account
from train.plan.cards import GPUS
from train.step import State
from train.task import Batch, Task, array_shapes, task_of

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Cards:
  """What a step is planned for."""

  device: str
  """Short name of the card."""
  devices: int | None = None
  """How many of them share the state by FSDP; None: the config's mesh."""
  estimate: bool = False
  """Whether to do without the compiler."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where the bytes of one device go."""

  config: str
  """Path of the config."""
  method: str
  """Name of the optimizer."""
  device: str
  """Short name of the card."""
  devices: int
  """How many of them share the step."""
  batch_size: int
  """Sequences in an update, on all devices."""
  sequence_length: int
  """Tokens in a sequence."""
  attention: str
  """'cudnn', whose kernel may take a workspace that the plan does not know, or
  'blockwise'."""
  parameter_bytes: int
  """Weights but for embeddings and head."""
  vocabulary_bytes: int
  """Embeddings and head."""
  basis_bytes: int
  """Bases of the projections."""
  moment_bytes: int
  """What the optimizer keeps of gradients, and its counters."""
  gradient_bytes: int
  """Gradients that exist at once: all, or the largest one and the sums."""
  activation_bytes: int
  """Inputs of the blocks, kept for the backward pass."""
  workspace_bytes: int
  """Allowance for what solvers allocate while they run."""
  capacity_bytes: int
  """What the programs take of the card's memory."""
  total_bytes: int
  """Peak, workspace included; without a compiler, what is certain."""
  fits: bool | None
  """Whether the total is at most the capacity; None, unknown, where what is
  certain is, and the compiler was not asked for the rest."""
  compiled: cards_lib.Compiled | None
  """What the compiler says; None for an estimate."""

  @property
  def state_bytes(self) -> int:
    """Weights and optimizer state."""
    weights = self.parameter_bytes + self.vocabulary_bytes
    return weights + self.basis_bytes + self.moment_bytes

  @property
  def parts(self) -> dict[str, int]:
    """What the total is made of; an estimate has no temporaries."""
    gradients = self.gradient_bytes
    activations = self.activation_bytes
    temporaries = self.total_bytes - self.workspace_bytes - self.state_bytes
    if self.compiled is not None:
      # The compiler may do with less than all gradients at once.
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
    """Returns a flat dict."""
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
  """Returns the plan of a config, compiled unless an estimate is wanted.

  Args:
    config: what is planned.
    cards: what it is planned for.
    path: of the config, for the reader.
    method: name of the optimizer; default, that of its class.
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
  rows, length = inputs['inputs'].shape
  gradients = gradient_bytes(config, task, state, mesh)
  activations = activation_bytes(config, length)
  workspace = workspace_bytes(config)
  total = sums.total + gradients + activations
  if compiled:
    total = compiled.total_bytes
  total += workspace
  capacity = int(MEMORY_SHARE * GPUS[cards.device].memory_bytes)
  return Plan(
    config=path,
    method=method or type(config.optimizer).__name__,
    device=cards.device,
    devices=config.mesh.size,
    batch_size=rows,
    sequence_length=length,
    attention=config.model.attention,
    parameter_bytes=sums.parameters,
    vocabulary_bytes=sums.vocabulary,
    basis_bytes=sums.bases,
    moment_bytes=sums.moments + sums.counters,
    gradient_bytes=gradients,
    activation_bytes=activations,
    workspace_bytes=workspace,
    capacity_bytes=capacity,
    total_bytes=total,
    fits=None if cards.estimate and total <= capacity else total <= capacity,
    compiled=compiled,
  )


def shared(config: Config, cards: Cards) -> Config:
  """Returns a config whose mesh has as many devices as are asked for.

  Raises:
    ValueError: its own mesh has others, or they cannot share a batch.
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
  """Returns a config with the attention that 'auto' would be on a card.

  Call it, and trace what comes of it, under `cards.cudnn`.
  """
  model = config.model
  if model.attention != 'auto':
    return config
  _, length = batch(config)['inputs'].shape
  q, k = (
    jax.ShapeDtypeStruct((1, length, heads, model.head_width), model.dtype)
    for heads in (model.num_heads, model.kv_heads)
  )
  refused = attention.refusal(q, k, model.window, model.causal)
  kind = 'blockwise' if refused else 'cudnn'
  model = dataclasses.replace(model, attention=kind)
  return dataclasses.replace(config, model=model)


def mesh_of(config: Config, cards: Cards) -> jax.sharding.Mesh:
  """Returns the cards that are not there.

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
  """Returns the jitted step, its state and its batch, on a mesh."""
  init, step = step_lib.build(config, task)
  places = step_lib.shardings(init, config, task, mesh)
  state = mesh_lib.at(jax.eval_shape(init, jax.random.key(0)), places)
  inputs = batch(config)
  rows = jax.tree.map(lambda _: mesh_lib.of_batch(mesh), inputs)
  step = step_lib.placed(step, mesh, places)
  return step, state, mesh_lib.at(inputs, rows)


def part(tree: PyTree) -> PyTree:
  """Returns the shapes of what each of the devices holds of arrays."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype),
    tree,
  )


def batch(config: Config) -> Batch:
  """Returns the shapes of a config's largest batch.

  Raises:
    ValueError: its task does not have them.
  """
  inputs = task_of(config).inputs
  if inputs is None:
    raise ValueError(
      f'a plan needs the shapes of a batch, which the task of a '
      f'{type(config.model).__name__} does not have: set Task.inputs'
    )
  return inputs()


def gradient_bytes(config: Config, task: Task, state: State, mesh: Any) -> int:
  """Returns the bytes of the gradients, and sums, that exist at once."""
  moving, _ = step_lib.split(array_shapes(config, task), task.trained)
  placed = mesh_lib.at(moving, mesh_lib.of_params(moving, mesh))
  leaves = jax.tree.leaves(part(placed))
  size = lambda x: x.size * x.dtype.itemsize
  if isinstance(config.update, WholeTree):
    return sum(map(size, leaves))
  update = step_lib.make_layerwise(config, task)
  params, _ = step_lib.split(state.params, task.trained)
  sums = jax.eval_shape(update.sums, params, state.optimizer)
  per_layer = lambda x: size(x) // (x.shape[0] if x.ndim == 3 else 1)
  # They live where moments do, of which each device has its share.
  sizes = config.mesh
  return max(map(per_layer, leaves)) + sum(map(size, sums)) // (
    sizes.fsdp * sizes.tensor
  )


def activation_bytes(config: Config, length: int) -> int:
  """Returns the bytes of the inputs of the blocks, for rows of a length."""
  tokens = config.batch_size * length
  if isinstance(config.update, WholeTree):
    tokens //= config.microbatches
  tokens //= config.update.accumulate * config.mesh.data * config.mesh.fsdp
  model = config.model
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
