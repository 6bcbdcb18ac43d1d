"""Bytes before anything exists: `describe` by weight, `account` in all.

Everything is read off shapes (`jax.eval_shape`), so that it is exact and
allocates nothing.
"""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.galore import GaloreState
from galore_optax.projection import watched


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
    rows = [('path', 'shape', 'projected', 'bytes')]
    for row in self:
      low = str(row.projected_shape or '-')
      rows.append((row.path, str(row.shape), low, f'{row.bytes:,}'))
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    return '\n'.join(
      f'{path:<{a}}  {shape:<{b}}  {low:<{c}}  {size:>{d}}'
      for path, shape, low, size in rows
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
  leaves = jax.tree_util.tree_leaves_with_path(params)
  owners = [path for path, _ in leaves]
  sizes = collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    owner = paths.owner(path, owners)
    end = () if owner is None else owners[owner][-1:]
    # A scalar is a counter, unless it stands where a parameter would.
    if owner is not None and (leaf.ndim or path[-1:] == end != ()):
      sizes[owner, paths.BASIS in path] += leaf.size * leaf.dtype.itemsize
  names = paths.paths(params)
  shapes = [tuple(leaf.shape) for _, leaf in leaves]
  low = [seen[name].low_shape if name in seen else None for name in names]
  bases = [sizes[i, True] for i in range(len(leaves))]
  rest = [sizes[i, False] for i in range(len(leaves))]
  return Table(map(Row, names, shapes, low, bases, rest))


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


def account(params: Any, state: Any) -> Account:
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


def elements(params: Any, state: Any) -> Account:
  """Returns the same as `account` in elements, whatever their types.

  >>> import optax
  >>> params = {'w': jnp.zeros((3, 5), jnp.bfloat16)}
  >>> elements(params, jax.eval_shape(optax.adam(0.1).init, params)).moments
  30
  """
  return _account(params, state, lambda x: x.size)


def _account(params, state, size) -> Account:
  sums = collections.Counter()
  weights = jax.tree.leaves(params)
  for path, w in zip(paths.paths(params), weights, strict=True):
    kind = 'vocabulary' if paths.in_vocabulary(path) else 'parameters'
    sums[kind] += size(w)
  is_galore = lambda x: isinstance(x, GaloreState)
  for node in jax.tree.leaves(state, is_leaf=is_galore):
    if is_galore(node):
      sums['bases'] += sum(map(size, jax.tree.leaves(node.basis)))
      node = node._replace(basis=())
    for x in jax.tree.leaves(node):
      # Codes of quantized moments are integers too, but of 8 bits.
      is_integer = jnp.issubdtype(x.dtype, jnp.integer)
      is_counter = is_integer and x.dtype.itemsize > 1
      sums['counters' if is_counter else 'moments'] += size(x)
  return Account(**{field: sums[field] for field in Account._fields})
