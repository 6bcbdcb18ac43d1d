"""This module holds the projection of one weight: which sides, and how.

Axes: i input (rows of a Flax kernel), o output (columns); m the projected
side, n the other, r the rank. Leading axes (layers, experts) are batch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

Basis: TypeAlias = jax.Array | tuple[jax.Array, ...]
"""Orthonormal rows [..., r, m]; for side 'full' a pair, input side first."""

Axes: TypeAlias = tuple[int | Sequence[int], int | Sequence[int]]
"""The input and the output axes of a weight; all other axes are batch."""

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
  def basis_shapes(self) -> tuple[tuple[int, ...], ...]:
    """Shape [..., r, m] of the basis of each projected side."""
    batch = self.matrix_shape[:-2]
    return tuple(
      (*batch, self.rank, self.matrix_shape[side]) for side in self.sides
    )


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
    basis: orthonormal rows [..., r, m], or a pair of them.

  Cost: 2 r i o flops a side.

  >>> p = Projection('w', (3, 5), ((0,), (1,)), 2, (ROWS,))
  >>> project(p, jnp.ones((3, 5)), jnp.eye(2, 3)).shape
  (2, 5)
  """
  low = to_matrix(projection, g)
  for side, basis_rm in _sides(projection, basis):
    low = orient(_matmul(basis_rm, orient(low, side)), side)
  return low


def unproject(projection: Projection, low: jax.Array, basis: Basis):
  """Returns the weight-shaped array whose projection is `low`, in float32.

  It inverts `project` on the span of the basis.

  >>> p = Projection('w', (3, 5), ((0,), (1,)), 2, (ROWS,))
  >>> unproject(p, jnp.ones((2, 5)), jnp.eye(2, 3)).sum()
  Array(10., dtype=float32)
  """
  for side, basis_rm in _sides(projection, basis):
    basis_mr = jnp.swapaxes(basis_rm, -2, -1)
    low = orient(_matmul(basis_mr, orient(low, side)), side)
  return from_matrix(projection, low)


def _sides(projection: Projection, basis: Basis):
  bases = basis if isinstance(basis, tuple) else (basis,)
  return zip(projection.sides, bases, strict=True)


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
