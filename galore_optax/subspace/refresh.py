"""This module holds when and how the bases of a tree are found anew.

A unit is one matrix: a stack of L layers is L units. What is kept in the state
for a leaf is its array, a pair of them for side 'full', or a MaskedNode where
nothing is kept.

Axes: k matrices of a stack, m projected side, n other side, r rank.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths as selection
from galore_optax import projection as projection_lib
from galore_optax.precision import full
from galore_optax.projection import Basis, Projection
from galore_optax.subspace import finders as subspace
from galore_optax.subspace import lazy
from galore_optax.subspace.turns import Turns

GOLDEN = 0.618033988749895
"""Multiples of it, modulo one, never come close to each other."""


@dataclasses.dataclass(frozen=True)
class Staggered:
  """A gap at which the matrices take turns, so that no step pays for all.

  All are found at step 0, and then each every `gap` steps.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(optax.adam(0.1), gap=Staggered(200))
  """

  gap: int
  """Updates from one refresh of a matrix to its next."""


@dataclasses.dataclass(frozen=True)
class Units:
  """The matrices of one projected leaf, and when each is due."""

  projection: Projection
  position: int
  """Place of the leaf in the whole model."""
  num_leaves: int
  """Number of leaves of the whole model."""
  gap: int | Staggered
  """Updates between refreshes."""
  layer: jax.Array | int
  """Index of the layer where one layer is updated at a time."""

  def index_k(self) -> jax.Array:
    """Number of each matrix within the leaf of the whole model."""
    k = self.projection.num_matrices
    return jnp.arange(k) + self.layer * k

  def refresh_index_k(self, count: jax.Array) -> jax.Array:
    """How many refreshes of each matrix came before `count` updates."""
    if isinstance(self.gap, int):
      return jnp.broadcast_to(count // self.gap, self.index_k().shape)
    turn_k = (self.position + self.num_leaves * self.index_k()) * GOLDEN % 1
    offset_k = 1 + jnp.int32(turn_k * self.gap.gap)
    return (count - offset_k) // self.gap.gap + 1

  def due_k(self, count: jax.Array) -> jax.Array:
    """Which matrices are due, bool."""
    changed_k = self.refresh_index_k(count) != self.refresh_index_k(count - 1)
    return changed_k | (count == 0)

  def keys_k(self, count: jax.Array, side: int) -> jax.Array:
    """A random key of each matrix at this refresh, for one side of it.

    The path names the leaf: a number would change with the part of the tree.
    """
    path = zlib.crc32(self.projection.path.encode())
    key = jax.random.fold_in(jax.random.key(side), path)
    fold = jax.vmap(jax.random.fold_in)
    index_k = self.index_k()
    keys_k = jnp.broadcast_to(key, index_k.shape)
    return fold(fold(keys_k, index_k), self.refresh_index_k(count))


def units(
  tree: Any,
  projections: Sequence[Projection | None],
  gap: int | Staggered,
  layer: jax.Array | int,
) -> list[Units | None]:
  """Returns the units of each leaf, None for one that is not projected."""
  places, num_leaves = selection.places(tree)
  return [
    p and Units(p, place, num_leaves, gap, layer)
    for p, place in zip(projections, places, strict=True)
  ]


def is_due(
  leaves: Sequence[Units | None], gap: int | Staggered, count: jax.Array
) -> jax.Array:
  """Whether any matrix is due: [], bool."""
  if isinstance(gap, int):
    return count % gap == 0
  due = [jnp.any(leaf.due_k(count)) for leaf in leaves if leaf is not None]
  return jnp.any(jnp.array(due, bool))


def first_basis(
  finder: subspace.Subspace, projection: Projection, dtype: Any
) -> Any:
  """Returns what the state keeps for a leaf before its first refresh.

  >>> p = Projection('w', (2, 5), ((0,), (1,)), 1, (projection_lib.ROWS,))
  >>> first_basis(subspace.Svd(), p, jnp.float32)
  Array([[1., 0.]], dtype=float32)
  """
  if not is_stored(finder):
    return optax.MaskedNode()
  batch = projection.matrix_shape[:-2]
  bases = []
  for side in projection.sides:
    m = projection.matrix_shape[side]
    basis = subspace.first_basis(finder, projection.rank, m, dtype)
    bases.append(jnp.broadcast_to(basis, (*batch, *basis.shape)))
  if isinstance(finder, lazy.Lazy):
    return lazy.begin(finder, tuple(bases), projection.num_matrices)
  return as_kept(tuple(bases))


def is_stored(finder: subspace.Subspace) -> bool:
  """Whether bases are kept in the state, not made from a seed at each update.

  >>> is_stored(subspace.Svd()), is_stored(subspace.RandomOrthogonal())
  (True, False)
  """
  return getattr(finder, 'stored', True)


def turn(
  leaf: Units, new: Basis, old: Basis, count: jax.Array
) -> Callable[[jax.Array, int], jax.Array]:
  """Returns the product with C = P_new P_old^T, its entries to a power.

  Before the first refresh there is nothing to carry: C is the identity. So it
  is for a matrix that was not due.
  """
  changed_k = leaf.due_k(count) & (count > 0)
  batch = leaf.projection.matrix_shape[:-2]
  changed = changed_k.reshape(*batch, 1, 1)
  r = leaf.projection.rank

  def product(x: jax.Array, power: int) -> jax.Array:
    overlaps = (
      jnp.where(changed, projection_lib.overlap(n, o), jnp.eye(r)) ** power
      for n, o in zip(new, old, strict=True)
    )
    return projection_lib.contract(leaf.projection.sides, x, tuple(overlaps))

  return product


def as_kept(basis: Basis) -> Any:
  """Returns what the state keeps: an array rather than a tuple of one."""
  return basis[0] if len(basis) == 1 else basis


def as_basis(kept: Any) -> Basis:
  """Returns a tuple with one entry a side; inverts `as_kept`."""
  if isinstance(kept, lazy.LazyBasis):
    return kept.basis
  return kept if isinstance(kept, tuple) else (kept,)


def remade(finder: subspace.Subspace, leaf: Units, count: jax.Array) -> Basis:
  """Returns a basis that is not stored, made from seed and time."""
  projection = leaf.projection
  r, batch = projection.rank, projection.matrix_shape[:-2]
  bases = []
  for number, side in enumerate(projection.sides):
    m = projection.matrix_shape[side]

    def one(matrix, m=m):
      key, turn = matrix
      if isinstance(finder, Turns):
        return finder.at(turn, r, m)
      # Such a finder looks at shapes alone.
      return finder(jnp.zeros((m, 1)), jnp.zeros((r, m)), key)

    turns_k = leaf.refresh_index_k(count)
    basis_k = _each(one, (leaf.keys_k(count, number), turns_k))
    bases.append(basis_k.reshape(*batch, *basis_k.shape[1:]))
  return tuple(bases)


def refresh(
  finder: subspace.Subspace,
  leaf: Units,
  g: jax.Array,
  kept: Any,
  count: jax.Array,
) -> tuple[Any, jax.Array]:
  """Finds the basis of those matrices of a leaf that are due.

  Args:
    finder: how a basis is found.
    leaf: its units.
    g: gradient, in the weight's shape.
    kept: what the state keeps for the leaf.
    count: [], int32: updates done so far.

  Returns:
    What it keeps now, and how many matrices kept their basis as the gradient
    (or what was found) was not finite: [], int32.
  """
  due_k = None if isinstance(leaf.gap, int) else leaf.due_k(count)
  if not isinstance(finder, lazy.Lazy):
    basis, skips = _refresh_due(finder, leaf, g, as_basis(kept), count, due_k)
    return as_kept(basis), skips
  found_k = leaf.due_k(count) & (kept.wait_k == 0)
  basis, skips = _refresh_due(finder, leaf, g, kept.basis, count, found_k)
  new = lazy.after(finder, kept, basis, found_k, count == 0)
  if due_k is None:
    return new, skips
  # A matrix whose turn it is not does not wait either.
  patience = zip(new[1:], kept[1:], strict=True)
  return lazy.LazyBasis(
    basis,
    *(
      jnp.where(due_k.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
      for x, y in patience
    ),
  ), skips


def _refresh_due(
  finder: subspace.Subspace,
  leaf: Units,
  g: jax.Array,
  basis: Basis,
  count: jax.Array,
  due_k: jax.Array | None,
) -> tuple[Basis, jax.Array]:
  """Refreshes some matrices of a leaf, or all where `due_k` is None.

  A stack runs matrix by matrix, so that its workspace is one matrix's.
  """
  projection = leaf.projection
  k, batch = projection.num_matrices, len(projection.matrix_shape) - 2
  g_kio = projection_lib.to_matrix(projection, g)
  g_kio = g_kio.reshape(k, *g_kio.shape[batch:])
  mask_k = leaf.due_k(count) if due_k is None else due_k
  new, kept = [], jnp.zeros([], jnp.int32)
  for number, (side, old) in enumerate(
    zip(projection.sides, basis, strict=True)
  ):

    def one(matrix, side=side):
      g_io, old_rm, key, due = matrix
      g_mn = projection_lib.orient(g_io, side)
      find = lambda: _refresh_matrix(finder, g_mn, old_rm, key, count == 0)
      if due_k is None:
        return find()
      return jax.lax.cond(due, find, lambda: (old_rm, jnp.int32(0)))

    old_k = old.reshape(k, *old.shape[batch:])
    keys_k = leaf.keys_k(count, number)
    new_k, kept_k = _each(one, (g_kio, old_k, keys_k, mask_k))
    new.append(new_k.reshape(old.shape))
    kept += jnp.sum(kept_k, dtype=jnp.int32)
  return tuple(new), kept


def _each(one: Callable[[Any], Any], stacks: Any) -> Any:
  """Maps over the leading axis, without a loop where it has one index."""
  if jax.tree.leaves(stacks)[0].shape[0] > 1:
    return jax.lax.map(one, stacks)
  alone = one(jax.tree.map(lambda x: x[0], stacks))
  return jax.tree.map(lambda x: x[None], alone)


def _refresh_matrix(finder, g_mn, old_rm, key, first):
  """Returns the new basis and 0, or the old one and 1."""
  g_mn = full(g_mn)
  previous_rm = jnp.where(first, 0, old_rm)
  if jnp.issubdtype(old_rm.dtype, jnp.floating):
    previous_rm = previous_rm.astype(g_mn.dtype)
  finite = jnp.all(jnp.isfinite(g_mn))
  # A decomposition of NaN may never end.
  safe_mn = jnp.where(finite, g_mn, 0)
  new_rm = subspace.find(finder, safe_mn, previous_rm, key)
  found = finite & jnp.all(jnp.isfinite(new_rm))
  basis_rm = jnp.where(found, new_rm.astype(old_rm.dtype), old_rm)
  return basis_rm, jnp.int32(~found)
