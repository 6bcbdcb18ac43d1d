"""The projection of one weight: which side, how, and back.

A leaf has a `Projection`, or a `Whole` where it is not projected: both have the
same methods, so that nothing asks which it is. `plan` makes them.

Axes: i input (rows of a Flax kernel), o output (columns); m the projected
side, n the other, r the rank. Leading axes (layers, experts) are batch.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from galore_optax.precision import full

# For each projected side, orthonormal rows [..., r, m] or coordinates [..., r]
# (integers).
Basis: TypeAlias = tuple[jax.Array, ...]

# The input and the output axes of a weight; all other axes are batch. As output
# axes, `...` stands for all that are left.
Axes: TypeAlias = tuple[int | Sequence[int], Any]

# Which side of a weight is projected.
Side: TypeAlias = Literal['std', 'reverse_std', 'left', 'right', 'full']

ROWS, COLUMNS = -2, -1

_watching: Any = contextvars.ContextVar('watching', default=None)


@dataclasses.dataclass(frozen=True)
class Whole:
  """A leaf that is not projected: the inner sees it as it is, in float32."""

  path: str  # path of the weight, keys joined by '/'
  shape: tuple[int, ...]  # shape of the weight

  rank, sides = None, ()

  def view(self, w: Any) -> Any:
    """Returns what the inner sees as parameter: the weight."""
    return full(w)

  def project(self, g: jax.Array, basis: Basis) -> jax.Array:
    """Returns the gradient in float32."""
    return full(g)

  def unproject(self, low: jax.Array, basis: Basis) -> jax.Array:
    """Returns the update as it is."""
    return low


@dataclasses.dataclass(frozen=True)
class Projection:
  """How one weight is projected. Static: it holds no array.

  Example:
    >>> p = Projection('w', (5, 3), ((0,), (1,)), 2, (COLUMNS,))
    >>> low_rn = p.project(jnp.ones((5, 3)), (jnp.eye(2, 3),))
    >>> low_rn.shape, p.unproject(low_rn, (jnp.eye(2, 3),)).shape
    ((2, 5), (5, 3))
  """

  path: str  # path of the weight, keys joined by '/'
  shape: tuple[int, ...]  # shape of the weight
  # Its input and output axes, non-negative.
  axes: tuple[tuple[int, ...], tuple[int, ...]]
  rank: int  # number r of basis vectors
  sides: tuple[int, ...]  # projected axes of the matrix: ROWS, COLUMNS or both

  @property
  def batch_axes(self) -> tuple[int, ...]:
    """The axes that are neither input nor output."""
    used = self.axes[0] + self.axes[1]
    return tuple(axis for axis in range(len(self.shape)) if axis not in used)

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """Shape [..., i, o] of the weight as a stack of matrices."""
    sizes = lambda axes: [self.shape[axis] for axis in axes]
    i, o = (math.prod(sizes(axes)) for axes in self.axes)
    return (*sizes(self.batch_axes), i, o)

  @property
  def batch(self) -> tuple[int, ...]:
    """Shape of the stack of matrices."""
    return self.matrix_shape[:-2]

  @property
  def num_matrices(self) -> int:
    """Number k of matrices in the stack."""
    return math.prod(self.batch)

  @property
  def low_shape(self) -> tuple[int, ...]:
    """Shape [..., r, n] of the projected gradient; [..., r, r] of both sides.

    Whichever side is projected, so that rows are long: a block of 8 bits then
    holds entries of one direction, which are of one size.
    """
    both = len(self.sides) > 1
    n = self.rank if both else self.matrix_shape[-3 - self.sides[0]]
    return (*self.batch, self.rank, n)

  def view(self, w: Any) -> jax.Array:
    """Returns what the inner sees as parameter: zeros [..., r, n]."""
    return jnp.zeros(self.low_shape, jnp.promote_types(w.dtype, jnp.float32))

  def project(self, g: jax.Array, basis: Basis) -> jax.Array:
    """Returns the low-rank gradient [..., r, n] in float32.

    Args:
      g: gradient in the weight's shape.
      basis: of each projected side.

    Cost: 2 r i o flops a side.
    """
    return full(self.turn(orient(to_matrix(self, g), self.sides[0]), basis))

  def unproject(self, low: jax.Array, basis: Basis) -> jax.Array:
    """Returns the weight-shaped array whose projection is `low`, in float32.

    It inverts `project` on the span of the basis.
    """
    x = orient(low, self.sides[0])
    for side, rows_rm in zip(self.sides, basis, strict=True):
      x = _back(x, rows_rm, side, self.matrix_shape[side])
    return from_matrix(self, x)

  def turn(self, low: jax.Array, turns: Sequence[jax.Array]) -> jax.Array:
    """Returns `low` times a matrix [..., r, r] for each projected side."""
    for side, turn_rr in zip(self.sides, turns, strict=True):
      # The first side is second to last in [..., m, n]; of both, as in [i, o].
      axis = ROWS if side == self.sides[0] else COLUMNS
      low = _through(low, turn_rr, axis)
    return low


def each(f: Callable, plans: Sequence[Any], tree: Any, *trees: Any) -> Any:
  """Returns a tree of f(plan, leaf, ...) for each leaf of `tree`.

  Args:
    f: a function of a plan, a leaf and what the other trees have in its place.
    plans: of each leaf.
    tree: parameters or gradients.
    *trees: trees that may go on where `tree` has a leaf.

  Example:
    >>> each(lambda p, x, y: p.rank or y, [Whole('w', ())], {'w': 0}, {'w': 3})
    {'w': 3}
  """
  leaves, treedef = jax.tree.flatten(tree)
  rest = [treedef.flatten_up_to(other) for other in trees]
  return treedef.unflatten(map(f, plans, leaves, *rest))


class Seen(NamedTuple):
  """What transformations record at `init`, by path."""

  plans: dict[str, Projection]
  """How each projected leaf is projected."""
  multipliers: dict[str, tuple[Any, Any]]
  """Multipliers of learning rate and weight decay, where there are groups."""


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
  """Yields dicts to which each `galore` adds its plans at `init`.

  A description thereby finds the plans behind any wrapper. The state could not
  hold them: flax's msgpack takes no static data, and a seed has no shape.
  """
  seen = Seen({}, {})
  token = _watching.set(seen)
  try:
    yield seen
  finally:
    _watching.reset(token)


def show(plans: Sequence[Projection | Whole]) -> None:
  """Records plans if a `watched()` context is active."""
  seen = _watching.get()
  if seen is not None:
    found = {p.path: p for p in plans if isinstance(p, Projection)}
    seen.plans.update(found)


def show_multipliers(found: dict[str, tuple[Any, Any]]) -> None:
  """Records the multipliers of leaves if a `watched()` context is active."""
  seen = _watching.get()
  if seen is not None:
    seen.multipliers.update(found)


def projected_sides(side: Side, i: int, o: int) -> tuple[int, ...]:
  """Returns which axes of an [i, o] matrix `side` projects.

  'std' is the shorter side, ties to the input; 'reverse_std' the longer,
  ties to the output: the PyTorch reference's rules on its (out, in) weights.

  >>> projected_sides('std', 32, 64) == (ROWS,)
  True
  >>> projected_sides('reverse_std', 32, 32) == (COLUMNS,)
  True
  """
  fixed = {'left': (ROWS,), 'right': (COLUMNS,), 'full': (ROWS, COLUMNS)}
  shorter, longer = (ROWS, COLUMNS) if i <= o else (COLUMNS, ROWS)
  return {'std': (shorter,), 'reverse_std': (longer,), **fixed}[side]


def orient(x: jax.Array, side: int) -> jax.Array:
  """Returns `x` with the projected side second to last: [..., m, n].

  It is its own inverse.

  >>> orient(jnp.zeros((3, 4, 7)), COLUMNS).shape
  (3, 7, 4)
  """
  return x if side == ROWS else jnp.swapaxes(x, ROWS, COLUMNS)


def to_matrix(projection: Projection, x: jax.Array) -> jax.Array:
  """Returns a weight-shaped array as [..., i, o].

  >>> p = Projection('w', (2, 3, 5), ((0,), (1, 2)), 1, (ROWS,))
  >>> to_matrix(p, jnp.zeros((2, 3, 5))).shape
  (2, 15)
  """
  x = x.transpose(projection.batch_axes + sum(projection.axes, ()))
  return x.reshape(projection.matrix_shape)


def from_matrix(projection: Projection, x: jax.Array) -> jax.Array:
  """Returns [..., i, o] in the weight's own shape; inverts `to_matrix`.

  >>> p = Projection('w', (2, 3, 5), ((0,), (1, 2)), 1, (ROWS,))
  >>> from_matrix(p, jnp.zeros((2, 15))).shape
  (2, 3, 5)
  """
  order = projection.batch_axes + sum(projection.axes, ())
  x = x.reshape([projection.shape[axis] for axis in order])
  return x.transpose([order.index(axis) for axis in range(len(order))])


def overlap(new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns `P_new P_old^T` [..., r, r], of rows or of coordinates.

  >>> overlap(jnp.array([0, 2]), jnp.array([2, 3]))
  Array([[0., 0.],
         [1., 0.]], dtype=float32)
  """
  if jnp.issubdtype(new.dtype, jnp.integer):
    return jnp.float32(new[..., :, None] == old[..., None, :])
  return _matmul(new, jnp.swapaxes(old, -2, -1))


def _through(x, rows, axis):
  """Returns `x` with an axis m replaced by r, through rows or coordinates."""
  x_mn = orient(x, axis)
  if not jnp.issubdtype(rows.dtype, jnp.integer):
    return orient(_matmul(rows, x_mn), axis)
  return orient(jnp.take_along_axis(x_mn, rows[..., None], axis=-2), axis)


def _back(x, rows, side, m):
  """Returns `x` with a side r replaced by m; transposes `_through`."""
  if jnp.issubdtype(rows.dtype, jnp.integer):
    return orient(_scatter(rows, orient(x, side), m), side)
  return _matmul(rows.mT, x) if side == ROWS else _matmul(x, rows)


def _scatter(index_r, low_rn, m):
  """Returns zeros [..., m, n] with the rows of `low` at the indices."""
  *batch, r, n = low_rn.shape
  zeros_mn = jnp.zeros((m, n), low_rn.dtype)
  one = lambda index_r, low_rn: zeros_mn.at[index_r].set(low_rn)
  whole = jax.vmap(one)(index_r.reshape(-1, r), low_rn.reshape(-1, r, n))
  return whole.reshape(*batch, m, n)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `a @ b` with operands as they are stored, summed in float32."""
  dtype = jnp.promote_types(a.dtype, b.dtype)
  wide = jnp.promote_types(dtype, jnp.float32)
  as_wide = lambda a, b: a.astype(wide) @ b.astype(wide)
  if dtype == wide:
    return as_wide(a, b)
  as_stored = lambda a, b: jnp.matmul(a, b, preferred_element_type=wide)
  a, b = a.astype(dtype), b.astype(dtype)
  # XLA's CPU backend has no bfloat16 product summed in float32 for all shapes.
  return jax.lax.platform_dependent(a, b, cpu=as_wide, default=as_stored)
