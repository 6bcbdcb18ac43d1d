"""This module holds the order in which coordinates, such as layers, train."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Turns:
  """Coordinates of the projected side that take turns, r at a time.

  With the layers of a stack as that side, a block of layers trains at a time.
  The turn follows from the number of refreshes: a resumed run goes on.

  Example:
    >>> [Turns('descending').at(t, 2, 6).tolist() for t in range(3)]
    [[4, 5], [2, 3], [0, 1]]

  References:
    Luo et al., `BAdam <https://arxiv.org/abs/2404.02827>`_, 2024.
  """

  order: str = 'random'
  """'random' is a new permutation in each cycle; 'ascending', 'descending';
  'fixed' is the first turn for ever."""
  seed: int = 0
  """Another seed, other permutations."""
  start: int | None = None
  """The first coordinate; default the last if descending, else 0."""

  stored: ClassVar[bool] = False

  def __post_init__(self) -> None:
    """Raises ValueError for an unknown order."""
    orders = ('random', 'ascending', 'descending', 'fixed')
    if self.order not in orders:
      raise ValueError(
        f'order must be one of {", ".join(orders)}, got {self.order!r}'
      )
    if self.order == 'random' and self.start is not None:
      raise ValueError(f"order 'random' has no start, got {self.start}")

  def __call__(
    self, g_mn: jax.Array, basis_r: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns the coordinates of the first turn; `at` knows all."""
    del key
    return self.at(0, basis_r.shape[0], g_mn.shape[0])

  def at(self, turn: jax.Array | int, r: int, m: int) -> jax.Array:
    """Returns the coordinates [r] of a turn, ascending.

    Where r does not divide m, the last turn of a cycle goes back to full r.
    """
    cycle, place = divmod(jnp.asarray(turn), -(-m // r))
    first = jnp.minimum(place * r, m - r)
    if self.order == 'random':
      key = jax.random.fold_in(jax.random.key(self.seed), cycle)
      order_m = jax.random.permutation(key, m)
    else:
      order_m = self._in_order(m)
    if self.order == 'fixed':
      first = 0
    chosen_r = jax.lax.dynamic_slice_in_dim(order_m, first, r)
    return jnp.sort(chosen_r).astype(jnp.int32)

  def _in_order(self, m: int) -> jax.Array:
    """Returns all coordinates [m] as they come."""
    down = self.order == 'descending'
    start = self.start
    if start is None:
      start = m - 1 if down else 0
    if not 0 <= start < m:
      raise ValueError(f'start must be in 0..{m - 1}, got {start}')
    return (start + (-1 if down else 1) * jnp.arange(m)) % m
