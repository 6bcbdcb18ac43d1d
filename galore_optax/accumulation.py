"""This module holds the summing of projected gradients over several batches.

Between two refreshes a projection is one linear map, so the projection of a
sum is the sum of the projections: what is held has the low-rank shape.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.precision import full

PyTree = Any


class Projected:
  """A gradient that has been projected, where `update` takes a gradient.

  A leaf with the shape and dtype of its weight.
  """

  def __init__(self, low: jax.Array, like: Any):
    """Keeps the projection of a gradient like `like`."""
    self.low, self.shape, self.dtype = low, like.shape, like.dtype
    self.ndim, self.size = like.ndim, like.size


class Accumulating(optax.GradientTransformationExtraArgs):
  """A transformation whose `update` takes sums of projected gradients too."""

  begin: Callable[..., optax.OptState]
  """`(updates, state, **extra_args) -> state`, with the bases that are due
  found from these updates."""
  compress: Callable[..., PyTree]
  """`(updates, state, **extra_args) -> updates`, in which a `Projected` stands
  for each gradient that is projected."""


class Galore(Accumulating):
  """TEMPORARY: the stages of the core's `Galore`, on `begin` and `compress`.

  The core's own class takes its place when the branches are merged.
  """

  linear = True

  def due(self, state: Any, *, layer: Any = 0) -> jax.Array:
    """Returns whether a basis may be due: []."""
    del state, layer
    return jnp.array(True)

  def refresh(self, grads: Any, state: Any, *, layer: Any = 0) -> Any:
    """Returns the state with the bases that are due."""
    return self.begin(grads, state, layer=layer)

  def project(self, grads: Any, state: Any, *, layer: Any = 0) -> Any:
    """Returns low-rank gradients; the others in float32."""
    low = self.compress(grads, state, layer=layer)
    return jax.tree.map(
      lambda x: x.low if isinstance(x, Projected) else full(x), low
    )

  def apply(
    self,
    low: Any,
    state: Any,
    params: Any = None,
    grads: Any = None,
    *,
    layer: Any = 0,
    **extra_args: Any,
  ) -> tuple[Any, Any]:
    """Returns updates and state, of low-rank gradients."""
    del grads
    projected = []

    def look(grads, state):
      marked = self.compress(grads, state, layer=0)
      projected.extend(
        isinstance(x, Projected) for x in jax.tree.leaves(marked)
      )
      return ()

    jax.eval_shape(look, params, state)
    flat, treedef = jax.tree.flatten(low)
    updates = [
      Projected(x, w) if yes else x.astype(w.dtype)
      for x, w, yes in zip(
        flat, treedef.flatten_up_to(params), projected, strict=True
      )
    ]
    updates = treedef.unflatten(updates)
    return self.update(updates, state, params, layer=layer, **extra_args)


def accumulating(
  tx: optax.GradientTransformation,
  begin: Callable[..., optax.OptState],
  compress: Callable[..., PyTree],
) -> Accumulating:
  """Returns a transformation with the two functions of `Accumulating`."""
  tx = optax.with_extra_args_support(tx)
  new = Galore(tx.init, tx.update)
  new.begin, new.compress = begin, compress
  return new


def first_of_chain(
  chain: optax.GradientTransformationExtraArgs,
  first: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns a chain that accumulates if the first of it does.

  What follows sees the update, made of the whole sum.
  """
  if not isinstance(first, Accumulating):
    return chain
  return accumulating(
    chain,
    lambda updates, state, **extra_args: (
      first.begin(updates, state[0], **extra_args),
      *state[1:],
    ),
    lambda updates, state, **extra_args: first.compress(
      updates, state[0], **extra_args
    ),
  )
