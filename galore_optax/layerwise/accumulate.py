"""A layer-wise step on sums of projected gradients.

The batch passes through the model in parts, forward and back, one after
another. Of a part's gradient only the projection is kept; the weights are
updated from the sum, layer after layer. `step` is one such step of a
`galore_optax.layerwise.step.Layerwise`, which documents the options.

Axes: A parts of the batch; L layers, the leading axis of a stack.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax import clipping
from galore_optax.layerwise import stack
from galore_optax.quantized.rounding import apply_updates_stochastic


def step(layers, tree, weights, state, batch):
  """Updates every weight from the sum of its projected gradients.

  Args:
    layers: a `Layerwise` step.
    tree: the `stack.Parts` of the parameters.
    weights: by path, as they are stored.
    state: before the step.
    batch: [N, ...], of all parts together.

  Returns:
    (stored weight, state of tx) by path; the norm of the mean of projected
    gradients; the metrics.
  """
  num = layers.accumulate
  key = jax.random.fold_in(jax.random.key(0), state.count)
  totals = zeros(layers, tree, weights, state.inner)
  entries = {name: (state.inner[name], totals[name]) for name in weights}
  add = functools.partial(_add, layers, tree, key)

  def part(entries, numbered):
    number, batch = numbered
    passes = layers.passes(tree, batch)
    entries, _, metrics = passes.backward(
      *passes.forward(weights),
      entries,
      functools.partial(add, number),
      stored=weights,
    )
    return entries, metrics

  numbered = (jnp.arange(num), stack.split(batch, num))
  entries, metrics = lax.scan(part, entries, numbered)
  metrics = jax.tree.map(lambda a: jnp.sum(a, 0), metrics)
  metrics['loss'] /= num
  sums = {name: total for name, (_, total) in entries.items()}
  norm = jnp.sqrt(clipping.sum_of_squares(sums)) / num
  factor = jnp.float32(1 / num)
  if layers.clip_norm is not None:
    factor *= clipping.clip_coefficient(norm, layers.clip_norm)

  def updated(name):
    update = functools.partial(layers.update, tree, key, factor, name)
    entry = (weights[name], entries[name][0])
    if name in layers.slices:
      return stack.in_slices(update, entry, sums[name], layers.slices[name])
    if stack.in_stack(name):
      return stack.each(update, entry, sums[name])
    return update(entry, sums[name], 0)

  return {name: updated(name) for name in weights}, norm, metrics


def zeros(layers, tree, weights, inner):
  """Returns what gradients are added to, in the shapes of `project`.

  A weight that is updated in slices is summed whole.
  """

  def zero(name):
    read = layers.weights.read
    low = lambda w, inner: _projected(layers, tree, name, read(w), inner)
    low = jax.vmap(low) if stack.in_stack(name) else low
    shape = jax.eval_shape(low, weights[name], inner[name]).shape
    return jnp.zeros(shape, layers.sums_dtype)

  return {name: zero(name) for name in weights}


def _add(layers, tree, key, number, entry, name, grad, layer):
  """Returns (state of tx, sums) of a weight after part `number`'s gradient."""
  inner, total = stack.take(entry, layer)
  index = 0 if layer is None else layer
  if name not in layers.slices:
    alone = tree.alone(name, grad)
    due = (number == 0) & layers.tx.due(inner, layer=index)
    refresh = lambda inner: layers.tx.refresh(alone, inner, layer=index)
    inner = lax.cond(due, refresh, lambda inner: inner, inner)
  low = _projected(layers, tree, name, grad, inner)
  noise = tree.key(jax.random.fold_in(key, number), name, index)
  new = (inner, apply_updates_stochastic(total, low, noise))
  return stack.put(entry, new, layer)


def _projected(layers, tree, name, grad, inner):
  """Returns what a gradient adds to the sums."""
  if name in layers.slices:
    return grad
  return jax.tree.leaves(layers.tx.project(tree.alone(name, grad), inner))[0]
