"""How weights are stored between steps.

A stored weight is an array or a `Quantized`; the model computes with arrays.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.quantized.array import Quantized, dequantize, quantize_linear
from galore_optax.quantized.rounding import apply_updates_stochastic

PyTree = Any
Stored = Any


def is_stored(x: Any) -> bool:
  """Whether a node of a tree is one stored weight, though no array."""
  return isinstance(x, Quantized)


class Weights(NamedTuple):
  """How one weight is stored."""

  store: Callable[[jax.Array], Stored]
  """An initial weight, stored."""
  read: Callable[[Stored], jax.Array]
  """The array that the model computes with."""
  write: Callable[[Stored, jax.Array, jax.Array], Stored]
  """The stored weight plus an update; the key is for stochastic rounding."""


ARRAYS = Weights(
  store=lambda weight: weight,
  read=lambda stored: stored,
  write=lambda stored, update, key: optax.apply_updates(stored, update),
)
"""Weights are kept as they are, sums rounded to nearest."""

ROUNDED = Weights(
  store=lambda weight: weight,
  read=lambda stored: stored,
  write=apply_updates_stochastic,
)
"""bfloat16 weights whose sums are rounded stochastically."""


def quantized(
  *, bits: Literal[4, 8] = 8, group: int = 256, dtype: Any
) -> Weights:
  """Weights in blocks of integers, sums rounded stochastically.

  Weights of fewer than two axes beyond a stack's (norms, biases) stay arrays.

  Args:
    bits: of an element, 8 or 4.
    group: elements that share a float32 scale.
    dtype: of the arrays that the model computes with.

  Example:
    >>> weights = quantized(dtype=jnp.bfloat16)
    >>> stored = weights.store(jnp.ones((2, 4, 256)))
    >>> stored.nbytes, weights.read(stored).dtype
    (2080, dtype(bfloat16))
  """

  def store(weight):
    return quantize_linear(weight, bits=bits, group=group)

  def read(stored):
    if is_stored(stored):
      return dequantize(stored).astype(dtype)
    return stored

  def write(stored, update, key):
    if not is_stored(stored):
      return apply_updates_stochastic(stored, update, key)
    total = dequantize(stored) + update.astype(jnp.float32)
    return quantize_linear(total, bits=bits, group=group, key=key)

  return Weights(store, read, write)
