"""Rules for the gradient outside the subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import PowerIteration, Sign, galore
from tests.galore_optax.every import build, maker
from tests.galore_optax.program import each, normal, trajectory, tree

SHAPES = {'w': (6, 9), 'b': (4,)}
W = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
LR = optax.linear_schedule(0.0, 0.25, 4)
INNERS = {
  'adamw': lambda: optax.adamw(LR, weight_decay=0.0),
  'lion': lambda: optax.lion(LR, weight_decay=0.0),
  'momentum': lambda: optax.sgd(LR, momentum=0.9),
  'injected': lambda: optax.inject_hyperparams(optax.adam)(learning_rate=LR),
}


@each('name', INNERS, quick=['adamw', 'momentum'])
def test_the_sign_has_the_learning_rate_of_the_step(name):
  line = optax.chain(
    galore(
      rank=2, gap=9, side='left', subspace='coordinates', residual=Sign(LR)
    ),
    INNERS[name](),
  )
  steps, grads = 4, tree(SHAPES, leading=(4,))
  weights, states = trajectory(line, W, grads)
  kept = np.asarray(states[0].basis['w'][0])
  out = np.setdiff1d(np.arange(6), kept)
  w = np.concatenate([np.zeros((1, 6, 9)), weights['w']])
  for t in range(steps):
    moved = (w[t + 1] - w[t])[out]
    want = -t / 16 * np.sign(grads['w'][t])[out]
    # Adam's update for a sign is that sign. The tolerance allows for eps and
    # the rounding of 1 - b2.
    np.testing.assert_allclose(moved, want, rtol=2e-5, atol=1e-7)
  alone, _ = trajectory(INNERS[name](), W, grads)
  np.testing.assert_allclose(weights['b'], alone['b'], rtol=1e-6, atol=1e-7)
  # The inner optimizer updates the kept coordinates, with a scale of 0.25.
  want = 0.25 * np.asarray(alone['w'])[:, kept]
  np.testing.assert_allclose(
    np.asarray(weights['w'])[:, kept], want, rtol=1e-5, atol=1e-7
  )


@pytest.mark.parametrize('residual', ['sign', 'sgd'])
def test_density_one_is_the_inner_and_zero_the_rule(residual):
  grads = tree(SHAPES, leading=(3,))
  options = dict(residual=residual, weight_decay=0.1)
  adam = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(LR),
  )
  want, _ = trajectory(adam, W, grads)
  one_rule, zero_rule = (
    build('Frugal', LR, density=density, **options) for density in (1.0, 0.0)
  )
  one, _ = trajectory(one_rule, W, grads)
  none, states = trajectory(zero_rule, W, grads)
  for name in W:
    np.testing.assert_array_equal(one[name], want[name])
  # The tolerance allows for one ulp, because XLA fuses the program differently.
  np.testing.assert_allclose(none['b'], want['b'], rtol=1e-6)
  rule = np.sign if residual == 'sign' else np.asarray
  w = np.zeros((6, 9), np.float32)
  for t in range(3):
    w = w - np.float32(t / 16) * (rule(grads['w'][t]) + np.float32(0.1) * w)
    np.testing.assert_allclose(none['w'][t], w, rtol=1e-6, atol=1e-7)
  # The state contains only Adam's two moments of the vector.
  sizes = [x[0].size for x in jax.tree.leaves(states) if x.ndim > 1]
  assert sum(sizes) == 2 * 4


CELLS = {
  'rotate': lambda: galore(
    optax.adam(0.05), rank=2, gap=5, scale=1.0, moments='rotate'
  ),
  'power, sign': lambda: galore(
    optax.adam(0.05),
    rank=2,
    gap=5,
    scale=1.0,
    subspace=PowerIteration(),
    residual=Sign(0.05),
    moments='reset',
  ),
  'sgdm in, sgd out': maker(
    'Frugal',
    gap=5,
    subspace='columns',
    inner=optax.trace(0.5),
    residual='sgd',
    density=0.5,
  ),
}


@pytest.mark.parametrize('name', CELLS)
def test_a_cell_goes_down_a_quadratic(name):
  tx, goal = CELLS[name](), jnp.asarray(normal((6, 9)), jnp.float32)

  def step(carry, _):
    w, state = carry
    updates, state = tx.update({'w': w['w'] - goal}, state, w)
    w = optax.apply_updates(w, updates)
    return (w, state), jnp.sum(jnp.square(w['w'] - goal))

  w = {'w': jnp.zeros((6, 9))}
  run = jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), length=100)[1])
  losses = run()
  start = jnp.sum(jnp.square(goal))
  assert losses[-1] < (1e-6 if name.startswith('sgdm') else 0.1) * start
