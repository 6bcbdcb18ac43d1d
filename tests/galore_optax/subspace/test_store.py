"""The exact finders against NumPy, and the sign rule for bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import Gram, Svd
from galore_optax.subspace import store as subspace
from tests.galore_optax.program import ORTHONORMAL, gram
from tests.rounding import assert_close

KEY = jax.random.key(0)
FINDERS = pytest.mark.parametrize(
  'finder', [Svd(), Gram()], ids=['svd', 'gram']
)


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def found(finder, g_mn, r):
  keeper = subspace.as_store(finder)
  kept = keeper.first(r, len(g_mn), g_mn.dtype)
  return np.asarray(keeper.find(g_mn, kept, KEY, jnp.array(True)))


@FINDERS
@pytest.mark.parametrize(
  'm, n, r', [(7, 13, 3), (13, 7, 3), (9, 9, 9), (7, 13, 7)]
)
def test_the_leading_left_singular_vectors(finder, m, n, r):
  g_mn = normal((m, n))
  basis_rm = np.asarray(finder(jnp.asarray(g_mn), jnp.zeros((r, m)), KEY))
  u, _, _ = np.linalg.svd(g_mn.astype(np.float64))
  np.testing.assert_allclose(gram(basis_rm), np.eye(r), atol=ORTHONORMAL)
  # Compare the singular vectors one by one, up to sign. The tolerance allows
  # for the finder 'gram', which squares the gradient and so loses digits.
  np.testing.assert_allclose(abs(basis_rm), abs(u[:, :r].T), atol=1e-4)


@FINDERS
def test_no_gradient_leaves_an_orthonormal_basis(finder):
  basis_rm = found(finder, jnp.zeros((7, 5)), 3)
  np.testing.assert_allclose(gram(basis_rm), np.eye(3), atol=ORTHONORMAL)


@FINDERS
def test_a_rank_deficient_gradient_is_spanned(finder):
  g_mn = normal((11, 2)) @ normal((2, 13), 1)
  basis_rm = found(finder, jnp.asarray(g_mn), 4)
  np.testing.assert_allclose(gram(basis_rm), np.eye(4), atol=ORTHONORMAL)
  # The tolerance allows for two products with sums of up to 11 terms. The
  # finder 'gram' also squares the gradient, which loses digits.
  spanned_mn = basis_rm.T @ (basis_rm @ g_mn)
  assert_close(spanned_mn, g_mn, operations=20 * 11)


@FINDERS
def test_the_longer_side_has_more_vectors_than_the_gradient_spans(finder):
  g_mn = jnp.asarray(normal((9, 4)))
  basis_rm = finder(g_mn, jnp.zeros((6, 9)), KEY)
  np.testing.assert_allclose(gram(basis_rm), np.eye(6), atol=ORTHONORMAL)


def test_signs_agree_with_the_previous_basis_or_the_peak_is_positive():
  old_rm = jnp.asarray(np.linalg.qr(normal((7, 4)))[0].T)
  new_rm = jnp.asarray(np.linalg.qr(normal((7, 4), 1))[0].T)
  fixed = np.asarray(subspace.fix_signs(new_rm, old_rm))
  assert np.all((fixed * old_rm).sum(1) >= 0)
  np.testing.assert_array_equal(abs(fixed), abs(new_rm))
  first = np.asarray(subspace.fix_signs(new_rm, jnp.zeros((4, 7))))
  assert np.all(first[np.arange(4), abs(first).argmax(1)] > 0)
  np.testing.assert_array_equal(abs(first), abs(new_rm))


def test_signs_of_a_stack_are_those_of_its_matrices():
  new, old = jnp.asarray(normal((3, 4, 7))), jnp.asarray(normal((3, 4, 7), 1))
  each = [subspace.fix_signs(n, o) for n, o in zip(new, old, strict=True)]
  np.testing.assert_array_equal(subspace.fix_signs(new, old), np.stack(each))
