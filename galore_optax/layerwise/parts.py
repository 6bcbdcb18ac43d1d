"""This module holds a tree of parameters seen one weight at a time."""

from typing import Any

import jax

from galore_optax import paths as selection
from galore_optax.layerwise import stack as stacks
from galore_optax.layerwise.weights import is_stored

PyTree = Any


class Parts:
  """The paths of a tree's stored weights, and their places in the tree.

  Example:
    >>> parts = Parts({'blocks': {'q': 0}, 'norm': 1})
    >>> parts.names
    ['blocks/q', 'norm']
    >>> parts.build({'norm': 2})
    {'blocks': {'q': None}, 'norm': 2}
  """

  def __init__(self, params: PyTree):
    """Reads the structure of a tree."""
    weights, self.treedef = jax.tree.flatten(params, is_leaf=is_stored)
    self.names = selection.paths(self.treedef.unflatten(range(len(weights))))

  def weights(self, params: PyTree) -> dict[str, Any]:
    """Returns the stored weights by path."""
    weights = self.treedef.flatten_up_to(params)
    return dict(zip(self.names, weights, strict=True))

  def build(self, weights: dict[str, Any]) -> PyTree:
    """Returns the tree of some weights; None where there is none."""
    return self.treedef.unflatten([weights.get(name) for name in self.names])

  def alone(self, name: str, weight: jax.Array) -> PyTree:
    """Returns the tree of one weight; `Elsewhere` stands for the others."""
    return self.treedef.unflatten(
      [weight if n == name else selection.Elsewhere() for n in self.names]
    )

  def key(self, key: jax.Array, name: str, layer: jax.Array | int) -> jax.Array:
    """Returns a random key of one weight and layer."""
    key = jax.random.fold_in(key, self.names.index(name))
    return jax.random.fold_in(key, layer)


def in_stack(name: str) -> bool:
  """Whether a path names a weight of the layer stack."""
  return name.split('/')[0] == 'blocks'


def at(name: str, entry: PyTree, layer: jax.Array | int) -> PyTree:
  """Returns one layer of a stacked entry, or an entry that is no stack."""
  return stacks.take(entry, layer) if in_stack(name) else entry


def put(
  name: str, entry: PyTree, new: PyTree, layer: jax.Array | int
) -> PyTree:
  """Returns a stacked entry with one layer replaced, or what is no stack."""
  return stacks.put(entry, new, layer) if in_stack(name) else new
