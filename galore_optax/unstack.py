"""`unstack`: the elements of a stack, compiled once for all of them.

XLA compiles equal kernels once. Two slices at different constant positions are
different kernels, and on a CPU each takes more than 10 ms to compile. A model
with hundreds of separate matrices has hundreds of such slices.
"""

from typing import Any

import jax
import jax.numpy as jnp


def unstack(tree: Any, num: int) -> list[Any]:
  """Returns the elements of a stack as a list of trees.

  Args:
    tree: arrays [k, ...], with at least one element each.
    num: the number k of elements.

  >>> unstack({'w': jnp.arange(4.0).reshape(2, 2)}, 2)
  [{'w': Array([0., 1.], dtype=float32)}, {'w': Array([2., 3.], dtype=float32)}]
  """
  leaves, treedef = jax.tree.flatten(tree)

  def by_slices(*leaves: jax.Array) -> list[list[jax.Array]]:
    return [[x[i] for x in leaves] for i in range(num)]

  def by_hidden_positions(*leaves: jax.Array) -> list[list[jax.Array]]:
    return [
      [jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in leaves]
      for i in _hidden_positions(leaves[0], num)
    ]

  # On a GPU a `cond` would wait for its condition at every step.
  rows = jax.lax.platform_dependent(
    *leaves, cpu=by_hidden_positions, default=by_slices
  )
  return list(map(treedef.unflatten, rows))


def _hidden_positions(x: jax.Array, num: int) -> tuple[jax.Array, ...]:
  """Returns 0, 1, ..., num - 1 as numbers that XLA cannot fold.

  A dynamic slice at a constant position would become a slice.
  XLA does not evaluate the condition, because 0 times infinity is not 0. The
  condition is always false.
  """
  never = jnp.float32(x.ravel()[0]) * 0 > 1
  return jax.lax.cond(
    never,
    lambda: (jnp.int32(never),) * num,
    lambda: tuple(jnp.int32(i) for i in range(num)),
  )
