"""dm-haiku: `hk.transform`, and parameters that are partly frozen."""

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.galore_optax.program import normal32
from tests.peers import steps

pytestmark = pytest.mark.peers

X, Y = normal32((16, 7), 8), normal32((16, 5), 9)


@hk.transform
def model(x):
  h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
  h = hk.nets.MLP([11, 9], activate_final=True)(h)
  return hk.Linear(5, name='out')(h)


def initial():
  return model.init(jax.random.key(0), X)


BASES = {
  'mlp/~/linear_0/w': (3, 7),
  'mlp/~/linear_1/w': (3, 9),
  'out/w': (3, 5),
}


@pytest.mark.parametrize('preset', steps.PRESETS)
def test_update_is_that_of_a_dict(preset):
  steps.assert_container_does_not_matter(steps.PRESETS[preset](), initial())


def test_three_steps_are_those_of_a_dict():
  tx = go.galore_adamw(0.1, weight_decay=0.1, rank=3, gap=2)
  assert steps.bases(tx.init(initial())) == BASES
  steps.assert_same_steps(tx, initial())


@pytest.mark.parametrize('preset', steps.PRESETS)
def test_an_immutable_mapping_keeps_its_names(preset):
  """Its leaves have numbers for JAX, and it cannot hold masked leaves."""
  tx, params = steps.PRESETS[preset](), initial()
  fixed = hk.data_structures.to_immutable_dict(params)
  grads = steps.gradients(params)
  fixed_grads = hk.data_structures.to_immutable_dict(grads)
  state = tx.init(params)
  chex.assert_trees_all_equal(state, tx.init(fixed))
  updates, _ = tx.update(grads, state, params)
  got, _ = tx.update(fixed_grads, state, fixed)
  assert jax.tree.structure(got) == jax.tree.structure(fixed)
  got = hk.data_structures.to_haiku_dict(got)
  chex.assert_trees_all_equal(got, updates)


def loss(params):
  return jnp.mean((model.apply(params, None, X) - Y) ** 2)


def test_training():
  tx = optax.chain(go.galore(rank=3, gap=10), optax.adamw(0.03))

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  params, losses = initial(), []
  state = tx.init(params)
  for _ in range(30):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert losses[-1] < 0.6 * losses[0]
  assert steps.bases(state) == BASES


def test_training_a_part_of_the_parameters():
  """Haiku's pattern for frozen layers: partition, update a part, merge."""

  def is_trainable(module, name, value):
    return module.startswith('mlp/')

  trainable, frozen = hk.data_structures.partition(is_trainable, initial())
  tx = go.galore_muon(0.03, rank=3, gap=10)

  @jax.jit
  def step(trainable, state):
    def of_part(trainable):
      return loss(hk.data_structures.merge(trainable, frozen))

    value, grads = jax.value_and_grad(of_part)(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value

  state, losses = tx.init(trainable), []
  for _ in range(30):
    trainable, state, value = step(trainable, state)
    losses.append(float(value))
  assert losses[-1] < 0.8 * losses[0]
  assert steps.bases(state) == {k: BASES[k] for k in BASES if k != 'out/w'}
  merged = hk.data_structures.merge(trainable, frozen)
  np.testing.assert_array_equal(merged['out']['w'], initial()['out']['w'])
