"""Counts the bytes of parameters and optimizer state from their shapes.

All sizes are read from shapes (`jax.eval_shape`), so they are exact and nothing
is allocated. `galore_optax.describe` lists the state of each weight.
"""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax import GaloreState, paths

PyTree = Any


class Account(NamedTuple):
  """Bytes, or numbers of elements, of parameters and optimizer state."""

  parameters: int
  """Weights whose size does not depend on the vocabulary."""
  vocabulary: int
  """Embeddings and output head."""
  bases: int
  """Bases of the projections."""
  moments: int
  """Statistics of gradients, including the scales of quantized moments."""
  counters: int
  """Integer counters, such as the number of steps."""

  @property
  def weights(self) -> int:
    """All weights, embeddings and head included."""
    return self.parameters + self.vocabulary

  @property
  def state(self) -> int:
    """All optimizer state."""
    return self.bases + self.moments + self.counters

  @property
  def total(self) -> int:
    """Weights and state."""
    return self.weights + self.state


def account(params: PyTree, state: PyTree) -> Account:
  """Returns the bytes of parameters and of an optimizer state for them.

  Args:
    params: arrays, or their shapes.
    state: of any optimizer, layer-wise or not. `jax.eval_shape(tx.init,
      params)` makes one without allocating it.

  Example:
    >>> import optax
    >>> params = {'w': jnp.zeros((3, 5)), 'embed': jnp.zeros((7, 3))}
    >>> account(params, jax.eval_shape(optax.adam(0.1).init, params))
    Account(parameters=60, vocabulary=84, bases=0, moments=288, counters=4)
  """
  return _account(params, state, lambda x: x.size * x.dtype.itemsize)


def elements(params: PyTree, state: PyTree) -> Account:
  """Returns the numbers of elements that `account` returns the bytes of.

  >>> import optax
  >>> params = {'w': jnp.zeros((3, 5), jnp.bfloat16)}
  >>> elements(params, jax.eval_shape(optax.adam(0.1).init, params)).moments
  30
  """
  return _account(params, state, lambda x: x.size)


def _account(
  params: PyTree, state: PyTree, size: Callable[[Any], int]
) -> Account:
  """Sums the `size` of each array of parameters and state by its kind."""
  sums: collections.Counter[str] = collections.Counter()
  weights = jax.tree.leaves(params)
  for path, w in zip(paths.paths(params), weights, strict=True):
    kind = 'vocabulary' if paths.in_vocabulary(path) else 'parameters'
    sums[kind] += size(w)
  for node in jax.tree.leaves(state, is_leaf=_is_galore):
    if _is_galore(node):
      sums['bases'] += sum(map(size, jax.tree.leaves(node.basis)))
      node = node._replace(basis=())
    for x in jax.tree.leaves(node):
      # Codes of quantized moments are also integers, but they have 8 bits.
      is_integer = jnp.issubdtype(x.dtype, jnp.integer)
      is_counter = is_integer and x.dtype.itemsize > 1
      sums['counters' if is_counter else 'moments'] += size(x)
  return Account(**{field: sums[field] for field in Account._fields})


def _is_galore(node: Any) -> bool:
  return isinstance(node, GaloreState)
