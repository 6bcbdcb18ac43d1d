"""This module holds the projection of one weight: which sides, and how.

Axes: i input (rows of a Flax kernel), o output (columns); m the projected
side, n the other, r the rank. Leading axes (layers, experts) are batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Basis: TypeAlias = tuple[jax.Array, ...]
"""For each projected side, orthonormal rows [..., r, m] or coordinates [..., r]
(integers)."""

Axes: TypeAlias = tuple[int | Sequence[int], Any]
"""The input and the output axes of a weight; all other axes are batch. As
output axes, `...` stands for all that are left."""

SIDES = ('std', 'reverse_std', 'left', 'right', 'full')

ROWS, COLUMNS = -2, -1


@dataclasses.dataclass(frozen=True)
class Projection:
  """How one weight is projected. Static: it holds no array."""

  path: str
  """Path of the weight, keys joined by '/'."""
  shape: tuple[int, ...]
  """Shape of the weight."""
  axes: tuple[tuple[int, ...], tuple[int, ...]]
  """Its input and output axes, non-negative."""
  rank: int
  """Number r of basis vectors."""
  sides: tuple[int, ...]
  """Projected axes of the matrix: ROWS, COLUMNS or both."""

  @property
  def batch_axes(self) -> tuple[int, ...]:
    """The axes that are neither input nor output."""
    used = self.axes[0] + self.axes[1]
    return tuple(axis for axis in range(len(self.shape)) if axis not in used)

  @property
  def matrix_shape(self) -> tuple[int, ...]:
    """Shape [..., i, o] of the weight as a stack of matrices."""
    sizes = (self.batch_axes, self.axes[0], self.axes[1])
    batch, i, o = ([self.shape[axis] for axis in group] for group in sizes)
    return (*batch, math.prod(i), math.prod(o))

  @property
  def low_shape(self) -> tuple[int, ...]:
    """Shape of the projected gradient, and so of its moments."""
    *batch, i, o = self.matrix_shape
    low_i = self.rank if ROWS in self.sides else i
    low_o = self.rank if COLUMNS in self.sides else o
    return (*batch, low_i, low_o)

  @property
  def num_matrices(self) -> int:
    """Number of matrices in the stack."""
    return math.prod(self.matrix_shape[:-2])


def projected_sides(side: str, i: int, o: int) -> tuple[int, ...]:
  """Returns which axes of an [i, o] matrix `side` projects.

  'std' is the shorter side, ties to the input; 'reverse_std' the longer,
  ties to the output: the PyTorch reference's rules on its (out, in) weights.

  >>> projected_sides('std', 32, 64) == (ROWS,)
  True
  >>> projected_sides('reverse_std', 32, 32) == (COLUMNS,)
  True
  """
  shorter, longer = (ROWS, COLUMNS) if i <= o else (COLUMNS, ROWS)
  return {
    'std': (shorter,),
    'reverse_std': (longer,),
    'left': (ROWS,),
    'right': (COLUMNS,),
    'full': (ROWS, COLUMNS),
  }[side]


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
  i, o = projection.axes
  x = x.transpose(projection.batch_axes + i + o)
  return x.reshape(projection.matrix_shape)


def from_matrix(projection: Projection, x: jax.Array) -> jax.Array:
  """Returns [..., i, o] in the weight's own shape; inverts `to_matrix`.

  >>> p = Projection('w', (2, 3, 5), ((0,), (1, 2)), 1, (ROWS,))
  >>> from_matrix(p, jnp.zeros((2, 15))).shape
  (2, 3, 5)
  """
  i, o = projection.axes
  order = projection.batch_axes + i + o
  x = x.reshape([projection.shape[axis] for axis in order])
  return x.transpose([order.index(axis) for axis in range(len(order))])


def project(projection: Projection, g: jax.Array, basis: Basis) -> jax.Array:
  """Returns the low-rank gradient, `P g`, `g P^T` or `P g Q^T`, in float32.

  Args:
    projection: how the weight is projected.
    g: gradient in the weight's shape.
    basis: of each projected side.

  Cost: 2 r i o flops a side.

  >>> p = Projection('w', (3, 5), ((0,), (1,)), 2, (ROWS,))
  >>> project(p, jnp.ones((3, 5)), (jnp.eye(2, 3),)).shape
  (2, 5)
  """
  return contract(projection.sides, to_matrix(projection, g), basis)


def unproject(
  projection: Projection, low: jax.Array, basis: Basis
) -> jax.Array:
  """Returns the weight-shaped array whose projection is `low`, in float32.

  It inverts `project` on the span of the basis.

  >>> p = Projection('w', (3, 5), ((0,), (1,)), 2, (ROWS,))
  >>> unproject(p, jnp.ones((2, 5)), (jnp.eye(2, 3),)).sum()
  Array(10., dtype=float32)
  """
  *_, i, o = projection.matrix_shape
  size = {ROWS: i, COLUMNS: o}
  for side, basis_rm in zip(projection.sides, basis, strict=True):
    low_rn = orient(low, side)
    if jnp.issubdtype(basis_rm.dtype, jnp.integer):
      whole_mn = _scatter(basis_rm, low_rn, size[side])
    else:
      whole_mn = _matmul(jnp.swapaxes(basis_rm, -2, -1), low_rn)
    low = orient(whole_mn, side)
  return from_matrix(projection, low)


def contract(
  sides: Sequence[int], x: jax.Array, matrices: Sequence[jax.Array]
) -> jax.Array:
  """Returns `x` with each side m replaced by r, through rows [..., r, m].

  >>> contract((COLUMNS,), jnp.ones((3, 5)), (jnp.eye(2, 5),)).shape
  (3, 2)
  """
  for side, rows_rm in zip(sides, matrices, strict=True):
    x_mn = orient(x, side)
    if jnp.issubdtype(rows_rm.dtype, jnp.integer):
      low_rn = jnp.take_along_axis(x_mn, rows_rm[..., None], axis=-2)
    else:
      low_rn = _matmul(rows_rm, x_mn)
    x = orient(low_rn, side)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def overlap(new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns `P_new P_old^T` [..., r, r], of rows or of coordinates.

  >>> overlap(jnp.array([0, 2]), jnp.array([2, 3]))
  Array([[0., 0.],
         [1., 0.]], dtype=float32)
  """
  if jnp.issubdtype(new.dtype, jnp.integer):
    return jnp.float32(new[..., :, None] == old[..., None, :])
  return _matmul(new, jnp.swapaxes(old, -2, -1))


def _scatter(index_r: jax.Array, low_rn: jax.Array, m: int) -> jax.Array:
  """Returns zeros [..., m, n] with the rows of `low` at the indices."""
  *batch, r, n = low_rn.shape
  one = lambda index_r, low_rn: (
    jnp.zeros((m, n), low_rn.dtype).at[index_r].set(low_rn)
  )
  whole = jax.vmap(one)(index_r.reshape(-1, r), low_rn.reshape(-1, r, n))
  return whole.reshape(*batch, m, n)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns `a @ b` with operands as they are stored, summed in float32."""
  dtype = jnp.promote_types(a.dtype, b.dtype)
  wide = jnp.promote_types(dtype, jnp.float32)
  as_stored = lambda a, b: jnp.matmul(
    a.astype(dtype), b.astype(dtype), preferred_element_type=wide
  )
  as_wide = lambda a, b: a.astype(wide) @ b.astype(wide)
  if dtype == wide:
    return as_wide(a, b)
  # XLA's CPU backend has no bfloat16 product summed in float32 for all shapes.
  return jax.lax.platform_dependent(a, b, cpu=as_wide, default=as_stored)
