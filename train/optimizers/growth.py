"""Limits how much the gradient norm of each weight grows in a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.residual import growth_factor


class GrowthState(NamedTuple):
  """State of `limit_growth`."""

  norms: Any
  """Norm of each weight's gradient in the last step, after scaling: [...] for
  a gradient [..., m, n]; float32."""


def limit_growth(limit: float) -> optax.GradientTransformation:
  """Scales gradients down so that no norm grows by more than a factor.

  The norm is taken over the last two axes of a gradient, so that each matrix of
  a stack has its own.

  Args:
    limit: largest ratio of a norm to the norm of the step before.

  Example:
    >>> tx = limit_growth(1.5)
    >>> g = {'w': jnp.ones(4)}
    >>> _, state = tx.update(g, tx.init(g))
    >>> print(tx.update({'w': 10 * g['w']}, state)[0]['w'].round(4))
    [1.5 1.5 1.5 1.5]

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, limits the
    norm of the residual in this way.
  """

  def factor(norm: jax.Array, last: jax.Array) -> jax.Array:
    return growth_factor(norm, last, limit)

  def init(params: Any) -> optax.OptState:
    # An infinite norm does not limit the first gradient.
    norms = jax.tree.map(
      lambda w: jnp.full(w.shape[:-2], jnp.inf, jnp.float32), params
    )
    return GrowthState(norms)

  def update(
    updates: Any, state: Any, params: Any = None
  ) -> tuple[Any, GrowthState]:
    del params
    norms = jax.tree.map(_norm, updates)
    factors = jax.tree.map(factor, norms, state.norms)
    last = jax.tree.map(jnp.multiply, factors, norms)
    return jax.tree.map(_scaled, updates, factors), GrowthState(last)

  return optax.GradientTransformation(init, update)


def _norm(g: jax.Array) -> jax.Array:
  """Returns the norm over the last two axes, in float32."""
  axes = tuple(range(g.ndim))[-2:]
  return jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32)), axes))


def _scaled(g: jax.Array, factor: jax.Array) -> jax.Array:
  """Multiplies gradients [..., m, n] by factors [...]."""
  factors = factor.reshape(factor.shape + (1,) * (g.ndim - factor.ndim))
  return (g.astype(jnp.float32) * factors).astype(g.dtype)
