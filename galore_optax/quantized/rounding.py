"""Stochastic rounding: a weight in bfloat16 that does not lose small updates.

To nearest, an update below half a unit in the last place (2^-9 of the weight)
is lost, and every later one like it. Rounded up or down at random, right on
average, it is not.
"""

from typing import Any

import jax
import jax.numpy as jnp


def _round_to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds float32 to one of its two bfloat16 neighbours, right on average.

  A bfloat16 is the upper half of a float32, so random low bits carry into it
  with exactly the probability that the lower half is of a whole.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = ((bits + noise) >> 16).astype(jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
  # A carry out of the largest bfloat16 is not an overflow of the sum.
  largest = float(jnp.finfo(jnp.bfloat16).max)
  rounded = jnp.clip(rounded, -largest, largest)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _apply(
  param: jax.Array | None, update: jax.Array | None, key: jax.Array
) -> jax.Array | None:
  if update is None or param is None:
    return param
  total = jnp.asarray(param, jnp.float32) + jnp.asarray(update, jnp.float32)
  if param.dtype == jnp.bfloat16:
    return _round_to_bfloat16(total, key)
  return (param + update).astype(param.dtype)


def apply_updates_stochastic(params: Any, updates: Any, key: jax.Array) -> Any:
  """Adds updates to parameters; bfloat16 sums are rounded stochastically.

  The sum is taken in float32. Its expectation over `key` is exact to 2^-16 of
  the spacing of the two bfloat16 neighbours; a sum that bfloat16 holds is
  never changed; NaN and infinities stay; what lies beyond the largest finite
  bfloat16 but is finite in float32 becomes that largest value. A leaf of
  another dtype is added as `optax.apply_updates` does. Costs no float32 copy
  of a tree: each leaf is one fused loop.

  Args:
    params: a tree of arrays.
    updates: a tree of arrays of the same structure, in any floating dtype.
      None leaves its parameter alone.
    key: a JAX random key, a new one every step. Each leaf draws its own bits.

  Returns:
    The new parameters, in the dtype of the old ones.

  Example:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from galore_optax.quantized import rounding
    >>> params = jnp.ones(10_000, jnp.bfloat16)  # Spacing above 1: 1 / 128.
    >>> updates = jnp.full(10_000, 0.25 / 128)
    >>> new = rounding.apply_updates_stochastic(
    ...   params, updates, jax.random.key(0)
    ... )
    >>> moved = float((new > 1).mean())
    >>> 0.24 < moved < 0.26
    True
  """
  leaves, treedef = jax.tree.flatten(params, is_leaf=lambda x: x is None)
  steps = treedef.flatten_up_to(updates)
  keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
  return treedef.unflatten(map(_apply, leaves, steps, keys))
