"""FRUGAL against its own equations, its limits, and what it keeps."""

import jax
import numpy as np
import optax
import pytest

from galore_optax import frugal
from tests.galore_optax.program import (
  MATRICES,
  SHAPES,
  Adam,
  trajectory,
  tree,
)

STEPS, GAP, DENSITY, DECAY = 8, 2, 0.4, 0.3
WARM_UP = optax.linear_schedule(0.0, 0.25, 4)
"""Zero at the first step; binary fractions, as optax rounds to float32."""


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def parts(subspace, name, g, kept):
  """Returns `down` and `up` of one matrix, as the paper's code has them."""
  if subspace == 'svd':
    rank = round(min(g.shape) * DENSITY)
    u, _, vh = np.linalg.svd(g)
    if g.shape[0] <= g.shape[1]:
      p = u[:, :rank]
      return lambda x: p.T @ x, lambda x: p @ x
    p = vh[:rank]
    return lambda x: x @ p.T, lambda x: x @ p
  axis = {'columns': 0, 'rows': 1}[subspace]
  mask = np.zeros(g.shape)
  mask[(kept, slice(None))[:: 1 - 2 * axis]] = 1
  # Adam of zeros is zero, so a mask is as good as a smaller array.
  return lambda x: x * mask, lambda x: x * mask


def oracle(subspace, residual, scale, weights, grads, basis):
  """Returns the weights after each step, from methods' equations."""
  w = {name: np.array(x) for name, x in weights.items()}
  inner, split, trail = {'vector': Adam()}, {}, []
  for t in range(STEPS):
    lr = min(t, 4) / 16
    for name in w:
      g = np.asarray(grads[name][t])
      w[name] = w[name] * (1 - lr * DECAY)
      if name == 'vector':
        w[name] = w[name] - lr * inner[name](g)
        continue
      if t % GAP == 0:
        inner[name] = Adam()
        kept = None if subspace == 'svd' else np.asarray(basis[name][t])
        split[name] = parts(subspace, name, g, kept)
      down, up = split[name]
      low = down(g)
      rest = g - up(low)
      rest = np.sign(rest) if residual == 'sign' else rest
      w[name] = w[name] - lr * (up(inner[name](low)) + scale * rest)
    trail.append(dict(w))
  return {name: np.stack([x[name] for x in trail]) for name in w}


@pytest.mark.parametrize(
  'subspace, residual, scale',
  [('svd', 'sign', 1.0), ('columns', 'sgd', 0.7), ('rows', 'sign', 0.7)],
)
def test_it_is_the_papers_algorithm(x64, subspace, residual, scale):
  weights, grads = tree(), tree(seed=10, leading=(STEPS,))
  tx = frugal(
    WARM_UP,
    density=DENSITY,
    gap=GAP,
    subspace=subspace,
    residual=residual,
    residual_scale=scale,
    weight_decay=DECAY,
  )
  ours, states = trajectory(tx, weights, grads)
  basis = states[0].basis
  want = oracle(subspace, residual, scale, weights, grads, basis)
  for name in SHAPES:
    # float64 through an SVD, and roots of squares.
    np.testing.assert_allclose(ours[name], want[name], rtol=1e-9, atol=1e-10)
  for name in MATRICES:
    changes = np.any(np.diff(np.asarray(basis[name]), axis=0) != 0)
    assert changes
