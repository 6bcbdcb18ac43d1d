"""Shardings: which device holds which part of each array.

Steps, validations, checkpoints and plans take their shardings from here. The
programs contain almost no explicit communication: the same code runs on one
device and on a mesh, and the compiler inserts the communication.
`train.engine.cluster` has the functions for several processes.

Axes: B rows of a batch, L layers, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models.lowrank import FACTORS

PyTree: TypeAlias = Any

ROWS = ('data', 'fsdp')
"""Mesh axes over which the rows of a batch are sharded."""

# Matrices whose last side the tensor axis shards, and those whose first side it
# shards. It shards heads, the MLP's hidden units and the vocabulary, but not
# the width.
_LAST = frozenset(('q', 'k', 'v', 'gate', 'up', 'lm_head'))
_FIRST = frozenset(('o', 'down', 'embedding'))


@dataclasses.dataclass(frozen=True)
class Mesh:
  """A grid of devices; its sizes do not change the result."""

  data: int = 1
  """Number of groups of devices that have the same weights and other rows of a
  batch."""
  fsdp: int = 1
  """Number of devices that have other rows of a batch, and each a part of every
  weight and of its optimizer state."""
  tensor: int = 1
  """Number of devices that have the same rows, and other heads, hidden units
  and tokens of the vocabulary."""

  def __post_init__(self) -> None:
    """Raises ValueError unless each size is at least 1."""
    for name, value in dataclasses.asdict(self).items():
      if value < 1:
        raise ValueError(f'mesh.{name} must be at least 1, got {value}')

  @property
  def size(self) -> int:
    """Number of devices."""
    return self.data * self.fsdp * self.tensor

  def check(
    self, sizes: Mapping[str, int], batch_size: int, parts: int
  ) -> None:
    """Raises ValueError unless the mesh divides the batch and the model.

    Args:
      sizes: fields of the model that the axis 'tensor' must divide, by name.
      batch_size: rows in an update.
      parts: number of equal parts of a batch that are computed one after
        another.
    """
    rows = self.data * self.fsdp
    if batch_size % (parts * rows):
      raise ValueError(
        'batch_size must be a multiple of mesh.data x mesh.fsdp = '
        f'{rows}{f" x {parts} parts" if parts > 1 else ""}, got {batch_size}: '
        'change it, or the mesh'
      )
    for name, size in sizes.items():
      if size % self.tensor:
        raise ValueError(
          f'mesh.tensor must divide model.{name} = {size}, got {self.tensor}: '
          'lower it, and raise mesh.fsdp or mesh.data in its place'
        )


@functools.cache
def devices(sizes: Mesh) -> jax.sharding.Mesh:
  """Returns the mesh of this machine's devices, or of those of all processes.

  Raises:
    ValueError: there are too few devices, or some process would have none.
  """
  there = jax.devices()
  if sizes.size > len(there):
    raise ValueError(
      f'a mesh of {described(sizes)} = {sizes.size} devices needs as many, got '
      f'{len(there)}: lower one of its sides'
    )
  if sizes.size < len(there) and jax.process_count() > 1:
    raise ValueError(
      f'a mesh over {jax.process_count()} processes must have all of their '
      f'{len(there)} devices, got {described(sizes)} = {sizes.size}: raise '
      '--mesh.data or --mesh.fsdp'
    )
  return grid(sizes, there[: sizes.size])


def grid(sizes: Mesh, there: Any) -> jax.sharding.Mesh:
  """Arranges devices as a mesh on which the compiler shards arrays."""
  shape, names, kinds = _axes(sizes)
  return jax.make_mesh(shape, names, axis_types=kinds, devices=there)


def absent(sizes: Mesh) -> jax.sharding.AbstractMesh:
  """Returns a mesh without devices, to trace shapes."""
  shape, names, kinds = _axes(sizes)
  return jax.sharding.AbstractMesh(shape, names, axis_types=kinds)


def _axes(
  sizes: Mesh,
) -> tuple[tuple[int, ...], tuple[str, ...], tuple[AxisType, ...]]:
  """Returns lengths, names and types of the mesh axes."""
  sides = dataclasses.asdict(sizes)
  kinds = (AxisType.Auto,) * len(sides)
  return tuple(sides.values()), tuple(sides), kinds


def described(sizes: Mesh) -> str:
  """Returns the sizes of a mesh as text.

  >>> described(Mesh(fsdp=4, tensor=2))
  'data 1 x fsdp 4 x tensor 2'
  """
  sides = dataclasses.asdict(sizes).items()
  return ' x '.join(f'{name} {size}' for name, size in sides)


def used(sizes: Mesh) -> str:
  """Returns a line about the mesh and about devices that it leaves idle."""
  idle = jax.device_count() - sizes.size
  line = f'mesh: {described(sizes)}'
  if idle:
    line += f'; {idle} devices are idle: --mesh.data or --mesh.fsdp uses them'
  return line


def everywhere(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of arrays that are replicated on all devices."""
  return NamedSharding(mesh, PartitionSpec())


def of_params(
  params: PyTree, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> PyTree:
  """Returns the sharding of each parameter, by its name and shape.

  A matrix is sharded along its width by the axis 'fsdp', if that divides it,
  and along its other side by 'tensor'. Vectors are replicated. The axis of
  layers is never sharded: each device has a part of every layer. Low-rank
  factors are sharded along their long side.
  """

  def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
    names = {jax.tree_util.keystr((key,), simple=True) for key in path}
    return NamedSharding(mesh, _spec(names, x.shape, mesh.shape))

  return jax.tree_util.tree_map_with_path(place, params)


def _spec(
  names: set[str], shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Returns how the mesh axes shard a parameter.

  Args:
    names: the keys in its path.
    shape: its shape.
    sizes: sizes of the mesh axes.
  """
  if len(shape) - ('blocks' in names) < 2:
    return PartitionSpec()
  cuts: dict[int, tuple[str, ...]] = {-2: (), -1: ()}
  order = sorted(cuts, key=lambda side: -shape[side])
  if names.isdisjoint(FACTORS):
    other = -1 if names & _LAST else -2 if names & _FIRST else None
    if other is not None:
      order = [-3 - other, other]
      if shape[other] % sizes['tensor'] == 0:
        cuts[other] = ('tensor',)
  for side in order:
    axes = (*cuts[side], 'fsdp')
    if shape[side] % np.prod([sizes[axis] for axis in axes]) == 0:
      cuts[side] = axes
      break
  unsharded = [None] * (len(shape) - 2)
  return PartitionSpec(*unsharded, cuts[-2], cuts[-1])


def at(shapes: PyTree, places: PyTree) -> PyTree:
  """Adds shardings to shapes."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )


def of_batch(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of the arrays [B, ...] of a batch."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def deal(sizes: Mesh) -> Callable[[PyTree], PyTree]:
  """Returns a function that moves a batch from host memory to the devices.

  Every process builds the whole batch and takes the rows of its own devices, so
  the number of processes and devices does not change a batch.
  """
  place = of_batch(devices(sizes))

  def put(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(x.shape, place, lambda at: x[at])

  return functools.partial(jax.tree.map, put)


def under(mesh: jax.sharding.Mesh, f: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `f`, traced with a mesh that `along_rows` reads."""

  def traced(*args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return f(*args)

  return traced


def measure(
  f: Callable[..., Any], sizes: Mesh
) -> Callable[[PyTree, PyTree], PyTree]:
  """Jits `(parameters, batch) -> result` for batches in host memory.

  The result is replicated, so that every process can read it.
  """
  mesh = devices(sizes)
  put = deal(sizes)
  jitted = jax.jit(under(mesh, f), out_shardings=everywhere(mesh))
  return lambda params, batch: jitted(params, put(batch))


def along_rows(x: jax.Array, axis: int = 0) -> jax.Array:
  """Constrains rows to the sharding of a batch, if traced under a mesh.

  Args:
    x: an array whose axis `axis` is the rows.
    axis: position of the rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  # Inside `jax.shard_map` over 'data', a device sees only its own rows.
  rows = tuple(name for name in ROWS if name not in mesh.manual_axes)
  before = [None] * axis
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*before, rows))


def along_params(grads: PyTree) -> PyTree:
  """Constrains gradients to their parameters' shardings, if under a mesh.

  Code that reads a gradient may need another sharding; for example, a refresh
  needs whole layers. Without this constraint the compiler might sum the whole
  gradient on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return grads
  return jax.tree.map(
    lambda g, place: jax.lax.with_sharding_constraint(g, place.spec),
    grads,
    of_params(grads, mesh),
  )


def keeping_rows(hook: Callable[..., Any] | None) -> Callable[..., Any]:
  """Returns a linen interceptor that keeps rows sharded from layer to layer.

  Weights are sharded along the width. The compiler might shard activations
  along it too, and make every device compute all rows.

  Args:
    hook: another interceptor, called inside; None for none.
  """

  def intercept(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: Any,
  ) -> Any:
    if hook is None:
      y = next_fun(*args, **kwargs)
    else:
      y = hook(next_fun, args, kwargs, context)
    if isinstance(y, dict) and 'h' in y:
      return {**y, 'h': along_rows(y['h'])}
    return y

  return intercept
