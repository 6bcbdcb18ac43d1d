"""The projection of one weight against NumPy, for every side and layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import projection as lib
from tests.rounding import assert_close


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows(r, m, seed=0):
  """Returns orthonormal rows [r, m]."""
  return np.linalg.qr(normal((m, r), seed))[0].T


@pytest.mark.parametrize(
  'i, o, std, reverse',
  [
    (3, 5, lib.ROWS, lib.COLUMNS),
    (5, 3, lib.COLUMNS, lib.ROWS),
    (4, 4, lib.ROWS, lib.COLUMNS),
  ],
)
def test_sides(i, o, std, reverse):
  assert lib.projected_sides('std', i, o) == (std,)
  assert lib.projected_sides('reverse_std', i, o) == (reverse,)
  assert lib.projected_sides('left', i, o) == (lib.ROWS,)
  assert lib.projected_sides('right', i, o) == (lib.COLUMNS,)
  assert lib.projected_sides('full', i, o) == (lib.ROWS, lib.COLUMNS)


LAYOUTS = {
  # Values are: the shape, the input axes, the output axes, and the einsum that
  # returns a stack of matrices.
  'matrix': ((7, 11), (0,), (1,), 'io->io'),
  'transposed': ((11, 7), (1,), (0,), 'oi->io'),
  'stack': ((3, 7, 11), (1,), (2,), 'lio->lio'),
  'attention': ((7, 2, 5), (0,), (1, 2), 'ihd->ihd'),
  'batch in the middle': ((7, 3, 11), (0,), (2,), 'ilo->lio'),
  'everything': ((5, 7, 3, 2), (1,), (0, 3), 'aiLb->Liab'),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_a_layout_goes_to_matrices_and_back(name):
  shape, i, o, spec = LAYOUTS[name]
  p = lib.Projection(name, shape, (i, o), (3,), (lib.ROWS,))
  x = normal(shape)
  matrices = np.einsum(spec, x).reshape(p.matrix_shape)
  np.testing.assert_array_equal(lib.to_matrix(p, jnp.asarray(x)), matrices)
  back = lib.from_matrix(p, lib.to_matrix(p, jnp.asarray(x)))
  np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
  'sides', [(lib.ROWS,), (lib.COLUMNS,), (lib.ROWS, lib.COLUMNS)]
)
@pytest.mark.parametrize('batch', [(), (2,), (2, 3)])
def test_project_and_unproject(sides, batch):
  i, o, r = 7, 11, 3
  p = lib.Projection(
    'w',
    (*batch, i, o),
    ((len(batch),), (len(batch) + 1,)),
    (r,) * len(sides),
    sides,
  )
  g = normal((*batch, i, o))
  left, right = np.eye(i, dtype=np.float32), np.eye(o, dtype=np.float32)
  basis = ()
  if lib.ROWS in sides:
    left = rows(r, i)
    basis += (jnp.broadcast_to(left, (*batch, r, i)),)
  if lib.COLUMNS in sides:
    right = rows(r, o, 1)
    basis += (jnp.broadcast_to(right, (*batch, r, o)),)
  low = p.project(jnp.asarray(g), basis)
  assert low.shape == p.low_shape
  want = left @ g @ right.T
  # With one side, the low-rank matrix is [..., r, n] for either side.
  want = want.swapaxes(-2, -1) if sides == (lib.COLUMNS,) else want
  # The tolerance allows for sums of up to 11 terms in one or two products, and
  # later in their transposes.
  assert_close(low, want, operations=22)
  whole = p.unproject(low, basis)
  assert_close(whole, left.T @ (left @ g @ right.T) @ right, operations=44)
  # Projecting the result of `unproject` again returns the same low-rank matrix.
  assert_close(p.project(whole, basis), low, operations=66)


@pytest.mark.parametrize('basis_dtype', [jnp.float32, jnp.bfloat16])
def test_bfloat16_gradients_are_summed_in_float32(basis_dtype):
  # Summing 1,024 terms in bfloat16 would lose most of its 8 significant bits.
  p = lib.Projection('w', (1024, 5), ((0,), (1,)), (2,), (lib.ROWS,))
  g = jnp.asarray(normal((1024, 5))).astype(jnp.bfloat16)
  basis_rm = jnp.asarray(rows(2, 1024)).astype(basis_dtype)
  low = jax.jit(lambda g, b: p.project(g, (b,)))(g, basis_rm)
  assert low.dtype == jnp.float32
  want = np.asarray(basis_rm, np.float64) @ np.asarray(g, np.float64)
  # If the sum were in bfloat16, the error would be a hundred times larger.
  assert_close(low, want, operations=1024)
