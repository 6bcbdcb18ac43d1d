"""This module holds the orthonormalisation of rows by matrix products alone.

On a GPU a QR, a Cholesky or an eigen decomposition is a solver call with a
workspace that no compiler plans. A polar decomposition needs products only.

Axes: r rows, m columns, r <= m; leading axes are batch.
"""

import jax
import jax.numpy as jnp
import numpy as np

SMALLEST = 1e-6
"""Rows are spread by at most 1 / SMALLEST (their condition number)."""

LARGEST_SCALE = 1.6
"""At sqrt(3) a step maps the largest value to the least, and its digits are
lost to cancellation; at 1.6 it keeps a third of it."""


def orthonormalise(x_rm: jax.Array) -> jax.Array:
  """Returns the orthonormal rows nearest to `x`, its polar factor.

  The rows of an orthonormal x come back as they are, which is why moments
  that are kept fit the new basis best under this rule.

  Guarantee: orthonormal to 1e-5 in float32 for a condition number up to 1e5
  (1 / SMALLEST less the slack of the norm's bound). Cost: N products of
  [r, m] with [m, r] and as many of [r, r] with [r, m]: 72 r^2 m flops.

  Args:
    x_rm: rows [..., r, m], r <= m, of full rank; float32 at least.

  Example:
    >>> orthonormalise(jnp.array([[2., 0., 0.], [0., .5, 0.]])).round(5)
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)

  References:
    Chen and Chow, A stable scaling of Newton-Schulz for improving the sign
    function computation of a Hermitian matrix, 2014.
  """
  gram_rr = _gram(x_rm)
  # The largest row sum bounds the largest eigenvalue.
  bound = jnp.sqrt(jnp.max(jnp.sum(jnp.abs(gram_rr), -1), -1))
  x_rm = x_rm / bound[..., None, None]

  def step(x_rm: jax.Array, alpha: jax.Array) -> tuple[jax.Array, None]:
    x_rm = alpha * x_rm
    correction_rm = jnp.matmul(_gram(x_rm), x_rm, precision='highest')
    return 1.5 * x_rm - 0.5 * correction_rm, None

  alphas = jnp.asarray(_scalings(), x_rm.dtype)
  return jax.lax.scan(step, x_rm, alphas)[0]


def _gram(x_rm: jax.Array) -> jax.Array:
  x_mr = jnp.swapaxes(x_rm, -2, -1)
  return jnp.matmul(x_rm, x_mr, precision='highest')


def _scalings() -> np.ndarray:
  """Returns the scale of each Newton-Schulz step.

  With singular values in [low, 1], a scale alpha with alpha^2 = 3 / (1 + low +
  low^2) maps both ends to the same value, the least of the new interval.
  """
  scalings, low = [], SMALLEST
  while low < 1 - 1e-7:
    alpha = min(LARGEST_SCALE, np.sqrt(3 / (1 + low + low * low)))
    scalings.append(alpha)
    low = min(1.5 * x - 0.5 * x**3 for x in (alpha, alpha * low))
  # The interval's upper end is reached from below; a plain step closes it.
  return np.array([*scalings, 1.0])
