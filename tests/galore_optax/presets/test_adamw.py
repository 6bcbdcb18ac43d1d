"""`galore_adamw` against its equations in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore, galore_adamw, scale_by_galore_adam
from galore_optax.decay import decay_updated_weights
from tests.galore_optax.program import normal, trajectory, tree
from tests.rounding import assert_close, units


def test_adam_with_eps_before_the_bias_correction():
  b1, b2, eps = 0.8, 0.97, 0.3
  tx = scale_by_galore_adam(b1=b1, b2=b2, eps=eps)
  state, mu, nu = tx.init(jnp.zeros(5)), 0.0, 0.0
  for t in range(1, 6):
    g = normal(5, t)
    updates, state = tx.update(jnp.asarray(g, jnp.float32), state)
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
    step = np.sqrt(1 - b2**t) / (1 - b1**t)
    want = step * mu / (np.sqrt(nu) + eps)
    # The tolerance allows for about ten roundings per step. The moments of five
    # steps may cancel.
    assert_close(updates, want, operations=50)


def test_it_is_optax_adam_with_a_growing_eps():
  g = jnp.asarray(normal(5), jnp.float32)
  tx = scale_by_galore_adam(b2=0.9, eps=0.2)
  ours, _ = tx.update(g, tx.init(g))
  other = optax.scale_by_adam(b2=0.9, eps=0.2 / np.sqrt(1 - 0.9))
  want, _ = other.update(g, other.init(g))
  # The tolerance allows for about ten roundings of products and roots on each
  # side.
  np.testing.assert_allclose(ours, want, rtol=units(20))


def test_bias_correction_keeps_its_digits_for_b2_near_one():
  # Computing 1 - b2 ** t in float32 would have a relative error of 6e-5 for b2
  # = 0.999 and t = 1.
  tx = scale_by_galore_adam(b2=0.999, eps=0.0)
  g = jnp.ones(1)
  updates, _ = tx.update(g, tx.init(g))
  # The tolerance allows for ten roundings of products and roots.
  np.testing.assert_allclose(updates, 1.0, rtol=units(10))


def test_decay_acts_on_the_weight_that_the_update_made():
  lr, decay = optax.linear_schedule(0.0, 0.4, 4), 0.5
  tx = decay_updated_weights(lr, weight_decay=decay)
  w, u = jnp.asarray([2.0, -3.0]), jnp.asarray([0.25, 0.5])
  state = tx.init(w)
  for t in range(3):
    updates, state = tx.update(u, state, w)
    want = (np.asarray(w) + np.asarray(u)) * (1 - 0.1 * t * decay)
    # The tolerance allows for rounding three products and three sums.
    np.testing.assert_allclose(w + updates, want, rtol=units(6))


def test_decay_is_on_every_leaf_whole_and_unscaled():
  params = {'w': jnp.asarray(normal((7, 9)), jnp.float32), 'b': jnp.ones(4)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  tx = galore_adamw(0.1, rank=3, scale=9.0, weight_decay=0.5)
  step = jax.jit(lambda g, w: tx.update(g, tx.init(w), w)[0])
  updates = step(zeros, params)
  for name, w in params.items():
    # The tolerance allows for multiplying the three numbers in a different
    # order.
    assert_close(updates[name], -0.05 * w, operations=3)


def test_without_decay_it_is_galore_around_its_adam():
  params = {'w': jnp.asarray(normal((7, 9)), jnp.float32), 'b': jnp.ones(4)}
  inner = optax.chain(scale_by_galore_adam(), optax.scale(-0.1))
  ours = galore_adamw(0.1, rank=3, gap=2)
  other = galore(inner, rank=3, gap=2)
  grads = tree({k: x.shape for k, x in params.items()}, 5, (3,), jnp.float32)
  found, want = (trajectory(tx, params, grads)[0] for tx in (ours, other))
  # The tolerance allows for different programs, which sum 9 terms in each of
  # three steps. Adam amplifies an error a thousandfold if an entry is that much
  # smaller than the largest one.
  assert_close(found, want, operations=3 * 9 * 1000)


def test_decay_without_params_raises():
  params = {'w': jnp.ones((7, 9))}
  tx = galore_adamw(0.1, rank=3, weight_decay=0.1)
  with pytest.raises(ValueError, match='needs params'):
    tx.update(params, tx.init(params))


def test_defaults_are_those_of_the_reference():
  defaults = {
    name: p.default
    for name, p in inspect.signature(galore_adamw).parameters.items()
  }
  named = {k: defaults[k] for k in ('b1', 'b2', 'eps', 'weight_decay')}
  assert named == {'b1': 0.9, 'b2': 0.999, 'eps': 1e-6, 'weight_decay': 0.0}


@pytest.mark.parametrize('option', ['rnk', 'learning_rates'])
def test_an_unknown_option_raises(option):
  with pytest.raises(TypeError, match=option):
    galore_adamw(0.1, **{option: 3})
