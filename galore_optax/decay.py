"""This module holds exact decoupled weight decay through a black-box inner.

An inner transformation sees the low-rank gradient, whose shape is not the
weight's, so what it would read from `params` is not there. If it reads them
for decoupled decay alone, its update is `u(gradient) + factor * params`, and
the factor can be read off a weight of one element: gradient and moments zero,
parameter one, counters (and so schedules) the true ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from galore_optax import moments
from galore_optax.static import is_zero

COUNTS = (0, 1, 10, 100, 1_000)
"""Steps at which an inner is tried: at some, a schedule may be zero."""


def decay_factors(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> Any:
  """Returns what the inner adds to the update of a weight of one.

  Args:
    inner: the transformation.
    state: its state for `params`.
    params: what the inner sees as parameters; only shapes are read.
    extra_args: passed to the inner.

  Returns:
    A tree of scalars, such as `-learning_rate * weight_decay`.

  Example:
    >>> params = {'w': jnp.zeros((3, 5))}
    >>> inner = optax.with_extra_args_support(
    ...   optax.adamw(0.5, weight_decay=0.25))
    >>> decay_factors(inner, inner.init(params), params, {})
    {'w': Array(-0.125, dtype=float32)}
  """
  ones = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), moments.sized(params, 1)
  )
  counters = moments.counter_paths(inner, params)
  probe = moments.transplant(state, inner.init(ones), counters)
  zeros = jax.tree.map(jnp.zeros_like, ones)
  factors, _ = inner.update(zeros, probe, ones, **extra_args)
  return jax.tree.map(lambda x: x.reshape(()), factors)


def responses(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> Any:
  """Returns what the inner, its moments fresh, makes of a gradient of one.

  That is minus the learning rate of this step for SGD, Adam or Lion with a
  schedule, whatever wraps it, and one without a learning rate. It is more for
  RMSProp without bias correction (by 1 / sqrt(1 - decay)) and for Nesterov
  momentum (by 1 + decay).

  Args:
    inner: the transformation; no clipping by a norm, which would see the ones.
    state: its state for `params`.
    params: what the inner sees as parameters; only ranks are read.
    extra_args: passed to the inner.

  Returns:
    A tree of scalars.

  Example:
    >>> params = {'w': jnp.zeros((3, 5))}
    >>> inner = optax.with_extra_args_support(optax.lion(0.5))
    >>> responses(inner, inner.init(params), params, {})
    {'w': Array(-0.5, dtype=float32)}
  """
  clocks = moments.clock_paths(inner, params)
  return _answers_to_one(inner, state, params, extra_args, clocks)


def gains(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> Any:
  """Returns `responses` of an inner whose counters are those of the state.

  Adam's is its response, times a number of its own, times the bias correction
  of this step: what grows with the step and not with the gradient.

  Args:
    inner: the transformation.
    state: its state for `params`.
    params: what the inner sees as parameters; only ranks are read.
    extra_args: passed to the inner.

  Returns:
    A tree of scalars.

  Example:
    >>> params = {'w': jnp.zeros((3, 5))}
    >>> inner = optax.with_extra_args_support(optax.scale_by_adam(0.5, 0.75))
    >>> _, state = inner.update(params, inner.init(params))
    >>> gains(inner, state, params, {})['w'].round(3)
    Array(0.882, dtype=float32)
  """
  counters = moments.counter_paths(inner, params)
  return _answers_to_one(inner, state, params, extra_args, counters)


def _answers_to_one(inner, state, params, extra_args, paths):
  """Returns updates for gradients of one, of the state's counters `paths`."""
  ones = jax.tree.map(
    lambda x: jnp.ones(x.shape, x.dtype), moments.sized(params, 1)
  )
  zeros = jax.tree.map(jnp.zeros_like, ones)
  probe = moments.transplant(state, inner.init(zeros), paths)
  answers, _ = inner.update(ones, probe, zeros, **extra_args)
  return jax.tree.map(lambda x: x.reshape(()), answers)


def check_decoupled(
  inner: optax.GradientTransformationExtraArgs,
  params: Any,
  projected: list[bool],
) -> None:
  """Raises if the inner reads params for more than decoupled decay.

  It is tried on 2 x 2 weights, whose values and zero must make updates that
  differ by `decay_factors` and states that do not differ: decay that enters a
  momentum is no longer decoupled.

  Args:
    inner: the transformation.
    params: what the inner sees as parameters; only shapes are read.
    projected: which leaves are projected.

  Raises:
    ValueError: the inner's update of a projected leaf is not affine in the
      weight with the slope that is read, or something else depends on it.
  """
  # Shapes of the weights that are tried: the real ones would be evaluated
  # below, all moments of the model among them.
  params = moments.sized(params, 2)
  with jax.ensure_compile_time_eval():
    weights = _filled(params, [0.5, -2.0])
    leaves, treedef = jax.tree.flatten(weights)
    blind = treedef.unflatten(
      [0 * w if p else w for w, p in zip(leaves, projected, strict=True)]
    )
    # With a learning rate of zero nothing can be seen: try the next.
    for count in COUNTS:
      try:
        seen, unseen, factors = _try(inner, params, weights, blind, count)
      except TypeError:
        return  # It needs extra args, which only `update` is given.
      if _any_traced((seen, unseen)):
        return  # A hyperparameter is traced: nothing can be compared.
      shift = [
        factor * w if p else 0 * w
        for factor, w, p in zip(factors, leaves, projected, strict=True)
      ]
      updates, expected = jax.tree.leaves(seen[0]), jax.tree.leaves(unseen[0])
      expected = [u + d for u, d in zip(expected, shift, strict=True)]
      if not (_close(updates, expected) and _close(seen[1], unseen[1])):
        raise ValueError(
          'the inner transformation reads params for more than decoupled'
          ' weight decay (a trust ratio, a parameter scale, or decay that'
          ' enters a momentum, perhaps); the params of a projected weight have'
          ' no low-rank form. Use one without it, such as optax.adamw'
        )
      if any(np.any(u) for u, p in zip(updates, projected, strict=True) if p):
        return


def _try(inner, params, weights, blind, count: int):
  """Returns two (update, state), with weights and without, and factors."""
  gradients = _filled(params, [1.0, 0.25])
  seen, unseen = (
    inner.update(gradients, at_count(inner, inner.init(w), params, count), w)
    for w in (weights, blind)
  )
  state = at_count(inner, inner.init(weights), params, count)
  factors = decay_factors(inner, state, params, {})
  return seen, unseen, jax.tree.leaves(factors)


def _close(one: Any, other: Any) -> bool:
  """Whether all numbers of two trees agree, to 1e-4 of the largest of each."""
  return all(
    np.allclose(x, y, rtol=1e-4, atol=1e-4 * np.max(np.abs(x), initial=0))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    if jnp.issubdtype(x.dtype, jnp.number)
  )


def _any_traced(tree: Any) -> bool:
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def _filled(params: Any, values: list[float]) -> Any:
  return jax.tree.map(
    lambda x: jnp.resize(jnp.array(values, x.dtype), x.shape),
    moments.sized(params, 2),
  )


def at_count(
  inner: optax.GradientTransformation, state: Any, params: Any, count: int
) -> Any:
  """Returns `state` with its integer scalar counters at `count`.

  >>> inner, params = optax.scale_by_adam(), {'w': jnp.zeros(2)}
  >>> print(at_count(inner, inner.init(params), params, 7).count)
  7
  """
  counters = moments.counter_paths(inner, params)

  def move(path, x):
    is_step = path in counters and jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.full_like(x, count) if is_step and x.ndim == 0 else x

  return jax.tree_util.tree_map_with_path(move, state)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
  """Returns a learning rate, or a schedule's at a step.

  >>> rate_at(0.5, 3), rate_at(lambda count: 2 * count, 3)
  (0.5, 6)
  """
  return learning_rate(count) if callable(learning_rate) else learning_rate


def add_decayed_weights(
  weight_decay: float,
) -> optax.GradientTransformation:
  """Returns optax's, which asks for no params where the decay is zero.

  >>> add_decayed_weights(0.0).update(jnp.ones(1), optax.EmptyState())[0]
  Array([1.], dtype=float32)
  """
  if is_zero(weight_decay):
    return optax.identity()
  return optax.add_decayed_weights(weight_decay)


def decay_updated_weights(
  learning_rate: optax.ScalarOrSchedule, *, weight_decay: float
) -> optax.GradientTransformation:
  """Decays the weights that the update makes: w' = (w + u) (1 - lr decay).

  Args:
    learning_rate: a number, or a schedule of the step.
    weight_decay: the decay.

  Example:
    >>> tx = decay_updated_weights(0.5, weight_decay=0.5)
    >>> w = {'w': jnp.array(3.0)}
    >>> u, _ = tx.update({'w': jnp.array(1.0)}, tx.init(w), w)
    >>> w['w'] + u['w']
    Array(3., dtype=float32)
  """

  def init_fn(params: optax.Params) -> optax.ScaleByScheduleState:
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
    if not is_zero(weight_decay):
      if params is None:
        raise ValueError(
          'weight decay needs params: tx.update(g, state, params)'
        )
      shrink = rate_at(learning_rate, state.count) * weight_decay
      updates = jax.tree.map(
        lambda u, w: u - (shrink * (w + u)).astype(u.dtype), updates, params
      )
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count=count)

  return optax.GradientTransformation(init_fn, update_fn)
