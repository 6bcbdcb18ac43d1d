"""Where the bytes of a config's training step go.

`make_plan` adds them up from shapes and, where a compiler is at hand, asks it
for the rest; the step is the one that `train.pretrain` runs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import attention
from models.llama import LlamaConfig
from train import step as step_lib
from train.config import Config, WholeTree
from train.plan import cards as cards_lib
from train.plan.account import account
from train.plan.cards import GPUS
from train.task import Task, array_shapes, language_model

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Cards:
  """What a step is planned for."""

  device: str
  """Short name of the card."""
  devices: int = 1
  """How many of them."""
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
  """Memory of the card."""
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
  check_devices(config, cards)
  config = on_card(config)
  task = language_model(config)
  init, step = step_lib.build(config, task)
  state = jax.eval_shape(init, jax.random.key(0))
  compiled = None
  if not cards.estimate:
    mesh = mesh_of(cards)
    compiled = cards_lib.compile_step(*placed_step(config, step, state, mesh))
  share = lambda tree: jax.tree.map(lambda x: shard(x, cards.devices), tree)
  sums = account(share(state.params), share(state.optimizer))
  gradients = gradient_bytes(config, task, state, cards.devices)
  activations = activation_bytes(config) // cards.devices
  workspace = workspace_bytes(config)
  total = sums.total + gradients + activations
  if compiled:
    total = compiled.total_bytes
  total += workspace
  capacity = GPUS[cards.device].memory_bytes
  return Plan(
    config=path,
    method=method or type(config.optimizer).__name__,
    device=cards.device,
    devices=cards.devices,
    batch_size=config.batch_size,
    sequence_length=config.sequence_length,
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


def check_devices(config: Config, cards: Cards) -> None:
  """Raises ValueError for cards that cannot share a batch."""
  if cards.devices < 1:
    raise ValueError(f'--devices must be at least 1, got {cards.devices}')
  if config.batch_size % cards.devices:
    raise ValueError(
      f'the batch size must be a multiple of --devices {cards.devices}, got '
      f'{config.batch_size}'
    )


def on_card(config: Config) -> Config:
  """Returns a config with the attention that 'auto' would be on a card.

  Call it, and trace what comes of it, under `cards.cudnn`.
  """
  model = config.model
  if model.attention != 'auto':
    return config
  q, k = (
    jax.ShapeDtypeStruct(
      (1, config.sequence_length, heads, model.head_width), model.dtype
    )
    for heads in (model.num_heads, model.kv_heads)
  )
  kind = 'blockwise' if attention.refusal(q, k, model.window) else 'cudnn'
  model = dataclasses.replace(model, attention=kind)
  return dataclasses.replace(config, model=model)


def mesh_of(cards: Cards) -> Mesh:
  """Returns the cards that are not there.

  Raises:
    ImportError: the compiler is not installed.
  """
  try:
    return cards_lib.topology_mesh(GPUS[cards.device], devices=cards.devices)
  except RuntimeError as error:
    raise ImportError(f'{error}; --estimate needs none') from error


def placed_step(
  config: Config, step: Any, state: PyTree, mesh: Mesh
) -> tuple[Any, PyTree, PyTree]:
  """Returns the jitted step, its state and its batch, on a mesh."""
  state = jax.tree.map(lambda x: placed(x, mesh), state)
  inputs = jax.tree.map(
    lambda x: placed(x, mesh, PartitionSpec('data')), batch(config)
  )
  # The state is shared out after the step as before it, or nothing happens in
  # place.
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
  return step, state, inputs


def placed(x: Any, mesh: Mesh, spec: PartitionSpec | None = None) -> Any:
  """Returns a shape on a mesh; without a spec, shared out as `shard` says."""
  if spec is None:
    axis = shared_axis(x, mesh.size)
    spec = PartitionSpec()
    if axis is not None:
      spec = PartitionSpec(*(None,) * axis, 'data')
  sharding = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def shared_axis(x: Any, devices: int) -> int | None:
  """Returns the axis of an array that devices share, None where each has all.

  The last one that they divide, so that no layer axis and no small array is
  shared.

  >>> shared_axis(jax.ShapeDtypeStruct((32, 1024, 1030), 'float32'), 4)
  1
  """
  axes = [i for i, size in enumerate(x.shape) if size % devices == 0]
  return axes[-1] if axes and x.size >= 2**16 else None


def shard(x: Any, devices: int) -> jax.ShapeDtypeStruct:
  """Returns what one of the devices holds of an array.

  >>> shard(jax.ShapeDtypeStruct((32, 1024, 1030), 'float32'), 4).shape
  (32, 256, 1030)
  """
  axis = shared_axis(x, devices)
  shape = [
    size // devices if i == axis else size for i, size in enumerate(x.shape)
  ]
  return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def batch(config: Config) -> PyTree:
  """Returns the shapes of a batch, as the data side makes it."""
  shape = (config.batch_size, config.sequence_length)
  names = ('inputs', 'targets', 'positions', 'segments')
  tokens = dict.fromkeys(names, jax.ShapeDtypeStruct(shape, jnp.int32))
  return tokens | {'weights': jax.ShapeDtypeStruct(shape, jnp.float32)}


def gradient_bytes(
  config: Config, task: Task, state: step_lib.State, devices: int
) -> int:
  """Returns the bytes of the gradients, and sums, that exist at once."""
  moving, _ = step_lib.split(array_shapes(config, task), task.trained)
  leaves = [shard(x, devices) for x in jax.tree.leaves(moving)]
  size = lambda x: x.size * x.dtype.itemsize
  if isinstance(config.update, WholeTree):
    return sum(map(size, leaves))
  update = step_lib.make_layerwise(config, task)
  params, _ = step_lib.split(state.params, task.trained)
  sums = jax.eval_shape(update.sums, params, state.optimizer)
  per_layer = lambda x: size(x) // (x.shape[0] if x.ndim == 3 else 1)
  return max(map(per_layer, leaves)) + sum(
    size(shard(x, devices)) for x in sums
  )


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
