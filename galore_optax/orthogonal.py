"""Muon's orthogonalisation, which consists of odd matrix polynomials.

`orthogonalise` is the approximation that Muon uses: all but the smallest
singular values end between 0.68 and 1.21. `subspace.polar.orthonormalise`
computes the exact polar factor, whose singular values are one.

Axes: r rows, m columns, r <= m; leading axes are batch.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.precision import at_least_float32, norm

# The coefficients (a, b, c) of Muon's polynomial a x + b x^3 + c x^5.
QUINTIC = (3.4445, -4.7750, 2.0315)
QUINTIC_STEPS = 5
# The largest number of polynomials that are composed as [r, r] matrices before
# they are multiplied with the rows; see `apply_polynomials`.
STEPS = 3

matmul = functools.partial(jnp.matmul, precision='highest')


@jax.jit
def orthogonalise(x: jax.Array) -> jax.Array:
  """Returns Muon's approximation of the orthogonal matrix nearest to `x`.

  `x` is divided by its Frobenius norm, and five quintic polynomials raise its
  singular values. Values above 2e-3 of that norm end between 0.68 and 1.21, and
  smaller ones grow by a factor of at most 485. Zero stays zero.

  `optax.contrib.scale_by_muon` computes the same within rounding. This function
  takes four products with `x` instead of ten, because three polynomials, and
  then two, are composed as [r, r] matrices of the shorter side r.

  Cost: 8 r^2 m + 28 r^3 flops. Temporary memory: a copy of `x` and about four
  [r, r] matrices, in float32 at least.

  Args:
    x: matrices [..., r, m] or [..., m, r].

  Returns:
    An array of the shape and dtype of `x`.

  Example:
    >>> x = jnp.array([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
    >>> y = orthogonalise(x)
    >>> print(f'{y[0, 0]:.1f} {y[1, 1]:.1f} {abs(y[0, 1]):.1f}')
    0.7 -1.1 0.0

  References:
    Jordan, `Muon <https://github.com/KellerJordan/Muon>`_, 2024.
  """
  is_tall = x.shape[-2] > x.shape[-1]
  x_rm = at_least_float32(x.mT if is_tall else x)
  # optax adds the same constant. It avoids a division by zero.
  x_rm = x_rm / (norm(x_rm, (-2, -1)) + 1e-8)
  x_rm = apply_polynomials(x_rm, [QUINTIC] * QUINTIC_STEPS)
  return (x_rm.mT if is_tall else x_rm).astype(x.dtype)


def apply_polynomials(
  x_rm: jax.Array, polynomials: Iterable[Iterable[float]]
) -> jax.Array:
  """Applies odd polynomials of degree five to the singular values of `x_rm`.

  Three polynomials at most are composed as [r, r] matrices, in terms of the
  Gram matrix `x x^T`, before they are multiplied with the rows. In float32 a
  Gram matrix is rounded to 1e-7 of its largest eigenvalue, and a polynomial of
  slope a at zero grows this error by a^2. If all five steps of Muon were
  composed at once, the result would be 30 times less accurate.

  Args:
    x_rm: rows [..., r, m] with singular values of at most one.
    polynomials: coefficients (a, b, c) of a x + b x^3 + c x^5, first to last.

  Example:
    >>> apply_polynomials(jnp.array([[0.5, 0.0]]), [(2.0, 0.0, -1.0)])
    Array([[0.96875, 0.     ]], dtype=float32)
  """
  rows = np.array([[*row] for row in polynomials])
  for group in np.array_split(rows, -(-len(rows) // STEPS)):
    x_rm = matmul(_composed(group, matmul(x_rm, x_rm.mT)), x_rm)
  return x_rm


def _composed(polynomials: np.ndarray, gram_rr: jax.Array) -> jax.Array:
  """Returns the [r, r] matrix that applies all polynomials to the rows.

  All factors are polynomials of the same Gram matrix, so they commute.
  """
  eye_rr = jnp.eye(gram_rr.shape[-1], dtype=gram_rr.dtype)
  eye_rr = jnp.broadcast_to(eye_rr, gram_rr.shape)
  steps = []
  for a, b, c in polynomials.tolist():
    step_rr = a * eye_rr + b * gram_rr + c * matmul(gram_rr, gram_rr)
    steps.append(step_rr)
    gram_rr = matmul(matmul(step_rr, gram_rr), step_rr)
  return functools.reduce(matmul, steps)
