"""Tests the Frechet distance on Gaussians whose distance is known."""

import warnings

import numpy as np
import pytest
import scipy.linalg

from models.frechet import Moments, distance, moments


def _gaussian(rng, size):
  """Returns random moments with a full covariance."""
  root = rng.standard_normal((size, size))
  return Moments(rng.standard_normal(size), root @ root.T)


def test_commuting_covariances_have_a_closed_form():
  """With the same eigenvectors, the roots of the eigenvalues are subtracted."""
  rng = np.random.default_rng(0)
  basis, _ = np.linalg.qr(rng.standard_normal((7, 7)))
  one, two = rng.uniform(0.1, 4, (2, 7))
  shift = rng.standard_normal(7)
  x = Moments(np.zeros(7), basis * one @ basis.T)
  y = Moments(shift, basis * two @ basis.T)
  expected = np.sum(shift**2) + np.sum((np.sqrt(one) - np.sqrt(two)) ** 2)
  assert distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_the_formula_with_matrix_roots():
  rng = np.random.default_rng(1)
  x, y = _gaussian(rng, 9), _gaussian(rng, 9)
  # The root of C_x C_y has the same trace as that of its symmetric form.
  root = scipy.linalg.sqrtm(x.covariance @ y.covariance)
  expected = np.sum((x.mean - y.mean) ** 2)
  expected += np.trace(x.covariance + y.covariance - 2 * root.real)
  assert distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_equal_sets_have_distance_zero_and_order_does_not_matter():
  rng = np.random.default_rng(2)
  x, y = _gaussian(rng, 8), _gaussian(rng, 8)
  assert 0 <= distance(x, x) < 1e-12 * np.trace(x.covariance)
  assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-12)


def test_a_shift_adds_its_square():
  rng = np.random.default_rng(3)
  features = rng.standard_normal((50, 6))
  shift = rng.standard_normal(6)
  found = distance(moments(features), moments(features + shift[None]))
  assert found == pytest.approx(np.sum(shift**2), rel=1e-9)


def test_fewer_vectors_than_features():
  """Covariances of rank N - 1 need no warning, and no root of rounding."""
  rng = np.random.default_rng(4)
  small = rng.standard_normal((5, 4))
  other = rng.standard_normal((6, 4)) + 1
  basis, _ = np.linalg.qr(rng.standard_normal((40, 40)))
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    found = distance(moments(small @ basis[:4]), moments(other @ basis[:4]))
  expected = distance(moments(small), moments(other))
  assert found == pytest.approx(expected, rel=1e-9)


def test_moments_are_those_of_numpy():
  features = np.float32(np.random.default_rng(5).standard_normal((30, 5)))
  found = moments(features)
  assert found.covariance.dtype == np.float64
  wide = np.float64(features)
  np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-14)
  np.testing.assert_allclose(
    found.covariance, np.cov(wide, rowvar=False), rtol=1e-12, atol=1e-15
  )


def test_what_is_impossible_is_named():
  with pytest.raises(ValueError, match=r'at least 2 vectors.*\(1, 3\)'):
    moments(np.ones((1, 3)))
  bad = np.ones((4, 3))
  bad[2, 1] = np.nan
  with pytest.raises(ValueError, match='non-finite number in row 2'):
    moments(bad)
  with pytest.raises(ValueError, match='same features, got 2 and 3'):
    distance(moments(np.eye(2)), moments(np.eye(3)))
