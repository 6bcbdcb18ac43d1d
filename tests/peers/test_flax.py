"""Flax 0.12: train states, NNX states and frozen dicts.

The tests of this folder's parent run `nnx.Optimizer` and `TrainState` with
dicts. These tests have the containers without such a wrapper.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.training import train_state

import galore_optax as go
from tests.galore_optax.program import normal32
from tests.peers import steps
from tests.rounding import assert_same_program

pytestmark = pytest.mark.peers

X, Y = normal32((16, 7), 8), normal32((16, 5), 9)


class Count(nnx.Variable):
  """The counter of flax's own example of a train state."""


class Model(nnx.Module):
  def __init__(self, rngs):
    self.count = Count(jnp.array(0))
    self.up = nnx.Linear(7, 11, rngs=rngs)
    self.norm = nnx.LayerNorm(11, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(11, 11, rngs=rngs) for _ in range(2)])
    self.out = nnx.Linear(11, 5, rngs=rngs)

  def __call__(self, x):
    self.count[...] += 1
    x = self.norm(nnx.relu(self.up(x)))
    for block in self.blocks:
      x = x + block(x)
    return self.out(x)


BASES = {
  'up/kernel': (3, 7),
  'blocks/0/kernel': (3, 11),
  'blocks/1/kernel': (3, 11),
  'out/kernel': (3, 5),
}


def nnx_params():
  return nnx.state(Model(nnx.Rngs(0)), nnx.Param)


def frozen_params():
  return FrozenDict(nnx.to_pure_dict(nnx_params()))


@flax.struct.dataclass
class Struct:
  up: dict
  blocks: list
  out: dict


def struct_params():
  return Struct(
    **{k: v for k, v in frozen_params().unfreeze().items() if k != 'norm'}
  )


CONTAINERS = {
  'nnx.State': nnx_params,
  'FrozenDict': frozen_params,
  'struct.dataclass': struct_params,
}


@pytest.mark.parametrize('preset', steps.PRESETS)
@pytest.mark.parametrize('container', CONTAINERS)
def test_update_is_that_of_a_dict(preset, container):
  tx, params = steps.PRESETS[preset](), CONTAINERS[container]()
  steps.assert_container_does_not_matter(tx, params)


@pytest.mark.parametrize('container', CONTAINERS)
def test_three_steps_are_those_of_a_dict(container):
  tx, params = (
    go.galore_adamw(0.1, weight_decay=0.1, rank=3, gap=2),
    CONTAINERS[container](),
  )
  assert steps.bases(tx.init(params)) == BASES
  steps.assert_same_steps(tx, params)


@pytest.mark.parametrize('container', CONTAINERS)
def test_describe_counts_the_arrays(container):
  tx, params = (
    go.galore_adamw(0.1, rank=3, gap=2),
    CONTAINERS[container](),
  )
  assert str(go.describe(tx, params)) == str(
    go.describe(tx, steps.plain(params))
  )


MAKERS = {
  'chain': lambda: optax.chain(go.galore(rank=3, gap=10), optax.adamw(0.03)),
  'muon': lambda: go.galore_muon(0.03, rank=3, gap=10),
  'reset': lambda: go.galore_adamw(0.1, rank=3, gap=10, moments='reset'),
  '8bit': lambda: go.galore_adamw_8bit(
    0.1, rank=3, gap=10, min_size=30, block_size=33
  ),
}


@pytest.mark.parametrize('name', MAKERS)
def test_a_split_model_learns(name):
  """EasyDeL's pattern: the state of the model is split off and updated."""
  tx = MAKERS[name]()
  graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

  @jax.jit
  def step(params, state, rest):
    def loss(params):
      model = nnx.merge(graphdef, params, rest, copy=True)
      value = jnp.mean((model(X) - Y) ** 2)
      return value, nnx.state(model, Count)

    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, rest, value

  state, losses = tx.init(params), []
  for _ in range(30):
    params, state, rest, value = step(params, state, rest)
    losses.append(float(value))
  assert losses[-1] < 0.6 * losses[0]
  assert steps.bases(state) == BASES
  assert nnx.merge(graphdef, params, rest).count[...] == 30


class TrainState(train_state.TrainState):
  """The train state of flax's example nnx_toy_examples/03_train_state.py."""

  graphdef: nnx.GraphDef
  counts: nnx.State


@pytest.mark.parametrize('name', MAKERS)
def test_the_train_state_of_an_nnx_model_learns(name):
  graphdef, params, counts = nnx.split(Model(nnx.Rngs(0)), nnx.Param, Count)
  state = TrainState.create(
    apply_fn=None,
    params=params,
    tx=MAKERS[name](),
    graphdef=graphdef,
    counts=counts,
  )

  @jax.jit
  def step(state):
    def loss(params):
      model = nnx.merge(state.graphdef, params, state.counts, copy=True)
      value = jnp.mean((model(X) - Y) ** 2)
      return value, nnx.state(model, Count)

    grad = jax.value_and_grad(loss, has_aux=True)
    (value, counts), grads = grad(state.params)
    return state.apply_gradients(grads=grads, counts=counts), value

  losses = []
  for _ in range(30):
    state, value = step(state)
    losses.append(float(value))
  assert losses[-1] < 0.6 * losses[0]
  assert steps.bases(state.opt_state) == BASES


def test_nnx_optimizer_makes_the_steps_of_a_dict():
  tx = go.galore_adamw(0.1, weight_decay=0.1, rank=3, gap=2)
  model = Model(nnx.Rngs(0))
  flat = steps.plain(nnx.state(model, nnx.Param))
  optimizer, state = nnx.Optimizer(model, tx, wrt=nnx.Param), tx.init(flat)

  @nnx.jit
  def by_nnx(model, optimizer, grads):
    optimizer.update(model, grads)

  @jax.jit
  def by_optax(flat, state, grads):
    updates, state = tx.update(grads, state, flat)
    return optax.apply_updates(flat, updates), state

  for i in range(3):
    grads = steps.gradients(nnx.state(model, nnx.Param), i)
    by_nnx(model, optimizer, grads)
    flat, state = by_optax(flat, state, steps.gradients(flat, i))
  steps.assert_equal_leaves(nnx.state(model, nnx.Param), flat)


class Boxed(nn.Module):
  """Kernels in boxes that name the axes of a mesh, as in MaxText."""

  @nn.compact
  def __call__(self, x):
    def dense(size, names):
      init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)
      return nn.Dense(size, kernel_init=init)

    x = nn.relu(dense(11, ('embed', 'mlp'))(x))
    return dense(5, ('mlp', 'embed'))(x)


def boxed_params():
  return Boxed().init(jax.random.key(0), X)['params']


@pytest.mark.parametrize('preset', steps.PRESETS)
def test_update_of_boxed_parameters_is_that_of_arrays(preset):
  """The state may keep the boxes; its arrays are those without boxes."""
  tx, boxed = steps.PRESETS[preset](), boxed_params()
  plain = nn.unbox(boxed)
  assert_same_program(
    (tx.update, steps.gradients(boxed), tx.init(boxed), boxed),
    (tx.update, steps.gradients(plain), tx.init(plain), plain),
  )


def test_training_of_boxed_parameters():
  state = train_state.TrainState.create(
    apply_fn=Boxed().apply, params=boxed_params(), tx=MAKERS['chain']()
  )

  @jax.jit
  def step(state):
    def loss(params):
      return jnp.mean((state.apply_fn({'params': params}, X) - Y) ** 2)

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value

  losses = []
  for _ in range(30):
    state, value = step(state)
    losses.append(float(value))
  assert losses[-1] < 0.8 * losses[0]
  box = state.params['Dense_0']['kernel']
  assert isinstance(box, nn.LogicallyPartitioned)
  assert box.names == ('embed', 'mlp')
  shapes = {x.shape for x in jax.tree.leaves(state.opt_state[0].basis)}
  assert shapes == {(3, 7), (3, 5)}


def test_a_frozen_dict_keeps_its_type():
  tx, params = MAKERS['chain'](), frozen_params()
  updates, _ = tx.update(steps.gradients(params), tx.init(params), params)
  assert isinstance(updates, FrozenDict)
  new = optax.apply_updates(params, updates)
  assert np.any(new['up']['kernel'] != params['up']['kernel'])
