"""How weights are stored between steps.

A stored weight is an array or a `Quantized` array. The model computes with
arrays.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from galore_optax.quantized.array import (
  Quantized,
  dequantize,
  is_quantized,
  quantize_linear,
)
from galore_optax.quantized.rounding import apply_updates_stochastic


class Weights(NamedTuple):
  """Three functions that store, read and update a weight."""

  store: Callable[[jax.Array], Any]
  """Converts an initial weight to its stored form."""
  read: Callable[[Any], jax.Array]
  """Converts a stored weight to the array that the model computes with."""
  write: Callable[[Any, jax.Array, jax.Array], Any]
  """Adds an update to a stored weight, given (stored, update, key). The key is
  for stochastic rounding."""


def _identity(weight: Any) -> Any:
  return weight


def _add(weight: Any, update: jax.Array, key: jax.Array) -> Any:
  return optax.apply_updates(weight, update)


# Weights are stored as they are, and sums are rounded to nearest.
ARRAYS = Weights(_identity, _identity, _add)
# Weights are stored as they are, and bfloat16 sums are rounded stochastically.
ROUNDED = Weights(_identity, _identity, apply_updates_stochastic)


def quantized(
  *, bits: Literal[4, 8] = 8, group: int = 256, dtype: DTypeLike
) -> Weights:
  """Stores weights as `Quantized` arrays; sums are rounded stochastically.

  `read` and `write` also accept weights that are stored as arrays. The caller
  decides which weights to quantize.

  Args:
    bits: bits per element, 8 or 4.
    group: number of elements that share a float32 scale.
    dtype: dtype of the arrays that the model computes with.

  Example:
    >>> weights = quantized(dtype=jnp.bfloat16)
    >>> stored = weights.store(jnp.ones((2, 4, 256)))
    >>> stored.nbytes, weights.read(stored).dtype
    (2080, dtype(bfloat16))
  """

  def store(weight: jax.Array, key: jax.Array | None = None) -> Quantized:
    return quantize_linear(weight, bits=bits, group=group, key=key)

  def read(stored: Any) -> jax.Array:
    return dequantize(stored).astype(dtype) if is_quantized(stored) else stored

  def write(stored: Any, update: jax.Array, key: jax.Array) -> Any:
    if not is_quantized(stored):
      return apply_updates_stochastic(stored, update, key)
    new = store(dequantize(stored) + update.astype(jnp.float32), key)
    # If the update is zero, keep the old codes. A dequantized value can differ
    # from its code by one ulp, and stochastic rounding would then occasionally
    # move the weight by a whole step.
    moves = jnp.any(update != 0)
    return jax.tree.map(lambda x, old: jnp.where(moves, x, old), new, stored)

  return Weights(store, read, write)
