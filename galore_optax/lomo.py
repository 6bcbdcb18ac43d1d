"""This module holds LOMO and AdaLomo: rules made for a layer-wise step.

LOMO is plain SGD that keeps nothing; AdaLomo keeps a factored second moment.
Both need clipping to learn, so both have it on. In `layerwise` the clipping
is by the norm of the whole gradient.

Axes: m rows, n columns; leading axes are batch.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.clipping import clipped

PyTree = Any


def lomo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  clip_norm: float | None = 1.0,
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Stochastic gradient descent without state, clipped by the global norm.

  w' = w - lr (c g + weight_decay w), c = min(1, clip_norm / (norm + 1e-6)).

  Args:
    learning_rate: a number, or a schedule of the step.
    clip_norm: largest global norm of the gradient; None for no clipping.
    weight_decay: decoupled, times the learning rate.

  Example:
    >>> tx = lomo(0.5)
    >>> params = {'w': jnp.array([3.0, 4.0])}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(f'{optax.tree.norm(updates):.4f}')
    0.5000

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with
    Limited Resources <https://arxiv.org/abs/2306.09782>`_, 2023.
  """
  rule = optax.scale_by_learning_rate(learning_rate)
  if weight_decay:
    rule = optax.chain(optax.add_decayed_weights(weight_decay), rule)
  return clipped(rule, clip_norm)


class FactoredState(NamedTuple):
  """State of `scale_by_grouped_rms`."""

  count: jax.Array  # [], int32: updates done
  row: PyTree  # [..., m] float32: mean square of each row; all of a vector
  column: PyTree  # [..., n] float32: of each column; MaskedNode for a vector


def adalomo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  clip_norm: float | None = 1.0,
  weight_decay: float = 0.0,
  decay_rate: float = 0.8,
  clip_threshold: float = 1.0,
  eps: tuple[float, float] = (1e-30, 1e-3),
) -> optax.GradientTransformationExtraArgs:
  """LOMO with an adaptive rate: factored RMS, normalised weight by weight.

  The update is the gradient over the root of a factored second moment, whose
  root mean square over the weight is brought to `clip_threshold`; its step is
  the learning rate times the weight's own root mean square. A stack of
  weights counts as one weight, unless a layer-wise step takes it apart.

  Args:
    learning_rate: a number, or a schedule of the step.
    clip_norm: largest global norm of the gradient; None for no clipping.
    weight_decay: decoupled, times the rate of the weight.
    decay_rate: the second moment decays by 1 - t^-decay_rate at update t.
    clip_threshold: largest root mean square of an update before the rate.
    eps: added to the squared gradient; least root mean square of a weight.

  State of a weight [m, n]: m + n elements, float32.

  Example:
    >>> tx = adalomo(0.1)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state[0].row['w'].shape, state[0].column['w'].shape
    ((4,), (6,))

  References:
    Lv et al., `AdaLomo: Low-memory Optimization with Adaptive Learning Rate
    <https://arxiv.org/abs/2310.10195>`_, 2023.
  """
  rule = optax.chain(
    scale_by_grouped_rms(
      decay_rate=decay_rate, clip_threshold=clip_threshold, eps=eps[0]
    ),
    scale_by_weight_rms(weight_decay=weight_decay, eps=eps[1]),
    optax.scale_by_learning_rate(learning_rate),
  )
  return clipped(rule, clip_norm)


def scale_by_grouped_rms(
  *,
  decay_rate: float = 0.8,
  clip_threshold: float = 1.0,
  eps: float = 1e-30,
) -> optax.GradientTransformation:
  """Divides by a factored RMS, then each weight by its update's own RMS.

  Args:
    decay_rate: the moment decays by 1 - t^-decay_rate at update t.
    clip_threshold: largest root mean square of an update.
    eps: added to the squared gradient.

  Example:
    >>> tx = scale_by_grouped_rms()
    >>> g = {'w': jnp.full((2, 3), 5.0)}
    >>> tx.update(g, tx.init(g))[0]['w'].round(4)
    Array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
  """

  def init_fn(params: optax.Params) -> FactoredState:
    row = lambda w: jnp.zeros(w.shape[:-1] if w.ndim > 1 else w.shape)
    column = lambda w: (
      jnp.zeros(w.shape[:-2] + w.shape[-1:])
      if w.ndim > 1
      else optax.MaskedNode()
    )
    return FactoredState(
      count=jnp.zeros([], jnp.int32),
      row=jax.tree.map(row, params),
      column=jax.tree.map(column, params),
    )

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, FactoredState]:
    del params
    count = jnp.asarray(optax.safe_increment(state.count))
    decay = 1 - count.astype(jnp.float32) ** -decay_rate
    leaves, treedef = jax.tree.flatten(updates)
    results = [
      _grouped(g, row, column, decay, eps, clip_threshold)
      for g, row, column in zip(
        leaves,
        treedef.flatten_up_to(state.row),
        treedef.flatten_up_to(state.column),
        strict=True,
      )
    ]
    updates, row, column = (
      treedef.unflatten(x) for x in zip(*results, strict=True)
    )
    return updates, FactoredState(count, row, column)

  return optax.GradientTransformation(init_fn, update_fn)


def scale_by_weight_rms(
  *, weight_decay: float = 0.0, eps: float = 1e-3
) -> optax.GradientTransformation:
  """Adds decay, then multiplies by the weight's RMS, at least eps.

  >>> tx = scale_by_weight_rms()
  >>> g, w = {'w': jnp.ones(2)}, {'w': jnp.array([1.0, 7.0])}
  >>> tx.update(g, tx.init(w), w)[0]['w']
  Array([5., 5.], dtype=float32)
  """

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError('AdaLomo needs params: tx.update(g, state, params)')

    def scale(u, w):
      w = w.astype(jnp.float32)
      total = u.astype(jnp.float32) + weight_decay * w
      return (jnp.maximum(eps, _rms(w)) * total).astype(u.dtype)

    return jax.tree.map(scale, updates, params), state

  return optax.GradientTransformation(optax.init_empty_state, update_fn)


def _grouped(g, row, column, decay, eps, clip_threshold):
  """Returns the normalised update of one weight, and its moments."""
  full = g.astype(jnp.float32)
  square = jnp.square(full) + eps
  average = lambda old, new: decay * old + (1 - decay) * new
  if g.ndim > 1:
    row = average(row, jnp.mean(square, axis=-1))
    column = average(column, jnp.mean(square, axis=-2))
    share = row / jnp.mean(row, axis=-1, keepdims=True)
    scale = (
      jax.lax.rsqrt(share)[..., None] * jax.lax.rsqrt(column)[..., None, :]
    )
  else:
    row = average(row, square)
    scale = jax.lax.rsqrt(row)
  update = full * scale
  update = update / jnp.maximum(1.0, _rms(update) / clip_threshold)
  return update.astype(g.dtype), row, column


def _rms(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.mean(jnp.square(x)))
