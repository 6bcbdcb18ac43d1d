"""This module holds the training step: microbatches, gradient, update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

# Axes: B rows of a batch, T tokens of a row.

PyTree: TypeAlias = Any
Batch: TypeAlias = dict[str, jax.Array]
Loss: TypeAlias = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]
Step: TypeAlias = Callable[['State', Batch], tuple['State', PyTree]]


class State(NamedTuple):
  """All that an update reads and writes."""

  step: jax.Array  # [], int32: updates done so far
  params: PyTree  # the model's parameters
  optimizer: optax.OptState  # the optimizer's state, made from params


def init(params: PyTree, tx: optax.GradientTransformation) -> State:
  """Returns the state before the first update."""
  return State(jnp.zeros([], jnp.int32), params, tx.init(params))


def make_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  *,
  schedule: optax.Schedule,
  microbatches: int = 1,
) -> Step:
  """Returns the jitted `(state, batch) -> (state, metrics)`; donates state.

  The loss is the mean over the scored tokens of the whole batch, however they
  fall into microbatches.

  Args:
    loss: `(params, batch) -> (loss, aux)`, a mean over all positions of
      weight * negative log-likelihood.
    tx: the optimizer.
    schedule: the learning rate by step, for the metrics alone.
    microbatches: number of equal parts of the batch, one in memory at a time.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    tokens = jnp.sum(batch['weights'])
    weights_BT = batch['weights'] * (batch['weights'].size / tokens)
    value, grads = mean_gradient(
      loss, state.params, {**batch, 'weights': weights_BT}, microbatches
    )
    updates, optimizer = tx.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss': value,
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.asarray(schedule(state.step)),
      'tokens': tokens,
    }
    return State(state.step + 1, params, optimizer), metrics

  return step


def mean_gradient(
  loss: Loss, params: PyTree, batch: Batch, microbatches: int
) -> tuple[jax.Array, PyTree]:
  """Returns the loss and its gradient, averaged over the microbatches."""
  gradient = jax.value_and_grad(loss, has_aux=True)
  if microbatches == 1:
    (value, _), grads = gradient(params, batch)
    return value, grads

  def add(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
    (value, _), grads = gradient(params, micro)
    return jax.tree.map(jnp.add, total, (value, grads)), None

  # In float32: a sum of many bfloat16 gradients would drop the small ones.
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.zeros([]), params)
  )
  parts = jax.tree.map(
    lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch
  )
  (value, grads), _ = jax.lax.scan(add, zeros, parts)
  mean = lambda total, like: (total / microbatches).astype(like.dtype)
  return value / microbatches, jax.tree.map(mean, grads, params)
