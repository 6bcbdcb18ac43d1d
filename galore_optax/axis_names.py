"""Names of axes in boxes of flax, for the arrays of optimizer state.

A box of flax names the mesh axes, or logical axes, of the dimensions of a
weight. Such boxes are `flax.linen.Partitioned`,
`flax.linen.LogicallyPartitioned` and a `flax.nnx.Variable` with `out_sharding`.
Programs read the sharding of the whole training state from them, and an array
without a box is replicated. `boxed_state` puts the state of a boxed weight into
boxes, with the names that `state_shardings` would use.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax import containers
from galore_optax.containers import AxisMetadata, Variable
from galore_optax.sharding import (
  MeshAxes,
  StateLeaf,
  as_axes,
  cuts_of,
  map_state,
)

SHARDING = 'out_sharding'
"""Metadata of an NNX variable: the mesh axes of its dimensions."""
OF_STATE = 'optimizer_sharding'
"""Metadata of an NNX variable that replaces SHARDING for optimizer state."""


def boxed_state(init: Callable[[Any], Any], state: Any, params: Any) -> Any:
  """Returns a state whose arrays are in boxes like those of their weights.

  The names of a box are those that `state_shardings` returns for the array. If
  the names are logical and the rules that map them to mesh axes are not known
  yet, a dimension has one name only, although `state_shardings` may shard it
  over two axes.

  Args:
    init: the function of opened parameters that returned the state.
    state: its result.
    params: parameters in their containers.
  """
  names = _of_params(params)
  if not any(names):
    return state
  plain = containers.opened(params)
  shapes = [x.shape for x in jax.tree.leaves(plain)]
  cuts = [
    [()] * len(shape) if one is None else one.cuts(len(shape))
    for one, shape in zip(names, shapes, strict=True)
  ]

  def fits(owner: int, size: int, axes: MeshAxes) -> bool:
    one = names[owner]
    return one is None or one.fits(shapes[owner], size, axes)

  def boxing(leaf: StateLeaf) -> Callable[[Any], Any]:
    one = None if leaf.owner is None else names[leaf.owner]
    if one is None or leaf.owner is None or not leaf.shape:
      return lambda array: array
    return functools.partial(one.box, one.entries(leaf, shapes[leaf.owner]))

  boxings = map_state(boxing, init, plain, cuts, fits)
  return jax.tree.map(lambda box, x: box(x), boxings, state)


@dataclasses.dataclass(frozen=True)
class Names:
  """The names of a weight's dimensions."""

  names: tuple[Any, ...]
  """For each dimension a name, several names, or None. There may be fewer names
  than dimensions."""
  box: Callable[[tuple[Any, ...], Any], Any]
  """`(names, array) -> box`: a box of the same kind with other names."""
  rules: Sequence[tuple[str, Any]]
  """Pairs of a logical name and its mesh axes. Without rules the names may
  already be mesh axes."""
  logical: bool
  """Whether names without a rule are replicated, instead of mesh axes."""
  mesh: Any
  """The mesh, or None if it is not known yet."""

  def cuts(self, ndim: int) -> list[MeshAxes]:
    """Returns the mesh axes, or else the logical names, of each dimension."""
    cuts = cuts_of(self.names, ndim)
    return _by_rules(cuts, self.rules, self.logical) if self.rules else cuts

  def fits(self, shape: Sequence[int], size: int, axes: MeshAxes) -> bool:
    """Whether mesh axes divide a dimension of the state.

    If the mesh is not known, each of its axes divides the number of devices and
    the dimension of the weight to which it belongs.

    Args:
      shape: of the weight.
      size: of the dimension.
      axes: the mesh axes.
    """
    if self.mesh is not None:
      # A name without a rule is not an axis of the mesh.
      count = math.prod(self.mesh.shape.get(axis, 1) for axis in axes)
      return size % count == 0
    whole = [
      length
      for length, cut in zip(shape, self.cuts(len(shape)), strict=True)
      if cut == axes
    ]
    return any(size % n == 0 for n in whole) or not size % jax.device_count()

  def entries(self, leaf: StateLeaf, shape: Sequence[int]) -> tuple[Any, ...]:
    """Returns the names of the dimensions of an array of the state.

    Args:
      leaf: the array.
      shape: of the weight.
    """
    axes: Sequence[MeshAxes] = leaf.axes
    if self.logical and not self.rules and leaf.plan is not None:
      # A layer-wise step plans for one layer of a stack.
      cuts = self.cuts(len(shape))[len(shape) - len(leaf.plan.shape) :]
      side = leaf.plan.sides[0]
      near = _first_name(cuts, leaf.plan.axes[side])
      far = _first_name(cuts, leaf.plan.axes[-3 - side])
      own, other = (near, far) if leaf.is_basis else (far, near)
      axes = _one_name_each(leaf.shape, axes, (own, other, near))
    return tuple(self._entry(one) for one in axes)

  def _entry(self, axes: MeshAxes) -> Any:
    """Returns the entry of one dimension."""
    # The name of a stack is kept even if no mesh axis belongs to it: programs
    # that find a stack without this name insert it.
    axes = tuple(x for x in axes if not isinstance(x, Unassigned)) or axes[:1]
    if len(axes) != 1:
      return axes or None
    # Flax looks up a single name, but not several names, in the rules.
    for name, mesh_axes in self.rules:
      if name in self.names and as_axes(mesh_axes) == axes:
        return name
    return str(axes[0])


class Unassigned(str):
  """A logical name to which the rules assign no mesh axis."""


def _of_params(params: Any) -> list[Names | None]:
  """Returns the names of each leaf of opened(params); None without names."""
  names: list[Names | None] = []
  for node in jax.tree.leaves(params, is_leaf=containers.is_box):
    leaves = jax.tree.leaves(containers.opened(node))
    one = _of_box(node) if containers.is_box(node) else None
    names += [one if len(leaves) == 1 else None] * len(leaves)
  return names


def _of_box(box: Any) -> Names | None:
  """Returns the names in a box; None if it has none."""
  if isinstance(box, Variable):
    return _of_variable(box)
  names = getattr(box, 'names', None)
  if not isinstance(box, AxisMetadata) or not isinstance(names, tuple):
    return None

  def renamed(names: tuple[Any, ...], x: Any) -> Any:
    return dataclasses.replace(some, value=x, names=names)

  some: Any = box
  logical = hasattr(box, 'rules')
  rules = (getattr(box, 'rules', None) or _context_rules()) if logical else ()
  mesh = getattr(box, 'mesh', None) or _context_mesh()
  return Names(names, renamed, rules, logical, mesh)


def _of_variable(box: Variable) -> Names | None:
  """Returns the names of an NNX variable; None if it has none."""
  metadata = box.get_metadata()
  key = OF_STATE if metadata.get(OF_STATE) else SHARDING
  names = metadata.get(key)
  place = names if isinstance(names, NamedSharding) else None
  if place is not None:
    names = place.spec
  if not names or not isinstance(names, tuple | PartitionSpec):
    return None
  _, boxed = containers.contents(box)

  def renamed(names: tuple[Any, ...], x: Any) -> Any:
    new: Any = (
      names
      if place is None
      else NamedSharding(place.mesh, PartitionSpec(*names))
    )
    variable = boxed(x)
    # The metadata is copied, because copies of a variable may share it.
    variable.set_metadata({**metadata, key: new})
    return variable

  rules = tuple(_context_rules()) + tuple(metadata.get('sharding_rules') or ())
  mesh = metadata.get('mesh') or _context_mesh()
  mesh = mesh if place is None else place.mesh
  return Names(tuple(names), renamed, rules, False, mesh)


def _context_rules() -> Sequence[tuple[str, Any]]:
  """Returns the logical axis rules that are active in flax.

  Flax is not imported here. If a tree has a box of flax, flax is loaded.
  """
  linen = sys.modules.get('flax.linen')
  return () if linen is None else linen.get_logical_axis_rules()


def _context_mesh() -> Any:
  """Returns the mesh of `jax.set_mesh`, or None."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def _by_rules(
  cuts: Sequence[MeshAxes], rules: Sequence[tuple[str, Any]], logical: bool
) -> list[MeshAxes]:
  """Returns mesh axes for logical names, as flax assigns them.

  The first rule whose mesh axes are free determines the axes of a name. A mesh
  axis is assigned once for each array. Several names in one entry are mesh
  axes. A name without mesh axes stays as it is.

  Args:
    cuts: names of each dimension.
    rules: pairs of a name and mesh axes, in order of precedence.
    logical: whether a name without a rule is replicated.
  """
  found: list[MeshAxes | None] = [
    None if len(cut) == 1 else cut for cut in cuts
  ]
  used = {axis for cut in found for axis in cut or ()}
  for name, mesh_axes in rules:
    axes = as_axes(mesh_axes)
    for i, cut in enumerate(cuts):
      if found[i] is None and cut == (name,) and not used & {*axes}:
        found[i], used = axes, used | {*axes}
  known = {name for name, _ in rules}
  return [
    axes or tuple(Unassigned(x) if logical or x in known else x for x in cut)
    for axes, cut in zip(found, cuts, strict=True)
  ]


def _first_name(cuts: Sequence[MeshAxes], axes: Sequence[int]) -> str | None:
  """Returns the first name of some dimensions, or None."""
  names = [name for axis in axes for name in cuts[axis]]
  return names[0] if names else None


def _one_name_each(
  shape: Sequence[int], axes: Sequence[MeshAxes], sides: Sequence[str | None]
) -> list[MeshAxes]:
  """Returns at most one logical name for each dimension.

  Flax accepts one logical name for each dimension. A moment [..., r, n] has two
  names at n, those of both sides of its weight. The other name goes to r if
  every mesh axis divides the rank. Otherwise the name of the projected side is
  kept if it fits: this side is usually that of the model width, which most
  programs shard.

  Args:
    shape: of the array.
    axes: names of each dimension.
    sides: the name of the array's own side, that of its other side, and that of
      the projected side.
  """
  own, other, projected = sides
  num = jax.device_count()
  new = [names[:1] for names in axes]
  if len(axes[-1]) < 2 or not own or not other:
    return new
  new[-1] = (own,)
  if len(shape) > 1 and not axes[-2] and shape[-2] % num == 0:
    new[-2] = (other,)
  elif projected and shape[-1] % num == 0:
    new[-1] = (projected,)
  return new
