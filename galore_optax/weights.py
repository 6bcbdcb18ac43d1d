"""This module holds how weights are stored between steps.

A stored weight is an array or a `Quantized`; the model computes with arrays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

Stored = Any


def _read(stored: Stored) -> jax.Array:
  return stored


def _write(stored: Stored, update: jax.Array, key: jax.Array) -> Stored:
  del key
  return optax.apply_updates(stored, update)


class Weights(NamedTuple):
  """How one weight is stored; by default as the array that it is."""

  read: Callable[[Stored], jax.Array] = _read
  """The array that the model computes with."""
  write: Callable[[Stored, jax.Array, jax.Array], Stored] = _write
  """The stored weight plus an update; the key is for stochastic rounding."""


def is_stored(x: Any) -> bool:
  """Whether a node of a tree is one stored weight."""
  del x
  return False
