"""Bytes before anything exists: `describe` by weight, `account` in all.

Everything is read off shapes (`jax.eval_shape`), so that it is exact and
allocates nothing.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.galore import GaloreState
from galore_optax.plan import watched

PyTree: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]

BASIS = jax.tree_util.GetAttrKey('basis')


class Row(NamedTuple):
  """What a transformation keeps for one parameter."""

  path: str  # path of the parameter, keys joined by '/'
  shape: tuple[int, ...]  # its shape
  # Shape of its projected gradient; None where it is not projected.
  projected_shape: tuple[int, ...] | None
  basis_bytes: int  # bytes of its basis
  moment_bytes: int  # bytes of all else of its shape in the state

  @property
  def bytes(self) -> int:
    """Bytes of state that belong to the parameter."""
    return self.basis_bytes + self.moment_bytes


class Table(tuple[Row, ...]):
  """Rows in the order of the parameters; `print` shows them aligned."""

  __slots__ = ()

  def __str__(self) -> str:
    """Returns the rows as text."""
    head = ('path', 'shape', 'projected', 'bytes')
    lines = [head] + [
      (
        row.path,
        str(row.shape),
        '-' if row.projected_shape is None else str(row.projected_shape),
        f'{row.bytes:,}',
      )
      for row in self
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
      f'{path:<{widths[0]}}  {shape:<{widths[1]}}  {low:<{widths[2]}}'
      f'  {size:>{widths[3]}}'
      for path, shape, low, size in lines
    )


def describe(tx: optax.GradientTransformation, params: optax.Params) -> Table:
  """Returns what `tx` projects and keeps, without allocating anything.

  Args:
    tx: any transformation; a `galore` in it is found behind any wrapper.
    params: parameters, or `jax.ShapeDtypeStruct`s of them.

  Returns:
    A row for each parameter: path, shape, projected shape, bytes of state.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax.galore import galore
    >>> tx = galore(optax.adam(0.1), rank=2)
    >>> params = {'b': jnp.zeros(6), 'w': jnp.zeros((4, 6))}
    >>> print(describe(tx, params))
    path  shape   projected  bytes
    b     (6,)    -             48
    w     (4, 6)  (2, 6)       128
  """
  with watched() as seen:
    # A new function: what was traced before would not be watched again.
    state = jax.eval_shape(lambda params: tx.init(params), params)
  low_shapes = {path: plan.low_shape for path, plan in seen.items()}
  leaves = jax.tree_util.tree_leaves_with_path(params)
  names = paths.paths(params)
  bases, rest = _bytes_by_owner(state, [path for path, _ in leaves])
  return Table(
    Row(name, tuple(leaf.shape), low_shapes.get(name), basis, other)
    for name, (_, leaf), basis, other in zip(
      names, leaves, bases, rest, strict=True
    )
  )


def _bytes_by_owner(state: Any, owners: list[Any]) -> tuple[list, list]:
  """Returns bytes of bases and of all else, by the parameter they belong to."""
  bases, rest = [0] * len(owners), [0] * len(owners)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    is_basis = BASIS in path
    owner = (_owner_of_basis if is_basis else _owner)(path, owners)
    # A scalar is a counter, unless it stands where a parameter would.
    if owner is not None and (
      leaf.ndim or path[-1:] == owners[owner][-1:] != ()
    ):
      into = bases if is_basis else rest
      into[owner] += leaf.size * leaf.dtype.itemsize
  return bases, rest


def _owner_of_basis(path: KeyPath, owners: list[KeyPath]) -> int | None:
  """Returns the parameter whose path follows the field of bases."""
  start = path.index(BASIS) + 1
  found = [
    i for i, owner in enumerate(owners) if path[start:][: len(owner)] == owner
  ]
  return max(found, key=lambda i: len(owners[i]), default=None)


def _owner(path: KeyPath, owners: list[KeyPath]) -> int | None:
  """Returns the parameter whose path comes last, before fields of a container.

  Of two that end together it is the longer; a chain's own indices, which a
  list of parameters shares, come first.
  """
  found = [
    (end, len(owner), i)
    for i, owner in enumerate(owners)
    for end in range(len(owner), len(path) + 1)
    if path[end - len(owner) : end] == owner
  ]
  return max(found)[-1] if found else None


class Account(NamedTuple):
  """Bytes, or elements, of parameters and optimizer state."""

  parameters: int  # weights that do not grow with the vocabulary
  vocabulary: int  # embeddings and head
  bases: int  # of the projections
  moments: int  # what the optimizer keeps of gradients, scales included
  counters: int  # integers: steps done

  @property
  def weights(self) -> int:
    """All weights."""
    return self.parameters + self.vocabulary

  @property
  def state(self) -> int:
    """All optimizer state."""
    return self.bases + self.moments + self.counters

  @property
  def total(self) -> int:
    """Weights and state."""
    return self.weights + self.state


def account(params: PyTree, state: PyTree) -> Account:
  """Returns the bytes of parameters and of a state for them.

  Args:
    params: arrays or their shapes.
    state: of any optimizer, layer-wise or not; `jax.eval_shape(tx.init,
      params)` makes one without allocating it.

  Example:
    >>> import optax
    >>> params = {'w': jnp.zeros((3, 5)), 'embed': jnp.zeros((7, 3))}
    >>> account(params, jax.eval_shape(optax.adam(0.1).init, params))
    Account(parameters=60, vocabulary=84, bases=0, moments=288, counters=4)
  """
  return _account(params, state, lambda x: x.size * x.dtype.itemsize)


def elements(params: PyTree, state: PyTree) -> Account:
  """Returns the same as `account` in elements, whatever their types.

  >>> import optax
  >>> params = {'w': jnp.zeros((3, 5), jnp.bfloat16)}
  >>> elements(params, jax.eval_shape(optax.adam(0.1).init, params)).moments
  30
  """
  return _account(params, state, lambda x: x.size)


def _account(params, state, size) -> Account:
  total = lambda leaves: sum(size(x) for x in leaves)
  weights = dict(zip(paths.paths(params), jax.tree.leaves(params), strict=True))
  vocabulary = [w for path, w in weights.items() if paths.in_vocabulary(path)]
  is_galore = lambda x: isinstance(x, GaloreState)
  nodes = jax.tree.leaves(state, is_leaf=is_galore)
  bases = jax.tree.leaves([n.basis for n in nodes if is_galore(n)])
  rest = jax.tree.leaves(
    [n._replace(basis=()) if is_galore(n) else n for n in nodes]
  )
  counters = [x for x in rest if _is_counter(x)]
  moments = [x for x in rest if not _is_counter(x)]
  return Account(
    parameters=total(weights.values()) - total(vocabulary),
    vocabulary=total(vocabulary),
    bases=total(bases),
    moments=total(moments),
    counters=total(counters),
  )


def _is_counter(x: Any) -> bool:
  # Codes of quantized moments are integers too, but of 8 bits.
  return jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize > 1
