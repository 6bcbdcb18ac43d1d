"""chex: dataclasses as parameters."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from tests.galore_optax.program import normal32
from tests.peers import steps

pytestmark = pytest.mark.peers


@chex.dataclass
class Layer:
  """A layer that is a mapping as well."""

  kernel: chex.Array
  bias: chex.Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Params:
  """A frozen dataclass with fields that are not arrays of weights."""

  layers: tuple
  out: Layer
  nothing: None = None


def params():
  def layer(i, o, seed):
    return Layer(kernel=normal32((i, o), seed), bias=normal32((o,), seed + 1))

  return Params(layers=(layer(7, 11, 0), layer(11, 9, 2)), out=layer(9, 5, 4))


BASES = {
  'layers/0/kernel': (3, 7),
  'layers/1/kernel': (3, 9),
  'out/kernel': (3, 5),
}


@pytest.mark.parametrize('preset', steps.PRESETS)
def test_update_is_that_of_a_dict(preset):
  steps.assert_container_does_not_matter(steps.PRESETS[preset](), params())


def test_three_steps_are_those_of_a_dict():
  tx = go.galore_adamw(0.1, weight_decay=0.1, rank=3, gap=2)
  assert steps.bases(tx.init(params())) == BASES
  steps.assert_same_steps(tx, params())


def test_training():
  x, y = normal32((16, 7), 8), normal32((16, 5), 9)

  def loss(params):
    h = x
    for layer in params.layers:
      h = jnp.tanh(h @ layer['kernel'] + layer.bias[None])
    return jnp.mean((h @ params.out.kernel - y) ** 2)

  tx = optax.chain(go.galore(rank=3, gap=10), optax.adamw(0.1))

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  weights, losses = params(), []
  state = tx.init(weights)
  for _ in range(30):
    weights, state, value = step(weights, state)
    losses.append(float(value))
  assert losses[-1] < 0.6 * losses[0]
  assert isinstance(weights, Params) and isinstance(weights.out, Layer)
