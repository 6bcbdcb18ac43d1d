"""Functions that read and write one weight of a tree or one layer of a stack.

Axes: L layers, the leading axis of a stack; N examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from galore_optax import paths
from galore_optax.quantized.array import is_quantized

PyTree = Any


class Parts:
  """The structure of a parameter tree, with the path of each stored weight.

  Trees of a single weight or of a few weights are built from this structure.

  Example:
    >>> parts = Parts({'blocks': {'q': 0}, 'norm': 1})
    >>> parts.names
    ['blocks/q', 'norm']
    >>> parts.build({'norm': 2})
    {'blocks': {'q': None}, 'norm': 2}
  """

  def __init__(self, params: PyTree) -> None:
    """Reads the structure of a parameter tree."""
    weights, self.treedef = jax.tree.flatten(params, is_leaf=is_quantized)
    self.names = paths.paths(self.treedef.unflatten(range(len(weights))))

  def weights(self, params: PyTree) -> dict[str, Any]:
    """Returns the stored weights by path."""
    weights = self.treedef.flatten_up_to(params)
    return dict(zip(self.names, weights, strict=True))

  def build(self, weights: dict[str, Any]) -> PyTree:
    """Returns the tree of some weights, with None for all others."""
    return self.treedef.unflatten(map(weights.get, self.names))

  def alone(self, name: str, weight: Any) -> PyTree:
    """Returns the tree of one weight, with `Elsewhere` for all others."""
    parts = [weight if n == name else paths.Elsewhere() for n in self.names]
    return self.treedef.unflatten(parts)

  def key(self, key: jax.Array, name: str, layer: jax.Array | int) -> jax.Array:
    """Returns a random key for one weight and one layer."""
    key = jax.random.fold_in(key, self.names.index(name))
    return jax.random.fold_in(key, layer)


def in_layer_stack(name: str) -> bool:
  """Whether a path names a weight of the layer stack."""
  return name.split('/')[0] == 'blocks'


def take(tree: PyTree, i: jax.Array | int | None) -> PyTree:
  """Returns element i of every leaf [L, ...]; if i is None, returns the tree.

  >>> take({'w': jnp.arange(6).reshape(3, 2)}, 1)
  {'w': Array([2, 3], dtype=int32)}
  """
  if i is None:
    return tree
  return jax.tree.map(
    lambda a: _in_rows(lax.dynamic_index_in_dim(a, i, keepdims=False)), tree
  )


def put(tree: PyTree, one: PyTree, i: jax.Array | int | None) -> PyTree:
  """Replaces element i of every leaf [L, ...]; if i is None, returns `one`.

  In the carry of a loop this writes in place. The inputs and outputs of a scan
  would be two separate stacks.

  >>> put(jnp.zeros(3), jnp.float32(1), 2)
  Array([0., 0., 1.], dtype=float32)
  """
  if i is None:
    return one
  return jax.tree.map(
    lambda a, b: lax.dynamic_update_index_in_dim(a, _in_rows(b), i, 0),
    tree,
    one,
  )


def _in_rows(a: jax.Array) -> jax.Array:
  """Constrains an array to the row-major layout.

  Otherwise XLA may choose the layout that is best for the matmul of one layer
  and copy the whole stack into it.
  """
  return with_layout_constraint(a, Layout(tuple(range(a.ndim))))


def map_layers(
  update: Callable[[Any, jax.Array, jax.Array], Any],
  entry: PyTree,
  grads: jax.Array,
) -> PyTree:
  """Replaces each element of a stacked entry by `update(entry, grad, i)`.

  >>> map_layers(lambda w, g, i: w - i * g, jnp.ones(3), jnp.ones(3))
  Array([ 1.,  0., -1.], dtype=float32)
  """

  def body(i: jax.Array, entry: PyTree) -> PyTree:
    return put(entry, update(take(entry, i), take(grads, i), i), i)

  return lax.fori_loop(0, grads.shape[0], body, entry)


def in_slices(
  update: Callable[..., Any],
  entry: tuple[Any, Any],
  grad: jax.Array,
  num: int | None,
) -> tuple[Any, Any]:
  """Updates a weight slice by slice along its leading axis.

  Args:
    update: `(entry, grad, i) -> entry`, for slice i.
    entry: (stored weight, state); the state has a leading axis of slices.
    grad: gradient of the whole weight.
    num: number of slices; None updates the whole weight in one call.

  Returns:
    The updated entry.
  """
  if num is None:
    return update(entry, grad, 0)
  stored, inner = entry
  sliced_entry = (sliced(stored, num), inner)
  new, inner = map_layers(update, sliced_entry, sliced(grad, num))
  return unflat(new, stored), inner


def sliced(tree: PyTree, num: int) -> PyTree:
  """Returns the leaves [N, ...] as stacks [num, N / num, ...].

  >>> sliced(jnp.zeros((6, 2)), 3).shape
  (3, 2, 2)
  """

  def cut(a: jax.Array) -> jax.Array:
    share = _share(a, num, 'slices', 'the leading axis')
    return a.reshape(num, share, *a.shape[1:])

  return jax.tree.map(cut, tree)


def split_microbatches(batch: PyTree, num: int) -> PyTree:
  """Returns microbatches [num, N / num, ...] of a batch [N, ...].

  Microbatch k contains every num-th example, starting with example k. A batch
  that is sharded over its examples is therefore not moved between devices.

  >>> split_microbatches(jnp.arange(4), 2)
  Array([[0, 2],
         [1, 3]], dtype=int32)
  """

  def cut(a: jax.Array) -> jax.Array:
    share = _share(a, num, 'microbatches', 'the batch')
    return jnp.swapaxes(a.reshape(share, num, *a.shape[1:]), 0, 1)

  return jax.tree.map(cut, batch)


def _share(a: jax.Array, num: int, option: str, whole: str) -> int:
  if a.shape[0] % num:
    raise ValueError(f'{option} must divide {whole} of {a.shape[0]}, got {num}')
  return a.shape[0] // num


def moving(x: PyTree) -> PyTree:
  """Returns the leaves that can be differentiated, with None for all others.

  >>> moving({'h': jnp.zeros(2), 'positions': jnp.arange(2)})
  {'h': Array([0., 0.], dtype=float32), 'positions': None}
  """
  return jax.tree.map(
    lambda a: a if jnp.issubdtype(a.dtype, jnp.inexact) else None, x
  )


def join_moving(moved: PyTree, x: PyTree) -> PyTree:
  """Returns `moved`, with the leaves of `x` instead of its Nones.

  >>> join_moving({'h': 1, 'positions': None}, {'h': 0, 'positions': 2})
  {'h': 1, 'positions': 2}
  """
  return jax.tree.map(
    lambda m, a: a if m is None else m, moved, x, is_leaf=lambda a: a is None
  )


def flat(tree: PyTree) -> PyTree:
  """Returns each leaf as a vector.

  A stack of vectors has only one layout. XLA may transpose a stack of matrices
  into the layout that is best for the matmul of one of them, which is a copy.
  """
  return jax.tree.map(jnp.ravel, tree)


def unflat(vectors: PyTree, like: PyTree) -> PyTree:
  """Reshapes vectors to the shapes of `like`; inverts `flat`.

  >>> unflat(flat(jnp.zeros((2, 3))), jnp.ones((2, 3))).shape
  (2, 3)
  """
  return jax.tree.map(lambda v, a: v.reshape(a.shape), vectors, like)
