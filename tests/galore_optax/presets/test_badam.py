"""BAdam: the order of its layers, its state, and its equations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import badam
from galore_optax.presets.badam import layer_of_turn
from tests.galore_optax.program import Adam, normal, run, trajectory

LAYERS, EVERY, DECAY = 3, 2, 0.25
STEPS = 2 * LAYERS * EVERY + 1
WARM_UP = optax.linear_schedule(0.0, 0.25, 4)
"""Warm-up from zero in binary fractions, which float32 represents exactly."""


def model(seed=0, leading=()):
  shapes = {'up': (LAYERS, 5, 7), 'norm': (LAYERS, 4)}
  blocks = {
    k: jnp.asarray(normal((*leading, *s), seed + i))
    for i, (k, s) in enumerate(shapes.items())
  }
  head = jnp.asarray(normal((*leading, 6, 9), seed + 9))
  return {'blocks': blocks, 'head': head}


def oracle(weights, grads, turns, train_rest):
  """Returns the weights after each step. Step t trains layer `turns[t]`."""
  w = jax.tree.map(np.array, weights)
  adams, trail, rest = {}, [], Adam()
  for t in range(STEPS):
    lr, active = min(t, 4) / 16, turns[t]
    for name, stack in w['blocks'].items():
      if t % EVERY == 0:
        adams[name] = Adam()
      g = np.asarray(grads['blocks'][name][t, active])
      layer = stack[active] * (1 - lr * DECAY) - lr * adams[name](g)
      w['blocks'][name] = stack.copy()
      w['blocks'][name][active] = layer
    if train_rest:
      u = rest(np.asarray(grads['head'][t]))
      w['head'] = w['head'] * (1 - lr * DECAY) - lr * u
    trail.append(jax.tree.map(np.copy, w))
  return jax.tree.map(lambda *x: np.stack(x), *trail)


def turns_of(blocks):
  """Returns the layer that changed at each step after the first."""
  changed = np.any(np.diff(np.asarray(blocks), axis=0) != 0, axis=(2, 3))
  assert np.all(changed.sum(1) == 1)
  return changed.argmax(1).tolist()


@pytest.mark.parametrize('order', ['ascending', 'descending', 'random'])
def test_it_is_the_papers_algorithm(order):
  rest = order == 'ascending'
  with jax.enable_x64(True):
    weights, grads = model(), model(20, (STEPS,))
    tx = badam(
      WARM_UP,
      switch_every=EVERY,
      order=order,
      weight_decay=DECAY,
      train_rest=rest,
    )
    ours, _ = trajectory(tx, weights, grads)
    # The learning rate is zero at step 0, so no layer changes. Step 1 trains
    # the same layer.
    seen = turns_of(ours['blocks']['up'])
    turns = seen[:1] + seen
    want = oracle(weights, grads, turns, rest)
  # BAdam and the oracle run in float64. The tolerance allows for rounding in
  # roots of squares.
  chex.assert_trees_all_close(ours, want, rtol=1e-9, atol=1e-10)
  blocks = turns[::EVERY]
  assert turns == np.repeat(blocks, EVERY).tolist()[:STEPS]
  cycles = blocks[:LAYERS], blocks[LAYERS : 2 * LAYERS]
  assert all(sorted(cycle) == list(range(LAYERS)) for cycle in cycles)
  if order != 'random':
    up = order == 'ascending'
    assert cycles == ([0, 1, 2],) * 2 if up else cycles == ([2, 1, 0],) * 2
  if not rest:
    # The head is not trained without train_rest, so it must not change at all.
    np.testing.assert_array_equal(ours['head'][-1], weights['head'])


def test_random_cycles_repeat_no_layer_and_are_not_all_alike():
  at = jax.jit(lambda t: layer_of_turn(t, 5, 'random', seed=1))
  cycles = np.array([at(t) for t in range(40)]).reshape(8, 5)
  assert np.all(np.sort(cycles, axis=1) == np.arange(5))
  assert len({tuple(cycle) for cycle in cycles.tolist()}) > 4


def test_a_stack_of_one_layer_is_adam():
  one = {'blocks': {'up': jnp.asarray(normal((1, 5, 7)), jnp.float32)}}
  grads = {'blocks': {'up': jnp.asarray(normal((4, 1, 5, 7), 1), jnp.float32)}}
  ours, _ = trajectory(badam(0.1, switch_every=9), one, grads)
  want, _ = trajectory(optax.adam(0.1), one, grads)
  # The tolerance allows for one ulp, because two factors are multiplied in a
  # different order.
  chex.assert_trees_all_close(ours, want, rtol=1e-6)


def test_a_resumed_run_goes_on_with_the_cycle():
  weights = jax.tree.map(jnp.float32, model())
  grads = jax.tree.map(jnp.float32, model(20, (8,)))
  tx = badam(0.1, switch_every=EVERY)
  grads = [jax.tree.map(lambda x, t=t: x[t], grads) for t in range(8)]
  whole = run(tx, weights, grads)[-1]
  part = run(tx, weights, grads[:5])[-1]
  leaves, treedef = jax.tree.flatten((part.params, part.state))
  saved = [np.asarray(x) for x in leaves]
  w, state = treedef.unflatten([jnp.asarray(x) for x in saved])
  chex.assert_trees_all_equal(run(tx, w, grads[5:], state=state)[-1], whole)


def test_it_keeps_the_moments_of_one_layer():
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.float32, model()))
  state = jax.eval_shape(badam(0.1, weight_decay=0.1).init, shapes)
  floats = [x.size for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
  assert sum(floats) == 2 * (5 * 7 + 4)


def test_a_fixed_block_is_adam_on_it_and_never_restarts():
  weights = jax.tree.map(jnp.float32, model())
  grads = jax.tree.map(jnp.float32, model(20, (STEPS,)))
  tx = badam(0.1, switch_every=EVERY, order='fixed', start=1)
  ours, _ = trajectory(tx, weights, grads)
  pick = lambda tree, axis: jax.tree.map(
    lambda x: jnp.take(x, 1, axis), tree['blocks']
  )
  want, _ = trajectory(optax.adam(0.1), pick(weights, 0), pick(grads, 1))
  # The tolerance allows for one ulp, because two factors are multiplied in a
  # different order.
  chex.assert_trees_all_close(pick(ours, 1), want, rtol=1e-6)
  for layer in (0, 2):
    still = ours['blocks']['up'][-1, layer]
    np.testing.assert_array_equal(still, weights['blocks']['up'][layer])


@pytest.mark.parametrize(
  ('order', 'first'), [('ascending', [1, 2, 0]), ('descending', [1, 0, 2])]
)
def test_a_cycle_starts_at_a_given_layer(order, first):
  turns = [int(layer_of_turn(t, 3, order, start=1)) for t in range(4)]
  assert turns == [*first, first[0]]


def test_master_weights_keep_steps_that_bfloat16_loses():
  one = {'blocks': {'up': jnp.ones((2, 5, 7), jnp.bfloat16)}}
  grads = {'blocks': {'up': jnp.ones((8, 2, 5, 7), jnp.bfloat16)}}
  # The rate is a quarter of the spacing of bfloat16 numbers below one.
  rate = 2.0**-10
  options = dict(switch_every=4, order='ascending', inner=optax.identity())
  lost, _ = trajectory(badam(rate, **options), one, grads)
  kept, states = trajectory(
    badam(rate, **options, master_weights=True), one, grads
  )
  assert np.all(lost['blocks']['up'] == 1)
  # After four steps per layer, each layer has moved by one spacing: the first
  # layer first, then the second.
  up = np.float32(kept['blocks']['up'])[:, :, 0, 0]
  np.testing.assert_array_equal(up[3], [1 - 2.0**-8, 1])
  np.testing.assert_array_equal(up[7], [1 - 2.0**-8, 1 - 2.0**-8])
  master = states.block.master['blocks']['up']
  assert master.dtype == jnp.float32 and master.shape == (8, 5, 7)


@pytest.mark.parametrize('order', ['fixed', 'ascending'])
def test_a_state_made_from_shapes_is_as_good(order):
  # The state includes float32 copies of the weights. `init` cannot fill them if
  # it gets only shapes.
  weights, grads = model(), model(20, (5,))
  tx = badam(
    0.1, switch_every=2, order=order, train_rest=True, master_weights=True
  )
  made = lambda: tx.init(jax.eval_shape(lambda: weights))
  blind = optax.GradientTransformation(lambda params: made(), tx.update)
  chex.assert_trees_all_equal(
    trajectory(blind, weights, grads)[0], trajectory(tx, weights, grads)[0]
  )


def test_it_refuses_bad_stacks_and_options():
  stacks = {'blocks': {'a': jnp.ones((2, 3)), 'b': jnp.ones((4, 3))}}
  with pytest.raises(ValueError, match='must match stacks'):
    badam(0.1).init(stacks)
  with pytest.raises(ValueError, match='match no parameter'):
    badam(0.1).init({'w': jnp.ones((2, 3))})
  with pytest.raises(ValueError, match='order must be one of'):
    badam(0.1, order='sideways')
  with pytest.raises(ValueError, match='learning rate of its own'):
    badam(0.1, inner=optax.adam(0.1)).init(model())
  with pytest.raises(ValueError, match='has no start'):
    badam(0.1, start=1)
  for switch_every in (0, -5, 1.5):
    with pytest.raises(ValueError, match='switch_every must be an integer'):
      badam(0.1, switch_every=switch_every)
