"""Transformations around `galore`, and libraries that use it."""

import dataclasses
import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from galore_optax import galore
from tests.galore_optax.every import build
from tests.galore_optax.program import each, normal32, run, tree
from tests.rounding import assert_close, assert_same_program, distance, units

OPTIONS = {'rank': 3, 'gap': 2}
# Tolerance for a program with other leaves, which sums up to 13 terms in a
# different order in each of four steps. Adam amplifies the rounding of entries
# that nearly cancel.
ANOTHER_PROGRAM = units(4 * 13 * 10)


def weights(seed=0):
  return tree({'w': (7, 11), 'v': (13, 5)}, seed) | {'b': normal32(6)}


def updates_of(tx, steps=4, params=None):
  """Returns the updates of each step, and the last state."""
  params = weights() if params is None else params
  grads = [
    jax.tree.map(lambda x, i=i: jnp.sin(3 * x + i), params)
    for i in range(steps)
  ]
  trail = run(tx, params, grads, apply=False)
  return [step.updates for step in trail], trail[-1].state


def direct():
  return galore(optax.adamw(0.1), **OPTIONS)


@functools.cache
def without_v():
  """Returns the updates of each step for a tree without the leaf 'v'."""
  return updates_of(direct(), params={k: weights()[k] for k in 'wb'})[0]


def test_masked():
  mask = {'w': True, 'v': False, 'b': True}
  trail, state = updates_of(optax.masked(direct(), mask))
  for ours, want in zip(trail, without_v(), strict=True):
    assert distance({k: ours[k] for k in 'wb'}, want) < ANOTHER_PROGRAM
  assert set(jax.tree.leaves(state.inner_state.basis)[0].shape) == {3, 7}


def test_partition():
  labels = {'w': 'low', 'v': 'full', 'b': 'low'}
  tx = optax.partition({'low': direct(), 'full': optax.sgd(0.5)}, labels)
  trail, _ = updates_of(tx)
  for ours, want in zip(trail, without_v(), strict=True):
    assert distance({k: ours[k] for k in 'wb'}, want) < ANOTHER_PROGRAM
  # The tolerance allows for two products, and for a sine that XLA computes to a
  # few ulps.
  want = -0.5 * np.sin(3 * np.float64(weights()['v']))
  assert_close(trail[0]['v'], want, operations=10)


def test_two_ranks_by_partition():
  labels = {'w': 'a', 'v': 'b', 'b': 'a'}
  stages = {
    k: optax.chain(galore(rank=r), optax.adam(0.1))
    for k, r in (('a', 2), ('b', 4))
  }
  _, state = updates_of(optax.partition(stages, labels))
  shapes = [
    x.shape
    for k in 'ab'
    for x in jax.tree.leaves(state.inner_states[k].inner_state[0].basis)
  ]
  assert shapes == [(2, 7), (4, 5)]


def test_MultiSteps():
  tx = optax.MultiSteps(direct(), 2)
  params = weights()
  state, step = tx.init(params), jax.jit(tx.update)
  want_tx = direct()
  want_state, want_step = want_tx.init(params), jax.jit(want_tx.update)
  for i in range(3):
    one, two = (
      jax.tree.map(lambda x: jnp.sin(x + j), params)  # noqa: B023
      for j in (2 * i, 2 * i + 1)
    )
    nothing, state = step(one, state, params)
    ours, state = step(two, state, params)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, one, two)
    want, want_state = want_step(mean, want_state, params)
    assert not np.any(nothing['w'])
    # The tolerance allows for a running mean, which rounds differently from the
    # mean of both gradients.
    assert distance(ours, want) < ANOTHER_PROGRAM
  assert int(state.inner_opt_state.count) == 3


def test_inject_hyperparams():
  tx = optax.inject_hyperparams(
    lambda learning_rate, scale: build(
      'Galore', learning_rate, scale=scale, **OPTIONS
    )
  )(optax.constant_schedule(0.1), scale=0.5)
  want = build('Galore', scale=0.5, **OPTIONS)
  params = weights()
  g, step = weights(5), jax.jit(tx.update)
  expected, _ = jax.jit(want.update)(g, want.init(params), params)
  for init in (tx.init, jax.jit(tx.init)):
    state = init(params)
    assert float(state.hyperparams['scale']) == 0.5
    ours, _ = step(g, state, params)
    assert distance(ours, expected) < ANOTHER_PROGRAM


def test_apply_if_finite_skips_the_whole_step():
  tx = optax.apply_if_finite(direct(), 5)
  params = weights()
  state, step = tx.init(params), jax.jit(tx.update)
  _, state = step(weights(3), state, params)
  bad = weights(4) | {'w': jnp.full((7, 11), jnp.nan)}
  updates, after = step(bad, state, params)
  assert not np.any(updates['w'])
  chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_named_chain():
  tx = optax.named_chain(('clip', optax.clip(0.5)), ('galore', direct()))
  want = optax.chain(optax.clip(0.5), direct())
  w, state, other = weights(), tx.init(weights()), want.init(weights())
  assert_same_program((tx.update, w, state, w), (want.update, w, other, w))
  assert state['galore'].basis['w'].shape == (3, 7)


def test_flatten_leaves_no_matrix():
  with pytest.raises(ValueError, match='projects no parameter'):
    optax.flatten(direct()).init(weights())


def test_schedule_free_around():
  tx = optax.contrib.schedule_free(
    galore(optax.sgd(0.1), scale=1.0, **OPTIONS), 0.1, b1=0.9
  )
  trail, state = updates_of(tx)
  assert state.base_optimizer_state.basis['w'].shape == (3, 7)
  # The average of the iterates at step one equals the iterate, so the update
  # equals galore's.
  want, _ = updates_of(galore(optax.sgd(0.1), scale=1.0, **OPTIONS), steps=1)
  assert distance(trail[0], want[0]) < ANOTHER_PROGRAM


def test_lookahead_around():
  tx = optax.lookahead(direct(), sync_period=2, slow_step_size=0.5)
  params = optax.LookaheadParams.init_synced(weights())
  updates, _ = jax.jit(tx.update)(weights(3), tx.init(params), params)
  want, _ = run_one(direct(), weights(3))
  assert distance(updates.fast, want) < ANOTHER_PROGRAM


def run_one(tx, g):
  return jax.jit(tx.update)(g, tx.init(weights()), weights())


def test_frozen_dict():
  tx, w = direct(), weights()
  frozen, state = FrozenDict(w), tx.init(w)
  frozen_state = tx.init(frozen)
  assert_same_program(
    (tx.update, frozen, frozen_state, frozen), (tx.update, w, state, w)
  )
  updates, _ = jax.eval_shape(tx.update, frozen, frozen_state, frozen)
  assert isinstance(updates, FrozenDict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Module:
  """A pytree with attributes and None, as equinox's filtered modules are."""

  weight: jax.Array
  bias: jax.Array | None
  children: tuple = ()


def test_a_module_that_is_a_pytree():
  leaf = Module(normal32((13, 5), 1), None)
  params = Module(normal32((7, 11)), normal32(6), (leaf, leaf))
  tx = galore(optax.adamw(0.1), targets=r'children/.*/weight', **OPTIONS)
  trail, state = updates_of(tx, params=params)
  assert isinstance(trail[0], Module)
  assert state.basis.children[1].weight.shape == (3, 5)
  assert state.basis.weight == optax.MaskedNode()
  named = {'0': leaf.weight, '1': leaf.weight}
  want, _ = updates_of(direct(), params=named)
  found = trail[-1].children[1].weight
  assert distance(found, want[-1]['1']) < ANOTHER_PROGRAM


def test_a_haiku_dict_has_slashes_in_its_keys():
  params = {
    'mlp/~/linear_0': {'w': normal32((7, 11)), 'b': normal32(11)},
    'mlp/~/layer_norm': {'scale': normal32(7), 'offset': normal32(7)},
    'mlp/~/embed': {'embeddings': normal32((13, 5))},
  }
  _, state = updates_of(direct(), params=params)
  bases = jax.tree_util.tree_leaves_with_path(state.basis)
  assert [p[0].key for p, _ in bases] == ['mlp/~/linear_0']
  named = galore(optax.adam(0.1), targets='mlp/~/embed/embeddings', **OPTIONS)
  _, state = updates_of(named, params=params)
  assert state.basis['mlp/~/embed']['embeddings'].shape == (3, 5)


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.LayerNorm()(nn.relu(nn.Dense(11)(x)))
    return nn.Dense(5, name='head')(nn.Dense(9)(x))


X, Y = normal32((16, 7), 8), normal32((16, 5), 9)


def projected_names(basis):
  leaves = jax.tree_util.tree_leaves_with_path(basis)
  return {
    jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in leaves
  }


# tests/trainers/test_flax_linen.py trains another TrainState.
@pytest.mark.slow
def test_a_flax_TrainState_learns():
  model = Linen()
  params = jax.jit(model.init)(jax.random.key(0), X)['params']
  tx = optax.chain(galore(rank=3, gap=10), optax.adamw(0.03))
  state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  @jax.jit
  def step(state):
    loss = lambda p: jnp.mean((state.apply_fn({'params': p}, X) - Y) ** 2)
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value

  losses = []
  for _ in range(30):
    state, value = step(state)
    losses.append(float(value))
  assert losses[-1] < 0.6 * losses[0]
  assert projected_names(state.opt_state[0].basis) == {
    'Dense_0/kernel',
    'Dense_1/kernel',
  }


# tests/trainers/test_levanter.py trains another model of Equinox.
@pytest.mark.slow
def test_an_equinox_model_learns():
  model = eqx.nn.MLP(7, 5, 11, depth=2, key=jax.random.key(0))
  tx = optax.chain(galore(rank=3, gap=10), optax.adamw(0.03))
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit
  def step(model, state):
    loss = lambda model: jnp.mean((jax.vmap(model)(X) - Y) ** 2)
    value, grads = eqx.filter_value_and_grad(loss)(model)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = tx.update(grads, state, params)
    return eqx.apply_updates(model, updates), state, value

  losses = []
  for _ in range(60):
    model, state, value = step(model, state)
    losses.append(float(value))
  assert losses[-1] < 0.6 * losses[0]
  # Equinox weights are [out, in]; the shorter side is projected.
  basis = state[0].basis
  assert projected_names(basis) == {f'layers/{i}/weight' for i in range(3)}
  assert [layer.weight.shape for layer in basis.layers] == [
    (3, 7),
    (3, 11),
    (3, 5),
  ]


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(7, 11, rngs=rngs)
    self.norm = nnx.LayerNorm(11, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(11, 11, rngs=rngs) for _ in range(2)])
    self.head = nnx.Linear(11, 5, rngs=rngs)

  def __call__(self, x):
    x = self.norm(nnx.relu(self.up(x)))
    for block in self.blocks:
      x = x + block(x)
    return self.head(x)


def train_nnx(model, tx):
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss = lambda model: jnp.mean((model(X) - Y) ** 2)
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value

  losses = [float(step(model, optimizer)) for _ in range(30)]
  assert losses[-1] < 0.6 * losses[0]
  return optimizer


@each(
  'kind, targets, bases',
  [
    ('NNX', None, {(3, 7), (3, 11)}),
    ('NNX', 'up/kernel', {(3, 7)}),
    ('linen', None, {(3, 7), (3, 9)}),
  ],
  # tests/trainers/test_flax_nnx.py trains with an optimizer of NNX.
  quick=[],
)
def test_an_nnx_optimizer_learns(kind, targets, bases):
  if kind == 'NNX':
    model = Nnx(nnx.Rngs(0))
  else:
    model = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(X)
  stage = galore(rank=3, gap=10, targets=targets)
  optimizer = train_nnx(model, optax.chain(stage, optax.adamw(0.03)))
  basis = nnx.to_pure_dict(nnx.state(optimizer))['opt_state'][0]['basis']
  assert {x.shape for x in jax.tree.leaves(basis)} == bases
