"""The optimizer in flax's linen examples (flax 0.12.8, commit 18f8f31).

`lm1b`, which partitions its parameters, is in `test_partitioned.py`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import jax_utils
from flax.core import FrozenDict
from flax.training import train_state
from flax.training.dynamic_scale import DynamicScale

from tests.trainers import program


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    x = nn.relu(nn.Dense(24)(x))
    x = nn.BatchNorm(use_running_average=not train, axis_name=None)(x)
    return nn.Dense(16)(x)


class TrainState(train_state.TrainState):
  batch_stats: Any
  dynamic_scale: Any = None


@functools.cache
def init():
  return jax.jit(Net().init)(jax.random.key(0), jnp.ones((1, 16)))


def create(tx, dynamic_scale=None):
  model, variables = Net(), init()
  return TrainState.create(
    apply_fn=model.apply,
    params=variables['params'],
    tx=tx,
    batch_stats=variables['batch_stats'],
    dynamic_scale=dynamic_scale,
  )


def loss_of(state, batch):
  def loss(params):
    out, updated = state.apply_fn(
      {'params': params, 'batch_stats': state.batch_stats},
      batch[0],
      mutable=['batch_stats'],
    )
    return jnp.mean((out - batch[1]) ** 2), updated['batch_stats']

  return loss


def test_a_train_state_with_batch_statistics():
  # examples/imagenet/train.py, create_train_state and train_step, by jit.
  state = create(program.line())
  program.assert_low_rank(state.opt_state, state.params)
  program.assert_same_as_plain(state.params)

  @jax.jit
  def step(state, batch):
    grad = jax.value_and_grad(loss_of(state, batch), has_aux=True)
    (loss, stats), grads = grad(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss

  losses = []
  for batch in program.data(steps=6):
    state, loss = step(state, batch)
    losses.append(float(loss))
  program.assert_falls(losses)
  # `TrainState.create` sets the step to the Python number 0, so that the second
  # call is traced again with any optimizer.
  assert step._cache_size() == 2


def test_replicas_with_a_loss_scale_skip_a_step_that_is_not_finite():
  # The same example with pmap and DynamicScale, which selects the old state by
  # `jnp.where` if a gradient is not finite.
  state = create(program.line(), DynamicScale(scale=1024.0))
  state = jax_utils.replicate(state)

  def step(state, batch):
    grad = state.dynamic_scale.value_and_grad(
      loss_of(state, batch), has_aux=True, axis_name='batch'
    )
    scale, finite, (loss, stats), grads = grad(state.params)
    new = state.apply_gradients(grads=grads, batch_stats=stats)
    keep = lambda new, old: jax.tree.map(
      lambda x, y: jnp.where(finite, x, y), new, old
    )
    new = new.replace(
      params=keep(new.params, state.params),
      opt_state=keep(new.opt_state, state.opt_state),
      dynamic_scale=scale,
    )
    return new, loss

  step = jax.pmap(step, axis_name='batch')
  losses = []
  for x, y in program.data(steps=6, shape=(64, 16)):
    batch = x.reshape(8, 8, -1), y.reshape(8, 8, -1)
    state, loss = step(state, batch)
    losses.append(float(jnp.mean(loss)))
  program.assert_falls(losses)
  assert np.all(jax_utils.unreplicate(state).step == 6)
  before = state
  after, _ = step(state, (batch[0] * jnp.inf, batch[1]))
  for x, y in zip(
    jax.tree.leaves((before.params, before.opt_state)),
    jax.tree.leaves((after.params, after.opt_state)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)


def test_frozen_dicts():
  params = FrozenDict(create(program.line()).params)
  program.assert_same_as_plain(params)
