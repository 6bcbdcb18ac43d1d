"""This module holds the summing of projected gradients over several batches.

Between two refreshes a projection is one linear map, so the projection of a
sum is the sum of the projections: what is held has the low-rank shape.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

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


def accumulating(
  tx: optax.GradientTransformation,
  begin: Callable[..., optax.OptState],
  compress: Callable[..., PyTree],
) -> Accumulating:
  """Returns a transformation with the two functions of `Accumulating`."""
  tx = optax.with_extra_args_support(tx)
  new = Accumulating(tx.init, tx.update)
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
