"""Assertions that programs are equal, or that results differ only by rounding.

Two programs that compute the same formula may round differently. XLA fuses and
contracts operations, and XLA and LAPACK choose kernels by the instruction set
and the number of threads. Results are bit-for-bit equal only if the same
sequence of operations computes them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def units(operations: float, dtype: Any = np.float32) -> float:
  """Returns a bound on the relative rounding error of several operations.

  Each operation has a relative error of at most `eps / 2`. The bound is twice
  that, because the expected value has rounding errors as well.

  >>> units(3, np.float64) == 3 * 2.0**-52
  True
  """
  return operations * float(jnp.finfo(dtype).eps)


def assert_close(found: Any, expected: Any, operations: float) -> None:
  """Asserts that two trees differ by at most the rounding of some operations.

  Errors are measured relative to the largest entry of a leaf. A sum whose terms
  cancel keeps the absolute error of its terms, so its error relative to itself
  has no bound.

  Args:
    found: tree of arrays. The dtype of each leaf determines its tolerance.
      Integer leaves must be equal.
    expected: tree of the same structure, with the same dtypes or wider ones.
    operations: number of rounded operations on the longest path from the inputs
      to an entry. If a later operation amplifies earlier errors, for example by
      dividing by a small number, count it several times.
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
  """Returns the norm of `found - expected` relative to the norm of `expected`.

  Adam divides each gradient entry by its magnitude, which amplifies the
  rounding errors of the few entries that nearly cancel. The norm averages over
  all entries, so these few do not dominate it.

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
  """Asserts that all calls trace to the same operations on the same leaves.

  Equal programs have equal results for every input, on every machine. The calls
  may differ in the tree structure of arguments and results.

  Args:
    calls: tuples of a function and its arguments.
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
