"""Every finder with non-finite gradients, and at the sizes of real models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Lazy, PowerIteration, Randomized, galore
from galore_optax.subspace import finders as subspace
from tests.galore_optax.program import ORTHONORMAL, each, find

KEY = jax.random.key(0)
DENSE = ['svd', 'gram', 'randomized', 'power', 'random']
STORED = ['svd', 'gram', 'randomized', 'power', 'coordinates']


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_a_bad_entry(bad):
  """Returns three gradients of a stack of three matrices.

  The second gradient has a `bad` entry in the second matrix.
  """
  grads = [{'w': normal((3, 11, 17), seed)} for seed in range(3)]
  grads[1]['w'][1, 2, 3] = bad
  return grads


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: Randomized(oversample=-1), 'oversample must be an integer >= 0'),
    (lambda: Randomized(power_iterations=-1), 'must be an integer >= 0'),
    (lambda: PowerIteration(steps=0), 'steps must be an integer >= 1'),
    (lambda: Lazy(memory=0), 'memory must be an integer >= 1'),
  ],
)
def test_options_of_a_finder_are_checked(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@each('bad', [np.nan, np.inf, -np.inf], quick=[np.inf])
@each('name', STORED, quick=['svd', 'power'])
def test_a_basis_is_kept_and_the_skip_counted(name, bad):
  tx = galore(optax.sgd(1.0), rank=4, gap=1, subspace=name)
  state, step, trail = tx.init(with_a_bad_entry(bad)[0]), jax.jit(tx.update), []
  for g in with_a_bad_entry(bad):
    _, state = step(g, state)
    trail.append(state)
  first, second, third = (np.asarray(state.basis['w']) for state in trail)
  assert [int(state.skipped) for state in trail] == [0, 1, 1]
  np.testing.assert_array_equal(first[1], second[1])
  for i in (0, 2):
    assert np.any(first[i] != second[i])
  assert np.any(second[1] != third[1])
  assert all(np.all(np.isfinite(basis)) for basis in (first, second, third))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_basis_from_a_seed_has_nothing_to_keep(bad):
  tx = galore(optax.sgd(1.0), rank=4, gap=1, subspace='random')
  state, step = tx.init(with_a_bad_entry(bad)[0]), jax.jit(tx.update)
  for g, good in zip(with_a_bad_entry(bad), [True, False, True], strict=True):
    updates, state = step(g, state)
    assert np.all(np.isfinite(updates['w'])) == good
    assert np.all(np.isfinite(updates['w'][0]))
  assert int(state.skipped) == 0


def power_law(m, n, seed):
  rng = np.random.default_rng(seed)
  left, _ = np.linalg.qr(rng.normal(size=(m, min(m, n))))
  right, _ = np.linalg.qr(rng.normal(size=(n, min(m, n))))
  values = np.arange(1, min(m, n) + 1) ** -0.7
  return jnp.asarray((left * values) @ right.T, jnp.float32)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
  # The MLP of the 60M model on its shorter and its longer side, and a basis as
  # large as the projected side of its attention.
  'm, n, r, kind',
  [
    (512, 1376, 128, 'power law'),
    (1376, 512, 128, 'rank 5'),
    (512, 512, 512, 'rank 5'),
  ],
)
@pytest.mark.parametrize('name', DENSE)
def test_rows_are_orthonormal_to_1e_5(name, m, n, r, kind):
  """Checks the first refresh, and a second one that starts from its basis."""
  step = jax.jit(find, static_argnums=0)
  basis_rm = jnp.zeros((r, m))
  for seed in range(2):
    g_mn = power_law(m, n, 0) + 0.1 * power_law(m, n, seed)
    if kind == 'rank 5':
      g_mn = jnp.asarray(normal((m, 5), seed) @ normal((5, n), seed + 9))
    basis_rm = step(subspace.NAMES[name], g_mn, basis_rm, KEY)
    gram_rr = np.float64(basis_rm) @ np.float64(basis_rm).T
    np.testing.assert_allclose(gram_rr, np.eye(r), rtol=0, atol=ORTHONORMAL)
