"""Stochastic rounding, with which bfloat16 weights keep small updates.

Rounding to nearest loses every update that is smaller than half a unit in the
last place, 2^-9 of the weight. Stochastic rounding rounds up or down at random,
so that the expected value is the exact sum.
"""

from typing import Any

import jax
import jax.numpy as jnp


def _round_to_bfloat16(x: jax.Array, key: jax.Array) -> jax.Array:
  """Rounds float32 to one of its two bfloat16 neighbours; unbiased.

  A bfloat16 is the upper half of the bits of a float32. Adding 16 random bits
  carries into the upper half with a probability of the lower half / 2^16.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  upper = ((bits + noise) >> 16).astype(jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
  # The carry may turn the largest finite bfloat16 into infinity.
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

  The sum is computed in float32. The expected value of the result over keys
  equals the sum, to 2^-16 of the spacing of its two bfloat16 neighbours. A sum
  that bfloat16 represents exactly is not changed. NaN and infinity are kept. A
  finite sum beyond the largest finite bfloat16 becomes that largest value.
  Leaves of other dtypes are added as by `optax.apply_updates`. Each leaf is one
  fused loop, so no float32 copy of the tree is made.

  Args:
    params: a tree of arrays.
    updates: a tree of the same structure, of any floating dtype. A parameter
      whose update is None is returned unchanged.
    key: a JAX random key, a new one for every step. Each leaf draws its own
      random bits.

  Returns:
    The new parameters, with the dtypes of the old ones.

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
