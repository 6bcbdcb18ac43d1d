"""Equality of programs, and closeness of their results by their rounding.

Two programs that compute the same formula round differently. XLA fuses and
contracts operations. XLA and LAPACK choose kernels by the instruction set and
the number of threads. Results are equal bit for bit only if one program, or
programs of the same operations, compute them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def units(operations: float, dtype: Any = np.float32) -> float:
  """Returns a bound on the relative error of a number of operations.

  An operation is off by at most half of `eps`. The other half is for the
  operations of the expected value.

  >>> units(3, np.float64) == 3 * 2.0**-52
  True
  """
  return operations * float(jnp.finfo(dtype).eps)


def assert_close(found: Any, expected: Any, operations: float) -> None:
  """Asserts that two trees differ by the rounding of `operations` operations.

  A sum keeps the absolute error of its terms when it cancels. Errors are
  therefore measured against the largest entry of a leaf.

  Args:
    found: tree of arrays. Its types choose the units; integers must be equal.
    expected: the same tree, in these types or wider ones.
    operations: roundings on the longest path from the inputs to an entry. A
      later step that divides by a small number enlarges earlier errors, and
      counts as so many operations.
  """
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(found),
    jax.tree.leaves(expected),
    strict=True,
  ):
    name, x, y = jax.tree_util.keystr(path), np.asarray(x), np.asarray(y)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      np.testing.assert_array_equal(x, y, err_msg=name)
      continue
    size = np.max(np.abs(np.float64(y)), initial=0)
    np.testing.assert_allclose(
      np.float64(x),
      np.float64(y),
      rtol=0,
      atol=units(operations, x.dtype) * size,
      err_msg=name,
    )


def distance(found: Any, expected: Any) -> float:
  """Returns the norm of the difference of two trees over that of `expected`.

  Adam divides an entry of a gradient by its size. It enlarges the rounding of
  the few entries that nearly cancel. The norm averages over all entries.

  >>> distance({'w': np.array([3.0, 5.0])}, {'w': np.array([3.0, 4.0])})
  0.2
  """

  def norm(tree: Any) -> float:
    return np.sqrt(sum(np.sum(x * x) for x in jax.tree.leaves(tree)))

  found, expected = (
    jax.tree.map(np.float64, jax.device_get(x)) for x in (found, expected)
  )
  off = jax.tree.map(np.subtract, found, expected)
  return float(norm(off) / norm(expected))


def assert_same_program(
  *calls: tuple[Callable[..., Any], *tuple[Any, ...]],
) -> None:
  """Asserts that calls are the same operations on the same leaves.

  No input can then tell their results apart, on any machine. The trees of
  arguments and results may differ.

  Args:
    calls: a function and its arguments each.
  """

  def program(
    function: Callable[..., Any], *args: Any
  ) -> tuple[str, list[np.ndarray]]:
    leaves, treedef = jax.tree.flatten(args)

    def flat(*x: Any) -> list[Any]:
      return jax.tree.leaves(function(*treedef.unflatten(x)))

    closed = jax.make_jaxpr(flat)(*leaves)
    return str(closed.jaxpr), [np.asarray(x) for x in closed.consts]

  (text, consts), *others = [program(*call) for call in calls]
  for other, other_consts in others:
    assert text == other
    for x, y in zip(consts, other_consts, strict=True):
      np.testing.assert_array_equal(x, y)
