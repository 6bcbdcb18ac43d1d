"""How the state stores the basis of one matrix: as rows, indices or a seed.

A `BasisStore` works on the *stored* value of one matrix. `first` creates the
value, `find` replaces it at a refresh, and `rows` computes the basis from it at
every update. `Lazy` and `Packed` are stores that wrap any other store.

Axes: m projected side, n other side, r rank; leading axes are batch.
"""

import dataclasses
import functools
from typing import (
  Any,
  Literal,
  NamedTuple,
  Protocol,
  TypeAlias,
  runtime_checkable,
)

import jax
import jax.numpy as jnp

from galore_optax import checks, projection
from galore_optax.quantized import array
from galore_optax.subspace import finders

Stored: TypeAlias = Any
"""A pytree of arrays from which a store computes a basis."""


@runtime_checkable
class BasisStore(Protocol):
  """Stores the basis of one matrix."""

  def first(self, r: int, m: int, dtype: Any) -> Stored:
    """Returns the stored value before the first refresh."""
    ...

  def find(
    self, g_mn: jax.Array, stored: Stored, key: jax.Array, first: Any
  ) -> Stored:
    """Returns the stored value after a refresh.

    Args:
      g_mn: the gradient [m, n].
      stored: the previous stored value.
      key: a random key.
      first: [], bool: whether this is the first refresh. The previous value
        then does not hold a basis.
    """
    ...

  def rows(self, stored: Stored, r: int, m: int, dtype: Any) -> jax.Array:
    """Returns the basis [..., r, m], or indices [..., r], of a stack."""
    ...


@runtime_checkable
class HasFinder(Protocol):
  """A store that holds a finder, or another store."""

  finder: Any
  """The finder, or the other store."""


def by_coordinates(store: Any) -> bool:
  """Whether the basis of a store, or of a finder, is indices instead of rows.

  >>> by_coordinates(as_store('coordinates')), by_coordinates(Lazy('svd'))
  (True, False)
  """
  while isinstance(store, HasFinder):
    store = store.finder
  return getattr(store, 'by_coordinates', False)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _eye(r: int, m: int, dtype: Any) -> jax.Array:
  """Returns `jnp.eye`, compiled as one program instead of five."""
  return jnp.eye(r, m, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class StoredRows:
  """Stores the basis itself; the previous basis determines its signs."""

  finder: finders.Subspace

  def first(self, r: int, m: int, dtype: Any) -> Stored:
    """Returns the first r coordinates. They are used if a first refresh fails.

    >>> StoredRows(finders.Svd()).first(1, 2, jnp.float32)
    Array([[1., 0.]], dtype=float32)
    """
    if by_coordinates(self):
      return jnp.arange(r, dtype=jnp.int32)
    return _eye(r, m, jnp.dtype(dtype))

  def find(
    self, g_mn: jax.Array, stored: Stored, key: jax.Array, first: Any
  ) -> Stored:
    """Returns the rows or indices that the finder returns.

    >>> g_mn = jnp.array([[0., 0.], [-2., 0.]])
    >>> store = StoredRows(finders.Svd())
    >>> none_rm, key = jnp.zeros((1, 2)), jax.random.key(0)
    >>> abs(store.find(g_mn, none_rm, key, True)).round(3)
    Array([[0., 1.]], dtype=float32)
    """
    previous = jnp.where(first, 0, stored)
    if jnp.issubdtype(stored.dtype, jnp.integer):
      return self.finder(g_mn, previous, key)
    previous_rm = previous.astype(g_mn.dtype)
    new_rm = fix_signs(self.finder(g_mn, previous_rm, key), previous_rm)
    return new_rm.astype(stored.dtype)

  def rows(self, stored: Stored, r: int, m: int, dtype: Any) -> jax.Array:
    """Returns the stored rows or indices."""
    return stored


@dataclasses.dataclass(frozen=True)
class StoredSeed:
  """Stores a seed, 4 bytes, from which each update computes the basis again."""

  finder: finders.Subspace

  def first(self, r: int, m: int, dtype: Any) -> Stored:
    """Returns a seed of zero."""
    return jnp.zeros([], jnp.uint32)

  def find(
    self, g_mn: jax.Array, stored: Stored, key: jax.Array, first: Any
  ) -> Stored:
    """Returns a new random seed."""
    return jax.random.bits(key, dtype=jnp.uint32)

  def rows(self, stored: Stored, r: int, m: int, dtype: Any) -> jax.Array:
    """Returns the basis of each seed, in float32 at least."""
    dtype = jnp.promote_types(dtype, jnp.float32)

    def of_seed(seed: jax.Array) -> jax.Array:
      # A finder that is not stored reads only the shapes of these arrays.
      g_m1, basis_rm = jnp.zeros((m, 1), dtype), jnp.zeros((r, m), dtype)
      return self.finder(g_m1, basis_rm, jax.random.key(seed))

    if stored.ndim == 0:
      return of_seed(stored)
    rows = jax.lax.map(of_seed, stored.reshape(-1))
    return rows.reshape(*stored.shape, *rows.shape[1:])


class LazyBasis(NamedTuple):
  """The stored value of `Lazy` for one matrix."""

  basis: Stored
  """The stored value of the wrapped store."""
  wait: jax.Array
  """[], int32: number of gaps to skip before the next refresh."""
  gaps: jax.Array
  """[], int32: number of gaps between two refreshes."""
  overlaps_q: jax.Array
  """[q], float32: the latest overlaps; -1 in entries that are not filled."""


@dataclasses.dataclass(frozen=True)
class Lazy:
  """Doubles the gap of a matrix if its last subspaces were similar.

  The overlap of two subspaces is |P_old P_new^T|^2 / r. It is 1 for equal
  subspaces and r / m for random ones. It does not depend on the signs or the
  rotation of the basis vectors within the subspace. (The reference compares
  single vectors, whose signs are arbitrary.) If the mean of the last `memory`
  overlaps is at least `threshold`, the matrix waits twice as long until its
  next refresh. Cost: 2 r^2 m flops a refresh.

  Example:
    >>> import galore_optax, optax
    >>> tx = galore_optax.galore(optax.adam(0.1), subspace=Lazy(threshold=0.6))

  References:
    Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024.
  """

  finder: Any = 'svd'
  """A short name, a finder, or a store."""
  threshold: float = 0.4
  """Mean overlap at which the gap doubles."""
  memory: int = 5
  """Number q of overlaps in the mean. The gap stays until there are q."""

  def __post_init__(self) -> None:
    """Raises ValueError for an option out of range, or a finder with seeds."""
    checks.check_count(memory=self.memory)
    checks.check_not_negative(threshold=self.threshold)
    object.__setattr__(self, 'finder', as_store(self.finder))
    if isinstance(self.finder, StoredSeed):
      raise ValueError(
        'finder must be one that follows the gradient; use a random one'
        f' without Lazy, got {self.finder!r}'
      )

  def first(self, r: int, m: int, dtype: Any) -> Stored:
    """Returns a stored value whose first refresh does not wait."""
    basis, none_q = self.finder.first(r, m, dtype), jnp.full(self.memory, -1.0)
    return LazyBasis(basis, jnp.int32(0), jnp.int32(1), none_q)

  def find(
    self, g_mn: jax.Array, stored: Stored, key: jax.Array, first: Any
  ) -> Stored:
    """Returns a new basis, or the stored one with one gap less to wait."""

    def found() -> LazyBasis:
      new = self.finder.find(g_mn, stored.basis, key, first)
      overlap = self._overlap(new, stored.basis, g_mn)
      seen_q = jnp.roll(stored.overlaps_q, 1).at[0].set(overlap)
      # Before the first refresh there is no basis to compare with.
      overlaps_q = jnp.where(first, stored.overlaps_q, seen_q)
      is_full = ~first & jnp.all(overlaps_q >= 0)
      similar = is_full & (jnp.mean(overlaps_q) >= self.threshold)
      gaps = jnp.where(similar, 2 * stored.gaps, stored.gaps)
      return LazyBasis(new, gaps - 1, gaps, overlaps_q)

    waiting = stored._replace(wait=stored.wait - 1)
    return jax.lax.cond(stored.wait == 0, found, lambda: waiting)

  def rows(self, stored: Stored, r: int, m: int, dtype: Any) -> jax.Array:
    """Returns the rows of the wrapped store."""
    return self.finder.rows(stored.basis, r, m, dtype)

  def _overlap(self, new: Stored, old: Stored, g_mn: jax.Array) -> jax.Array:
    """Returns |P_old P_new^T|^2 / r of two stored values: []."""
    r, m = jax.tree.leaves(old)[0].shape[0], g_mn.shape[0]
    new_rm = self.finder.rows(new, r, m, g_mn.dtype)
    old_rm = self.finder.rows(old, r, m, g_mn.dtype)
    return jnp.sum(jnp.square(projection.overlap(new_rm, old_rm))) / r


@dataclasses.dataclass(frozen=True)
class Packed:
  """Stores a basis in blocks of 8 or 4 bits.

  A refresh quantizes the basis, and each update dequantizes it. Indices of
  coordinates and seeds are stored unchanged.

  Example:
    >>> import galore_optax, optax
    >>> tx = galore_optax.galore(optax.sgd(0.1), rank=2, subspace=Packed('svd'))
    >>> tx.init({'w': jnp.ones((512, 512))}).basis['w'].nbytes
    528
  """

  finder: Any
  """A short name, a finder, or a store."""
  bits: Literal[4, 8] = 4
  """Bits of an element."""
  group: int = 256
  """Number of elements that share a float32 scale."""

  def __post_init__(self) -> None:
    """Raises ValueError unless `bits` is 4 or 8 and `group` fits it."""
    array.check_layout(bits=self.bits, group=self.group)
    object.__setattr__(self, 'finder', as_store(self.finder))

  def first(self, r: int, m: int, dtype: Any) -> Stored:
    """Returns the first value of the wrapped store, quantized."""
    return self._quantized(self.finder.first(r, m, dtype))

  def find(
    self, g_mn: jax.Array, stored: Stored, key: jax.Array, first: Any
  ) -> Stored:
    """Returns the new value of the wrapped store, quantized."""
    stored = array.dequantize_tree(stored, g_mn.dtype)
    return self._quantized(self.finder.find(g_mn, stored, key, first))

  def rows(self, stored: Stored, r: int, m: int, dtype: Any) -> jax.Array:
    """Returns the rows in the weight's dtype."""
    return self.finder.rows(array.dequantize_tree(stored, dtype), r, m, dtype)

  def _quantized(self, stored: Stored) -> Stored:
    """Returns a stored value whose rows are quantized."""

    def of_array(x: jax.Array) -> Any:
      if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
        return x
      return array.quantize_linear(x, bits=self.bits, group=self.group)

    return jax.tree.map(of_array, stored)


def packed(store: Any, *, bits: Literal[4, 8], group: int) -> Any:
  """Returns a store whose bases are quantized, also inside `Lazy`.

  >>> packed(Lazy(), bits=8, group=64).finder
  Packed(finder=StoredRows(finder=Svd()), bits=8, group=64)
  """
  if isinstance(store, Lazy):
    inside = packed(store.finder, bits=bits, group=group)
    return dataclasses.replace(store, finder=inside)
  return Packed(store, bits, group)


def as_store(finder: Any) -> Any:
  """Returns a store for a short name or a finder; a store is returned as is.

  Raises:
    ValueError: the name is unknown, or the value is a class.

  >>> as_store('svd')
  StoredRows(finder=Svd())
  >>> as_store(finders.Gaussian(seed=3))
  StoredSeed(finder=Gaussian(seed=3))
  """
  if isinstance(finder, type):
    raise ValueError(
      'subspace must be an instance, such as Svd() instead of Svd, got'
      f' {finder!r}'
    )
  if isinstance(finder, BasisStore):
    return finder
  if not callable(finder):
    checks.check_one_of(tuple(finders.NAMES), subspace=finder)
    return as_store(finders.NAMES[finder])
  is_stored = getattr(finder, 'stored', True)
  store: Any = StoredRows if is_stored else StoredSeed
  return store(finder)


def fix_signs(new_rm: jax.Array, old_rm: jax.Array) -> jax.Array:
  """Flips each new vector that points away from the old one of its index.

  A decomposition does not determine signs, and moments that are kept across a
  refresh depend on them. If the old vector is zero or orthogonal, the entry of
  largest magnitude becomes positive.

  >>> fix_signs(jnp.eye(2), jnp.array([[0., -1.], [0., 0.]]))
  Array([[1., 0.],
         [0., 1.]], dtype=float32)
  """
  agreement_r = jnp.sum(new_rm * old_rm, axis=-1)
  peak_r1 = jnp.argmax(jnp.abs(new_rm), axis=-1, keepdims=True)
  peak_r = jnp.take_along_axis(new_rm, peak_r1, axis=-1)[..., 0]
  reference_r = jnp.where(agreement_r == 0, peak_r, agreement_r)
  return jnp.where(reference_r[..., None] < 0, -new_rm, new_rm)
