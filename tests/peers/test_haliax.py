"""haliax: trees of NamedArray, in the loop of Levanter's trainer."""

import warnings

import equinox as eqx
import jax
import optax
import pytest

import galore_optax as go
from tests.galore_optax.program import normal32
from tests.peers import steps

with warnings.catch_warnings():
  # haliax imports a module that JAX deprecates.
  warnings.simplefilter('ignore', DeprecationWarning)
  import haliax as hax

pytestmark = [
  pytest.mark.peers,
  # haliax calls functions that JAX deprecates.
  pytest.mark.filterwarnings('ignore:jax.core:DeprecationWarning'),
]

Batch, In, Mlp, Out, Layers = hax.make_axes(
  Batch=16, In=7, Mlp=11, Out=5, Layers=3
)
X = hax.named(normal32((16, 7), 8), (Batch, In))
Y = hax.named(normal32((16, 5), 9), (Batch, Out))


def dense(layer, x):
  """Applies a linear layer to [Batch, In].

  haliax 1.4.dev453 calls a function in its own products that JAX 0.12 removed.
  """
  product = hax.named(x.array @ layer.weight.array.T, (Batch, layer.Out))
  return product if layer.bias is None else product + layer.bias


class Block(eqx.Module):
  up: hax.nn.Linear
  down: hax.nn.Linear

  @staticmethod
  def init(*, key):
    keys = jax.random.split(key)
    return Block(
      up=hax.nn.Linear.init(In, Mlp, key=keys[0]),
      down=hax.nn.Linear.init(Mlp, In, key=keys[1], use_bias=False),
    )

  def __call__(self, x):
    return x + dense(self.down, hax.tanh(dense(self.up, x)))


class Model(eqx.Module):
  """A stack of blocks, as Levanter's models have it."""

  blocks: hax.nn.Stacked
  out: hax.nn.Linear

  @staticmethod
  def init(*, key):
    keys = jax.random.split(key)
    stack = hax.nn.Stacked.init(Layers, Block)
    return Model(
      blocks=stack(key=jax.random.split(keys[0], Layers.size)),
      out=hax.nn.Linear.init(In, Out, key=keys[1]),
    )

  def __call__(self, x):
    return dense(self.out, self.blocks.fold(x))


# The weights are [out, in], and each layer of the stack has a basis.
BASES = {
  'blocks/stacked/up/weight': (3, 3, 7),
  'blocks/stacked/down/weight': (3, 3, 7),
  'out/weight': (3, 5),
}


def trainable(model):
  """Returns the part that Levanter passes to `init` of the optimizer."""
  return eqx.filter(model, eqx.is_inexact_array)


def params():
  return trainable(Model.init(key=jax.random.key(0)))


@pytest.mark.parametrize('preset', [*steps.PRESETS, 'badam'])
def test_update_is_that_of_a_dict(preset):
  if preset == 'badam':
    tx = go.badam(0.1, switch_every=2, weight_decay=0.1)
  else:
    tx = steps.PRESETS[preset]()
  steps.assert_container_does_not_matter(tx, params())


def test_three_steps_are_those_of_a_dict():
  tx = go.galore_adamw(0.1, weight_decay=0.1, rank=3, gap=2)
  assert steps.bases(tx.init(params())) == BASES
  steps.assert_same_steps(tx, params())


@pytest.mark.parametrize(
  'make',
  [
    lambda: optax.chain(
      optax.clip_by_global_norm(1.0),
      go.galore(rank=3, gap=10),
      optax.adamw(0.03),
    ),
    lambda: go.galore_muon(0.03, rank=3, gap=10),
    lambda: go.frugal(0.01, density=0.5, gap=10),
  ],
  ids=['chain', 'muon', 'frugal'],
)
def test_training(make):
  """Levanter passes the loss as `obj_fn` to each update."""
  tx, model = make(), Model.init(key=jax.random.key(0))
  state = tx.init(trainable(model))

  def loss(model):
    return hax.mean((model(X) - Y) ** 2).scalar()

  @hax.named_jit
  def step(model, state):
    value, grads = eqx.filter_value_and_grad(loss)(model)
    updates, state = tx.update(
      grads, state, params=trainable(model), obj_fn=loss
    )
    return eqx.apply_updates(model, updates), state, value

  losses = []
  for _ in range(30):
    model, state, value = step(model, state)
    losses.append(float(value))
  assert losses[-1] < 0.6 * losses[0]
  assert isinstance(model.out.weight, hax.NamedArray)
  assert steps.bases(state).keys() == BASES.keys()


def test_describe_counts_the_arrays():
  tx = go.galore_adamw(0.1, rank=3, gap=2)
  table = go.describe(tx, params())
  flat = go.describe(tx, steps.plain(params()))
  assert str(table) == str(flat)
