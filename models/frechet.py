"""Frechet distance between two sets of feature vectors.

The distance is that of two Gaussians with the means and covariances of the
sets, as in Heusel et al., `FID <https://arxiv.org/abs/1706.08500>`_, 2017. It
is computed in float64.

Shapes: N vectors, D features.
"""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """Mean and covariance of a set of feature vectors."""

  mean: np.ndarray
  """Mean [D], float64."""
  covariance: np.ndarray
  """Covariance [D, D] with the divisor N - 1, float64."""


def moments(features_ND: np.ndarray) -> Moments:
  """Returns the mean and the covariance of feature vectors.

  Raises:
    ValueError: There are fewer than two vectors, or a number is not finite.
  """
  features_ND = np.asarray(features_ND, np.float64)
  if features_ND.ndim != 2 or len(features_ND) < 2:
    raise ValueError(
      'features must be at least 2 vectors [N, D], got the shape '
      f'{features_ND.shape}'
    )
  if not np.isfinite(features_ND).all():
    rows = np.flatnonzero(~np.isfinite(features_ND).all(axis=1))
    raise ValueError(
      f'features must be finite, got a non-finite number in row {rows[0]}'
    )
  mean_D = features_ND.mean(axis=0)
  centered_ND = features_ND - mean_D[None]
  return Moments(mean_D, centered_ND.T @ centered_ND / (len(features_ND) - 1))


def distance(x: Moments, y: Moments) -> float:
  """Returns the squared Frechet distance of two Gaussians.

  It is |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x^1/2 C_y C_x^1/2)^1/2). With
  factors C = A A^T, the trace of the last root is the sum of the singular
  values of A_x^T A_y. This needs no root of a matrix that is almost singular,
  as a covariance of fewer vectors than features is.

  Raises:
    ValueError: The numbers of features differ.

  Example:
    >>> x = Moments(np.zeros(2), np.diag([1.0, 4.0]))
    >>> y = Moments(np.array([3.0, 0.0]), np.diag([4.0, 4.0]))
    >>> round(distance(x, y), 12)
    10.0
  """
  if x.mean.shape != y.mean.shape:
    raise ValueError(
      f'the two sets must have the same features, got {x.mean.size} and '
      f'{y.mean.size}'
    )
  product = _factor(x.covariance).T @ _factor(y.covariance)
  root = np.linalg.svd(product, compute_uv=False).sum()
  shift = np.sum((x.mean - y.mean) ** 2)
  spread = np.trace(x.covariance) + np.trace(y.covariance)
  # Rounding can make the distance of equal sets slightly negative.
  return max(0.0, float(shift + spread - 2 * root))


def _factor(covariance: np.ndarray) -> np.ndarray:
  """Returns A [D, D] with A A^T = covariance."""
  values, vectors = np.linalg.eigh(covariance)
  # Eigenvalues that should be 0 are rounding errors of either sign. Their roots
  # would be larger than the rounding errors of the distance.
  least = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
  roots = np.sqrt(np.where(values > least, values, 0.0))
  return vectors * roots[None]
