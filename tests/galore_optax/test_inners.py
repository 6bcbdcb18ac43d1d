"""Which optax transformations work as the inner optimizer of `galore`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore
from tests.galore_optax.program import each, tree

SHAPES = {'wide': (7, 11), 'tall': (13, 5), 'bias': (6,)}


def warmup(count):
  return 0.1 * jnp.minimum(count / 3, 1)


MASK = {'wide': True, 'tall': False, 'bias': True}
INNERS = {
  'sgd': optax.sgd(0.1),
  'momentum': optax.sgd(0.1, momentum=0.9),
  'nesterov': optax.sgd(warmup, momentum=0.9, nesterov=True),
  'sign_sgd': optax.sign_sgd(0.1),
  'adam': optax.adam(warmup),
  'amsgrad': optax.amsgrad(0.1),
  'adabelief': optax.adabelief(0.1),
  'radam': optax.radam(0.1),
  'nadam': optax.nadam(0.1),
  'lion': optax.lion(warmup, weight_decay=0.0),
  'rmsprop': optax.rmsprop(0.1, momentum=0.9),
  'adagrad': optax.adagrad(0.1),
  'adafactor': optax.adafactor(
    warmup, multiply_by_parameter_scale=False, min_dim_size_to_factor=2
  ),
  'adafactor with momentum': optax.adafactor(
    0.1, multiply_by_parameter_scale=False, momentum=0.9
  ),
  'factored rms': optax.chain(
    optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)
  ),
  'clipping inside': optax.chain(
    optax.clip_by_global_norm(0.1), optax.adam(0.1)
  ),
  'injected': optax.inject_hyperparams(optax.adam)(warmup),
  'masked inside': optax.chain(optax.masked(optax.adam(0.1), MASK)),
  'partition inside': optax.partition(
    {'a': optax.adam(0.1), 'b': optax.sgd(0.1)},
    {'wide': 'a', 'tall': 'b', 'bias': 'a'},
  ),
  'MultiSteps inside': optax.MultiSteps(
    optax.adam(0.1), 2
  ).gradient_transformation(),
  'apply_if_finite inside': optax.apply_if_finite(optax.adam(0.1), 3),
  'bfloat16 momentum': optax.adam(0.1, mu_dtype=jnp.bfloat16),
}


@each(
  'name',
  INNERS,
  quick=['adam', 'adafactor', 'partition inside'],
)
def test_an_inner_sees_the_projected_gradients_and_no_more(name):
  """Compares with P^T inner(P g), computed explicitly over two refreshes."""
  inner, params = INNERS[name], tree(SHAPES)
  tx = galore(inner, rank=3, gap=2, scale=0.5)
  state, step = tx.init(params), jax.jit(tx.update)
  low_state, by_hand = None, jax.jit(inner.update)
  for i in range(4):
    g = tree(SHAPES, 10 + i)
    ours, state = step(g, state, params)
    p, q = state.basis['wide'], state.basis['tall']
    low = {'wide': p @ g['wide'], 'tall': q @ g['tall'].T, 'bias': g['bias']}
    if low_state is None:
      low_state = inner.init(jax.tree.map(jnp.zeros_like, low))
    # Some inner optimizers use the shapes of params.
    u, low_state = by_hand(low, low_state, jax.tree.map(jnp.zeros_like, low))
    want = {
      'wide': 0.5 * p.T @ u['wide'],
      'tall': 0.5 * u['tall'].T @ q,
      'bias': u['bias'],
    }
    # The tolerance allows for one more float32 product on each side, in a
    # different order.
    chex.assert_trees_all_close(ours, want, rtol=1e-4, atol=1e-5)
  assert not isinstance(state.basis['wide'], optax.MaskedNode)
  chex.assert_trees_all_close(state.inner, low_state, rtol=1e-4, atol=1e-5)


WITH_DECAY = {
  'adamw': lambda **k: optax.adamw(0.1, weight_decay=0.3, **k),
  'lion': lambda **k: optax.lion(0.1, weight_decay=0.3, **k),
  'nadamw': lambda **k: optax.nadamw(0.1, weight_decay=0.3, **k),
  'adan': lambda **k: optax.adan(0.1, weight_decay=0.3),
  'adafactor': lambda **k: optax.adafactor(
    0.1, multiply_by_parameter_scale=False, weight_decay_rate=0.3
  ),
  'SGD, decay last': lambda **k: optax.chain(
    optax.trace(0.9), optax.add_decayed_weights(0.3), optax.scale(-0.1)
  ),
  'L2, SGD without momentum': lambda **k: optax.chain(
    optax.add_decayed_weights(0.3), optax.sgd(0.1)
  ),
  'injected': lambda **k: optax.inject_hyperparams(optax.adamw)(
    0.1, weight_decay=0.3
  ),
}


@each(
  'name', WITH_DECAY, quick=['adamw', 'SGD, decay last', 'injected', 'lion']
)
def test_decay_of_an_inner_is_that_of_the_whole_weight(name):
  """The effect of params on an update equals the inner's on whole weights."""
  inner, params = WITH_DECAY[name](), tree(SHAPES)
  zeros = jax.tree.map(jnp.zeros_like, params)
  tx = galore(inner, rank=3)
  step, by_hand = jax.jit(tx.update), jax.jit(inner.update)
  g, state, whole = tree(SHAPES, 10), tx.init(params), inner.init(params)
  ours = jax.tree.map(
    jnp.subtract, step(g, state, params)[0], step(g, state, zeros)[0]
  )
  want = jax.tree.map(
    jnp.subtract, by_hand(g, whole, params)[0], by_hand(g, whole, zeros)[0]
  )
  assert np.any(want['wide'])
  # The tolerance allows for rounding in differences of float32 updates of order
  # one.
  chex.assert_trees_all_close(ours, want, atol=1e-6)


def test_lbfgs_needs_more_than_a_gradient():
  params = tree(SHAPES)
  tx = galore(optax.lbfgs(), rank=3)
  with pytest.raises(ValueError, match='value_fn, a function of the whole'):
    tx.update(params, tx.init(params), params)
