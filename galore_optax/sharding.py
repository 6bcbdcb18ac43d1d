"""Shardings of optimizer state on a mesh of devices.

`state_shardings` returns them for any transformation. `placed` makes an `init`
that follows them. `on_any_mesh` makes a function work on a mesh with explicit
axes. `alike` keeps the sharding of a state that an update returns.

To try a mesh on several CPU devices, set OPENBLAS_NUM_THREADS=1 before Python
starts. Otherwise each device's decomposition uses all cores, the devices block
each other, and XLA may end the process at the next all-gather.

Axes: m projected side, n other side, r rank; leading axes are batch.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context
from jax.experimental.shard_alike import shard_alike
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax import closures, containers, paths
from galore_optax.projection import Projection, recording_plans

CODED = {'codes', 'scale'}
"""Fields of 8-bit arrays."""

MeshAxes = tuple[str, ...]
"""Names of the mesh axes along which one dimension of an array is sharded."""


def state_shardings(tx: Any, params: Any, shardings: Any) -> Any:
  """Returns the sharding of each leaf of the state of `tx`.

  State with a weight's shape has the weight's sharding. For a projected weight,
  moments [..., r, n] are sharded along n and a basis [..., r, m] along m, over
  all mesh axes along which the weight is sharded. So no device holds a whole
  copy of this state, whichever side is sharded. (If both sides are projected,
  moments [..., r, r] are replicated.) 8-bit codes of a stack and their scales
  are sharded along the stack if its length is divisible: along n, a
  quantization block could be split between two devices. The axis r is sharded
  only for a matrix with one column. Counters, and dimensions that no mesh axis
  divides, are replicated.

  Boxes of flax and haliax are treated as their arrays, in `params` and in
  `shardings`.

  Args:
    tx: any transformation, or another object with an `init`, such as
      `layerwise`.
    params: parameters, or `jax.ShapeDtypeStruct`s of them.
    shardings: a `jax.sharding.NamedSharding` for each parameter.

  Returns:
    A tree of `NamedSharding`s with the structure of `tx.init(params)`. Pass it
    as `out_shardings` of a jitted `init`. An `init` that is not jitted, called
    with sharded parameters, follows their shardings itself.

  Raises:
    ValueError: the sharding of a parameter is not a NamedSharding.

  Example:
    >>> import galore_optax, optax
    >>> mesh = jax.make_mesh((1,), ('fsdp',))
    >>> rows = NamedSharding(mesh, PartitionSpec('fsdp'))
    >>> tx = galore_optax.galore(optax.adam(0.1), rank=2)
    >>> params = {'w': jax.ShapeDtypeStruct((4, 6), 'float32')}
    >>> state = state_shardings(tx, params, {'w': rows})
    >>> tuple(state.basis['w'].spec), tuple(state.inner[0].mu['w'].spec)
    ((None, 'fsdp'), (None, 'fsdp'))
  """
  plain = containers.opened(params)
  places = containers.where_present(containers.unboxed(shardings), plain)
  found = _shardings(tx.init, plain, places)
  if not containers.has_boxes(params):
    return found
  state = jax.eval_shape(tx.init, containers.arrays(params))
  return containers.reboxed(found, state)


def _is_named(x: Any) -> bool:
  return isinstance(x, NamedSharding)


def _shardings(init: Callable[[Any], Any], params: Any, shardings: Any) -> Any:
  """Returns the sharding of each leaf of init(params)."""
  leaves, treedef = jax.tree.flatten(params)
  places = treedef.flatten_up_to(shardings)
  for name, place in zip(paths.paths(params), places, strict=True):
    if not _is_named(place):
      raise ValueError(
        f'shardings must be a NamedSharding for {name}, got {place!r}'
      )
  pairs = zip(places, leaves, strict=True)
  cuts = [_cuts(place, len(x.shape)) for place, x in pairs]

  def of_leaf(leaf: StateLeaf) -> NamedSharding:
    return NamedSharding(places[leaf.owner or 0].mesh, _spec(leaf.axes))

  def fits(owner: int, size: int, axes: MeshAxes) -> bool:
    return _divides(places[owner].mesh, size, axes)

  return map_state(of_leaf, init, params, cuts, fits)


class StateLeaf(NamedTuple):
  """An array of optimizer state, and how it is sharded."""

  owner: int | None
  """Index of the parameter to which the array belongs, or None."""
  shape: tuple[int, ...]
  """Shape of the array."""
  axes: tuple[MeshAxes, ...]
  """Mesh axes of each dimension; empty if it belongs to no parameter."""
  plan: Projection | None
  """Plan of the parameter; None if it is not projected."""
  is_basis: bool
  """Whether the array belongs to a basis."""


def map_state(
  f: Callable[[StateLeaf], Any],
  init: Callable[[Any], Any],
  params: Any,
  cuts: Sequence[list[MeshAxes]],
  fits: Callable[[int, int, MeshAxes], bool],
) -> Any:
  """Returns f(leaf) for each array of init(params).

  Args:
    f: a function of a leaf.
    init: of a transformation.
    params: parameters.
    cuts: mesh axes of each dimension, for each parameter.
    fits: `(owner, size, axes) -> bool`: whether mesh axes divide a dimension.
  """
  with recording_plans() as recorded:
    # The shapes are passed without shardings. With them, operations under
    # explicit mesh axes would require an output sharding.
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
    )
    # The lambda is a new function: JAX caches traces of `init`, and a cached
    # trace would not record its plans again.
    state = jax.eval_shape(lambda w: init(w), shapes)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  owners, names = [path for path, _ in leaves], paths.paths(params)

  def of_leaf(path: Any, x: Any) -> Any:
    owner = paths.owner(path, owners)
    if owner is None:
      return f(StateLeaf(None, x.shape, (), None, False))
    fits_here = functools.partial(fits, owner)
    shape, axes = leaves[owner][1].shape, cuts[owner]
    plan = recorded.plans.get(names[owner])
    fields = {getattr(key, 'name', None) for key in path}
    is_basis = paths.BASIS in path
    if isinstance(plan, Projection):
      shape, axes = _of_low(plan, shape, axes, is_basis=is_basis)
      first = axes[0] + axes[-1]
      stacked = plan.bases if is_basis else plan.batch
      if stacked and fields & CODED and fits_here(shape[0], first):
        axes = [first, *axes[1:-1], ()]
    axes = _fitted(fits_here, x.shape, _like(fields, x.shape, shape, axes))
    projected = plan if isinstance(plan, Projection) else None
    return f(StateLeaf(owner, x.shape, axes, projected, is_basis))

  return jax.tree_util.tree_map_with_path(of_leaf, state)


def _spec(axes: Sequence[MeshAxes]) -> PartitionSpec:
  """Returns the partition of an array with these mesh axes."""
  return PartitionSpec(*(one or None for one in axes))


def _cuts(place: NamedSharding, ndim: int) -> list[MeshAxes]:
  """Returns the mesh axes of each dimension of an array."""
  return cuts_of(place.spec, ndim)


def cuts_of(entries: Iterable[Any], ndim: int) -> list[MeshAxes]:
  """Returns the names in each dimension of an array.

  Args:
    entries: for each dimension a name, several names, or None. There may be
      fewer entries than dimensions.
    ndim: number of dimensions.

  >>> cuts_of(('x', None, ('y', 'z')), 4)
  [('x',), (), ('y', 'z'), ()]
  """
  cuts = list(map(as_axes, entries))[:ndim]
  missing: list[MeshAxes] = [()] * (ndim - len(cuts))
  return cuts + missing


def as_axes(entry: Any) -> MeshAxes:
  """Returns the entry of one dimension as a tuple of names.

  >>> as_axes('x'), as_axes(None), as_axes(['x', 'y'])
  (('x',), (), ('x', 'y'))
  """
  if not entry or entry is PartitionSpec.UNCONSTRAINED:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _of_low(
  plan: Projection,
  shape: Sequence[int],
  cuts: list[MeshAxes],
  *,
  is_basis: bool = False,
) -> tuple[tuple[int, ...], list[MeshAxes]]:
  """Returns shape and mesh axes of a projected gradient, or of a basis.

  Args:
    plan: of the weight. A layer-wise step plans for one layer of a stack; the
      weight then has more leading axes than the plan.
    shape: of the weight.
    cuts: mesh axes of each dimension of the weight.
    is_basis: whether to return those of the basis.
  """
  num, side = len(shape) - len(plan.shape), plan.sides[0]

  def of_axes(axes: Sequence[int]) -> MeshAxes:
    return tuple(name for axis in axes for name in cuts[num + axis])

  # The axes of the array's own side come first, so that less data has to move.
  near, far = of_axes(plan.axes[side]), of_axes(plan.axes[-3 - side])
  low = (*shape[:num], *plan.low_shape)
  batch = [*cuts[:num], *(cuts[num + axis] for axis in plan.batch_axes)]
  if is_basis and plan.shared:
    # Axes that share a basis are not among its own: their mesh axes cut m.
    low = (*shape[:num], *plan.bases, *plan.low_shape[-2:])
    batch = batch[: len(batch) - len(plan.shared)]
    far += of_axes(plan.shared)
  # FRUGAL's single entries are a matrix with one column: only its rows can be
  # sharded.
  rows = near + far if low[-1] == 1 else ()
  if is_basis:
    return (*low[:-1], plan.matrix_shape[side]), [*batch, rows, near + far]
  return low, [*batch, rows, far + near if len(plan.sides) == 1 else ()]


def _fitted(
  fits: Callable[[int, MeshAxes], bool],
  shape: Sequence[int],
  cuts: Sequence[MeshAxes],
) -> tuple[MeshAxes, ...]:
  """Returns the mesh axes of each dimension without those that do not fit."""

  def of_side(size: int, axes: MeshAxes) -> MeshAxes:
    while axes and not fits(size, axes):
      axes = axes[:-1]
    return axes

  return tuple(map(of_side, shape, cuts))


def _divides(mesh: Any, size: int, axes: MeshAxes) -> bool:
  """Whether the number of devices along mesh axes divides a size."""
  return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def _like(
  fields: set[Any],
  shape: Sequence[int],
  whole: Sequence[int],
  cuts: list[MeshAxes],
) -> list[MeshAxes]:
  """Returns the mesh axes of a leaf of state that belongs to an array.

  Args:
    fields: names of the fields on the path of the leaf.
    shape: of the leaf.
    whole: shape of the array: the weight, its projected gradient, or its basis.
    cuts: mesh axes of each dimension of the array.
  """
  if len(shape) == len(whole):
    return cuts
  if len(shape) == len(whole) - 1:
    # Scales of quantization blocks: one number for several elements.
    if 'scale' in fields:
      return [*cuts[:-2], cuts[-2] + cuts[-1]]
    for axis in (-2, -1) if 'v_col' in fields else (-1, -2):
      left = [i for i in range(len(whole)) if i != axis % len(whole)]
      if tuple(shape) == tuple(whole[i] for i in left):
        return [cuts[i] for i in left]
    # State of one layer of a stack, as in `badam`.
    if tuple(shape) == tuple(whole[1:]):
      return cuts[1:]
  alike = tuple(shape) == tuple(whole[: len(shape)])
  return cuts[: len(shape)] if alike else [()] * len(shape)


def placed(init: Callable[..., Any]) -> Callable[..., Any]:
  """Returns an `init` whose state has the shardings of `state_shardings`.

  It applies them if the shardings of the parameters are known: for concrete
  arrays, and for tracers under explicit mesh axes. Beside parameters on a mesh
  those on no device in particular, such as NumPy arrays, are replicated.

  Args:
    init: a function of opened parameters.
  """

  @functools.wraps(init)
  def init_fn(params: Any) -> Any:
    with _explicit_mesh(params) as explicit:

      def place(x: Any) -> Any:
        # A tracer has a sharding only under explicit mesh axes, where it is
        # part of its type.
        typed = jax.typeof(x) if explicit else x
        return getattr(typed, 'sharding', None)

      leaves, treedef = jax.tree.flatten(params)
      known = [place(x) for x in leaves]
      meshes = [one.mesh for one in known if _is_named(one)]
      if not meshes or not all(map(_is_placed, leaves, known)):
        return init(params)
      # JAX replicates arrays that are on no device in particular.
      rest = NamedSharding(meshes[0], PartitionSpec())
      known = [one if _is_named(one) else rest for one in known]
      # The structure of a state may depend on hyperparameters, so `init` must
      # not receive them as tracers.
      f = closures.with_arrays(init, _without_mesh) if explicit else init
      places = _shardings(f, params, treedef.unflatten(known))
      if not explicit:
        return jax.jit(f, out_shardings=places)(params)
      specs = jax.tree.map(lambda x: x.spec, places)
      run = functools.partial(_in_auto_axes, f, specs)
      return jax.jit(run)(params)

  return init_fn


def _is_placed(x: Any, place: Any) -> bool:
  """Whether a parameter is on a mesh, or may be replicated on one."""
  if _is_named(place):
    return isinstance(x, jax.Array)
  return not isinstance(x, Tracer | jax.ShapeDtypeStruct) and not getattr(
    x, 'committed', False
  )


def on_any_mesh(
  f: Callable[..., Any], *, like: Callable[[], Any]
) -> Callable[..., Any]:
  """Returns `f`; on a mesh with explicit axes, with automatic shardings inside.

  Under explicit mesh axes each operation of `f` would need an output sharding.
  The returned function sets the shardings of its result only, and the compiler
  chooses all others. Without explicit axes it calls `f` itself. The mesh is
  that of `jax.set_mesh`, or else that of the arguments.

  Arrays that `f` reads from a closure may be on the mesh too, such as the
  hyperparameters of `optax.inject_hyperparams`.

  Args:
    f: a function of positional arguments, trees with arrays and other leaves.
    like: returns a tree with the structure of the result, whose leaves are
      arrays or shardings: the shardings of the result. It is called under
      explicit axes only.
  """

  def spec(x: Any) -> PartitionSpec:
    return (x if _is_named(x) else jax.typeof(x).sharding).spec

  def run(*args: Any) -> Any:
    with _explicit_mesh(args) as explicit:
      if not explicit:
        return f(*args)
      return _in_auto_axes(f, jax.tree.map(spec, like()), *args)

  return run


@contextlib.contextmanager
def _explicit_mesh(tree: Any) -> Iterator[bool]:
  """Enters the mesh of the arrays; yields whether it has explicit axes.

  A mesh that is set already, such as by `jax.set_mesh`, is not changed. If no
  mesh is set and no array has explicit axes, none is entered.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    yield bool(mesh.explicit_axes)
    return
  leaves = jax.tree.leaves(tree)
  arrays = [x for x in leaves if isinstance(x, jax.Array) and _has_explicit(x)]
  if not arrays:
    yield False
    return
  with _entered(arrays[0]):
    yield True


_only_abstract: contextvars.ContextVar[bool] = contextvars.ContextVar(
  'only_abstract', default=False
)


@contextlib.contextmanager
def _entered(x: jax.Array) -> Iterator[None]:
  """Enters the mesh of an array."""
  # Inside a traced function `jax.set_mesh` raises. Outside of it an abstract
  # mesh is not enough, because it does not determine the devices.
  if isinstance(x, Tracer) or isinstance(jnp.zeros([]), Tracer):
    token = _only_abstract.set(True)
    try:
      with jax.sharding.use_abstract_mesh(jax.typeof(x).sharding.mesh):
        yield
    finally:
      _only_abstract.reset(token)
  else:
    place: Any = x.sharding
    with jax.set_mesh(place.mesh):
      yield


def without_abstract_mesh() -> contextlib.AbstractContextManager[Any]:
  """Returns a context that leaves an abstract mesh of this module.

  The devices of such a mesh are not known, so nothing can be computed in it. A
  mesh of `jax.set_mesh` has devices, and is not left.
  """
  if not _only_abstract.get():
    return contextlib.nullcontext()
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


@contextlib.contextmanager
def compile_time_eval() -> Iterator[None]:
  """Enters a context in which JAX computes, also inside of a traced function.

  Unlike in `jax.ensure_compile_time_eval`, the constants of a jitted function
  are not computed one by one, each by a program of its own.

  Transfers to the device are allowed although `jax.transfer_guard` may forbid
  them in the program: they are a few bytes, and happen once.

  >>> with compile_time_eval():
  ...   jax.numpy.ones(2)
  Array([1., 1.], dtype=float32)
  """
  allowed = jax.transfer_guard('allow')
  with eval_context(), without_abstract_mesh(), allowed:
    yield


def _has_explicit(x: jax.Array) -> bool:
  """Whether the type of an array has a mesh with explicit axes."""
  return bool(jax.typeof(x).sharding.mesh.explicit_axes)


def _without_mesh(x: jax.Array) -> Any:
  """Returns a number in NumPy if its value is known; otherwise `x`."""
  is_number = not isinstance(x, Tracer) and x.ndim == 0 and _has_explicit(x)
  return np.asarray(x) if is_number else x


def _in_auto_axes(f: Callable[..., Any], specs: Any, *args: Any) -> Any:
  """Returns f(*args) with the shardings `specs`, and any inside."""
  closed: dict[int, jax.Array] = {}

  def find(x: jax.Array) -> jax.Array:
    if _has_explicit(x):
      closed[id(x)] = x
    return x

  closures.with_arrays(f, find)
  leaves, treedef = jax.tree.flatten(args)
  every = dict(enumerate(leaves))
  arrays = {i: x for i, x in every.items() if isinstance(x, jax.Array)}

  def of_arrays(both: tuple[dict[int, jax.Array], dict[int, jax.Array]]) -> Any:
    arrays, closed = both
    inside = closures.with_arrays(f, lambda x: closed.get(id(x), x))
    return inside(*treedef.unflatten((every | arrays).values()))

  return jax.sharding.auto_axes(of_arrays, out_sharding=specs)((arrays, closed))


def low_sharding(plan: Any, x: jax.Array) -> NamedSharding:
  """Returns the sharding of a leaf's projected gradient, from its type."""
  place = jax.typeof(x).sharding
  if not isinstance(plan, Projection):
    return place
  low, cuts = _of_low(plan, x.shape, _cuts(place, x.ndim))
  fits = functools.partial(_divides, place.mesh)
  axes = _fitted(fits, low, cuts)
  return NamedSharding(place.mesh, _spec(axes))


def alike(new: Any, old: Any) -> Any:
  """Returns `new` with the shardings of `old`, a tree of the same shapes.

  An update passes its new state and its previous state. On a mesh with
  automatic axes the compiler chooses the sharding of a result. It chooses
  that of the arguments for moments, which are computed element by element. It
  replicates quantized arrays, because a quantization block is a reshape.

  Inside `jax.jit` the sharding of `old` is not known. `shard_alike` makes the
  compiler use the same one for both. On one device nothing is added.

  >>> alike(jax.numpy.zeros(2), jax.numpy.ones(2))
  Array([0., 0.], dtype=float32)
  """

  def of_leaf(new: jax.Array, old: jax.Array) -> jax.Array:
    mesh = jax.typeof(old).sharding.mesh
    if not any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
      return new
    if isinstance(new, Tracer) or isinstance(old, Tracer):
      return shard_alike(new, old)[0]
    return jax.device_put(new, old.sharding)

  return jax.tree.map(of_leaf, new, old)
