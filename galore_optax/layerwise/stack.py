"""This module holds what a loop over stacked pytrees is made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

PyTree = Any


def take(tree: PyTree, i: jax.Array | int) -> PyTree:
  """Returns element i of every leaf [L, ...].

  >>> take({'w': jnp.arange(6).reshape(3, 2)}, 1)
  {'w': Array([2, 3], dtype=int32)}
  """
  return jax.tree.map(
    lambda a: _in_rows(lax.dynamic_index_in_dim(a, i, keepdims=False)), tree
  )


def put(tree: PyTree, one: PyTree, i: jax.Array | int) -> PyTree:
  """Returns the leaves [L, ...] with element i replaced.

  In the carry of a loop this writes in place; a scan's xs and ys would be two
  stacks.

  >>> put(jnp.zeros(3), jnp.float32(1), 2)
  Array([0., 0., 1.], dtype=float32)
  """
  return jax.tree.map(
    lambda a, b: lax.dynamic_update_index_in_dim(a, _in_rows(b), i, 0),
    tree,
    one,
  )


def _in_rows(a: jax.Array) -> jax.Array:
  """Returns an array laid out in rows.

  XLA would lay out a whole stack as a product likes one layer of it: a copy.
  """
  return with_layout_constraint(a, Layout(tuple(range(a.ndim))))


def sliced(tree: PyTree, num: int) -> PyTree:
  """Returns the leaves [N, ...] as stacks [num, N / num, ...].

  >>> sliced(jnp.zeros((6, 2)), 3).shape
  (3, 2, 2)
  """

  def cut(a):
    if a.shape[0] % num:
      raise ValueError(
        f'slices must divide the leading axis, got {num} for shape {a.shape}'
      )
    return a.reshape(num, -1, *a.shape[1:])

  return jax.tree.map(cut, tree)


def in_slices(
  update: Callable[..., Any], entry: Any, grad: jax.Array, num: int
) -> Any:
  """Returns (stored, inner state) of a weight, updated slice by slice."""
  stored, inner = entry
  grad = sliced(grad, num)

  def body(i, entry):
    new = update(take(entry, i), take(grad, i), i)
    return put(entry, new, i)

  entry = (sliced(stored, num), inner)
  new, inner = lax.fori_loop(0, num, body, entry)
  return unflat(new, stored), inner


def split(batch: PyTree, num: int) -> PyTree:
  """Returns microbatches [num, N / num, ...] of a batch [N, ...].

  Microbatch k takes every num-th example, so that a batch that is sharded
  over its examples stays where it is.

  >>> split(jnp.arange(4), 2)
  Array([[0, 2],
         [1, 3]], dtype=int32)
  """

  def cut(a):
    if a.shape[0] % num:
      raise ValueError(
        f'microbatches must divide the batch of {a.shape[0]}, got {num}'
      )
    return jnp.swapaxes(a.reshape(-1, num, *a.shape[1:]), 0, 1)

  return jax.tree.map(cut, batch)


def moving(x: PyTree) -> PyTree:
  """Returns the leaves that have a gradient; None stands for the others.

  >>> moving({'h': jnp.zeros(2), 'positions': jnp.arange(2)})
  {'h': Array([0., 0.], dtype=float32), 'positions': None}
  """
  return jax.tree.map(
    lambda a: a if jnp.issubdtype(a.dtype, jnp.inexact) else None, x
  )


def join(moved: PyTree, x: PyTree) -> PyTree:
  """Returns `x` with the leaves of `moved` where that has any.

  >>> join({'h': 1, 'positions': None}, {'h': 0, 'positions': 2})
  {'h': 1, 'positions': 2}
  """
  return jax.tree.map(
    lambda m, a: a if m is None else m, moved, x, is_leaf=lambda a: a is None
  )


def flat(tree: PyTree) -> PyTree:
  """Returns each leaf as a vector.

  A stack of vectors has one layout; of a stack of arrays, XLA may make a
  transposed copy for the sake of a matmul that reads one of them.
  """
  return jax.tree.map(jnp.ravel, tree)


def unflat(vectors: PyTree, like: PyTree) -> PyTree:
  """Returns vectors in the shapes of `like`; inverts `flat`.

  >>> unflat(flat(jnp.zeros((2, 3))), jnp.ones((2, 3))).shape
  (2, 3)
  """
  return jax.tree.map(lambda v, a: v.reshape(a.shape), vectors, like)
