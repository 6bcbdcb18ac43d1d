"""This module holds step sizes of each weight, for an inner transformation.

A step size may follow the whole weight (Adafactor's scales with its RMS) and
yet act before the inner's momentum, where only the low-rank gradient is seen.
So it is computed outside of `galore` and handed through it as an extra arg.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import decay
from galore_optax import paths as selection
from galore_optax.accumulation import Accumulating, accumulating
from galore_optax.galore import galore, projections_of
from galore_optax.precision import full
from galore_optax.projection import Projection


def scale_by_step_size() -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus a step size that `update` is given for each leaf.

  `update(..., step_size=tree)`, of scalars or of arrays that broadcast against
  the updates, such as [L, 1, 1] for a step size of each layer.

  Raises:
    TypeError: `update` got no step size.

  Example:
    >>> tx = scale_by_step_size()
    >>> tx.update({'w': jnp.ones(1)}, tx.init(None), step_size={'w': 0.5})[0]
    {'w': Array([-0.5], dtype=float32)}
  """

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    step_size: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, Any]:
    del params, extra_args
    if step_size is None:
      raise TypeError(
        'scale_by_step_size needs update(..., step_size=tree), which'
        ' galore_with_step_sizes gives it'
      )
    updates = jax.tree.map(
      lambda u, size: jnp.asarray(-size, u.dtype) * u, updates, step_size
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


def galore_with_step_sizes(
  inner: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  parameter_floor: float | None = None,
  weight_decay: float = 0.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """`galore` around an inner that is told the step size of each weight.

  So the step size can follow the RMS of a whole weight and still enter before
  the inner's momentum, although the inner only sees the low-rank gradient:
  `update` of the inner gets a tree `step_size` (see `scale_by_step_size`).

  Args:
    inner: a transformation that reads `step_size`, and no params.
    learning_rate: a number, or a schedule of the step.
    parameter_floor: step size = learning rate times the RMS of the weight, at
      least this; None: the learning rate.
    weight_decay: decoupled, times the step size, on every leaf.
    **options: those of `galore`.

  Example:
    >>> tx = galore_with_step_sizes(
    ...   scale_by_step_size(), 0.1, parameter_floor=1e-3, rank=2)
    >>> params = {'w': jnp.full((4, 6), 3.0)}
    >>> updates, state = tx.update(params, tx.init(params), params)
  """
  tx = galore(inner, **options)

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, Any]:
    if params is None:
      raise ValueError(
        'weight decay and the scale of parameters need params:'
        ' tx.update(g, state, params)'
      )
    lr = decay.rate_at(learning_rate, state.count)
    weights, treedef = jax.tree.flatten(params)
    projections = projections_of(params, **options)
    sizes = [
      lr * _parameter_scale(name, p, w, parameter_floor)
      for name, p, w in zip(
        selection.paths(params), projections, weights, strict=True
      )
    ]
    step_size = treedef.unflatten(list(map(_as_low_rank, projections, sizes)))
    # The inner reads no params: decay needs no probe, it is added here.
    updates, state = tx.update(
      updates, state, None, step_size=step_size, **extra_args
    )
    updates = jax.tree.map(
      lambda u, size, w: u - (size * weight_decay * w).astype(u.dtype),
      updates,
      treedef.unflatten(sizes),
      params,
    )
    return updates, state

  new = optax.GradientTransformationExtraArgs(tx.init, update_fn)
  if not isinstance(tx, Accumulating):
    return new
  return accumulating(new, tx.begin, tx.compress)


def _parameter_scale(
  name: str, projection: Projection | None, w: jax.Array, floor: float | None
) -> jax.Array:
  """Returns the RMS of each matrix or vector of a leaf, axes kept."""
  w = full(w)
  if floor is None:
    return jnp.ones((1,) * w.ndim, w.dtype)
  own_axes = (
    selection.own_axes(name, w.ndim)
    if projection is None
    else sum(projection.axes, ())
  )
  return jnp.maximum(rms(w, own_axes), floor)


def _as_low_rank(projection: Projection | None, size: jax.Array) -> jax.Array:
  """Returns a scale of the weight's axes in those of the low-rank gradient."""
  if projection is None:
    return size
  i, o = projection.axes
  size = size.transpose(projection.batch_axes + i + o)
  return size.reshape(*size.shape[: len(projection.batch_axes)], 1, 1)


def rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the root mean square over `axes`, which are kept.

  >>> rms(jnp.array([[3.0, -3.0], [1.0, -7.0]]), (-1,))
  Array([[3.],
         [5.]], dtype=float32)
  """
  return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
