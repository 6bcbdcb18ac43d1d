"""A layer-wise step on sums of projected gradients.

The batch passes through the model in parts, forward and back, one after
another. Of a part's gradient only the projection is kept; the weights are
updated from the sum, layer after layer.

Axes: A parts of the batch; L layers, the leading axis of a stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax import clipping
from galore_optax.layerwise import stack
from galore_optax.quantized.rounding import apply_updates_stochastic

PyTree = Any
Weights = dict[str, Any]
"""By path, in the order of the tree."""


def step(
  layers: Any, tree: stack.Parts, weights: Weights, state: Any, batch: PyTree
) -> tuple[Weights, dict[str, PyTree]]:
  """Updates every weight from the sum of its projected gradients.

  Args:
    layers: a `Layerwise` step.
    tree: of the parameters.
    weights: as they are stored.
    state: before the step.
    batch: [N, ...], of all parts together.

  Returns:
    (stored weight, state of tx) by path; the metrics.
  """
  key = jax.random.fold_in(jax.random.key(0), state.count)
  inner, sums, metrics = _summed(layers, tree, weights, state, batch, key)
  norm = jnp.sqrt(clipping.sum_of_squares(sums)) / layers.accumulate
  factor = jnp.float32(1 / layers.accumulate)
  if layers.clip_norm is not None:
    factor *= clipping.clip_coefficient(norm, layers.clip_norm)

  def updated(name):
    cut = name in layers.slices
    rule = layers.tx.update if cut else layers.tx.apply
    update = functools.partial(layers.update, rule, tree, key, name)

    def one(entry, total, layer):
      mean = total.astype(jnp.float32) * factor
      if cut:
        mean = mean.astype(jax.eval_shape(layers.weights.read, entry[0]).dtype)
      return update(entry, mean, layer)

    entry, total = (weights[name], inner[name]), sums[name]
    if cut:
      return stack.in_slices(one, entry, total, layers.slices[name])
    if stack.in_stack(name):
      return stack.each(one, entry, total)
    return one(entry, total, 0)

  new = {name: updated(name) for name in weights}
  return new, {**metrics, 'grad_norm': norm}


def zeros(
  layers: Any, tree: stack.Parts, weights: Weights, inner: Weights
) -> dict[str, jax.Array]:
  """Returns what gradients are added to, in the shapes of `project`.

  A weight that is updated in slices is summed whole.
  """

  def zero(name):
    low = lambda stored, inner: _projected(
      layers, tree, name, layers.weights.read(stored), inner
    )
    low = jax.vmap(low) if stack.in_stack(name) else low
    shape = jax.eval_shape(low, weights[name], inner[name]).shape
    return jnp.zeros(shape, layers.sums_dtype)

  return {name: zero(name) for name in weights}


def _summed(layers, tree, weights, state, batch, key):
  """Returns the states with new bases, the sums, and the metrics."""

  def add(number, entry, name, grad, layer):
    inner, total = stack.take(entry, layer)
    index = 0 if layer is None else layer
    if name not in layers.slices:
      alone = tree.alone(name, grad)
      inner = lax.cond(
        (number == 0) & layers.tx.due(inner, layer=index),
        lambda inner: layers.tx.refresh(alone, inner, layer=index),
        lambda inner: inner,
        inner,
      )
    grad = _projected(layers, tree, name, grad, inner)
    noise = tree.key(jax.random.fold_in(key, number), name, index)
    new = (inner, apply_updates_stochastic(total, grad, noise))
    return stack.put(entry, new, layer)

  def part(entries, numbered):
    number, part = numbered
    passes = layers.passes(tree, part)
    saved, x = passes.forward(weights)
    visit = functools.partial(add, number)
    return passes.backward(saved, x, entries, visit, stored=weights)

  totals = zeros(layers, tree, weights, state.inner)
  entries = {name: (state.inner[name], totals[name]) for name in weights}
  parts = stack.split(batch, layers.accumulate)
  numbers = jnp.arange(layers.accumulate)
  entries, metrics = lax.scan(part, entries, (numbers, parts))
  metrics = jax.tree.map(lambda a: jnp.sum(a, 0), metrics)
  metrics['loss'] /= layers.accumulate
  inner = {name: inner for name, (inner, _) in entries.items()}
  return inner, {name: total for name, (_, total) in entries.items()}, metrics


def _projected(layers, tree, name, grad, inner):
  """Returns what a gradient adds to the sums."""
  if name in layers.slices:
    return grad
  alone = tree.alone(name, grad)
  return jax.tree.leaves(layers.tx.project(alone, inner))[0]
