"""This module holds what happens to the inner state when the basis changes.

The inner transformation is a black box. What in its state follows the shapes
of parameters (moments) and what does not (counters) is read off `init`, run
abstractly on parameters of two sizes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.quantized.array import Quantized, dequantize, quantize

MOMENTS = ('keep', 'reset', 'rotate')
"""The short names that `galore(moments=...)` takes."""

FIRST, SECOND = ('mu', 'trace'), ('nu',)
"""Fields of first and of second moments in optax's states."""

KeyPath = tuple[Any, ...]


def sized(tree: Any, size: int) -> Any:
  """Returns abstract leaves of shape (size, ..., size), ranks kept.

  >>> sized({'w': jnp.zeros((3, 5))}, 1)
  {'w': ShapeDtypeStruct(shape=(1, 1), dtype=float32)}
  """
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((size,) * x.ndim, x.dtype), tree
  )


def counter_paths(
  inner: optax.GradientTransformation, params: Any
) -> set[KeyPath]:
  """Returns the paths in the inner state of what has no parameter's shape.

  >>> params = {'w': jnp.zeros((3, 5))}
  >>> [jax.tree_util.keystr(p) for p in counter_paths(optax.adam(1.), params)]
  ['[0].count']
  """
  # The real shapes too: Adafactor factors large weights alone.
  real, one, two = (
    dict(jax.tree_util.tree_leaves_with_path(jax.eval_shape(inner.init, tree)))
    for tree in (params, sized(params, 1), sized(params, 2))
  )
  return {
    path
    for path, leaf in real.items()
    if all(path in x and x[path].shape == leaf.shape for x in (one, two))
  }


def transplant(state: Any, into: Any, paths: set[KeyPath]) -> Any:
  """Returns the state `into` with what `state` has at the given paths."""
  values = dict(jax.tree_util.tree_leaves_with_path(state))
  return jax.tree_util.tree_map_with_path(
    lambda path, x: values[path] if path in paths else x, into
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
  go_on = clock_paths(inner, params)
  fresh = dict(jax.tree_util.tree_leaves_with_path(inner.init(params)))
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x if path in go_on else fresh[path], state
  )


def clock_paths(
  inner: optax.GradientTransformation, params: Any
) -> set[KeyPath]:
  """Returns the paths of counters that stand beside no moments.

  >>> params = {'w': jnp.zeros((3, 5))}
  >>> inner = optax.adam(lambda count: 0.1)
  >>> [jax.tree_util.keystr(path) for path in clock_paths(inner, params)]
  ['[1].count']
  """
  counters = counter_paths(inner, params)
  leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  state = _abstract_init(inner, params, 1)
  # A moment of leaf p stands at (*owner, field, *p), or has fields of its own.
  owners = {
    path[: start - 1]
    for path, _ in jax.tree_util.tree_leaves_with_path(state)
    if path not in counters
    for leaf in leaves
    for start in range(1, len(path) - len(leaf) + 1)
    if path[start : start + len(leaf)] == leaf
  }
  return {path for path in counters if path[:-1] not in owners}


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
  return optax.partition(
    {'low': inner, 'rest': inner}, labels, mask_compatible_extra_args=True
  )


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


def check_rotates(inner: optax.GradientTransformation, params: Any) -> None:
  """Raises if the inner keeps moments that `rotate` does not know.

  Args:
    inner: the transformation.
    params: what it sees as parameters; only structure and ranks are read.

  Raises:
    ValueError: a field of moments is neither mu, trace nor nu.
  """
  counters = counter_paths(inner, params)
  state = _abstract_init(inner, params, 1)
  for path, _ in jax.tree_util.tree_leaves_with_path(state):
    known = any(
      jax.tree_util.GetAttrKey(field) in path for field in FIRST + SECOND
    )
    if path not in counters and not known:
      raise ValueError(
        "moments='rotate' knows the moments mu, trace and nu, got"
        f" {jax.tree_util.keystr(path)}; use 'keep' or 'reset'"
      )


def rotate(
  inner: optax.GradientTransformationExtraArgs,
  state: Any,
  params: Any,
  turns: list[Callable[[jax.Array, int], jax.Array] | None],
  extra_args: dict[str, Any],
) -> Any:
  """Returns the inner state carried from the old basis to the new one.

  With C = P_new P_old^T the first moment becomes C mu. The second follows its
  variance: with both corrected for bias, |C^2 (nu - mu^2) + (C mu)^2|, where
  C^2 has the squared entries of C.

  Args:
    inner: the transformation; its moments are fields mu, trace or nu.
    state: its state for `params`.
    params: what it sees as parameters; only structure and ranks are read.
    turns: for each leaf `turn(x, power)`, the product with C, its entries
      raised to a power; None where the basis did not change.
    extra_args: passed to the inner.

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024.
  """
  # After one step from zero on gradients of one, mu is 1 - b1 and nu 1 - b2.
  ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), sized(params, 1))
  counters = counter_paths(inner, params)
  probe = transplant(state, inner.init(ones), counters)
  _, probe = inner.update(ones, probe, ones, **extra_args)
  nodes, treedef = jax.tree.flatten(state, is_leaf=_is_moments)
  probes = jax.tree.leaves(probe, is_leaf=_is_moments)
  return treedef.unflatten(
    [
      _rotate_node(node, step, jax.tree.structure(params), turns)
      if _is_moments(node)
      else node
      for node, step in zip(nodes, probes, strict=True)
    ]
  )


def _is_moments(node: Any) -> bool:
  return bool(_moment_fields(node))


def _read(moment: Any) -> jax.Array:
  return dequantize(moment) if isinstance(moment, Quantized) else moment


def _stored(new: jax.Array, old: Any) -> Any:
  """Returns `new`, in 8 bits if `old` is."""
  if not isinstance(old, Quantized):
    return new
  return quantize(new, code=old.code, block_size=old.block_size)


def _moment_fields(node: Any) -> list[str]:
  return [f for f in FIRST + SECOND if f in getattr(node, '_fields', ())]


def _rotate_node(node, step, treedef, turns):
  """Returns one NamedTuple of moments with its leaves turned."""
  fields = _moment_fields(node)
  flat = {f: treedef.flatten_up_to(getattr(node, f)) for f in fields}
  rates = {f: treedef.flatten_up_to(getattr(step, f)) for f in fields}
  count = getattr(node, 'count', None)
  for i, turn in enumerate(turns):
    # In a partition another rule may have the leaf.
    if turn is None or isinstance(flat[fields[0]][i], optax.MaskedNode):
      continue
    first = next((f for f in FIRST if f in fields), None)
    m = _read(flat[first][i]) if first else None
    if 'nu' in fields:
      # Bias corrections; without a count the inner makes none.
      w1, w2 = (
        1.0 if count is None or f is None else _corrected(rates[f][i], count)
        for f in (first, 'nu')
      )
      mean = 0.0 if m is None else m / w1
      turned_mean = 0.0 if m is None else turn(m, 1) / w1
      spread = turn(_read(flat['nu'][i]) / w2 - mean**2, 2)
      nu = w2 * jnp.abs(spread + turned_mean**2)
      flat['nu'][i] = _stored(nu, flat['nu'][i])
    if first:
      flat[first][i] = _stored(turn(m, 1), flat[first][i])
  return node._replace(**{f: treedef.unflatten(flat[f]) for f in fields})


def _corrected(rate: jax.Array, count: jax.Array) -> jax.Array:
  """Returns `1 - (1 - rate)**count`, at least the rate."""
  return -jnp.expm1(jnp.maximum(count, 1) * jnp.log1p(-rate.reshape(())))
