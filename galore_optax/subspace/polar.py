"""This module holds the orthonormalisation of rows by matrix products alone.

On a GPU a QR, a Cholesky or an eigen decomposition is a solver call with a
workspace that no compiler plans. A polar decomposition needs products only.

Axes: r rows, m columns, r <= m; leading axes are batch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.orthogonal import apply_polynomials

# Singular values below this share of the largest are rounding in float32.
SMALLEST = 1e-6
# It keeps roundings from 1, where each polynomial would grow them by 12.
SLACK = 1.001
# From here the Taylor polynomial is within 3e-7 of 1.
CLOSE = 0.99
# It is 1 at 1 with two derivatives zero: an error e becomes 2.5 e^3.
TAYLOR = np.array([15, -10, 3]) / 8


def orthonormalise(x_rm: jax.Array, *, low: float) -> jax.Array:
  """Returns the orthonormal rows nearest to `x`, its polar factor.

  The rows of an orthonormal x come back as they are, which is why moments
  that are kept fit the new basis best under this rule.

  Odd polynomials of degree five raise the singular values to one, a few at a
  time (`apply_polynomials`). Muon's five steps are another, rougher map:
  `galore_optax.orthogonal.orthogonalise`.

  Guarantee: orthonormal to 1e-5 in float32. Cost: p polynomials, 4 for `low`
  0.1 and 10 for 1e-5, in q = ceil(p / 3) groups: 4 q m r^2 + (8 p - 6 q) r^3
  flops.

  Args:
    x_rm: rows [..., r, m], r <= m, with singular values in [low, 1]; float32
      at least.
    low: at least SMALLEST.

  Example:
    >>> x_rm = jnp.array([[1., 0., 0.], [0., .5, 0.]])
    >>> abs(orthonormalise(x_rm, low=0.5)).round(3)
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)

  References:
    Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_,
    2025, of the polynomials.
  """
  polynomials = _polynomials(low) + [TAYLOR] * (x_rm.dtype == jnp.float64)
  return apply_polynomials(x_rm, polynomials)


def random_rows(key: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
  """Returns orthonormal rows [r, m] of a uniformly random subspace.

  They are the polar factor of a Gaussian matrix. Its singular values are known
  beforehand: see `gaussian_range`.
  """
  low, high = gaussian_range(*shape)
  x_rm = jax.random.normal(key, shape, dtype)
  return orthonormalise(x_rm / high, low=max(low / high, SMALLEST))


def gaussian_range(r: int, m: int) -> tuple[float, float]:
  """Returns bounds of the singular values of a Gaussian [r, m] matrix.

  One is passed by less than about one matrix in a million. The range is
  narrow unless r is close to m.

  References:
    Rudelson and Vershynin, `Smallest singular value of a random rectangular
    matrix <https://arxiv.org/abs/0802.3956>`_, 2009.
  """
  rare = 1e-6 ** (1 / (m - r + 1))
  low = 0.5 * rare * (np.sqrt(m) - np.sqrt(r - 1))
  return float(low), float(np.sqrt(m) + np.sqrt(r) + 6)


@functools.lru_cache
def _polynomials(low: float) -> list[np.ndarray]:
  """Returns coefficients (a, b, c) of a x + b x^3 + c x^5, first to last.

  Each is the one that brings all of [low, 1] closest to a constant. It is
  scaled so that 1 stays the upper end.
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
  """Returns a minimax polynomial on [low, 1], and its distance to one.

  Remez: it is off by the same at both ends and at its two inner extrema.
  """
  inner = low + (1 - low) * np.array([1, 2]) / 3
  for _ in range(20):
    x = np.array([low, *inner, 1])
    rows = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
    a, b, c, error = np.linalg.solve(rows, np.ones(4))
    spread = np.sqrt(9 * b * b - 20 * a * c) * np.array([-1, 1])
    inner = np.sqrt((spread - 3 * b) / (10 * c))
  return np.array([a, b, c]), error
