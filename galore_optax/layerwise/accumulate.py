"""This module holds a layer-wise step on sums of projected gradients.

The batch passes through the model in parts, forward and back, one after
another. Of a part's gradient only the projection is kept; the weights are
updated from the sum, layer after layer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax import clipping
from galore_optax.accumulation import Projected
from galore_optax.layerwise import parts
from galore_optax.layerwise import stack as stacks
from galore_optax.quantized.rounding import apply_updates_stochastic

# Axes: A parts of the batch; L layers, the leading axis of a stack.

PyTree = Any


def step(
  layers: Any,
  tree: parts.Parts,
  weights: dict[str, Any],
  state: Any,
  batch: PyTree,
) -> tuple[dict[str, Any], dict[str, PyTree]]:
  """Updates every weight from the sum of its projected gradients.

  Args:
    layers: a `Layerwise` step.
    tree: of the parameters.
    weights: stored, by path.
    state: before the step.
    batch: [N, ...], of all parts together.

  Returns:
    (stored weight, state of tx) by path; the metrics.
  """
  key = jax.random.fold_in(jax.random.key(0), state.count)
  slots = start(layers, tree, weights, state)
  zeros = {name: zero for name, (zero, _) in slots.items()}
  inner, sums, metrics = _summed(
    layers, tree, weights, (state.inner, zeros), batch, key
  )
  norm = jnp.sqrt(clipping.sum_of_squares(sums)) / layers.accumulate
  factor = jnp.float32(1 / layers.accumulate)
  if layers.clip_norm is not None:
    factor *= clipping.clip_coefficient(norm, layers.clip_norm)

  def updated(name):
    update = functools.partial(layers.update, tree, key, name)

    def one(entry, total, layer):
      like = jax.eval_shape(layers.weights.read, entry[0])
      mean = total.astype(jnp.float32) * factor
      projected = name not in layers.slices and slots[name][1]
      grad = Projected(mean, like) if projected else mean.astype(like.dtype)
      return update(entry, grad, layer)

    entry, total = (weights[name], inner[name]), sums[name]
    if name in layers.slices:
      return stacks.in_slices(one, entry, total, layers.slices[name])
    if not parts.in_stack(name):
      return one(entry, total, 0)

    def body(layer, entry):
      new = one(stacks.take(entry, layer), stacks.take(total, layer), layer)
      return stacks.put(entry, new, layer)

    return lax.fori_loop(0, total.shape[0], body, entry)

  new = {name: updated(name) for name in weights}
  return new, {**metrics, 'grad_norm': norm}


def start(
  layers: Any, tree: parts.Parts, weights: dict[str, Any], state: Any
) -> dict[str, tuple[jax.Array, bool]]:
  """Returns by path the zeros that gradients are added to; if projected."""
  return {
    name: _slot(layers, tree, name, stored, state.inner[name])
    for name, stored in weights.items()
  }


def _summed(layers, tree, weights, entries, batch, key):
  """Returns the states with new bases, the sums, and the metrics."""

  def read(entry, name, layer):
    del entry
    return layers.weights.read(parts.at(name, weights[name], layer))

  def add(number, entry, name, grad, layer):
    inner, total = parts.at(name, entry, layer)
    if name not in layers.slices:
      alone = tree.alone(name, grad)
      inner = lax.cond(
        number == 0,
        lambda inner: layers.tx.begin(alone, inner, layer=layer),
        lambda inner: inner,
        inner,
      )
      grad, _ = _compressed(layers, tree, name, grad, inner, layer)
    noise = tree.key(jax.random.fold_in(key, number), name, layer)
    new = (inner, apply_updates_stochastic(total, grad, noise))
    return parts.put(name, entry, new, layer)

  def part(entries, numbered):
    number, part = numbered
    walk = layers.walk(tree, part)
    visit = functools.partial(add, number)
    return walk.backward(*walk.forward(weights), entries, read, visit)

  entries = {name: (entries[0][name], entries[1][name]) for name in weights}
  numbered = (
    jnp.arange(layers.accumulate),
    stacks.split(batch, layers.accumulate),
  )
  entries, metrics = lax.scan(part, entries, numbered)
  metrics = jax.tree.map(lambda a: jnp.sum(a, 0), metrics)
  metrics['loss'] /= layers.accumulate
  inner = {name: state for name, (state, _) in entries.items()}
  return inner, {name: total for name, (_, total) in entries.items()}, metrics


def _slot(layers, tree, name, stored, inner):
  """Returns zeros to sum a weight's gradients in; if these are projected."""
  projected = False
  first = (lambda x: stacks.take(x, 0)) if parts.in_stack(name) else lambda x: x

  def low(stored, inner):
    nonlocal projected
    grad = layers.weights.read(first(stored))
    if name in layers.slices:
      return grad
    grad, projected = _compressed(layers, tree, name, grad, first(inner), 0)
    return grad

  shape = jax.eval_shape(low, stored, inner).shape
  if parts.in_stack(name):
    shape = (jax.tree.leaves(stored)[0].shape[0], *shape)
  return jnp.zeros(shape, layers.sums_dtype), projected


def _compressed(layers, tree, name, grad, inner, layer):
  """Returns the projection of a gradient and True; or itself and False."""
  alone = layers.tx.compress(tree.alone(name, grad), inner, layer=layer)
  (low,) = jax.tree.leaves(alone)
  return (low.low, True) if isinstance(low, Projected) else (low, False)
