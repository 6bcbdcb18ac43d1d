"""This module holds subspaces that are found less often the less they move.

Axes: k matrices of a stack, q refreshes remembered, r rank, m projected side.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from galore_optax import projection as projection_lib
from galore_optax.projection import Basis
from galore_optax.static import check_count
from galore_optax.subspace import finders as subspace


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

  finder: subspace.Subspace = dataclasses.field(default_factory=subspace.Svd)
  """How a basis is found."""
  threshold: float = 0.4
  """Mean overlap from which on the gap doubles."""
  memory: int = 5
  """Overlaps that the mean is over; none before so many were seen."""

  def __post_init__(self) -> None:
    """Raises ValueError for a mean over nothing."""
    check_count(memory=self.memory)

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns the basis [r, m] of a gradient."""
    return self.finder(g_mn, basis_rm, key)


class LazyBasis(NamedTuple):
  """What the state keeps for a leaf whose matrices wait."""

  basis: Basis
  """Of each projected side."""
  wait_k: jax.Array
  """[k], int32: gaps to sit out before the next refresh."""
  gaps_k: jax.Array
  """[k], int32: gaps from one refresh to the next."""
  overlaps_kq: jax.Array
  """[k, q], float32: the latest overlaps, NaN where there was none yet."""


def begin(lazy: Lazy, basis: Basis, k: int) -> LazyBasis:
  """Returns the state before the first refresh."""
  return LazyBasis(
    basis=basis,
    wait_k=jnp.zeros(k, jnp.int32),
    gaps_k=jnp.ones(k, jnp.int32),
    overlaps_kq=jnp.full((k, lazy.memory), jnp.nan),
  )


def after(
  lazy: Lazy, old: LazyBasis, basis: Basis, found_k: jax.Array, first: jax.Array
) -> LazyBasis:
  """Returns the state after a refresh.

  Args:
    lazy: the rule.
    old: the state before.
    basis: the new basis, that of `old` where none was looked for.
    found_k: [k], bool: where one was looked for.
    first: [], bool: the first refresh has nothing to compare with.
  """
  overlap_k = jnp.mean(
    jnp.stack([_overlap(n, o) for n, o in zip(basis, old.basis, strict=True)]),
    axis=0,
  )
  seen_kq = jnp.roll(old.overlaps_kq, 1, axis=1).at[:, 0].set(overlap_k)
  compared_k = found_k & ~first
  overlaps_kq = jnp.where(compared_k[:, None], seen_kq, old.overlaps_kq)
  # A mean with a NaN in it is none, and not at least the threshold.
  alike_k = compared_k & (jnp.mean(overlaps_kq, axis=1) >= lazy.threshold)
  gaps_k = jnp.where(alike_k, 2 * old.gaps_k, old.gaps_k)
  wait_k = jnp.where(found_k, gaps_k - 1, old.wait_k - 1)
  return LazyBasis(basis, wait_k, gaps_k, overlaps_kq)


def _overlap(new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns |P_new P_old^T|^2 / r of each matrix: [k]."""
  overlap_krr = projection_lib.overlap(new, old)
  r = overlap_krr.shape[-1]
  return jnp.sum(jnp.square(overlap_krr), (-2, -1)).reshape(-1) / r
