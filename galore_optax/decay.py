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

from galore_optax import moments


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
    params: what the inner sees as parameters; only ranks are read.
    extra_args: passed to the inner.

  Returns:
    A tree of float32 scalars, such as `-learning_rate * weight_decay`.

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
  probe = moments.transplant_counters(inner, state, params, inner.init(ones))
  zeros = jax.tree.map(jnp.zeros_like, ones)
  factors, _ = inner.update(zeros, probe, ones, **extra_args)
  return jax.tree.map(lambda x: x.reshape(()), factors)


def check_decoupled(
  inner: optax.GradientTransformationExtraArgs,
  params: Any,
  projected: list[bool],
) -> None:
  """Raises if the inner reads params for more than decoupled decay.

  It is tried, on a tree of 2 x 2 weights, at the first step and at a later
  one (the first may have learning rate zero).

  Args:
    inner: the transformation.
    params: what the inner sees as parameters; only ranks are read.
    projected: which leaves are projected.

  Raises:
    ValueError: an update of a projected leaf is not affine in its weight with
      the slope that `decay_factors` reads.
  """
  with jax.ensure_compile_time_eval():
    weights = _filled(params, [0.5, -2.0])
    gradients = _filled(params, [1.0, 0.25])
    state = inner.init(weights)
    for count in (0, 100):
      try:
        state = _at(inner, state, params, count)
        with_w, _ = inner.update(gradients, state, weights)
        zeros = jax.tree.map(jnp.zeros_like, weights)
        without, _ = inner.update(gradients, state, zeros)
        factors = decay_factors(inner, state, params, {})
      except TypeError:
        return  # It needs extra args, which only `update` is given.
      rows = zip(
        *map(jax.tree.leaves, (with_w, without, factors, weights)),
        strict=True,
      )
      for (u, u0, factor, w), yes in zip(rows, projected, strict=True):
        if yes and not np.allclose(
          u, u0 + factor * w, rtol=1e-4, atol=1e-4 * np.max(np.abs(u))
        ):
          raise ValueError(
            'the inner transformation reads params for more than decoupled'
            ' weight decay (a trust ratio or a parameter scale, perhaps); the'
            ' params of a projected weight have no low-rank form. Use one'
            ' without it, such as optax.adamw'
          )


def _filled(params: Any, values: list[float]) -> Any:
  return jax.tree.map(
    lambda x: jnp.resize(jnp.array(values, x.dtype), x.shape),
    moments.sized(params, 2),
  )


def _at(inner, state: Any, params: Any, count: int) -> Any:
  """Returns `state` with its integer scalar counters at `count`."""
  counters = moments.counter_paths(inner, params)

  def move(path, x):
    is_step = path in counters and jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.full_like(x, count) if is_step and x.ndim == 0 else x

  return jax.tree_util.tree_map_with_path(move, state)
