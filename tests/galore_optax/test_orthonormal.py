"""Polar factors by matrix products."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax.orthonormal import orthonormalise


def _with_spread(r, m, spread):
  """Returns rows of a given condition number, and their polar factor."""
  rng = np.random.default_rng(0)
  u_rr, _ = np.linalg.qr(rng.normal(size=(r, r)))
  v_mr, _ = np.linalg.qr(rng.normal(size=(m, r)))
  x_rm = (u_rr * np.geomspace(1, 1 / spread, r)) @ v_mr.T
  return jnp.asarray(x_rm, jnp.float32), u_rr @ v_mr.T


@pytest.mark.parametrize('r,m', [(19, 47), (13, 13), (1, 5)])
@pytest.mark.parametrize('spread', [1.0, 1e3, 1e5])
def test_rows_are_orthonormal_and_nearest(r, m, spread):
  x_rm, polar_rm = _with_spread(r, m, spread)
  q_rm = jax.jit(orthonormalise)(x_rm)
  chex.assert_trees_all_close(q_rm @ q_rm.T, jnp.eye(r), atol=1e-5)
  # A direction of size s is known to eps / s.
  tolerance = 1e-6 + 1e-7 * spread if r > 1 else 1e-6
  chex.assert_trees_all_close(q_rm, jnp.float32(polar_rm), atol=tolerance)


def test_orthonormal_rows_come_back():
  _, polar_rm = _with_spread(11, 29, 1.0)
  polar_rm = jnp.float32(polar_rm)
  chex.assert_trees_all_close(orthonormalise(polar_rm), polar_rm, atol=1e-6)


def test_the_leading_direction_keeps_its_digits():
  # An unlimited scale would map the largest value to the least, and cancel.
  x_1m = jnp.array([[0.3, 0.1, -0.5, 0.7, 0.2]])
  q_1m = orthonormalise(x_1m)
  chex.assert_trees_all_close(q_1m, x_1m / jnp.linalg.norm(x_1m), atol=1e-6)


def test_no_solver_is_called():
  text = jax.jit(orthonormalise).lower(jnp.ones((3, 7))).as_text()
  assert 'custom_call' not in text


def test_a_stack_is_a_loop():
  x_krm = jnp.stack([_with_spread(7, 17, 10.0)[0], _with_spread(7, 17, 1e3)[0]])
  loop = jnp.stack([orthonormalise(x) for x in x_krm])
  chex.assert_trees_all_close(orthonormalise(x_krm), loop, atol=1e-6)
