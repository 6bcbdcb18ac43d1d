"""Equinox: modules that can be called, in the loop of its documentation."""

import equinox as eqx
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


class Block(eqx.Module):
  """A block with a norm, an activation function and an integer as leaves."""

  norm: eqx.nn.LayerNorm
  up: eqx.nn.Linear
  down: eqx.nn.Linear
  activation: object
  calls: int

  def __init__(self, key):
    keys = jax.random.split(key)
    self.norm = eqx.nn.LayerNorm(7)
    self.up = eqx.nn.Linear(7, 11, key=keys[0])
    self.down = eqx.nn.Linear(11, 7, use_bias=False, key=keys[1])
    self.activation = jax.nn.gelu
    self.calls = 3

  def __call__(self, x):
    return x + self.down(self.activation(self.up(self.norm(x))))


class Model(eqx.Module):
  blocks: list
  out: eqx.nn.Linear

  def __init__(self, key):
    keys = jax.random.split(key, 3)
    self.blocks = [Block(k) for k in keys[:2]]
    self.out = eqx.nn.Linear(7, 5, key=keys[2])

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return self.out(x)


# The weights of Equinox are [out, in], and the shorter side is projected.
BASES = {
  'blocks/0/up/weight': (3, 7),
  'blocks/0/down/weight': (3, 7),
  'blocks/1/up/weight': (3, 7),
  'blocks/1/down/weight': (3, 7),
  'out/weight': (3, 5),
}


def filtered():
  return eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array)


@pytest.mark.parametrize('preset', steps.PRESETS)
def test_update_is_that_of_a_dict(preset):
  steps.assert_container_does_not_matter(steps.PRESETS[preset](), filtered())


def test_three_steps_are_those_of_a_dict():
  tx = go.galore_adamw(0.1, weight_decay=0.1, rank=3, gap=2)
  assert steps.bases(tx.init(filtered())) == BASES
  steps.assert_same_steps(tx, filtered())


def train(tx, params_of):
  """Trains as Equinox's examples do; returns the losses, model and state."""
  model = Model(jax.random.key(0))
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_value_and_grad
  def loss(model):
    return jnp.mean((jax.vmap(model)(X) - Y) ** 2)

  @eqx.filter_jit
  def step(model, state):
    value, grads = loss(model)
    updates, state = tx.update(grads, state, params_of(model))
    return eqx.apply_updates(model, updates), state, value

  losses = []
  for _ in range(30):
    model, state, value = step(model, state)
    losses.append(float(value))
  return losses, model, state


def arrays_of(model):
  return eqx.filter(model, eqx.is_array)


def whole(model):
  return model


@pytest.mark.parametrize('params_of', [arrays_of, whole])
@pytest.mark.parametrize(
  'make',
  [
    lambda: optax.chain(go.galore(rank=3, gap=10), optax.adamw(0.03)),
    lambda: go.galore_muon(0.03, rank=3, gap=10),
    lambda: go.galore_adamw(0.1, rank=3, gap=10, moments='reset'),
    lambda: go.frugal(0.01, density=0.5, gap=10),
    lambda: go.galore_adamw_8bit(
      0.1, rank=3, gap=10, min_size=30, block_size=33
    ),
  ],
  ids=['chain', 'muon', 'reset', 'frugal', '8bit'],
)
def test_training(make, params_of):
  losses, model, state = train(make(), params_of)
  assert losses[-1] < 0.6 * losses[0]
  assert steps.bases(state).keys() == BASES.keys()
  assert model.blocks[0].calls == 3
  assert model.blocks[0].activation is jax.nn.gelu


def test_params_may_be_the_whole_model():
  """The update reads only the arrays that have gradients."""
  tx = go.galore_adamw(0.03, weight_decay=0.1, rank=3, gap=10)
  losses, _, state = train(tx, arrays_of)
  of_whole, _, state_of_whole = train(tx, whole)
  np.testing.assert_array_equal(losses, of_whole)
  steps.assert_equal_leaves(state_of_whole, state)
