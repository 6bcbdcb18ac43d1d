"""Clipping by the global norm, of the whole gradient or of its pieces.

Begin with `clipped`. A layer-wise step, which never has the whole gradient,
uses the functions below it one by one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.checks import check_above_zero
from galore_optax.precision import full


class ClippedTransformation(optax.GradientTransformationExtraArgs):
  """A rule that clips by the global norm first, in a form that can be read.

  A layer-wise step meets the gradient in pieces, whose own norms are of no
  use: it takes `clip_norm` and applies `rule` to the pieces it has clipped.
  """

  clip_norm: float
  rule: optax.GradientTransformationExtraArgs


def clipped(rule: optax.GradientTransformation, clip_norm: float | None) -> Any:
  """Puts clipping by the exact global norm before a rule.

  Args:
    rule: what is applied to the clipped gradient.
    clip_norm: largest global norm, or None for no clipping.

  Returns:
    The transformation. `layerwise`, given one, clips by the norm of the whole
    gradient too.

  Example:
    >>> tx = clipped(optax.sgd(1.0), 1.0)
    >>> params = {'w': jnp.array([6.0, 8.0])}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> print(f'{optax.tree.norm(updates):.4f}')
    1.0000
  """
  rule = optax.with_extra_args_support(rule)
  check_norm(clip_norm)
  if clip_norm is None:
    return rule

  def update_fn(updates, state, params=None, **extra_args):
    by = clip_coefficient(global_norm(updates), clip_norm)
    # Each leaf is rounded once, to its dtype.
    updates = jax.tree.map(lambda a: (full(a) * by).astype(a.dtype), updates)
    return rule.update(updates, state, params, **extra_args)

  tx = ClippedTransformation(rule.init, update_fn)
  tx.clip_norm, tx.rule = clip_norm, rule
  return tx


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Returns optax's transformation of this name with a float32 norm.

  `optax.clip_by_global_norm` sums in the dtype of the gradient. In bfloat16 a
  sum stops to grow at 256 times its terms, so that a tree of many leaves has
  too small a norm. For float32 gradients the results are the same.

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
      scaled = (full(x) / norm) * max_norm
      return jnp.where(norm < max_norm, x, scaled.astype(x.dtype))

    return jax.tree.map(clip_leaf, updates)

  return optax.stateless(clip)


def check_norm(clip_norm: Any) -> None:
  """Raises ValueError for a bound that would turn or stop the gradient."""
  if clip_norm is not None:
    check_above_zero('positive, or None', clip_norm=clip_norm)


def clip_coefficient(norm: jax.Array, clip_norm: float) -> jax.Array:
  """Returns what brings a gradient of this norm to at most `clip_norm`.

  The small constant is that of PyTorch and of LOMO; it makes a norm of zero
  harmless.

  >>> clip_coefficient(jnp.array([0.5, 4.0]), 1.0).round(4)
  Array([1.  , 0.25], dtype=float32)
  """
  return jnp.minimum(1.0, clip_norm / (norm + 1e-6))


def global_norm(tree: Any) -> jax.Array:
  """Returns the norm of all leaves together, float32.

  >>> g = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
  >>> print(f'{global_norm(g):.4f}')
  5.0000
  """
  return jnp.sqrt(sum_of_squares(tree))


def sum_of_squares(tree: Any) -> jax.Array:
  """Returns the squared norm of all leaves together, float32.

  >>> print(sum_of_squares({'a': jnp.array([3.0]), 'b': jnp.array([4.0])}))
  25.0
  """
  squares = [jnp.sum(jnp.square(full(a))) for a in jax.tree.leaves(tree)]
  return sum(squares, jnp.zeros([], jnp.float32))
