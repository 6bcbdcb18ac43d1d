"""A second oracle: `optax.contrib.galore`, which projects the longer side."""

import types

import jax
import jax.numpy as jnp
import optax
from optax.contrib import _galore as theirs

from galore_optax import galore
from galore_optax.subspace import store as subspace
from tests.galore_optax.program import tree
from tests.rounding import distance

# No shape is square: for square matrices, optax projects the rows and the
# PyTorch reference the output axis.
SHAPES = {'tall': (23, 11), 'wide': (11, 29), 'bias': (5,)}


def positive_peaks(x, axis):
  peak = jnp.argmax(jnp.abs(x), axis, keepdims=True)
  return jnp.sign(jnp.take_along_axis(x, peak, axis))


def signed_svd(x, full_matrices):
  """Returns an SVD in which the peak of each long-side vector is positive."""
  u, s, vh = jnp.linalg.svd(x, full_matrices=full_matrices)
  sign = positive_peaks(u, 0) if len(u) >= vh.shape[1] else None
  if sign is None:
    sign = positive_peaks(vh, 1).T
  return u * sign, s, vh * sign.T


def test_the_longer_side_is_that_of_optax(monkeypatch):
  # Make optax use our sign rule, because it keeps the signs that LAPACK
  # returns. Our own rule must ignore the previous basis, as optax does.
  linalg = types.SimpleNamespace(svd=signed_svd)
  monkeypatch.setattr(
    theirs, 'jnp', types.SimpleNamespace(**vars(jnp) | {'linalg': linalg})
  )
  fix_signs = subspace.fix_signs
  monkeypatch.setattr(
    subspace, 'fix_signs', lambda new, old: fix_signs(new, jnp.zeros_like(old))
  )
  inner = optax.scale_by_adam(eps=1e-8)
  ours = galore(inner, rank=4, gap=3, scale=0.5, side='reverse_std')
  reference = optax.contrib.scale_by_galore(
    rank=4, update_proj_gap=3, scale=0.5, base_optimizer=inner
  )
  params = tree(SHAPES)
  state, want_state = ours.init(params), reference.init(params)
  step, want_step = jax.jit(ours.update), jax.jit(reference.update)
  for i in range(8):  # refreshes at steps 0, 3 and 6
    g = tree(SHAPES, 10 + i)
    updates, state = step(g, state)
    want, want_state = want_step(g, want_state)
    for name, update in updates.items():
      # The tolerance allows for different float32 decompositions, because optax
      # decomposes the transpose. The error of a singular vector is eps divided
      # by its distance from the next singular value, and Adam amplifies entries
      # that nearly cancel.
      assert distance(update, want[name]) < 1e-3
  for name in ('tall', 'wide'):
    basis, projector = state.basis[name], want_state.projector[name]
    assert basis.shape == projector.shape[::-1] == (4, max(SHAPES[name]))
