"""This module holds the training step: microbatches, gradient, update."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax.layerwise.step import Layerwise, layerwise
from galore_optax.layerwise.weights import is_stored
from models.llama import Layers
from train.config import Config
from train.update import WholeTree

# Axes: B rows of a batch, T tokens of a row.

PyTree: TypeAlias = Any
Batch: TypeAlias = dict[str, jax.Array]
Loss: TypeAlias = Callable[[PyTree, Batch], tuple[jax.Array, PyTree]]
Init: TypeAlias = Callable[[jax.Array], 'State']
Step: TypeAlias = Callable[['State', Batch], tuple['State', PyTree]]

# The weights that `slices` cuts; a tied model has one of them.
VOCABULARY = ('embed/embedding', 'lm_head/kernel')


class State(NamedTuple):
  """All that an update reads and writes."""

  step: jax.Array  # [], int32: updates done so far
  params: PyTree  # the model's parameters
  optimizer: optax.OptState  # the optimizer's state, made from params


def model(config: Config) -> Layers:
  """Returns the model of a config, which reads its weights as they are stored.

  Layer by layer: no more than one layer of them exists as arrays.
  """
  read = config.weights().read
  return Layers(
    config.model, lambda tree: jax.tree.map(read, tree, is_leaf=is_stored)
  )


def init_params(config: Config, key: jax.Array) -> PyTree:
  """Returns the first weights of a config, as they are stored."""
  store = config.weights().store
  params = Layers(config.model).init(key)
  blocks = jax.tree.map(
    lambda w: store(w) if w.ndim > 2 else w, params['blocks']
  )
  return params | {'blocks': blocks}


def build(config: Config) -> tuple[Init, Step]:
  """Returns what starts and what continues the training of a config."""
  schedule = config.schedule()
  if isinstance(config.update, WholeTree):
    tx = config.transformation()
    step = make_step(
      Layers(config.model),
      tx,
      schedule=schedule,
      microbatches=config.microbatches,
    )
    return lambda key: init(init_params(config, key), tx), step
  update = make_layerwise(config)
  step = make_layerwise_step(update, schedule=schedule)
  return lambda key: init(init_params(config, key), update), step


def make_layerwise(config: Config) -> Layerwise:
  """Returns the layer-wise update of a config that has one."""
  update = config.update
  assert not isinstance(update, WholeTree)
  return layerwise(
    Layers(config.model),
    config.optimizer.build(config.schedule()),
    clip_norm=config.clip_norm,
    clip=update.clip,
    microbatches=config.microbatches,
    accumulate=update.accumulate,
    sums_dtype=update.sums,
    slices=dict.fromkeys(VOCABULARY, update.slices)
    if update.slices > 1
    else {},
    weights=config.weights(),
  )


def make_layerwise_step(update: Layerwise, *, schedule: optax.Schedule) -> Step:
  """Returns the same as `make_step` for a layer-wise update."""

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    batch, tokens = with_mean_weight(batch)
    params, optimizer, metrics = update(state.params, state.optimizer, batch)
    metrics = {
      'loss': metrics['loss'],
      'grad_norm': metrics['grad_norm'],
      'learning_rate': jnp.asarray(schedule(state.step)),
      'tokens': tokens,
    }
    return State(state.step + 1, params, optimizer), metrics

  return step


def with_mean_weight(batch: Batch) -> tuple[Batch, jax.Array]:
  """Returns the batch with weights of mean 1, and their sum before."""
  tokens = jnp.sum(batch['weights'])
  weights_BT = batch['weights'] * (batch['weights'].size / tokens)
  return {**batch, 'weights': weights_BT}, tokens


def init(params: PyTree, tx: Any) -> State:
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
    batch, tokens = with_mean_weight(batch)
    value, grads = mean_gradient(loss, state.params, batch, microbatches)
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
