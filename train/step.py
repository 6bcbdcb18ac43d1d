"""The training step: microbatches, gradient, update.

`build` makes what `train.loop` repeats of a `train.task.Task`, for all weights
at once or, with `galore_optax.layerwise`, one after another.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax.layerwise.step import Layerwise, layerwise
from train.config import Config, WholeTree
from train.task import Batch, Loss, PyTree, Task

Init: TypeAlias = Callable[[jax.Array], 'State']
Step: TypeAlias = Callable[['State', Batch], tuple['State', PyTree]]

NO_SUMS = ('loss', 'grad_norm', 'projected_grad_norm')
"""Metrics of a layer-wise update that are no sums over the batch."""


class State(NamedTuple):
  """All that an update reads and writes."""

  step: jax.Array  # [], int32: updates done so far
  params: PyTree  # the model's parameters
  optimizer: optax.OptState  # the optimizer's state, made from params


def build(config: Config, task: Task) -> tuple[Init, Step]:
  """Returns what starts and what continues the training of a task."""
  schedule, start = config.schedule(), starter(config, task)
  if isinstance(config.update, WholeTree):
    step = make_step(
      task.loss,
      config.transformation(),
      schedule=schedule,
      microbatches=config.microbatches,
    )
  else:
    update = make_layerwise(config, task)
    step = make_layerwise_step(update, schedule=schedule)
  if config.learning_rate == 0:
    step = still(step)
  return lambda key: start(task.init(key)), step


def starter(config: Config, task: Task) -> Callable[[PyTree], 'State']:
  """Returns `parameters -> state` before the first update."""
  if isinstance(config.update, WholeTree):
    tx = config.transformation()
  else:
    tx = make_layerwise(config, task)
  return lambda params: init(params, tx)


def still(step: Step) -> Step:
  """Returns a step that moves no weight: a sum with 0 would lose a -0."""

  @functools.partial(jax.jit, donate_argnums=0)
  def same(state: State, batch: Batch) -> tuple[State, PyTree]:
    new, metrics = step(state, batch)
    return new._replace(params=state.params), metrics

  return same


def init(params: PyTree, tx: Any) -> State:
  """Returns the state before the first update."""
  return State(jnp.zeros([], jnp.int32), params, tx.init(params))


def make_layerwise(config: Config, task: Task) -> Layerwise:
  """Returns the layer-wise update of a config that has one."""
  update = config.update
  assert not isinstance(update, WholeTree)
  return layerwise(
    task.layers,
    config.optimizer.build(config.schedule()),
    clip_norm=config.clip_norm,
    clip=update.clip,
    microbatches=config.microbatches,
    accumulate=update.accumulate,
    sums_dtype=update.sums,
    slices=dict.fromkeys(task.large, update.slices)
    if update.slices > 1
    else {},
    weights=config.weights(),
  )


def make_layerwise_step(update: Layerwise, *, schedule: optax.Schedule) -> Step:
  """Returns the same as `make_step` for a layer-wise update.

  With `accumulate`, `projected_grad_norm` stands for `grad_norm`.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    batch, weight = with_mean_weight(batch)
    params, optimizer, found = update(state.params, state.optimizer, batch)
    metrics = {name: found[name] for name in NO_SUMS if name in found}
    metrics['learning_rate'] = jnp.asarray(schedule(state.step))
    sums = {name: x for name, x in found.items() if name not in metrics}
    metrics |= with_own_weight(sums, batch, weight)
    return State(state.step + 1, params, optimizer), metrics

  return step


def make_step(
  loss: Loss,
  tx: optax.GradientTransformation,
  *,
  schedule: optax.Schedule,
  microbatches: int = 1,
) -> Step:
  """Returns the jitted `(state, batch) -> (state, metrics)`; donates state.

  The loss is the mean over what the whole batch scores, however that falls
  into microbatches. Metrics are `loss`, `grad_norm`, `learning_rate`, the
  batch's `weight` and the sums that stand beside the loss, by name.

  Args:
    loss: as in `Task.loss`.
    tx: the optimizer.
    schedule: the learning rate by step, for the metrics alone.
    microbatches: number of equal parts of the batch, one in memory at a time.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: State, batch: Batch) -> tuple[State, PyTree]:
    batch, weight = with_mean_weight(batch)
    value, sums, grads = mean_gradient(loss, state.params, batch, microbatches)
    updates, optimizer = tx.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss': value,
      'grad_norm': optax.tree.norm(grads),
      'learning_rate': jnp.asarray(schedule(state.step)),
    }
    metrics |= with_own_weight(sums, batch, weight)
    return State(state.step + 1, params, optimizer), metrics

  return step


def with_mean_weight(batch: Batch) -> tuple[Batch, jax.Array]:
  """Returns the batch with weights of mean 1, and their sum before."""
  weight = jnp.sum(batch['weights'])
  weights = batch['weights'] * (batch['weights'].size / weight)
  return {**batch, 'weights': weights}, weight


def with_own_weight(
  sums: dict[str, jax.Array], batch: Batch, weight: jax.Array
) -> dict[str, jax.Array]:
  """Undoes `with_mean_weight` for sums, which are linear in the weights."""
  share = weight / batch['weights'].size
  return {name: share * total for name, total in sums.items()} | {
    'weight': weight
  }


def mean_gradient(
  loss: Loss, params: PyTree, batch: Batch, microbatches: int
) -> tuple[jax.Array, PyTree, PyTree]:
  """Returns loss and gradient, averaged over microbatches, and the sums."""
  gradient = jax.value_and_grad(loss, has_aux=True)
  if microbatches == 1:
    (value, sums), grads = gradient(params, batch)
    return value, sums, grads
  parts = jax.tree.map(
    lambda x: x.reshape(microbatches, -1, *x.shape[1:]), batch
  )

  def add(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, total, gradient(params, micro)), None

  first = jax.tree.map(lambda x: x[0], parts)
  # In float32: a sum of many bfloat16 gradients would drop the small ones.
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.float32),
    (jax.eval_shape(loss, params, first), params),
  )
  ((value, sums), grads), _ = jax.lax.scan(add, zeros, parts)
  mean = lambda total, like: (total / microbatches).astype(like.dtype)
  return value / microbatches, sums, jax.tree.map(mean, grads, params)
