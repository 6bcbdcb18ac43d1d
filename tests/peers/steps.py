"""Compares updates of another library's tree with those of a dict.

The tree and the dict have the same arrays under the same paths, in the same
order. The container must not matter: both updates must be the same program, and
their results bit-for-bit equal.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.galore_optax.presets.test_contract import PRESETS as CASES
from tests.rounding import assert_same_program

PRESETS = {
  name: CASES[name]
  for name in (
    *('galore_adamw', 'galore_adamw_8bit', 'galore_adafactor', 'galore_muon'),
    *('rotate', 'frugal-svd', 'fira-reset', 'apollo', 'adalomo', 'scale_sgd'),
  )
}
"""Presets that treat the tree in different ways: whole, by label, in pieces."""

BOXES = (
  jax.tree_util.GetAttrKey('value'),
  jax.tree_util.FlattenedIndexKey(0),
)
"""The last key of an array in an NNX variable, a linen box or a NamedArray."""


def plain(tree: Any) -> collections.OrderedDict[str, jax.Array]:
  """Returns a dict from the path of each array to the array, in leaf order."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return collections.OrderedDict((name(path), leaf) for path, leaf in leaves)


def name(path: Any) -> str:
  """Returns a key path as text, without the key of a box."""
  path = path[:-1] if path[-1] in BOXES else path
  return jax.tree_util.keystr(path, simple=True, separator='/')


def gradients(params: Any, i: int = 0) -> Any:
  """Returns the gradients of step `i`, in the containers of the weights."""
  return jax.tree.map(lambda x: jnp.sin(3 * x + i), params)


def bases(state: Any) -> dict[str, tuple[int, ...]]:
  """Returns the path of each projected weight and the shape of its basis."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    if 'basis' in keys:
      found[name(path[keys.index('basis') + 1 :])] = leaf.shape
  return found


def assert_container_does_not_matter(
  tx: optax.GradientTransformation, params: Any
) -> None:
  """Asserts that the update of a tree is the update of a dict of its arrays."""
  tree, flat = tx.init(params), tx.init(plain(params))
  assert_equal_leaves(tree, flat)
  assert_same_program(
    (tx.update, gradients(params), tree, params),
    (tx.update, gradients(plain(params)), flat, plain(params)),
  )
  updates, after = jax.eval_shape(tx.update, gradients(params), tree, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert jax.tree.structure(after) == jax.tree.structure(tree)


def assert_same_steps(tx: optax.GradientTransformation, params: Any) -> None:
  """Asserts bit-for-bit equal weights and states after three compiled steps."""

  def run(params: Any) -> Any:
    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> Any:
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(3):
      params, state = step(gradients(params, i), state, params)
    return params, state

  assert_equal_leaves(run(params), run(plain(params)))


def assert_equal_leaves(found: Any, expected: Any) -> None:
  """Asserts that two trees have the same leaves in the same order."""
  found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
  for x, y in zip(found, expected, strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
