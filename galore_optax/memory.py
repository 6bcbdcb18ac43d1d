"""Optimizer-state memory of each parameter, known before any allocation.

`describe` computes the numbers from shapes (`jax.eval_shape`). They are exact,
and nothing is allocated.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax

from galore_optax import paths
from galore_optax.projection import recording_plans


class Row(NamedTuple):
  """The optimizer state of one parameter."""

  path: str
  """Path of the parameter, keys joined by '/'."""
  shape: tuple[int, ...]
  """Shape of the parameter."""
  projected_shape: tuple[int, ...] | None
  """Shape of the projected gradient; None if the parameter is not projected."""
  basis_bytes: int
  """Bytes of the stored basis."""
  moment_bytes: int
  """Bytes of all other state arrays of the parameter, such as its moments."""

  @property
  def bytes(self) -> int:
    """Bytes of state that belong to the parameter."""
    return self.basis_bytes + self.moment_bytes


class Table(tuple[Row, ...]):
  """A row for each parameter, in tree order; `print` aligns the columns."""

  multipliers: Mapping[str, tuple[Any, Any]] = {}
  """Multipliers of learning rate and weight decay, by path. Empty without
  `grouped`."""

  def __str__(self) -> str:
    """Returns the rows as text, with the multipliers if there are groups."""
    rows = [('path', 'shape', 'projected', 'bytes')]
    for row in self:
      low = str(row.projected_shape or '-')
      rows.append((row.path, str(row.shape), low, f'{row.bytes:,}'))
    if self.multipliers:
      # Leaves outside the `grouped` transformation have no multipliers.
      none = ('-', '-')
      factors = [self.multipliers.get(row.path, none) for row in self]
      columns = [('rate', 'decay'), *((str(a), str(b)) for a, b in factors)]
      rows = [(*row, *more) for row, more in zip(rows, columns, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = zip('<<<>>>', widths, strict=False)
    line = '  '.join(f'{{:{side}{width}}}' for side, width in pairs)
    return '\n'.join(line.format(*row) for row in rows)


def describe(tx: optax.GradientTransformation, params: optax.Params) -> Table:
  """Returns projected shape and state bytes of each parameter.

  Nothing is allocated.

  Args:
    tx: any transformation. A `galore` is found inside any other transformation.
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
  with recording_plans() as recorded:
    # The lambda is new at each call. JAX would not run a function again that it
    # has traced before, and the plans would not be recorded.
    state = jax.eval_shape(lambda params: tx.init(params), params)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  owners = [path for path, _ in leaves]
  # By index of the parameter and whether the bytes are those of a basis.
  sizes: collections.Counter[tuple[int, bool]] = collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    owner = paths.owner(path, owners)
    end = () if owner is None else owners[owner][-1:]
    # Most scalars are step counters. A scalar belongs to the parameter only if
    # the last keys agree, as those of a norm for each parameter do.
    if owner is not None and (leaf.ndim or path[-1:] == end != ()):
      sizes[owner, paths.BASIS in path] += leaf.size * leaf.dtype.itemsize
  names = paths.paths(params)
  shapes = [tuple(leaf.shape) for _, leaf in leaves]
  low = [
    recorded.plans[name].low_shape if name in recorded.plans else None
    for name in names
  ]
  indices = range(len(leaves))
  basis_bytes = [sizes[i, True] for i in indices]
  moment_bytes = [sizes[i, False] for i in indices]
  table = Table(map(Row, names, shapes, low, basis_bytes, moment_bytes))
  table.multipliers = recorded.multipliers
  return table
