"""What the state keeps of a basis: rows, a seed, or something that holds one.

A `Keeper` works on a *kept* value of one matrix. `first` makes it, `find`
replaces it at a refresh, `rows` makes a basis of it at every update. `Lazy`
and `Packed` are keepers that wrap another one, whatever that is.

Axes: m projected side, n other side, r rank; leading axes are batch.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from galore_optax import checks, projection
from galore_optax.quantized import array
from galore_optax.subspace import finders

Kept: TypeAlias = Any  # A pytree of arrays.


class Keeper(Protocol):
  """Keeps the basis of one matrix."""

  def first(self, r: int, m: int, dtype: Any) -> Kept:
    """Returns what is kept before the first refresh."""

  def find(self, g_mn: Any, kept: Kept, key: Any, first: Any) -> Kept:
    """Returns what is kept after a refresh; `first` says there is no basis."""

  def rows(self, kept: Kept, r: int, m: int, dtype: Any) -> Any:
    """Returns a basis [..., r, m], or indices [..., r], of a stack of kept."""


def by_coordinates(keeper: Any) -> bool:
  """Whether the basis of a keeper, or a finder, is indices and no rows.

  >>> by_coordinates(keeping('coordinates')), by_coordinates(Lazy('svd'))
  (True, False)
  """
  while hasattr(keeper, 'finder'):
    keeper = keeper.finder
  return getattr(keeper, 'by_coordinates', False)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Keeps the basis itself, its signs fixed by the one before."""

  finder: finders.Subspace

  def first(self, r, m, dtype):
    """Returns the first r coordinates, should the first refresh fail.

    >>> Rows(finders.Svd()).first(1, 2, jnp.float32)
    Array([[1., 0.]], dtype=float32)
    """
    if by_coordinates(self):
      return jnp.arange(r, dtype=jnp.int32)
    return jnp.eye(r, m, dtype=dtype)

  def find(self, g_mn, kept, key, first):
    """Returns the rows or indices that the finder finds.

    >>> g_mn = jnp.array([[0., 0.], [-2., 0.]])
    >>> keeper = Rows(finders.Svd())
    >>> none_rm, key = jnp.zeros((1, 2)), jax.random.key(0)
    >>> abs(keeper.find(g_mn, none_rm, key, True)).round(3)
    Array([[0., 1.]], dtype=float32)
    """
    previous = jnp.where(first, 0, kept)
    if jnp.issubdtype(kept.dtype, jnp.integer):
      return self.finder(g_mn, previous, key)
    previous_rm = previous.astype(g_mn.dtype)
    new_rm = fix_signs(self.finder(g_mn, previous_rm, key), previous_rm)
    return new_rm.astype(kept.dtype)

  def rows(self, kept, r, m, dtype):
    """Returns what is kept."""
    return kept


@dataclasses.dataclass(frozen=True)
class Seeds:
  """Keeps a seed, 4 bytes, of a basis that is made anew at every update."""

  finder: finders.Subspace

  def first(self, r, m, dtype):
    """Returns a seed."""
    return jnp.zeros([], jnp.uint32)

  def find(self, g_mn, kept, key, first):
    """Returns a new seed."""
    return jax.random.bits(key, dtype=jnp.uint32)

  def rows(self, kept, r, m, dtype):
    """Returns the basis of each seed, at least in float32."""
    wide = jnp.promote_types(dtype, jnp.float32)

    def one(seed):
      # Such a finder looks at shapes alone.
      nothing = jnp.zeros((m, 1), wide), jnp.zeros((r, m), wide)
      return self.finder(*nothing, jax.random.key(seed))

    if kept.ndim == 0:
      return one(kept)
    rows = jax.lax.map(one, kept.reshape(-1))
    return rows.reshape(*kept.shape, *rows.shape[1:])


class LazyBasis(NamedTuple):
  """What `Lazy` keeps of one matrix."""

  basis: Kept  # What the keeper inside keeps.
  wait: jax.Array  # [], int32: gaps to sit out before the next refresh.
  gaps: jax.Array  # [], int32: gaps from one refresh to the next.
  # [q], float32: the latest overlaps, -1 where there was none yet.
  overlaps_q: jax.Array


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Doubles the gap of a matrix whose last subspaces were much alike.

  Two subspaces overlap by |P_old P_new^T|^2 / r, which is one for the same and
  r / m for random ones, whatever the signs or the gauge of their vectors (the
  reference compares one vector with its sign, which a library may flip). Where
  the mean of the last `memory` overlaps is at least `threshold`, the matrix
  waits twice as long for its next refresh. Cost: r^2 m flops a refresh.

  Example:
    >>> import galore_optax, optax
    >>> tx = galore_optax.galore(optax.adam(0.1), subspace=Lazy(threshold=0.6))

  References:
    Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024.
  """

  finder: Any = 'svd'  # A short name, a finder or a keeper.
  threshold: float = 0.4  # Mean overlap from which on the gap doubles.
  memory: int = 5  # Overlaps in that mean; none before so many were seen.

  def __post_init__(self) -> None:
    """Raises ValueError for a mean over nothing."""
    checks.check_count(memory=self.memory)
    checks.check_not_negative(threshold=self.threshold)
    object.__setattr__(self, 'finder', keeping(self.finder))
    rule = 'one that follows the gradient; use a random one without Lazy'
    checks.require(rule, lambda x: not isinstance(x, Seeds), finder=self.finder)

  def first(self, r, m, dtype):
    """Returns a basis that waits for nothing."""
    basis, none_q = self.finder.first(r, m, dtype), jnp.full(self.memory, -1.0)
    return LazyBasis(basis, jnp.int32(0), jnp.int32(1), none_q)

  def find(self, g_mn, kept, key, first):
    """Returns a new basis, or what is kept with less to wait."""

    def found():
      new = self.finder.find(g_mn, kept.basis, key, first)
      overlap = self._overlap(new, kept.basis, g_mn)
      seen_q = jnp.roll(kept.overlaps_q, 1).at[0].set(overlap)
      # The first refresh has nothing to compare with.
      overlaps_q = jnp.where(first, kept.overlaps_q, seen_q)
      known = ~first & jnp.all(overlaps_q >= 0)
      alike = known & (jnp.mean(overlaps_q) >= self.threshold)
      gaps = jnp.where(alike, 2 * kept.gaps, kept.gaps)
      return LazyBasis(new, gaps - 1, gaps, overlaps_q)

    waiting = kept._replace(wait=kept.wait - 1)
    return jax.lax.cond(kept.wait == 0, found, lambda: waiting)

  def rows(self, kept, r, m, dtype):
    """Returns the rows of the basis inside."""
    return self.finder.rows(kept.basis, r, m, dtype)

  def _overlap(self, new, old, g_mn):
    r, m = jax.tree.leaves(old)[0].shape[0], g_mn.shape[0]
    rows = lambda kept: self.finder.rows(kept, r, m, g_mn.dtype)
    return jnp.sum(jnp.square(projection.overlap(rows(new), rows(old)))) / r


@dataclasses.dataclass(frozen=True)
class Packed:
  """Keeps a basis in blocks of 8 or 4 bits.

  It is quantized when it is found, and an array only while its weight is
  updated. Indices of coordinates and seeds stay as they are.

  Example:
    >>> import galore_optax, optax
    >>> tx = galore_optax.galore(optax.sgd(0.1), rank=2, subspace=Packed('svd'))
    >>> tx.init({'w': jnp.ones((512, 512))}).basis['w'].nbytes
    528
  """

  finder: Any  # A short name, a finder or a keeper.
  bits: Literal[4, 8] = 4  # Of an element.
  group: int = 256  # Elements that share a float32 scale.

  def __post_init__(self) -> None:
    """Raises ValueError for a layout that no array has."""
    array.check_layout(bits=self.bits, group=self.group)
    object.__setattr__(self, 'finder', keeping(self.finder))

  def first(self, r, m, dtype):
    """Returns the first rows, packed."""
    return self._pack(self.finder.first(r, m, dtype))

  def find(self, g_mn, kept, key, first):
    """Returns the new rows, packed."""
    kept = array.unpacked(kept, g_mn.dtype)
    return self._pack(self.finder.find(g_mn, kept, key, first))

  def rows(self, kept, r, m, dtype):
    """Returns the rows as an array in the weight's type."""
    return self.finder.rows(array.unpacked(kept, dtype), r, m, dtype)

  def _pack(self, kept):
    is_rows = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1
    pack = lambda x: array.quantize_linear(x, bits=self.bits, group=self.group)
    return jax.tree.map(lambda x: pack(x) if is_rows(x) else x, kept)


def packed(keeper: Any, *, bits: Literal[4, 8], group: int) -> Any:
  """Returns a keeper whose bases are packed, inside of what `Lazy` keeps.

  >>> packed(Lazy(), bits=8, group=64).finder
  Packed(finder=Rows(finder=Svd()), bits=8, group=64)
  """
  if isinstance(keeper, Lazy):
    inside = packed(keeper.finder, bits=bits, group=group)
    return dataclasses.replace(keeper, finder=inside)
  return Packed(keeper, bits, group)


def keeping(finder: Any) -> Any:
  """Returns a keeper of a short name, a finder, or a keeper as it is.

  >>> keeping('svd')
  Rows(finder=Svd())
  >>> keeping(finders.Gaussian(seed=3))
  Seeds(finder=Gaussian(seed=3))
  """
  rule = 'an instance, such as Svd() instead of Svd'
  checks.require(rule, lambda x: not isinstance(x, type), subspace=finder)
  if hasattr(finder, 'rows'):
    return finder
  if not callable(finder):
    checks.check_one_of(tuple(finders.NAMES), subspace=finder)
    finder = finders.NAMES[finder]
  kind: Any = Rows if getattr(finder, 'stored', True) else Seeds
  return kind(finder)


def fix_signs(new_rm: jax.Array, old_rm: jax.Array) -> jax.Array:
  """Flips each new vector to agree with the old one of the same index.

  A decomposition leaves signs open, and moments that are kept across a
  refresh would depend on them. Where the old vector says nothing (it is zero
  or orthogonal) the entry of largest magnitude becomes positive.

  >>> fix_signs(jnp.eye(2), jnp.array([[0., -1.], [0., 0.]]))
  Array([[1., 0.],
         [0., 1.]], dtype=float32)
  """
  agreement_r = jnp.sum(new_rm * old_rm, axis=-1)
  peak_r1 = jnp.argmax(jnp.abs(new_rm), axis=-1, keepdims=True)
  peak_r = jnp.take_along_axis(new_rm, peak_r1, axis=-1)[..., 0]
  reference_r = jnp.where(agreement_r == 0, peak_r, agreement_r)
  return jnp.where(reference_r[..., None] < 0, -new_rm, new_rm)
