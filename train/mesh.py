"""Where each array lives: which devices hold which part of it.

Steps, validations, checkpoints and plans all ask here. Nothing is parallel by
hand: what runs on a mesh is what runs on one device, of arrays that are cut,
and the compiler moves between devices what it must. `join` and `agree` are for
several processes, each with devices of its own.

Axes: B rows of a batch, L layers, D width, V vocabulary.
"""

import dataclasses
import datetime
import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models.lowrank import FACTORS

PyTree: TypeAlias = Any

ROWS = ('data', 'fsdp')
"""The axes that the rows of a batch are dealt out over."""

# Matrices whose last side the tensor axis cuts, and those whose first: heads,
# the mlp's hidden layer and the vocabulary are cut, the width is not.
_LAST = frozenset(('q', 'k', 'v', 'gate', 'up', 'lm_head'))
_FIRST = frozenset(('o', 'down', 'embedding'))


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices in a grid; what is trained does not depend on it."""

  data: int = 1
  """Devices that have the same weights and other rows of a batch."""
  fsdp: int = 1
  """Devices that have other rows too, and a part of each weight and of its
  optimizer state each."""
  tensor: int = 1
  """Devices that have the same rows, and other heads, hidden units and tokens
  of the vocabulary."""

  def __post_init__(self):
    """Checks the sizes."""
    for name, value in dataclasses.asdict(self).items():
      if value < 1:
        raise ValueError(f'mesh.{name} must be at least 1, got {value}')

  @property
  def size(self) -> int:
    """Number of devices."""
    return self.data * self.fsdp * self.tensor

  def check(self, model: Any, batch_size: int, parts: int) -> None:
    """Raises ValueError for a batch, or heads, that it does not divide.

    Args:
      model: configuration of the model, as far as that is known.
      batch_size: rows in an update.
      parts: equal parts of them that are computed one after another.
    """
    rows = self.data * self.fsdp
    if batch_size % (parts * rows):
      raise ValueError(
        'batch_size must be a multiple of mesh.data x mesh.fsdp = '
        f'{rows}{f" x {parts} parts" if parts > 1 else ""}, got {batch_size}: '
        'change it, or the mesh'
      )
    for name in ('num_heads', 'kv_heads', 'mlp_width'):
      size = getattr(model, name, None)
      if size is not None and size % self.tensor:
        raise ValueError(
          f'mesh.tensor must divide model.{name.replace("kv_", "num_kv_")} = '
          f'{size}, got {self.tensor}: lower it, and raise mesh.fsdp or '
          'mesh.data in its place'
        )


@functools.cache
def devices(sizes: Mesh) -> jax.sharding.Mesh:
  """Returns the grid of this machine's devices, or of all processes'.

  Raises:
    ValueError: there are too few, or a process would have none.
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
  """Returns devices as a mesh on which the compiler lays arrays out."""
  shape, names, kinds = _axes(sizes)
  return jax.make_mesh(shape, names, axis_types=kinds, devices=there)


def absent(sizes: Mesh) -> jax.sharding.AbstractMesh:
  """Returns a mesh of no devices, for shapes alone."""
  shape, names, kinds = _axes(sizes)
  return jax.sharding.AbstractMesh(shape, names, axis_types=kinds)


def _axes(sizes: Mesh):
  """Lengths, names and types of the axes."""
  sides = dataclasses.asdict(sizes)
  kinds = (AxisType.Auto,) * len(sides)
  return tuple(sides.values()), tuple(sides), kinds


def described(sizes: Mesh) -> str:
  """Returns the sides of a mesh in words.

  >>> described(Mesh(fsdp=4, tensor=2))
  'data 1 x fsdp 4 x tensor 2'
  """
  sides = dataclasses.asdict(sizes).items()
  return ' x '.join(f'{name} {size}' for name, size in sides)


def used(sizes: Mesh) -> str:
  """Returns which of the devices there are do something, in words."""
  idle = jax.device_count() - sizes.size
  line = f'mesh: {described(sizes)}'
  if idle:
    line += f'; {idle} devices are idle: --mesh.data or --mesh.fsdp uses them'
  return line


def everywhere(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the place of what each device has whole."""
  return NamedSharding(mesh, PartitionSpec())


def of_params(params: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Returns where each parameter lives, by its name and its shape.

  A matrix is cut along its width by the axis 'fsdp', where that divides it,
  and along its other side by 'tensor'; vectors are everywhere. Layers are never
  dealt out: a device has a part of each. Factors of low rank are cut along
  their long side.
  """

  def place(path, x):
    names = {getattr(key, 'key', getattr(key, 'name', None)) for key in path}
    return NamedSharding(mesh, _spec(names, x.shape, mesh.shape))

  return jax.tree_util.tree_map_with_path(place, params)


def _spec(names, shape, sizes) -> PartitionSpec:
  if len(shape) - ('blocks' in names) < 2:
    return PartitionSpec()
  cuts = {-2: (), -1: ()}
  order = sorted(cuts, key=lambda side: -shape[side])
  if not names & {*FACTORS}:
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
  return PartitionSpec(*(None,) * (len(shape) - 2), cuts[-2], cuts[-1])


def at(shapes: PyTree, places: PyTree) -> PyTree:
  """Returns shapes that say where the arrays live."""
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    *(shapes, places),
  )


def of_batch(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns where arrays [B, ...] of a batch live."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def deal(sizes: Mesh) -> Callable[[PyTree], PyTree]:
  """Returns what deals the rows of a batch on the host out to the devices.

  Every process makes the whole batch and takes the rows of its own devices, so
  that a batch is the same however many processes and devices there are.
  """
  place = of_batch(devices(sizes))

  def put(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(x.shape, place, lambda at: x[at])

  return functools.partial(jax.tree.map, put)


def under(mesh: jax.sharding.Mesh, f: Callable) -> Callable:
  """Returns a function that is traced with a mesh for `along_rows`."""

  def traced(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return f(*args)

  return traced


def measure(f: Callable, sizes: Mesh) -> Callable[[PyTree, PyTree], PyTree]:
  """Returns `(parameters, batch) -> result`, jitted, of a batch on the host.

  The result is whole on every device, so that each process can read it.
  """
  mesh, put = devices(sizes), deal(sizes)
  jitted = jax.jit(under(mesh, f), out_shardings=everywhere(mesh))
  return lambda params, batch: jitted(params, put(batch))


def along_rows(x: jax.Array, axis: int = 0) -> jax.Array:
  """Keeps rows where the batch has them, if this is traced under a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  # Inside of `jax.shard_map` over 'data' a device has its own rows alone.
  rows = tuple(name for name in ROWS if name not in mesh.manual_axes)
  spec = PartitionSpec(*(None,) * axis, rows)
  return jax.lax.with_sharding_constraint(x, spec)


def along_params(grads: PyTree) -> PyTree:
  """Keeps gradients where their parameters live, if traced under a mesh.

  What reads them wants them elsewhere: a refresh whole layers, for one. Asked
  for both, the compiler might have every device sum all of a gradient.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return grads
  keep = lambda g, place: jax.lax.with_sharding_constraint(g, place.spec)
  return jax.tree.map(keep, grads, of_params(grads, mesh))


def keeping_rows(hook: Callable | None) -> Callable:
  """Returns a linen interceptor that keeps rows from block to block of a model.

  The compiler is free to cut activations along the width that weights are cut
  along, and might then have every device compute all rows.

  Args:
    hook: another interceptor, to call inside.
  """

  def intercept(next_fun, args, kwargs, context):
    if hook is None:
      y = next_fun(*args, **kwargs)
    else:
      y = hook(next_fun, args, kwargs, context)
    if isinstance(y, dict) and 'h' in y:
      return {**y, 'h': along_rows(y['h'])}
    return y

  return intercept


def leads() -> bool:
  """Whether this is the process that prints and writes for all of them."""
  return jax.process_index() == 0


def announce(line: str) -> None:
  """Prints a line, once for all processes."""
  if leads():
    print(line, flush=True)


def join() -> None:
  """Joins the other processes of a cluster, before JAX looks for devices.

  Where JAX detects one: SLURM, Open MPI, an indexed job of Kubernetes, a TPU
  pod; or where JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
  name it.

  Raises:
    ValueError: one of the three variables is missing.
  """
  if jax.distributed.is_initialized() or not _in_cluster():
    return
  given = {}
  if 'JAX_COORDINATOR_ADDRESS' in os.environ:
    for name in ('num_processes', 'process_id'):
      value = os.environ.get(f'JAX_{name.upper()}', '')
      if value.isdigit():
        given[name] = int(value)
      elif value or not _detected():
        raise ValueError(
          f'JAX_{name.upper()} must be a number beside JAX_COORDINATOR_ADDRESS,'
          f' got {value!r}: set it in each process, or unset both'
        )
  # Its own handler of SIGTERM would take the place of the program's.
  jax.config.update('jax_enable_preemption_service', False)
  # Processes on CPUs wait for each other for ever where each begins with
  # another one of several programs that are queued.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  jax.distributed.initialize(**given)


def _in_cluster() -> bool:
  return 'JAX_COORDINATOR_ADDRESS' in os.environ or _detected()


def _detected() -> bool:
  # With a task of its own, JAX would have each process take a single card.
  if os.environ.get('SLURM_NTASKS') == '1':
    return False
  # Any pod is in Kubernetes; only those of an indexed job have a number.
  known = lambda kind: (
    kind.name != 'k8s' or 'JOB_COMPLETION_INDEX' in os.environ
  )
  return any(
    kind.is_env_present()
    for kind in ClusterEnv._cluster_types
    if known(kind) and not kind.opt_in_only_method
  )


def together(moment: str) -> None:
  """Waits until all processes have come to a moment, which has a name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(moment)


def agree(what: str, content: bytes) -> None:
  """Waits for the other processes, and compares what they have.

  Raises:
    ValueError: it is not the same in all of them.
  """
  if jax.process_count() == 1:
    return
  ours = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
  theirs = multihost_utils.process_allgather(ours)
  if (theirs != ours).any():
    raise ValueError(
      f'{what} must be the same in all {jax.process_count()} processes, and '
      'differ: start all of them with the same files and options'
    )


def clock() -> datetime.datetime:
  """Returns the time of the first process, the same in all of them."""
  now = datetime.datetime.now().replace(microsecond=0)
  if jax.process_count() == 1:
    return now
  # Processes may have other time zones.
  parts = np.array(now.timetuple()[:6], np.int32)
  found = multihost_utils.broadcast_one_to_all(parts)
  return datetime.datetime(*map(int, found))


def of_any(number: int | None) -> int | None:
  """Returns the signal that any of the processes has got, None for none.

  All of them must leave the loop after the same step.
  """
  if jax.process_count() == 1:
    return number
  found = multihost_utils.process_allgather(np.int32(number or 0))
  return int(found.max()) or None
