"""Orthonormalisation of rows by a polar decomposition.

On a GPU, QR, Cholesky and eigenvalue decompositions call solvers that allocate
a workspace, which XLA does not plan. A polar decomposition by polynomials needs
matrix products only.

Axes: r rows, m columns, r <= m; leading axes are batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.orthogonal import apply_polynomials

SMALLEST = 1e-6
"""Singular values below this share of the largest are rounding errors in
float32."""
SLACK = 1.001
"""Divides each polynomial, so that singular values stay below 1 despite
rounding errors. Above 1 a polynomial would amplify an error by a factor of 12.
"""
CLOSE = 0.99
"""If all singular values are at least `CLOSE`, the last polynomial maps them to
within 3e-7 of 1."""
TAYLOR = np.array([15, -10, 3]) / 8
"""Coefficients of the last polynomial. At 1 it is 1 and its first two
derivatives are zero, so it maps 1 - e to 1 - 2.5 e^3."""


def orthonormalise(x_rm: jax.Array, *, low: float) -> jax.Array:
  """Returns the orthonormal rows closest to `x`: its polar factor.

  If the rows of x are orthonormal already, they are returned unchanged. So the
  new basis stays as close as possible to the old one, and moments that are kept
  across a refresh fit it.

  A sequence of odd polynomials of degree five maps all singular values to one;
  `apply_polynomials` applies several of them at a time. Muon's five steps are a
  less accurate map (`galore_optax.orthogonal.orthogonalise`).

  Error: the rows are orthonormal to 1e-5 in float32. Cost: 4 q m r^2 +
  (8 p - 6 q) r^3 flops for p polynomials in q = ceil(p / 3) groups. p is 4 for
  `low` = 0.1 and 10 for `low` = 1e-5.

  Args:
    x_rm: rows [..., r, m], r <= m, with singular values in [low, 1]; float32
      at least.
    low: lower bound of the singular values, at least SMALLEST.

  Example:
    >>> x_rm = jnp.array([[1., 0., 0.], [0., .5, 0.]])
    >>> abs(orthonormalise(x_rm, low=0.5)).round(3)
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)

  References:
    Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_,
    2025, describes the polynomials.
  """
  polynomials = _polynomials(low) + [TAYLOR] * (x_rm.dtype == jnp.float64)
  return apply_polynomials(x_rm, polynomials)


def random_rows(
  key: jax.Array, shape: tuple[int, ...], dtype: Any
) -> jax.Array:
  """Returns orthonormal rows [r, m] of a uniformly random subspace.

  They are the polar factor of a Gaussian matrix, whose singular values are
  within the bounds of `gaussian_range`.
  """
  r, m = shape
  low, high = gaussian_range(r, m)
  x_rm = jax.random.normal(key, shape, dtype)
  return orthonormalise(x_rm / high, low=max(low / high, SMALLEST))


def gaussian_range(r: int, m: int) -> tuple[float, float]:
  """Returns bounds of the singular values of a Gaussian [r, m] matrix.

  About one matrix in a million has a singular value outside the bounds. The
  range is narrow unless r is close to m.

  References:
    Rudelson and Vershynin, `Smallest singular value of a random rectangular
    matrix <https://arxiv.org/abs/0802.3956>`_, 2009.
  """
  rare = 1e-6 ** (1 / (m - r + 1))
  low = 0.5 * rare * (np.sqrt(m) - np.sqrt(r - 1))
  return float(low), float(np.sqrt(m) + np.sqrt(r) + 6)


@functools.lru_cache
def _polynomials(low: float) -> list[np.ndarray]:
  """Returns coefficients (a, b, c) of polynomials a x + b x^3 + c x^5.

  They are applied in the order of the list. Each polynomial maps the current
  interval [low, 1] to values as close to a constant as possible. It is scaled
  so that the largest value is 1 / SLACK.
  """
  found = []
  while low < CLOSE:
    coefficients, error = _nearest_to_one(low)
    high = (1 + error) * SLACK
    found.append(coefficients / high)
    low = (1 - error) / high
  centre = 2 / (1 + low)
  return [*found, TAYLOR * centre ** np.array([1, 3, 5])]


def _nearest_to_one(low: float) -> tuple[np.ndarray, float]:
  """Returns the polynomial closest to one on [low, 1], and its largest error.

  This is Remez' algorithm: the error has the same magnitude at both ends and at
  the two extrema between them.
  """
  inner = low + (1 - low) * np.array([1, 2]) / 3
  for _ in range(20):
    x = np.array([low, *inner, 1])
    rows = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
    a, b, c, error = np.linalg.solve(rows, np.ones(4))
    spread = np.sqrt(9 * b * b - 20 * a * c) * np.array([-1, 1])
    inner = np.sqrt((spread - 3 * b) / (10 * c))
  return np.array([a, b, c]), error
