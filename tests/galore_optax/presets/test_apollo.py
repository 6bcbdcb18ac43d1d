"""APOLLO and APOLLO-Mini against their equations."""

import jax
import numpy as np
import optax
import pytest

from galore_optax import Gaussian, apollo, apollo_mini
from tests.galore_optax.presets import scaled_oracle
from tests.galore_optax.program import (
  MATRICES,
  SHAPES,
  rows_of,
  trajectory,
  tree,
)

STEPS, GAP, DECAY = 8, 2, 0.25
WARM_UP = optax.linear_schedule(0.0, 0.25, 4)


@pytest.mark.parametrize(
  'mini, moments',
  [
    (False, 'keep'),
    pytest.param(True, 'keep', marks=pytest.mark.slow),
    pytest.param(False, 'reset', marks=pytest.mark.slow),
  ],
)
def test_it_is_the_papers_algorithm(mini, moments):
  rank, scale = (1, 9.0) if mini else (3, 4.0)
  with jax.enable_x64(True):
    weights, grads = tree(), tree(seed=10, leading=(STEPS,))
    # The gradient grows tenfold at one step, which triggers the norm-growth
    # limiter.
    size = np.where(np.arange(STEPS) == 5, 10, 1)
    grads = {k: np.einsum('t...,t->t...', g, size) for k, g in grads.items()}
    options = dict(gap=GAP, scale=scale, weight_decay=DECAY, moments=moments)
    tx = (
      apollo_mini(WARM_UP, targets=MATRICES, **options)
      if mini
      else apollo(WARM_UP, rank=rank, targets=MATRICES, **options)
    )
    ours, states = trajectory(tx, weights, grads)
    make = lambda: scaled_oracle.Scaled(
      whole=True, channels=not mini, inside=0.0, outside=np.sqrt(scale)
    )
    rows = jax.jit(lambda basis: rows_of(tx, Gaussian(), weights, basis))(
      states[0].basis
    )
    want = scaled_oracle.run(
      *(make, weights, grads, rows, STEPS, DECAY),
      restart_every=GAP if moments == 'reset' else None,
    )
  for name in SHAPES:
    # Preset and oracle run in float64. The tolerance allows for rounding in
    # roots of sums of squares.
    np.testing.assert_allclose(ours[name], want[name], rtol=1e-9, atol=1e-10)
  for name in MATRICES:
    drawn = np.asarray(rows[name])
    changed = np.any(drawn[1:] != drawn[:-1], axis=(1, 2))
    assert changed.tolist() == [t % GAP == 0 for t in range(1, STEPS)]
  # The state stores only a seed for each random projection.
  assert all(x.shape == (STEPS,) for x in jax.tree.leaves(states[0].basis))


@pytest.mark.slow
def test_its_state_in_eight_bits():
  m, n, r = 64, 96, 48
  make = lambda inner: apollo(0.1, rank=r, gap=3, inner=inner)
  apart, size = scaled_oracle.in_eight_bits(make, (m, n))
  # The first update does not read stored moments. The average quantization
  # error is about 1%, and the norm of a channel averages 48 entries.
  assert apart[0] < 1e-6
  assert 0 < np.max(apart[1:]) < 0.004
  # The state has two moments with a scale per 256 codes, one norm and one seed.
  assert size == 2 * (r * n + r * n // 256 * 4) + 4 + 4
