"""This module holds what happens to the inner state when the basis changes.

The inner transformation is a black box. What in its state follows the shapes
of parameters (moments) and what does not (counters) is read off `init`, run
abstractly on parameters of two sizes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

MOMENTS = ('keep', 'reset')
"""The short names that `galore(moments=...)` takes."""

KeyPath = tuple[Any, ...]


def sized(tree: Any, size: int) -> Any:
  """Returns abstract float32 leaves of shape (size, ..., size), ranks kept.

  >>> sized({'w': jnp.zeros((3, 5))}, 1)
  {'w': ShapeDtypeStruct(shape=(1, 1), dtype=float32)}
  """
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((size,) * x.ndim, jnp.float32), tree
  )


def counter_paths(
  inner: optax.GradientTransformation, params: Any
) -> set[KeyPath]:
  """Returns the paths in the inner state of what has no parameter's shape.

  >>> params = {'w': jnp.zeros((3, 5))}
  >>> [jax.tree_util.keystr(p) for p in counter_paths(optax.adam(1.), params)]
  ['[0].count']
  """
  one, two = (
    dict(jax.tree_util.tree_leaves_with_path(_abstract_init(inner, params, n)))
    for n in (1, 2)
  )
  return {
    path
    for path, leaf in one.items()
    if path in two and two[path].shape == leaf.shape
  }


def transplant_counters(
  inner: optax.GradientTransformation, state: Any, params: Any, into: Any
) -> Any:
  """Returns the state `into` with the counters of `state`.

  Args:
    inner: the transformation of both states.
    state: a state for `params`.
    params: parameters; only structure and ranks are read.
    into: a state for parameters of the same structure, of any shapes.
  """
  counters = counter_paths(inner, params)
  values = dict(jax.tree_util.tree_leaves_with_path(state))
  return jax.tree_util.tree_map_with_path(
    lambda path, x: values[path] if path in counters else x, into
  )


def restart(
  inner: optax.GradientTransformation, state: Any, params: Any
) -> Any:
  """Returns the inner state with moments, and their counters, started anew.

  A counter that stands beside moments (Adam's) restarts; one that stands
  alone (a learning-rate schedule's) goes on.

  Args:
    inner: the transformation.
    state: its state for `params`.
    params: parameters; only shapes are read.

  Example:
    >>> params = {'w': jnp.zeros((3, 5))}
    >>> inner = optax.adam(lambda count: 0.1)
    >>> _, state = inner.update(params, inner.init(params))
    >>> adam, schedule = restart(inner, state, params)
    >>> int(adam.count), int(schedule.count)
    (0, 1)
  """
  counters = counter_paths(inner, params)
  leaf_paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  fresh = dict(jax.tree_util.tree_leaves_with_path(inner.init(params)))
  # A moment of leaf p stands at (*owner, field, *p).
  owners = {
    path[: -len(leaf) - 1]
    for path in fresh.keys() - counters
    for leaf in leaf_paths
    if path[len(path) - len(leaf) :] == leaf
  }

  def renew(path: KeyPath, value: jax.Array) -> jax.Array:
    goes_on = path in counters and path[:-1] not in owners
    return value if goes_on else fresh[path]

  return jax.tree_util.tree_map_with_path(renew, state)


def _abstract_init(inner, params, size: int):
  return jax.eval_shape(inner.init, sized(params, size))


def grouped(
  inner: optax.GradientTransformation, labels: Any
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` with a state of its own for 'low' and for 'rest' leaves.

  Adam's counter serves all its leaves: were it one state, a restart of the
  projected leaves would correct the bias of the others anew.

  Args:
    inner: the transformation of both groups.
    labels: tree of 'low' and 'rest'.
  """
  return optax.partition({'low': inner, 'rest': inner}, labels)


def restart_low(
  inner: optax.GradientTransformation, state: Any, params: Any
) -> Any:
  """Returns the state of a `grouped` inner with its 'low' leaves restarted.

  Args:
    inner: the transformation that was grouped.
    state: the grouped state.
    params: parameters of the low leaves, MaskedNode elsewhere.
  """
  low = state.inner_states['low']
  low = low._replace(inner_state=restart(inner, low.inner_state, params))
  return state._replace(inner_states={**state.inner_states, 'low': low})
