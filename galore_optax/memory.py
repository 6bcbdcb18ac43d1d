"""Bytes before anything exists: `describe` tells those of each weight.

Everything is read off shapes (`jax.eval_shape`), so that it is exact and
allocates nothing.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from galore_optax import paths
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

  multipliers: Mapping[str, tuple[Any, Any]] = {}
  """Multipliers of learning rate and weight decay by path, with `grouped`."""

  def __str__(self) -> str:
    """Returns the rows as text, with the multipliers if there are groups."""
    rows = [('path', 'shape', 'projected', 'bytes')]
    for row in self:
      low = str(row.projected_shape or '-')
      rows.append((row.path, str(row.shape), low, f'{row.bytes:,}'))
    if self.multipliers:
      # Another transformation may update the rest of the tree.
      none = ('-', '-')
      factors = [self.multipliers.get(row.path, none) for row in self]
      columns = [('rate', 'decay'), *((str(a), str(b)) for a, b in factors)]
      rows = [(*row, *more) for row, more in zip(rows, columns, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = zip('<<<>>>', widths, strict=False)
    line = '  '.join(f'{{:{side}{width}}}' for side, width in pairs)
    return '\n'.join(line.format(*row) for row in rows)


def describe(tx: optax.GradientTransformation, params: optax.Params) -> Table:
  """Returns what `tx` projects and keeps, without allocating anything.

  Args:
    tx: any transformation; a `galore` in it is found behind any wrapper.
    params: parameters, or `jax.ShapeDtypeStruct`s of them.

  Returns:
    A row for each parameter: path, shape, projected shape, bytes of state. The
    printed table also has the multipliers of groups (`grouped`).

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
  low = [
    seen.plans[name].low_shape if name in seen.plans else None for name in names
  ]
  num_bytes = lambda in_basis: [sizes[i, in_basis] for i in range(len(leaves))]
  columns = shapes, low, num_bytes(True), num_bytes(False)
  table = Table(map(Row, names, *columns))
  table.multipliers = seen.multipliers
  return table
