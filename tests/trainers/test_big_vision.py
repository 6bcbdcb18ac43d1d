"""The optimizer in big_vision (commit 0127fb6, big_vision/optax.py, train.py).

A config names a function of optax. `bv_optax.make` masks it and chains it with
clipping, multipliers, weight decay and schedules, each masked by regexes.
"""

import functools
import operator
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_optax as go
from tests.galore_optax.program import each
from tests.trainers import program


class Classifier(nn.Module):
  boxed: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.xavier_uniform()
    if self.boxed:
      init = nn.with_logical_partitioning(init, ('embed', 'mlp'))
    x = nn.Dense(24, kernel_init=init, name='embedding')(x)
    x = x + nn.Dense(24, kernel_init=init, name='Dense_0')(nn.gelu(x))
    x = x + nn.Dense(24, kernel_init=init, name='Dense_1')(nn.gelu(x))
    return nn.Dense(16, name='head')(x)


@pytest.fixture
def namespace(monkeypatch):
  """The namespace that big_vision adds to optax, with the line of a config."""
  added = types.SimpleNamespace(
    galore=functools.partial(go.galore, optax.scale_by_adam(b2=0.95))
  )
  monkeypatch.setattr(optax, 'big_vision', added, raising=False)


def masks(params, patterns):
  """Returns a tree of booleans for each pattern; the first match counts."""
  names = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  first = [
    next(i for i, p in enumerate(patterns) if re.fullmatch(p, name))
    for name in names
  ]
  treedef = jax.tree.structure(params)
  return [
    treedef.unflatten([i == j for j in first]) for i in range(len(patterns))
  ]


def make(config, params):
  """Repeats `bv_optax.make`."""
  *trained, frozen = masks(params, ['.*/bias', '.*/kernel', 'frozen/.*'])
  not_frozen = jax.tree.map(operator.not_, frozen)
  tx = operator.attrgetter(config['optax_name'])(optax)
  decayed, _ = masks(params, ['.*/kernel', '.*'])
  schedule = optax.cosine_decay_schedule(1.0, 100)
  return optax.chain(
    optax.masked(optax.clip_by_global_norm(1.0), not_frozen),
    optax.masked(tx(**config['optax']), not_frozen),
    optax.scale(config['lr']),
    optax.add_decayed_weights(1e-4, decayed),
    *(
      optax.masked(optax.scale_by_schedule(schedule), mask) for mask in trained
    ),
    optax.masked(optax.set_to_zero(), frozen),
    optax.scale(-1.0),
  )


CONFIG = {
  'optax_name': 'big_vision.galore',
  'optax': {'rank': program.RANK, 'gap': 2},
  'lr': 0.02,
}


def fsdp(mesh, x):
  """Shards the largest divisible axis: the rule 'fsdp(axis="data")'."""
  spec = [None] * x.ndim
  for axis in np.argsort(x.shape)[::-1]:
    if x.shape[axis] % 8 == 0:
      spec[axis] = 'data'
      break
  return NamedSharding(mesh, PartitionSpec(*spec))


@each('boxed', [False, True], quick=[True])
def test_training_lowers_the_loss(namespace, boxed):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  model = Classifier(boxed)

  def init(key):
    return model.init(key, jnp.ones((1, 16)))['params']

  replicated = NamedSharding(mesh, PartitionSpec())
  key = jax.device_put(jax.random.key(0), replicated)
  shapes = jax.eval_shape(init, key)
  # The masks are made of arrays, but the state is made of boxes.
  tx = make(CONFIG, nn.unbox(shapes))
  # big_vision raises an error for each implicit transfer to a device.
  with jax.transfer_guard('disallow'):
    opt_shapes = jax.eval_shape(tx.init, shapes)
    places = jax.tree.map(
      functools.partial(fsdp, mesh), nn.unbox((shapes, opt_shapes))
    )
    params = jax.jit(init, out_shardings=places[0])(key)
    opt = jax.jit(tx.init, out_shardings=places[1])(params)
  state = nn.unbox((params, opt))
  whole = jax.eval_shape(optax.adamw(0.1).init, state[0])
  assert program.num_elements(opt) < program.num_elements(whole)

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=(places, None))
  def update(state, batch):
    params, opt = state

    def loss_fn(params):
      return jnp.mean(
        (model.apply({'params': params}, batch[0]) - batch[1]) ** 2
      )

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), loss

  losses = []
  by_rows = NamedSharding(mesh, PartitionSpec('data'))
  for batch in jax.device_put(program.data(steps=8), by_rows):
    with jax.transfer_guard('disallow'):
      state, loss = update(state, batch)
    losses.append(float(loss))
  program.assert_falls(losses)
  # big_vision reads the step from the state of the schedule.
  is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
  leaves = jax.tree.leaves(state[1], is_leaf=is_schedule)
  assert {int(x.count) for x in leaves if is_schedule(x)} == {8}


def test_frozen_parameters_have_no_state(namespace):
  init = jax.jit(Classifier().init)
  params = init(jax.random.key(0), jnp.ones((1, 16)))['params']
  params = {'model': params, 'frozen': {'w': jnp.ones((16, 24))}}
  state = make(CONFIG, params).init(params)
  paths = program.by_path(state)
  assert any('basis/model' in path for path in paths)
  assert not any('frozen' in path for path in paths)


PRESETS = {
  'chain': program.line,
  '8bit': lambda: go.galore_adamw_8bit(0.1, rank=4, gap=2, min_size=0),
  'muon': lambda: go.galore_muon(0.1, rank=4, gap=2),
  'adalomo': lambda: go.adalomo(0.1),
}


@each('name', PRESETS, quick=['chain', '8bit'])
def test_nothing_is_transferred_implicitly(name):
  params, tx = {'w': jnp.ones((16, 24))}, PRESETS[name]()
  with jax.transfer_guard('disallow'):
    jax.eval_shape(tx.init, params)
    state = jax.jit(tx.init)(params)
    jax.jit(tx.update)(params, state, params)
