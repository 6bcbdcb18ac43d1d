"""Effect of a refresh on the inner state, for `moments` 'keep' and 'reset'."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore, moments
from tests.galore_optax.program import each, normal32, run, tree
from tests.rounding import assert_close, distance, units

PARAMS = {'w': (7, 9), 'stack': (2, 11, 5), 'b': (4,)}


def states(inner, steps, **options):
  """Returns the state after each step."""
  tx, params = galore(inner, rank=3, gap=2, **options), tree(PARAMS)
  grads = [tree(PARAMS, 10 + i) for i in range(steps)]
  return [step.state for step in run(tx, params, grads, apply=False)]


def test_keep_leaves_the_inner_state_to_the_inner():
  first, second, third = states(optax.adam(0.1), 3)
  adam = third.inner[0]
  assert int(adam.count) == 3
  # mu only decays and adds the gradient in the new basis.
  g = tree(PARAMS, 12)['w']
  want = 0.9 * second.inner[0].mu['w'] + 0.1 * third.basis['w'] @ g
  # The tolerance allows for rounding in sums of seven terms.
  assert_close(adam.mu['w'], want, operations=10)
  assert np.any(first.basis['w'] != third.basis['w'])


def test_reset_restarts_only_projected_leaves():
  lr = optax.linear_schedule(0.0, 1.0, 10)
  trail = states(optax.adamw(lr), 3, moments='reset')
  low, rest = (
    [s.inner.inner_states[name].inner_state for s in trail]
    for name in ('projected', 'other')
  )
  # Adam restarts its count for projected leaves at the refresh at step 2.
  assert [int(s[0].count) for s in low] == [1, 2, 1]
  assert [int(s[0].count) for s in rest] == [1, 2, 3]
  # A refresh does not restart learning-rate schedules.
  for group in (low, rest):
    assert [int(s[2].count) for s in group] == [1, 2, 3]
  g = tree(PARAMS, 12)
  mu = low[2][0].mu
  # The tolerance allows for rounding in sums of seven terms.
  want = 0.1 * trail[2].basis['w'] @ g['w']
  assert_close(mu['w'], want, operations=10)
  want = 0.9 * rest[1][0].mu['b'] + 0.1 * g['b']
  assert_close(rest[2][0].mu['b'], want, operations=3)


def test_reset_leaves_other_leaves_on_their_own_trajectory():
  # Leaves that are not projected must get the updates that they would get if
  # the tree contained only them.
  inner, params = optax.adam(0.1), tree(PARAMS)
  tx = galore(inner, rank=3, gap=2, moments='reset')
  state, alone = tx.init(params), inner.init(params['b'])
  step, step_alone = jax.jit(tx.update), jax.jit(inner.update)
  for i in range(5):
    g = tree(PARAMS, 10 + i)
    ours, state = step(g, state, params)
    want, alone = step_alone(g['b'], alone)
    # The tolerance allows for five steps of Adam in two programs.
    assert_close(ours['b'], want, operations=50)


INNERS = {
  'adam': optax.adam(0.1),
  'sgd': optax.sgd(0.1, momentum=0.9),
  'lion': optax.lion(0.1),
  'radam': optax.radam(0.1),
  'rmsprop': optax.rmsprop(0.1, centered=True, momentum=0.9),
  'injected': optax.inject_hyperparams(optax.adam)(
    optax.constant_schedule(0.1)
  ),
  'adafactor': optax.adafactor(
    0.1,
    multiply_by_parameter_scale=False,
    min_dim_size_to_factor=3,
    momentum=0.9,
  ),
}


@each('name', INNERS, quick=['adam', 'adafactor'])
def test_after_a_reset_the_projected_updates_are_those_of_a_first_step(name):
  tx = galore(INNERS[name], rank=3, gap=2, moments='reset')
  params = tree(PARAMS)
  state, step = tx.init(params), jax.jit(tx.update)
  for i in range(2):
    _, state = step(tree(PARAMS, 10 + i), state, params)
  g = tree(PARAMS, 20)
  after_reset, _ = step(g, state, params)
  fresh = galore(INNERS[name], rank=3, gap=2)
  # A new basis takes its signs from the old one, so both must start with the
  # same basis.
  first = fresh.init(params)._replace(count=state.count, basis=state.basis)
  want, _ = jax.jit(fresh.update)(g, first, params)
  for name in ('w', 'stack'):
    # The tolerance allows for different programs. Inner optimizers amplify the
    # rounding of entries that nearly cancel.
    assert distance(after_reset[name], want[name]) < units(1000)


def test_a_restart_zeroes_moments_and_their_counters():
  inner = optax.adam(optax.linear_schedule(1.0, 0.0, 5))
  params = tree(PARAMS)
  _, state = inner.update(params, inner.init(params))
  adam, schedule = moments.reset(state)
  chex.assert_trees_all_equal(adam, inner.init(params)[0])
  assert int(schedule.count) == 1


def test_a_bare_array_restarts_too():
  inner = optax.adam(0.1)
  _, state = inner.update(normal32((3, 5)), inner.init(jnp.zeros((3, 5))))
  again = moments.reset(state)
  chex.assert_trees_all_equal(again, inner.init(jnp.zeros((3, 5))))


def test_a_reset_of_moments_that_are_not_known_raises():
  # The accumulator of Adagrad starts above zero, so zeros would not reset it.
  tx = galore(optax.adagrad(0.1), rank=3, moments='reset')
  with pytest.raises(ValueError, match="reset' knows the moments"):
    tx.init(tree(PARAMS))
