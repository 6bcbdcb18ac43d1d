"""`orthonormalise` computes polar factors by matrix products."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax.subspace import polar as orthonormal
from galore_optax.subspace.polar import SMALLEST, orthonormalise, random_rows
from tests.galore_optax.program import ORTHONORMAL, gram
from tests.rounding import assert_close, units


def _with_spread(r, m, spread):
  """Returns rows with a given condition number, and their polar factor."""
  rng = np.random.default_rng(0)
  u_rr, _ = np.linalg.qr(rng.normal(size=(r, r)))
  v_mr, _ = np.linalg.qr(rng.normal(size=(m, r)))
  x_rm = (u_rr * np.geomspace(1, 1 / spread, r)) @ v_mr.T
  return jnp.asarray(x_rm, jnp.float32), u_rr @ v_mr.T


@pytest.mark.parametrize('low', [1e-6, 1e-5, 1e-3, 0.1, 0.5, 0.98])
def test_the_polynomials_bring_the_whole_range_to_one(low):
  x = np.geomspace(low, 1, 20001)
  for a, b, c in orthonormal._polynomials(low):
    x = a * x + b * x**3 + c * x**5
    # A value beyond 1 could diverge under the next polynomial.
    assert 0 < x.min() and x.max() < 1 + 1e-6
  # From CLOSE on, the error of the final Taylor polynomial is below 3e-7.
  np.testing.assert_allclose(x, 1, atol=3e-7)


@pytest.mark.parametrize('r,m', [(19, 47), (13, 13), (1, 5)])
@pytest.mark.parametrize('spread', [1.0, 1e3, 1e5])
def test_rows_are_orthonormal_and_nearest(r, m, spread):
  x_rm, polar_rm = _with_spread(r, m, spread)
  # `low` is below the smallest singular value, and the factor 0.99 keeps the
  # largest below 1. Rounding could otherwise move values out of the range.
  low = 0.9 / spread
  q_rm = jax.jit(functools.partial(orthonormalise, low=low))(0.99 * x_rm)
  chex.assert_trees_all_close(gram(q_rm), jnp.eye(r), atol=ORTHONORMAL)
  # The tolerance allows for an error of eps / s in a singular direction of size
  # s.
  tolerance = 1e-6 + 1e-7 * spread if r > 1 else 1e-6
  chex.assert_trees_all_close(q_rm, jnp.float32(polar_rm), atol=tolerance)


def test_a_low_bound_that_is_too_low_costs_no_digits():
  _, polar_rm = _with_spread(11, 29, 1.0)
  polar_rm = jnp.float32(polar_rm)
  for low in (0.9, 0.1, SMALLEST):
    # The tolerance allows for sums of up to 29 terms. The polynomials shrink
    # earlier rounding errors.
    f = jax.jit(functools.partial(orthonormalise, low=low))
    assert_close(f(polar_rm), polar_rm, operations=29)


def test_the_leading_direction_keeps_its_digits():
  # Each polynomial would amplify rounding errors of a singular value of exactly
  # 1. The polynomials are therefore scaled to stay slightly below 1.
  x_1m = jnp.array([[0.3, 0.1, -0.5, 0.7, 0.2]])
  expected_1m = x_1m / jnp.linalg.norm(x_1m)
  q_1m = orthonormalise(x_1m, low=SMALLEST)
  # The tolerance allows for the roundings of the last polynomial, since earlier
  # errors shrink.
  assert_close(q_1m, expected_1m, operations=10)


def test_double_precision():
  with jax.enable_x64(True):
    x_rm = jnp.asarray(np.random.default_rng(0).normal(size=(7, 17))) / 10
    q_rm = orthonormalise(x_rm, low=0.05)
    assert q_rm.dtype == jnp.float64
    # The tolerance allows for sums of up to 17 terms in each of a few
    # polynomials.
    atol = units(20 * 17, np.float64)
    np.testing.assert_allclose(gram(q_rm), np.eye(7), atol=atol)


def test_no_solver_is_called():
  f = jax.jit(functools.partial(orthonormalise, low=1e-5))
  assert 'custom_call' not in f.lower(jnp.ones((3, 7))).as_text()


def test_a_stack_is_a_loop():
  f = jax.jit(functools.partial(orthonormalise, low=1e-3))
  x_krm = jnp.stack([_with_spread(7, 17, 10.0)[0], _with_spread(7, 17, 1e3)[0]])
  loop = jnp.stack([f(x) for x in x_krm])
  # The tolerance allows for an error of eps / s in a singular direction of size
  # s.
  chex.assert_trees_all_close(f(x_krm), loop, atol=units(1e3))


@pytest.mark.parametrize('low,count', [(0.1, 4), (1e-5, 10)])
def test_the_cost_is_as_stated(low, count):
  assert len(orthonormal._polynomials(low)) == count
  r, m = 64, 256
  f = jax.jit(functools.partial(orthonormalise, low=low))
  analysis = f.lower(jnp.ones((r, m))).compile().cost_analysis()
  groups = -(-count // 3)
  products = 4 * groups * m * r**2 + (8 * count - 6 * groups) * r**3
  # Adding [r, r] matrices costs only terms of lower order.
  assert products <= analysis['flops'] < 1.1 * products


@pytest.mark.parametrize(
  'r,m', [(1, 1), (1, 5), (4, 4), (12, 13), (13, 13), (8, 16), (32, 128)]
)
def test_gaussian_matrices_are_in_their_range(r, m):
  low, high = orthonormal.gaussian_range(r, m)
  x_krm = np.random.default_rng(0).normal(size=(1000, r, m))
  values = np.linalg.svd(x_krm, compute_uv=False)
  assert low < values.min() and values.max() < high


@pytest.mark.parametrize('r,m', [(1, 1), (1, 5), (13, 13), (12, 13), (8, 32)])
def test_random_rows_are_orthonormal(r, m):
  keys = jax.random.split(jax.random.key(0), 100)
  make = jax.jit(jax.vmap(lambda key: random_rows(key, (r, m), jnp.float32)))
  q_krm = make(keys)
  gram_krr = q_krm @ jnp.swapaxes(q_krm, -2, -1)
  chex.assert_trees_all_close(
    gram_krr, jnp.broadcast_to(jnp.eye(r), gram_krr.shape), atol=ORTHONORMAL
  )
  # For uniformly distributed rows, each entry has mean 0 and variance 1 / m.
  # The limit is four standard deviations.
  assert abs(float(q_krm[:, 0, 0].mean())) < 4 / np.sqrt(100 * m)


def test_a_thin_random_matrix_takes_few_polynomials():
  low, high = orthonormal.gaussian_range(128, 512)
  assert len(orthonormal._polynomials(low / high)) == 4
