"""Clipping by the global norm, computed in float32.

`clipped` adds clipping to a transformation. The layer-wise step never holds the
whole gradient. It sums the norm over the layers, and calls the functions after
`clipped` itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import edge
from galore_optax.checks import check_above_zero
from galore_optax.precision import at_least_float32


class ClippedTransformation(optax.GradientTransformationExtraArgs):
  """A transformation that clips by the global norm and then applies a rule.

  `clipped` makes it. Its attributes are for the layer-wise step, which receives
  the gradient layer by layer. That step clips each layer's gradient by the norm
  of the whole gradient, and then applies `rule` to it.
  """

  clip_norm: float
  """Largest global norm of the gradient."""
  rule: optax.GradientTransformationExtraArgs
  """The transformation of the clipped gradient."""


def clipped(
  rule: optax.GradientTransformation, clip_norm: float | None
) -> optax.GradientTransformationExtraArgs:
  """Clips the gradient by its global norm, and then applies a rule.

  Args:
    rule: the transformation of the clipped gradient.
    clip_norm: largest global norm, or None for no clipping.

  Returns:
    A `ClippedTransformation`, or the rule if `clip_norm` is None. `layerwise`
    accepts a `ClippedTransformation`, and also clips by the norm of the whole
    gradient.

  Example:
    >>> tx = clipped(optax.sgd(1.0), 1.0)
    >>> params = {'w': jnp.array([6.0, 8.0])}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> print(f'{optax.tree.norm(updates):.4f}')
    1.0000
  """
  tx = optax.with_extra_args_support(rule)
  check_norm(clip_norm)
  if clip_norm is None:
    return tx

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    coefficient = clip_coefficient(global_norm(updates), clip_norm)

    def clip_leaf(x: jax.Array) -> jax.Array:
      # Multiply in float32, so that a leaf is rounded to its dtype only once.
      return (at_least_float32(x) * coefficient).astype(x.dtype)

    updates = jax.tree.map(clip_leaf, updates)
    return tx.update(updates, state, params, **extra_args)

  clipping = ClippedTransformation(
    edge.at_init(tx.init), edge.at_update(update_fn)
  )
  clipping.clip_norm = clip_norm
  clipping.rule = tx
  return clipping


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Clips as `optax.clip_by_global_norm` does, with a float32 norm.

  `optax.clip_by_global_norm` sums in the dtype of the gradient. A bfloat16 sum
  stops growing at 256 times the size of its terms, so the norm of a large tree
  would be too small. For float32 gradients the results are the same.

  Args:
    max_norm: largest global norm.

  Example:
    >>> tx = clip_by_global_norm(1.0)
    >>> g = {'w': jnp.array([6.0, 8.0])}
    >>> updates, _ = tx.update(g, tx.init(g))
    >>> print(f'{global_norm(updates):.4f}')
    1.0000
  """

  def clip(updates: optax.Updates, params: optax.Params | None) -> Any:
    norm = global_norm(updates)

    def clip_leaf(x: jax.Array) -> jax.Array:
      scaled = (at_least_float32(x) / norm) * max_norm
      return jnp.where(norm < max_norm, x, scaled.astype(x.dtype))

    return jax.tree.map(clip_leaf, updates)

  return optax.stateless(clip)


def check_norm(clip_norm: Any) -> None:
  """Raises ValueError unless the largest norm is positive or None."""
  if clip_norm is not None:
    check_above_zero('positive, or None', clip_norm=clip_norm)


def clip_coefficient(norm: jax.Array, clip_norm: float) -> jax.Array:
  """Returns the factor that reduces a gradient of this norm to `clip_norm`.

  The factor is at most 1. PyTorch and LOMO add the same small constant to the
  norm, which avoids a division by zero.

  >>> clip_coefficient(jnp.array([0.5, 4.0]), 1.0).round(4)
  Array([1.  , 0.25], dtype=float32)
  """
  return jnp.minimum(1.0, clip_norm / (norm + 1e-6))


def global_norm(tree: Any) -> jax.Array:
  """Returns the L2 norm of all leaves together: [], float32.

  >>> g = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  >>> print(f'{global_norm(g):.4f}')
  5.0000
  """
  return jnp.sqrt(sum_of_squares(tree))


def sum_of_squares(tree: Any) -> jax.Array:
  """Returns the squared L2 norm of all leaves together: [], float32.

  >>> print(sum_of_squares({'a': jnp.array([3.0]), 'b': jnp.array([4.0])}))
  25.0
  """
  leaves = map(at_least_float32, jax.tree.leaves(tree))
  squares = [jnp.sum(jnp.square(x)) for x in leaves]
  return sum(squares, jnp.zeros([], jnp.float32))
