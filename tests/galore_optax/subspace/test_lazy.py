"""`Lazy` finds a basis less often if the subspace moves less."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import Lazy, Svd, galore
from tests.galore_optax.program import ORTHONORMAL, Gauge


def _run(moving, steps, finder=Svd()):  # noqa: B008
  """Returns whether each of two stacked matrices found a basis, per step.

  The gradient of the first matrix is constant. That of the second is also
  constant unless `moving`, in which case it is random at each step.
  """
  lazy = Lazy(finder, threshold=0.6, memory=2)
  tx = galore(optax.sgd(1.0), rank=3, gap=1, subspace=lazy)
  still = np.random.default_rng(0).normal(size=(2, 11, 13))
  still[:, 3:] *= 1e-3
  state, step, found = (
    tx.init({'w': jnp.float32(still)}),
    jax.jit(tx.update),
    [],
  )
  for t in range(steps):
    g = still.copy()
    if moving:
      g[1] = np.random.default_rng(t + 1).normal(size=(11, 13))
    before = state.basis['w'].gaps, state.basis['w'].wait
    _, state = step({'w': jnp.float32(g)}, state)
    found.append(np.asarray(before[1]) == 0)
  return np.stack(found), state


def test_a_still_subspace_waits_twice_as_long_each_time():
  found, state = _run(moving=False, steps=20)
  # The wait doubles only after two overlaps of successive bases are known,
  # which refreshes 1 and 2 provide.
  assert np.flatnonzero(found[:, 0]).tolist() == [0, 1, 2, 4, 8, 16]
  overlaps_q = state.basis['w'].overlaps_q
  np.testing.assert_allclose(overlaps_q, 1.0, atol=ORTHONORMAL)


def test_likeness_does_not_depend_on_signs_or_gauge():
  found, state = _run(moving=False, steps=9, finder=Gauge())
  assert np.flatnonzero(found[:, 0]).tolist() == [0, 1, 2, 4, 8]
  overlaps_q = state.basis['w'].overlaps_q
  np.testing.assert_allclose(overlaps_q, 1.0, atol=ORTHONORMAL)


def test_a_moving_subspace_is_found_at_every_gap():
  found, _ = _run(moving=True, steps=9)
  assert found[:, 1].all()
  assert not found[:, 0].all()


def test_one_compilation_and_finite_checkpointable_shapes():
  _, state = _run(moving=True, steps=3)
  assert all(x.size for x in jax.tree.leaves(state))
