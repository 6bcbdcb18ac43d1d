"""LOMO and AdaLomo against float64 oracles of their published rules."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.clipping import ClippedTransformation
from galore_optax.presets.lomo import adalomo, lomo
from tests.galore_optax.program import run
from tests.rounding import assert_close

STEPS = 5


def trees(seed):
  draw = np.random.default_rng(seed).normal
  return {'bias': draw(size=7), 'w': draw(size=(5, 7))}


def after_five_steps(tx, params):
  float32 = lambda tree: jax.tree.map(jnp.float32, tree)
  grads = [float32(trees(10 + i)) for i in range(STEPS)]
  return run(tx, float32(params), grads)[-1].params


def clip(grads, bound):
  norm = np.sqrt(sum(np.sum(g * g) for g in grads.values()))
  factor = min(1.0, bound / (norm + 1e-6)) if bound else 1.0
  return {k: factor * g for k, g in grads.items()}


def test_a_bound_that_would_turn_the_gradient_raises():
  for rule in (lomo, adalomo):
    with pytest.raises(ValueError, match='clip_norm must be positive'):
      rule(0.1, clip_norm=-1.0)


def test_numbers_may_be_injected():
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), trees(0))
  tx = optax.inject_hyperparams(lomo)(0.1, weight_decay=0.3)
  # The tolerance allows for rounding, because hyperparameters are arrays in one
  # program and constants in the other. An update rounds about ten times and is
  # a tenth of the weights.
  want = after_five_steps(lomo(0.1, weight_decay=0.3), params)
  assert_close(after_five_steps(tx, params), want, operations=2 * STEPS)


@pytest.mark.parametrize('bound', [None, 1.0])
def test_lomo(bound):
  lr, decay = 0.1, 0.03
  params = trees(0)
  for i in range(STEPS):
    grads = clip(trees(10 + i), bound)
    params = {
      k: (1 - lr * decay) * w - lr * grads[k] for k, w in params.items()
    }
  tx = lomo(lr, clip_norm=bound, weight_decay=decay)
  # The tolerance allows for five steps in float32; the oracle runs in float64.
  chex.assert_trees_all_close(
    after_five_steps(tx, trees(0)), params, rtol=2e-6, atol=2e-7
  )


@pytest.mark.parametrize('bound', [None, 1.0])
def test_adalomo(bound):
  lr, decay = 0.1, 0.03
  params = trees(0)
  row, column, full = np.zeros(5), np.zeros(7), np.zeros(7)
  for t in range(1, STEPS + 1):
    grads = clip(trees(9 + t), bound)
    beta = 1 - t**-0.8
    square = grads['w'] ** 2 + 1e-30
    row = beta * row + (1 - beta) * square.mean(-1)
    column = beta * column + (1 - beta) * square.mean(-2)
    full = beta * full + (1 - beta) * (grads['bias'] ** 2 + 1e-30)
    moment = {'w': np.outer(row, column) / row.mean(), 'bias': full}
    for k, w in params.items():
      u = grads[k] / np.sqrt(moment[k])
      u /= max(1.0, np.sqrt(np.mean(u * u)))
      rate = lr * max(1e-3, np.sqrt(np.mean(w * w)))
      params[k] = w * (1 - rate * decay) - rate * u
  tx = adalomo(lr, clip_norm=bound, weight_decay=decay)
  # The tolerance allows for five steps in float32; the oracle runs in float64.
  chex.assert_trees_all_close(
    after_five_steps(tx, trees(0)), params, rtol=1e-5, atol=1e-6
  )


def test_clipping_is_on():
  assert isinstance(lomo(0.1), ClippedTransformation)
  assert isinstance(adalomo(0.1), ClippedTransformation)
