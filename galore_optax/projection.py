"""How one weight is projected: its sides, its rank, and the two products.

A leaf of the parameters has a plan: a `Projection`, or a `Whole` if it is not
projected. Both have `inner_params`, `project` and `unproject`. The module
`plan` makes them.

Axes: i input (rows of a Flax kernel), o output (columns); m the projected
side, n the other side, r the rank. Leading axes (layers, experts) are batch.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from galore_optax.precision import at_least_float32

Basis: TypeAlias = tuple[jax.Array, ...]
"""For each projected side: orthonormal rows [..., r, m], or indices [..., r] of
coordinates. It is empty for a leaf that is not projected."""

Axes: TypeAlias = tuple[int | Sequence[int], Any]
"""The input axes and the output axes of a weight. All other axes are batch.
`...` as output axes stands for all axes that are not input axes."""

Side: TypeAlias = Literal['std', 'reverse_std', 'left', 'right', 'both', 'full']
"""The side of a weight to project; 'full' is another name of 'both'."""

ROWS, COLUMNS = -2, -1


@dataclasses.dataclass(frozen=True)
class Whole:
  """The plan of a leaf that is not projected.

  The inner optimizer receives the leaf in its own shape, in float32 at least.
  """

  path: str
  """Path of the weight, its keys joined by '/'."""
  shape: tuple[int, ...]
  """Shape of the weight."""
  reason: str = dataclasses.field(default='', compare=False)
  """Why the leaf is not projected, for tables."""
  too_small: bool = dataclasses.field(
    default=False, compare=False, kw_only=True
  )
  """Whether the leaf is a matrix that is not projected because of its size."""

  rank, sides = None, ()

  def inner_params(self, w: Any) -> Any:
    """Returns the parameter that the inner optimizer receives: the weight."""
    return at_least_float32(w)

  def project(self, g: jax.Array, basis: Basis) -> jax.Array:
    """Returns the gradient in float32 at least."""
    return at_least_float32(g)

  def unproject(self, low: jax.Array, basis: Basis) -> jax.Array:
    """Returns the update unchanged."""
    return low


@dataclasses.dataclass(frozen=True)
class Projection:
  """The plan of a projected leaf. It is static: it holds no array.

  Example:
    >>> p = Projection('w', (5, 3), ((0,), (1,)), 2, (COLUMNS,))
    >>> low_rn = p.project(jnp.ones((5, 3)), (jnp.eye(2, 3),))
    >>> low_rn.shape, p.unproject(low_rn, (jnp.eye(2, 3),)).shape
    ((2, 5), (5, 3))
  """

  path: str
  """Path of the weight, its keys joined by '/'."""
  shape: tuple[int, ...]
  """Shape of the weight."""
  axes: tuple[tuple[int, ...], tuple[int, ...]]
  """Input axes and output axes of the weight, non-negative."""
  rank: int
  """Number r of basis vectors."""
  sides: tuple[int, ...]
  """Projected axes of the matrix [i, o]: ROWS, COLUMNS, or both."""
  reason: str = dataclasses.field(default='', compare=False)
  """Why the leaf is projected, for tables."""

  @property
  def batch_axes(self) -> tuple[int, ...]:
    """The axes that are neither input nor output."""
    used = self.axes[0] + self.axes[1]
    return tuple(axis for axis in range(len(self.shape)) if axis not in used)

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """Shape [..., i, o] of the weight as a stack of matrices."""
    i, o = (math.prod(self.shape[axis] for axis in axes) for axes in self.axes)
    return (*(self.shape[axis] for axis in self.batch_axes), i, o)

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
    """Shape [..., r, n] of the projected gradient; [..., r, r] for both sides.

    The side n comes last whichever side is projected. A block of 8-bit
    codes then covers entries of one basis vector, which are of similar size.
    """
    both = len(self.sides) > 1
    n = self.rank if both else self.matrix_shape[-3 - self.sides[0]]
    return (*self.batch, self.rank, n)

  def inner_params(self, w: Any) -> jax.Array:
    """Returns the parameter that the inner receives: zeros [..., r, n]."""
    return jnp.zeros(self.low_shape, jnp.promote_types(w.dtype, jnp.float32))

  def project(self, g: jax.Array, basis: Basis) -> jax.Array:
    """Returns the low-rank gradient [..., r, n] in float32 at least.

    Cost: at most 2 r i o flops a side.

    Args:
      g: gradient in the weight's shape.
      basis: rows or indices of each projected side.
    """
    x_mn = orient(to_matrix(self, g), self.sides[0])
    return at_least_float32(self.project_sides(x_mn, basis))

  def unproject(self, low: jax.Array, basis: Basis) -> jax.Array:
    """Returns P^T low in the weight's shape, in float32 at least.

    For a basis P with orthonormal rows, the projection of the result is `low`.
    """
    x = orient(low, self.sides[0])
    for side, rows_rm in zip(self.sides, basis, strict=True):
      x = _unproject_side(x, rows_rm, side, self.matrix_shape[side])
    return from_matrix(self, x)

  def project_sides(
    self, x_mn: jax.Array, rows: Sequence[jax.Array]
  ) -> jax.Array:
    """Returns `x` with each projected side m replaced by r.

    Args:
      x_mn: a matrix [..., m, n] with the first projected side first.
      rows: [..., r, m] for each projected side, or indices [..., r].
    """
    for side, rows_rm in zip(self.sides, rows, strict=True):
      axis = ROWS if side == self.sides[0] else COLUMNS
      x_mn = _project_side(x_mn, rows_rm, axis)
    return x_mn


def map_plans(
  f: Callable[..., Any], plans: Sequence[Any], tree: Any, *trees: Any
) -> Any:
  """Returns a tree of f(plan, leaf, ...) for each leaf of `tree`.

  Args:
    f: a function of a plan, a leaf, and the subtrees of the other trees at the
      place of that leaf.
    plans: one for each leaf.
    tree: parameters or gradients.
    *trees: trees with the structure of `tree`, or with subtrees as its leaves.

  Example:
    >>> plans = [Whole('w', ())]
    >>> map_plans(lambda p, x, y: p.rank or y, plans, {'w': 0}, {'w': 3})
    {'w': 3}
  """
  leaves, treedef = jax.tree.flatten(tree)
  rest = [treedef.flatten_up_to(other) for other in trees]
  return treedef.unflatten(map(f, plans, leaves, *rest))


class Recorded(NamedTuple):
  """The plans and multipliers that `init` records, by path."""

  plans: dict[str, Projection | Whole]
  """The plan of each leaf, whether it is projected or not."""
  multipliers: dict[str, tuple[Any, Any]]
  """Multipliers of learning rate and weight decay, if there are groups."""


_recording: contextvars.ContextVar[Recorded | None] = contextvars.ContextVar(
  'recording', default=None
)


@contextlib.contextmanager
def recording_plans() -> Iterator[Recorded]:
  """Yields a record to which each `galore` adds its plans at `init`.

  `describe` and `state_shardings` thereby find the plans behind any wrapper.
  The plans cannot be part of the state: flax serializes arrays only, and a
  seed does not have the shape of a basis.
  """
  recorded = Recorded({}, {})
  token = _recording.set(recorded)
  try:
    yield recorded
  finally:
    _recording.reset(token)


def record_plans(plans: Sequence[Projection | Whole]) -> None:
  """Records the plans if a `recording_plans()` context is active.

  A `Whole` does not replace a `Projection`: another `galore` in the same
  transformation may project the leaf.
  """
  recorded = _recording.get()
  if recorded is None:
    return
  for p in plans:
    if isinstance(p, Projection) or p.path not in recorded.plans:
      recorded.plans[p.path] = p


def record_multipliers(multipliers: dict[str, tuple[Any, Any]]) -> None:
  """Records multipliers if a `recording_plans()` context is active."""
  recorded = _recording.get()
  if recorded is not None:
    recorded.multipliers.update(multipliers)


def projected_sides(side: Side, i: int, o: int) -> tuple[int, ...]:
  """Returns the axes of an [i, o] matrix that `side` projects.

  'std' is the shorter side (the input if both are equal). 'reverse_std' is
  the longer side (the output if both are equal). These are the rules of the
  PyTorch reference for its weights [out, in].

  >>> projected_sides('std', 32, 64) == (ROWS,)
  True
  >>> projected_sides('reverse_std', 32, 32) == (COLUMNS,)
  True
  """
  shorter, longer = (ROWS, COLUMNS) if i <= o else (COLUMNS, ROWS)
  sides = {
    'std': (shorter,),
    'reverse_std': (longer,),
    'left': (ROWS,),
    'right': (COLUMNS,),
    'both': (ROWS, COLUMNS),
    'full': (ROWS, COLUMNS),
  }
  return sides[side]


def orient(x: jax.Array, side: int) -> jax.Array:
  """Returns `x` with the projected side second to last: [..., m, n].

  The function is its own inverse.

  >>> orient(jnp.zeros((3, 4, 7)), COLUMNS).shape
  (3, 7, 4)
  """
  return x if side == ROWS else jnp.swapaxes(x, ROWS, COLUMNS)


def to_matrix(projection: Projection, x: jax.Array) -> jax.Array:
  """Returns a weight-shaped array as a stack of matrices [..., i, o].

  >>> p = Projection('w', (2, 3, 5), ((0,), (1, 2)), 1, (ROWS,))
  >>> to_matrix(p, jnp.zeros((2, 3, 5))).shape
  (2, 15)
  """
  x = x.transpose(
    projection.batch_axes + projection.axes[0] + projection.axes[1]
  )
  return x.reshape(projection.matrix_shape)


def from_matrix(projection: Projection, x: jax.Array) -> jax.Array:
  """Returns a stack [..., i, o] in the weight's shape; inverts `to_matrix`.

  >>> p = Projection('w', (2, 3, 5), ((0,), (1, 2)), 1, (ROWS,))
  >>> from_matrix(p, jnp.zeros((2, 15))).shape
  (2, 3, 5)
  """
  order = projection.batch_axes + projection.axes[0] + projection.axes[1]
  x = x.reshape([projection.shape[axis] for axis in order])
  return x.transpose([order.index(axis) for axis in range(len(order))])


def overlap(new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns `P_new P_old^T` [..., r, r] for two bases of one side.

  >>> overlap(jnp.array([0, 2]), jnp.array([2, 3]))
  Array([[0., 0.],
         [1., 0.]], dtype=float32)
  """
  if jnp.issubdtype(new.dtype, jnp.integer):
    return jnp.float32(new[..., :, None] == old[..., None, :])
  return _matmul(new, jnp.swapaxes(old, -2, -1))


def _project_side(x: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
  """Returns `x` with an axis m replaced by r: the product with a basis."""
  x_mn = orient(x, axis)
  if jnp.issubdtype(rows.dtype, jnp.integer):
    low_rn = jnp.take_along_axis(x_mn, rows[..., None], axis=-2)
  else:
    low_rn = _matmul(rows, x_mn)
  return orient(low_rn, axis)


def _unproject_side(
  x: jax.Array, rows: jax.Array, side: int, m: int
) -> jax.Array:
  """Returns `x` with a side r replaced by m; transposes `_project_side`."""
  if jnp.issubdtype(rows.dtype, jnp.integer):
    return orient(_scatter(rows, orient(x, side), m), side)
  return _matmul(rows.mT, x) if side == ROWS else _matmul(x, rows)


def _scatter(index_r: jax.Array, low_rn: jax.Array, m: int) -> jax.Array:
  """Returns zeros [..., m, n] with the rows of `low` at the indices."""
  *batch, r, n = low_rn.shape
  zeros_mn = jnp.zeros((m, n), low_rn.dtype)
  whole_kmn = jax.vmap(
    lambda index_r, low_rn: zeros_mn.at[index_r].set(low_rn)
  )(index_r.reshape(-1, r), low_rn.reshape(-1, r, n))
  return whole_kmn.reshape(*batch, m, n)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `a @ b`, summed in float32 at least."""
  dtype = jnp.promote_types(a.dtype, b.dtype)
  sum_dtype = jnp.promote_types(dtype, jnp.float32)
  if dtype == sum_dtype:
    return a.astype(dtype) @ b.astype(dtype)
  # XLA's CPU backend does not compile bfloat16 products with float32 sums for
  # every shape, so it multiplies float32 copies.
  return jax.lax.platform_dependent(
    a.astype(dtype),
    b.astype(dtype),
    cpu=lambda a, b: a.astype(sum_dtype) @ b.astype(sum_dtype),
    default=lambda a, b: jnp.matmul(a, b, preferred_element_type=sum_dtype),
  )
