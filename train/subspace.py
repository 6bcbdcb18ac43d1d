"""Whether rank and gap fit: two numbers of each basis, noted when it is found.

`watched` has a `galore` note them beside its bases: that costs two products a
refresh and nothing between refreshes, whole-tree and layer-wise. `health` reads
them off an optimizer's state; `train.step` hands them to the log.

* Captured energy, |P G|^2 / |G|^2: the share of the gradient that a basis P
  held when it was found from it. Low: a higher rank would learn more.
* Overlap, |P_new P_old^T|^2 / r: 1 for the same subspace, r / m for random
  ones. Near 1: a longer gap would do; low: the old one had gone stale.

Axes: m projected side, n other side, r rank, k matrices of a stack.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax.galore import Galore
from galore_optax.subspace.kept import Seeds

BASIS = jax.tree_util.GetAttrKey('basis')

NUMBERS = ('captured_energy', 'subspace_overlap')
"""What the log calls the two."""


class Noted(NamedTuple):
  """What `Noting` keeps of one matrix."""

  basis: Any  # What the keeper inside keeps.
  # [3], float32: `NUMBERS`, -1 where there was none yet, and refreshes so far.
  noted: jax.Array


@dataclasses.dataclass(frozen=True)
class Noting:
  """A keeper that notes how good each new basis is."""

  finder: Any  # The keeper inside.

  def first(self, r, m, dtype):
    """Returns the first basis, of which nothing is known."""
    noted = jnp.array([-1, -1, 0], jnp.float32)
    return Noted(self.finder.first(r, m, dtype), noted)

  def find(self, g_mn, kept, key, first):
    """Returns a new basis and its numbers."""
    new = self.finder.find(g_mn, kept.basis, key, first)
    r, m = jax.tree.leaves(new)[0].shape[0], g_mn.shape[0]
    rows = lambda kept: self.finder.rows(kept, r, m, g_mn.dtype)
    new_rm, old_rm = (as_rows(rows(x), m) for x in (new, kept.basis))
    overlap = jnp.where(first, -1, square(new_rm @ old_rm.T) / r)
    noted = [captured(new_rm, g_mn), overlap, kept.noted[2] + 1]
    return Noted(new, jnp.stack(noted).astype(jnp.float32))

  def rows(self, kept, r, m, dtype):
    """Returns the rows of the basis inside."""
    return self.finder.rows(kept.basis, r, m, dtype)


def captured(rows_rm: jax.Array, g_mn: jax.Array) -> jax.Array:
  """Returns the share of a gradient in a subspace; 0 where there is none.

  >>> f'{captured(jnp.eye(1, 2), jnp.array([[3.], [4.]])):.4f}'
  '0.3600'
  """
  total = square(g_mn)
  share = square(rows_rm @ g_mn) / jnp.where(total > 0, total, 1)
  return jnp.where(total > 0, share, 0)


def square(x: jax.Array) -> jax.Array:
  """Returns the squared norm."""
  return jnp.sum(jnp.square(x))


def as_rows(basis: jax.Array, m: int) -> jax.Array:
  """Returns a basis as rows [r, m] in float32 at least, coordinates too.

  >>> as_rows(jnp.array([1]), 3)
  Array([[0., 1., 0.]], dtype=float32)
  """
  if jnp.issubdtype(basis.dtype, jnp.integer):
    return jax.nn.one_hot(basis, m)
  return basis.astype(jnp.promote_types(basis.dtype, jnp.float32))


def watched(tx: Any) -> Any:
  """Returns a `galore` that notes the numbers; anything else as it is."""
  return tx.with_keeper(noting) if isinstance(tx, Galore) else tx


def noting(keeper: Any) -> Any:
  """Returns a keeper that notes; as it is if no basis follows the gradient."""
  inside = keeper
  while not isinstance(inside, Seeds) and hasattr(inside, 'finder'):
    inside = inside.finder
  return keeper if isinstance(inside, Seeds) else Noting(keeper)


def health(optimizer: Any) -> dict[str, jax.Array]:
  """Returns what is noted in an optimizer's state, [3, k] by weight."""
  is_noted = lambda x: isinstance(x, Noted)
  nodes = jax.tree_util.tree_leaves_with_path(optimizer, is_leaf=is_noted)
  return {
    jax.tree_util.keystr(
      path[path.index(BASIS) + 1 :], simple=True, separator='/'
    ): node.noted.reshape(-1, 3).T
    for path, node in nodes
    if is_noted(node)
  }


def refreshes(found: dict[str, jax.Array]) -> jax.Array:
  """Returns how often all matrices had a new basis, of what `health` says."""
  return jnp.min(jnp.stack([jnp.min(x[2]) for x in found.values()]))


def by_number(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
  """Returns what the log says of a refresh: by number, by weight, [k].

  >>> by_number({'w': [[0.5], [-1], [1]]})
  {'captured_energy': {'w': [0.5]}}
  """
  logged = {}
  for i, name in enumerate(NUMBERS):
    rows = {
      path: [round(float(x), 6) for x in found[path][i]] for path in found
    }
    if all(min(row) >= 0 for row in rows.values()):
      logged[name] = rows
  return logged
