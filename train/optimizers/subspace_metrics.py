"""Statistics of a basis that help to choose rank and gap.

`watched` makes a `galore` record two numbers whenever it finds a basis. This
costs two matrix products for each refresh and nothing in other steps,
whole-tree and layer-wise. `health` reads the numbers from an optimizer's state,
and `train.engine.step` adds them to the metrics.

* Captured energy, |P G|^2 / |G|^2: the share of the gradient G that the basis P
  captured when it was found. If it is low, a higher rank would learn more.
* Overlap, |P_new P_old^T|^2 / r: 1 for the same subspace, about r / m for
  random ones. If it is near 1, a longer gap would suffice. If it is low, the
  old basis was out of date.

Axes: m projected side, n other side, r rank, k matrices of a stack.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from galore_optax.galore import Galore
from galore_optax.subspace.store import StoredSeed

BASIS = jax.tree_util.GetAttrKey('basis')

NUMBERS = ('captured_energy', 'subspace_overlap')
"""Names of the two numbers in the log."""


@runtime_checkable
class Wrapper(Protocol):
  """A basis store that wraps another store, or a function that finds bases."""

  finder: Any
  """The wrapped object."""


class Noted(NamedTuple):
  """The state that `Noting` keeps for one matrix."""

  basis: Any
  """The stored value of the wrapped basis store."""
  noted: jax.Array
  """The two `NUMBERS`, -1 if not known yet, and the number of refreshes; [3],
  float32."""


@dataclasses.dataclass(frozen=True)
class Noting:
  """A basis store that records two statistics of each new basis."""

  finder: Any
  """The wrapped basis store."""

  def first(self, r: int, m: int, dtype: Any) -> Noted:
    """Returns the first state; its numbers are not known yet."""
    noted = jnp.array([-1, -1, 0], jnp.float32)
    return Noted(self.finder.first(r, m, dtype), noted)

  def find(self, g_mn: jax.Array, kept: Noted, key: Any, first: Any) -> Noted:
    """Finds a new basis, and computes its numbers."""
    new = self.finder.find(g_mn, kept.basis, key, first)
    m = g_mn.shape[0]
    r = jax.tree.leaves(new)[0].shape[0]
    new_rm = as_rows(self.finder.rows(new, r, m, g_mn.dtype), m)
    old_rm = as_rows(self.finder.rows(kept.basis, r, m, g_mn.dtype), m)
    overlap = jnp.where(first, -1, square_norm(new_rm @ old_rm.T) / r)
    noted = [captured(new_rm, g_mn), overlap, kept.noted[2] + 1]
    return Noted(new, jnp.stack(noted).astype(jnp.float32))

  def rows(self, kept: Noted, r: int, m: int, dtype: Any) -> jax.Array:
    """Returns the basis of the wrapped store as rows [r, m]."""
    return self.finder.rows(kept.basis, r, m, dtype)


def captured(rows_rm: jax.Array, g_mn: jax.Array) -> jax.Array:
  """Returns the share of a gradient in a subspace; 0 for a zero gradient.

  >>> f'{captured(jnp.eye(1, 2), jnp.array([[3.], [4.]])):.4f}'
  '0.3600'
  """
  total = square_norm(g_mn)
  share = square_norm(rows_rm @ g_mn) / jnp.where(total > 0, total, 1)
  return jnp.where(total > 0, share, 0)


def square_norm(x: jax.Array) -> jax.Array:
  """Returns the squared norm."""
  return jnp.sum(jnp.square(x))


def as_rows(basis: jax.Array, m: int) -> jax.Array:
  """Converts a basis, or indices of coordinates, to rows [r, m].

  The result is at least float32.

  >>> as_rows(jnp.array([1]), 3)
  Array([[0., 1., 0.]], dtype=float32)
  """
  if jnp.issubdtype(basis.dtype, jnp.integer):
    return jax.nn.one_hot(basis, m)
  return basis.astype(jnp.promote_types(basis.dtype, jnp.float32))


def watched(tx: Any) -> Any:
  """Makes a `galore` record the numbers; returns other objects unchanged."""
  return tx.with_keeper(noting) if isinstance(tx, Galore) else tx


def noting(store: Any) -> Any:
  """Wraps a basis store in `Noting`, which records statistics of new bases.

  Stores of random bases are returned unchanged.
  """
  inside = store
  while isinstance(inside, Wrapper) and not isinstance(inside, StoredSeed):
    inside = inside.finder
  return store if isinstance(inside, StoredSeed) else Noting(store)


def health(optimizer: Any) -> dict[str, jax.Array]:
  """Returns the recorded numbers [3, k] in an optimizer's state, by weight."""
  nodes = jax.tree_util.tree_leaves_with_path(
    optimizer, is_leaf=lambda node: isinstance(node, Noted)
  )
  found = {}
  for path, node in nodes:
    if isinstance(node, Noted):
      keys = path[path.index(BASIS) + 1 :]
      name = jax.tree_util.keystr(keys, simple=True, separator='/')
      found[name] = node.noted.reshape(-1, 3).T
  return found


def refreshes(found: dict[str, jax.Array]) -> jax.Array:
  """Returns the smallest number of refreshes that any matrix has had.

  Args:
    found: the result of `health`.
  """
  return jnp.min(jnp.stack([jnp.min(x[2]) for x in found.values()]))


def by_number(found: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
  """Arranges the result of `health` for the log: by number, by weight, [k].

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
