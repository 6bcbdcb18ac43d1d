"""This module holds when and how the bases of a tree are found anew.

Axes: m projected side, n other side, r rank; leading axes are batch.
"""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax import projection as projection_lib
from galore_optax import subspace
from galore_optax.projection import Basis, Projection


def first_basis(projection: Projection, dtype: Any) -> Basis:
  """Returns coordinate axes, a valid basis should the first refresh fail.

  >>> p = Projection('w', (2, 5), ((0,), (1,)), 1, (projection_lib.ROWS,))
  >>> first_basis(p, jnp.float32)
  Array([[1., 0.]], dtype=float32)
  """
  return _one_or_pair(
    [
      jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=dtype), shape)
      for shape in projection.basis_shapes
    ]
  )


def refresh(
  finder: subspace.Subspace,
  projections: Sequence[Projection | None],
  grads: Sequence[jax.Array],
  bases: Sequence[Any],
  *,
  key: jax.Array,
  first: jax.Array,
  layer: jax.Array | int = 0,
) -> tuple[list[Any], jax.Array]:
  """Finds the bases of all projected leaves.

  Args:
    finder: how a basis is found.
    projections: how each leaf is projected.
    grads: gradient of each leaf.
    bases: present basis of each leaf.
    key: a random key of this refresh.
    first: [], bool: the present bases were never found.
    layer: index of the leaves' layer where one layer is updated at a time.

  Returns:
    The new bases, and how many matrices kept the old one because their
    gradient (or what was found) was not finite: [], int32.
  """
  pairs = [
    (basis, 0)
    if projection is None
    else _refresh_leaf(finder, projection, g, basis, key, first, layer)
    for projection, g, basis in zip(projections, grads, bases, strict=True)
  ]
  counts = jnp.array([count for _, count in pairs], jnp.int32)
  return [basis for basis, _ in pairs], jnp.sum(counts, dtype=jnp.int32)


def _refresh_leaf(finder, projection, g, basis, key, first, layer):
  """A stack runs matrix by matrix: its workspace is one matrix's."""
  g = projection_lib.to_matrix(projection, g)
  g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
  matrices = g[..., 0, 0].size
  # A path is a name that survives when only a part of the tree is seen.
  key = jax.random.fold_in(key, zlib.crc32(projection.path.encode()))
  index = jnp.arange(matrices) + layer * matrices
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, index)
  find = functools.partial(_refresh_matrix, finder, first)
  old = basis if isinstance(basis, tuple) else (basis,)
  pairs = [
    _each_matrix(find, projection_lib.orient(g, side), old_rm, keys)
    for side, old_rm in zip(projection.sides, old, strict=True)
  ]
  return _one_or_pair([new for new, _ in pairs]), sum(n for _, n in pairs)


def _each_matrix(find, g_mn, old_rm, keys):
  if g_mn.ndim == 2:
    return find(g_mn, old_rm, keys[0])
  flat = lambda x: x.reshape(-1, *x.shape[-2:])
  new_rm, kept = jax.lax.map(
    lambda xs: find(*xs), (flat(g_mn), flat(old_rm), keys)
  )
  return new_rm.reshape(old_rm.shape), jnp.sum(kept, dtype=jnp.int32)


def _refresh_matrix(finder, first, g_mn, old_rm, key):
  """Returns the new basis, or the old one and 1 where g is not finite."""
  previous_rm = jnp.where(first, 0, old_rm).astype(g_mn.dtype)
  finite = jnp.all(jnp.isfinite(g_mn))
  # A decomposition of NaN may never end.
  safe_mn = jnp.where(finite, g_mn, 0)
  new_rm = subspace.find(finder, safe_mn, previous_rm, key)
  found = finite & jnp.all(jnp.isfinite(new_rm))
  basis_rm = jnp.where(found, new_rm.astype(old_rm.dtype), old_rm)
  return basis_rm, jnp.int32(~found)


def _one_or_pair(bases: list[jax.Array]) -> Basis:
  return bases[0] if len(bases) == 1 else tuple(bases)
