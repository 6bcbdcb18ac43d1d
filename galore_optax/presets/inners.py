"""This module holds what a preset may be given as its inner.

A preset multiplies by the learning rate last, so its inner has none: it is a
`scale_by_...`, and a learning rate of its own would apply twice.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from galore_optax import decay, moments
from galore_optax import paths as selection
from galore_optax.precision import in_float32

Inner: TypeAlias = str | optax.GradientTransformation
"""A short name, or a transformation without a learning rate."""

INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  'adam': optax.scale_by_adam,
  'lion': optax.scale_by_lion,
  'sgdm': lambda: optax.trace(0.9),
}
"""The short names, with optax's own defaults."""


def without_rate(inner: Inner) -> optax.GradientTransformationExtraArgs:
  """Returns an inner whose `init` raises if it has a learning rate.

  It runs in float32 at least, and so do its moments.

  Args:
    inner: 'adam', 'lion', 'sgdm', or a transformation.

  Raises:
    ValueError: the name is unknown; at `init`, the inner turns a gradient of
      one around, as an optimizer does.

  Example:
    >>> tx = without_rate('sgdm')
    >>> g = {'w': jnp.ones(2)}
    >>> tx.update(g, tx.init(g))[0]
    {'w': Array([1., 1.], dtype=float32)}
  """
  if isinstance(inner, str):
    if inner not in INNERS:
      raise ValueError(
        f'inner must be one of {", ".join(INNERS)} or a transformation without'
        f' a learning rate, such as optax.scale_by_adam(), got {inner!r}'
      )
    inner = INNERS[inner]()
  tx = in_float32(inner)

  def init_fn(params: optax.Params) -> Any:
    # The parts of a tree are seen after the whole, one by one.
    if not selection.is_part(params):
      _check_no_rate(optax.with_extra_args_support(inner), params)
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def _check_no_rate(
  inner: optax.GradientTransformationExtraArgs, params: Any
) -> None:
  with jax.ensure_compile_time_eval():
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), moments.sized(params, 1)
    )
    # At a learning rate of zero nothing can be seen: try the next count.
    for count in decay.COUNTS:
      state = decay.at_count(inner, inner.init(zeros), zeros, count)
      try:
        gains = jax.tree.leaves(decay.gains(inner, state, zeros, {}))
      except TypeError:
        return  # It needs extra args, which only `update` is given.
      if any(isinstance(gain, Tracer) for gain in gains):
        return  # A hyperparameter is traced: its sign is not known.
      if any(gain < 0 for gain in gains):
        raise ValueError(
          'the inner has a learning rate of its own (it makes'
          f' {float(min(gains)):.3g} of a gradient of one), and the preset'
          " multiplies by learning_rate after it; give 'adam', 'lion', 'sgdm'"
          ' or a transformation such as optax.scale_by_adam()'
        )
      if any(gain > 0 for gain in gains):
        return
