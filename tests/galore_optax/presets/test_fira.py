"""Fira against its equations, and its norm-growth limiter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import fira
from tests.galore_optax.presets import scaled_oracle
from tests.galore_optax.program import (
  MATRICES,
  SHAPES,
  normal,
  trajectory,
  tree,
)

STEPS, GAP, RANK, DECAY = 8, 2, 3, 0.25
WARM_UP = optax.linear_schedule(0.0, 0.25, 4)


@pytest.mark.parametrize(
  'moments, complement',
  [
    ('keep', 'exact'),
    # This variant uses G - scale P^T P G. The authors' code, and so the
    # published results, use it.
    ('keep', 'reference'),
    pytest.param('reset', 'exact', marks=pytest.mark.slow),
  ],
)
def test_it_is_the_papers_algorithm(moments, complement):
  with jax.enable_x64(True):
    weights, grads = tree(), tree(seed=10, leading=(STEPS,))
    # The gradient grows tenfold at one step, which triggers the norm-growth
    # limiter.
    size = np.where(np.arange(STEPS) == 5, 10, 1)
    grads = {k: np.einsum('t...,t->t...', g, size) for k, g in grads.items()}
    tx = fira(
      WARM_UP,
      rank=RANK,
      gap=GAP,
      scale=0.25,
      weight_decay=DECAY,
      moments=moments,
      complement=complement,
    )
    ours, states = trajectory(tx, weights, grads)
    basis = states[0].basis
    make = lambda: scaled_oracle.Scaled(
      whole=False,
      channels=True,
      inside=0.25,
      outside=1.0,
      off=1.0 if complement == 'exact' else 0.25,
    )
    want = scaled_oracle.run(
      *(make, weights, grads, basis, STEPS, DECAY),
      restart_every=GAP if moments == 'reset' else None,
    )
  for name in SHAPES:
    # Preset and oracle run in float64. The tolerance allows for rounding in
    # roots of sums of squares.
    np.testing.assert_allclose(ours[name], want[name], rtol=1e-9, atol=1e-10)
  for name in MATRICES:
    bases = np.asarray(basis[name])
    changed = np.any(bases[1:] != bases[:-1], axis=(1, 2))
    assert changed.tolist() == [t % GAP == 0 for t in range(1, STEPS)]
    g = np.asarray(grads[name][-2])
    g = g if g.shape[0] <= g.shape[1] else g.T
    u, _, _ = np.linalg.svd(g)
    span = u[:, :RANK] @ u[:, :RANK].T
    np.testing.assert_allclose(bases[-1].T @ bases[-1], span, atol=1e-9)


def test_no_odd_gradient_stops_a_matrix_for_ever():
  # The limiter bounds an update norm by a multiple of the last one. After a
  # zero gradient, it must not limit all later updates to zero.
  tx, w = fira(0.1, rank=2, gap=100), {'w': jnp.zeros((3, 5, 7))}
  g = jnp.asarray(normal((3, 5, 7)), jnp.float32)
  # Each of the three layers has a bad gradient: zero, NaN or infinity.
  odd = g * jnp.array([0.0, jnp.nan, jnp.inf])[:, None, None]

  def step(state, g):
    _, state = tx.update({'w': g}, state, w)
    return state, state[0].residual['w']

  grads = jnp.stack([g, odd, g, g])
  _, norms = jax.jit(lambda: jax.lax.scan(step, tx.init(w), grads))()
  assert np.all(norms[0] > 0)
  assert norms[1, 0] == 0 and norms[-1, 0] > 0


def test_its_state_in_eight_bits():
  m, n, r = 64, 96, 48
  make = lambda inner: fira(0.1, rank=r, gap=3, scale=1.0, inner=inner)
  apart, size = scaled_oracle.in_eight_bits(make, (m, n))
  # The first update does not read stored moments. A quantization error is at
  # most 0.7% of the block's largest entry. For normally distributed entries,
  # this is about 1% of an entry on average.
  assert apart[0] < 1e-6
  assert 0 < np.max(apart[1:]) < 0.02
  # The state has a basis, two moments with a scale per 256 codes, and one norm.
  assert size == 4 * r * m + 2 * (r * n + r * n // 256 * 4) + 4
