"""Where the arrays of a state live on a mesh of devices.

`state_shardings` tells it of any transformation. `placed` makes an `init` that
follows it, `on_any_mesh` lets the compiler lay out what runs under a mesh with
explicit axes.

Axes: m projected side, n other side, r rank; leading axes are batch.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax import paths
from galore_optax.checks import require
from galore_optax.projection import Projection, watched

# Fields of 8-bit arrays.
CODED = {'codes', 'scale', 'offset'}

_is_place = lambda x: isinstance(x, NamedSharding)


def state_shardings(tx: Any, params: Any, shardings: Any) -> Any:
  """Returns where each leaf of the state of `tx` lives.

  What has a weight's shape lives where the weight does. Of a projected weight,
  moments [..., r, n] are cut along n and a basis [..., r, m] along m, over all
  mesh axes that the weight is cut over, whichever side that is: a state is
  never whole on a device. 8-bit codes of a stack, and their scales, are cut
  along the stack where its length allows: along n a block might lie on two
  devices. Nothing is cut along r. What no axis divides, and counters, are whole
  on every device.

  NNX variables count as the arrays in them, and `flax.nnx.Optimizer` keeps
  plain arrays: axes that a variable names are those of its weight alone. For
  the same reason take linen's boxes off first, by `flax.linen.unbox`.

  Args:
    tx: any transformation, or what else has an `init`, as `layerwise` does.
    params: parameters, or `jax.ShapeDtypeStruct`s of them.
    shardings: a `jax.sharding.NamedSharding` for each parameter.

  Returns:
    A tree like `tx.init(params)`, of `NamedSharding`s: `out_shardings` of a
    jitted `init`, which does not know of them. Called with sharded parameters,
    an `init` that is not jitted follows them by itself.

  Raises:
    ValueError: a parameter has another kind of sharding.

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
  return _shardings(tx.init, _unboxed(params), _unboxed(shardings))


def _shardings(init: Callable[[Any], Any], params: Any, shardings: Any) -> Any:
  with watched() as seen:
    # Of bare shapes: where an operation's result lives need not be said. A new
    # function: what was traced before would not be watched again.
    bare = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    state = jax.eval_shape(lambda w: init(w), jax.tree.map(bare, params))
  leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
  owners = [path for path, _ in leaves]
  names, places = paths.paths(params), treedef.flatten_up_to(shardings)
  for name, place in zip(names, places, strict=True):
    require(f'a NamedSharding for {name}', _is_place, shardings=place)

  def of_leaf(path, x):
    owner = paths.owner(path, owners)
    if owner is None:
      return NamedSharding(places[0].mesh, PartitionSpec())
    shape, place = leaves[owner][1].shape, places[owner]
    cuts = [*map(_axes, place.spec), *((),) * len(shape)][: len(shape)]
    plan = seen.plans.get(names[owner])
    fields = {getattr(key, 'name', None) for key in path}
    if plan is not None:
      shape, cuts = _of_low(plan, shape, cuts, basis=paths.BASIS in path)
      first = cuts[0] + cuts[-1]
      if plan.batch and fields & CODED and _fits(place.mesh, shape[0], first):
        cuts = [first, *cuts[1:-1], ()]
    spec = _fitted(place.mesh, x.shape, _like(fields, x.shape, shape, cuts))
    return NamedSharding(place.mesh, spec)

  return jax.tree_util.tree_map_with_path(of_leaf, state)


def _axes(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes that an entry of a partition names."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _of_low(plan: Projection, shape, cuts, *, basis: bool = False):
  """Returns shape and axes of a projected gradient, or of a basis.

  A layer-wise step plans for one layer: axes before the plan's are a stack's.
  """
  num, side = len(shape) - len(plan.shape), plan.sides[0]
  of = lambda axes: sum((cuts[num + axis] for axis in axes), ())
  # The axes of an array's own side come first: less has to move.
  near, far = of(plan.axes[side]), of(plan.axes[-3 - side])
  low = (*shape[:num], *plan.low_shape)
  batch = [*cuts[:num], *(cuts[num + axis] for axis in plan.batch_axes)]
  # A single column, of entries one by one, has rows alone to cut.
  rows = near + far if low[-1] == 1 else ()
  if basis:
    return (*low[:-1], plan.matrix_shape[side]), [*batch, rows, near + far]
  return low, [*batch, rows, far + near if len(plan.sides) == 1 else ()]


def _fitted(mesh: Any, shape, cuts) -> PartitionSpec:
  """Returns the partition, of no more axes than divide a dimension."""

  def of_side(size, axes):
    while not _fits(mesh, size, axes):
      axes = axes[:-1]
    return axes or None

  return PartitionSpec(*map(of_side, shape, cuts))


def _fits(mesh: Any, size: int, axes: tuple[str, ...]) -> bool:
  return size % math.prod(mesh.shape[axis] for axis in axes) == 0


def _like(fields, shape, whole, cuts) -> list[tuple[str, ...]]:
  """Returns the axes of a leaf that follows an array of shape `whole`."""
  if len(shape) == len(whole):
    return cuts
  if len(shape) == len(whole) - 1:
    if fields & {'scale', 'offset'}:  # Numbers that elements share.
      return [*cuts[:-2], cuts[-2] + cuts[-1]]
    for axis in (-2, -1) if 'v_col' in fields else (-1, -2):
      left = [i for i in range(len(whole)) if i != axis % len(whole)]
      if shape == tuple(whole[i] for i in left):
        return [cuts[i] for i in left]
  alike = shape == whole[: len(shape)]
  return cuts[: len(shape)] if alike else [()] * len(shape)


def placed(init: Callable) -> Callable:
  """Returns an `init` whose state lives where `state_shardings` says.

  It does where the places of its last argument, the parameters, are known:
  of arrays, and of what is traced under a mesh with explicit axes.
  """

  @functools.wraps(init)
  def init_fn(*args):
    one, params = functools.partial(init, *args[:-1]), _unboxed(args[-1])
    typed = jax.sharding.get_abstract_mesh().explicit_axes
    leaves = jax.tree.leaves(params)
    # What is traced has a place by its type, under explicit axes, or none.
    place = lambda x: getattr(jax.typeof(x) if typed else x, 'sharding', None)
    known = lambda x: isinstance(x, jax.Array) and _is_place(place(x))
    if not leaves or not all(map(known, leaves)):
      return one(params)
    places = _shardings(one, params, jax.tree.map(place, params))
    if not typed:
      return jax.jit(one, out_shardings=places)(params)
    specs = jax.tree.map(lambda x: x.spec, places)
    return jax.jit(jax.sharding.auto_axes(one, out_sharding=specs))(params)

  return init_fn


def _unboxed(params: Any) -> Any:
  """Returns the arrays of NNX variables, and other leaves as they are.

  A variable names the axes that cut it, and its optimizer would cut whatever
  stands in a copy of it alike: a basis has other sides.
  """
  is_variable = lambda x: hasattr(x, 'get_metadata')
  one = lambda x: jax.tree.leaves(x)[0] if is_variable(x) else x
  return jax.tree.map(one, params, is_leaf=is_variable)


def on_any_mesh(like: Callable) -> Callable[[Callable], Callable]:
  """Lets the compiler lay out what a function does, whatever the mesh.

  Under a mesh with explicit axes each operation would have to say where its
  result lives: here the result of the whole does.

  Args:
    like: a function of the positional arguments: a tree of what lives where
      the result does, arrays or partitions.
  """
  return lambda f: functools.wraps(f)(
    lambda *args, **kwargs: _run(f, like, args, kwargs)
  )


def _run(f, like, args, kwargs):
  if not jax.sharding.get_abstract_mesh().explicit_axes:
    return f(*args, **kwargs)
  leaves, treedef = jax.tree.flatten((args, kwargs))
  every = dict(enumerate(leaves))
  arrays = {i: x for i, x in every.items() if isinstance(x, jax.Array)}

  def run(arrays):
    args, kwargs = treedef.unflatten((every | arrays).values())
    return f(*args, **kwargs)

  place = lambda x: x if _is_place(x) else jax.typeof(x).sharding
  specs = jax.tree.map(lambda x: place(x).spec, like(*args))
  return jax.sharding.auto_axes(run, out_sharding=specs)(arrays)


def low_sharding(plan: Any, x: jax.Array) -> NamedSharding:
  """Returns where a leaf's projected gradient lives, by the leaf's type."""
  place = jax.typeof(x).sharding
  if not isinstance(plan, Projection):
    return place
  low = _of_low(plan, x.shape, [*map(_axes, place.spec)])
  return NamedSharding(place.mesh, _fitted(place.mesh, *low))
