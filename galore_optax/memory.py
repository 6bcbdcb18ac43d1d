"""Optimizer-state memory of each parameter, known before any allocation.

`describe` computes the numbers from shapes (`jax.eval_shape`). They are exact,
and nothing is allocated.
"""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import containers, paths
from galore_optax.projection import Projection, Whole, recording_plans

LARGE_SHARE = 0.1
"""Share of the weights in attention and MLP. If more of them stay whole because
of their size, the table has a note."""


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
  reason: str = ''
  """Why the parameter is projected or stays whole. It is empty if no `galore`
  receives the parameter."""

  @property
  def bytes(self) -> int:
    """Bytes of state that belong to the parameter."""
    return self.basis_bytes + self.moment_bytes


class Table(tuple[Row, ...]):
  """A row for each parameter, in tree order; `print` aligns the columns."""

  multipliers: Mapping[str, tuple[Any, Any]] = {}
  """Multipliers of learning rate and weight decay, by path. Empty without
  `grouped`."""
  total: str = ''
  """A line with the bytes of all rows and those of AdamW."""
  notes: tuple[str, ...] = ()
  """Lines about weights that stay whole, or are split, against expectation."""

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
    line = '  '.join(f'{{:{side}{width}}}' for side, width in pairs) + '  {}'
    reasons = ['reason', *(row.reason or '-' for row in self)]
    lines = [
      line.format(*row, reason)
      for row, reason in zip(rows, reasons, strict=True)
    ]
    return '\n'.join([*lines, *filter(None, [self.total]), *self.notes])


def describe(tx: optax.GradientTransformation, params: optax.Params) -> Table:
  """Returns projected shape and state bytes of each parameter.

  Nothing is allocated. The printed table compares the bytes with those of
  `optax.adamw`, whose moments have the dtype of the parameters. With bfloat16
  parameters the moments of `galore` are float32, or have 8 bits, because a
  second moment in bfloat16 would not decay. Counters are not included.

  Args:
    tx: any transformation. A `galore` is found inside any other transformation.
    params: parameters, or `jax.ShapeDtypeStruct`s of them, in any containers.

  Returns:
    A row for each parameter: path, shape, projected shape, bytes of state, and
    the reason why it is projected or not. The printed table also has the
    multipliers of groups (`grouped`), a line with the total, and a note if more
    than a tenth of the weights in attention and MLP stay whole because of their
    size.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax.galore import galore
    >>> tx = galore(optax.adam(0.1), rank=2)
    >>> params = {'b': jnp.zeros(6), 'w': jnp.zeros((4, 6))}
    >>> print(describe(tx, params))
    path  shape   projected  bytes  reason
    b     (6,)    -             48  vector
    w     (4, 6)  (2, 6)       128  matrix
    total: 176 bytes of state; optax.adamw: 240
  """
  params = containers.arrays(params)
  with recording_plans() as recorded:
    # The lambda is new at each call. JAX would not run a function again that it
    # has traced before, and the plans would not be recorded.
    state = jax.eval_shape(lambda params: tx.init(params), params)
  state, plain = containers.unboxed(state), containers.unboxed(params)
  leaves = [
    (path, x)
    for path, x in jax.tree_util.tree_leaves_with_path(plain)
    if hasattr(x, 'dtype')
  ]
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
  rows = []
  for i, (path, leaf) in enumerate(leaves):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    plan = recorded.plans.get(name)
    low = plan.low_shape if isinstance(plan, Projection) else None
    reason = plan.reason if plan else ''
    if recorded.plans and not containers.is_trained(leaf):
      reason = 'not floating' if leaf.size else 'empty'
    shape = tuple(leaf.shape)
    rows.append(Row(name, shape, low, sizes[i, True], sizes[i, False], reason))
  table = Table(rows)
  table.multipliers = recorded.multipliers
  arrays = [leaf for _, leaf in leaves]
  is_projected = any(row.projected_shape for row in rows)
  table.total = _total(rows, arrays, is_projected=is_projected)
  table.notes = _notes(list(recorded.plans.values()))
  return table


def _total(
  rows: Sequence[Row], leaves: Sequence[Any], *, is_projected: bool
) -> str:
  """Returns the line with the bytes of all rows and those of AdamW."""
  floating = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
  of_adamw = sum(2 * x.size * x.dtype.itemsize for x in floating)
  ours = sum(row.bytes for row in rows)
  line = f'total: {ours:,} bytes of state; optax.adamw: {of_adamw:,}'
  narrow = sorted({str(x.dtype) for x in floating if x.dtype.itemsize < 4})
  if not (narrow and is_projected):
    return line
  kinds = ' and '.join(narrow)
  return f'{line}, with moments in {kinds} (here float32, or 8 bits)'


def _notes(plans: Sequence[Projection | Whole]) -> tuple[str, ...]:
  """Returns a note if many weights stay whole because of their size."""
  projected, too_small = 0, 0
  for plan in plans:
    size = math.prod(plan.shape)
    if isinstance(plan, Projection):
      projected += size
    elif plan.too_small:
      too_small += size
  share = too_small / max(1, projected + too_small)
  if share <= LARGE_SHARE:
    return ()
  return (
    f'{share:.0%} of the weights in attention and MLP stay whole: lower the'
    ' rank, or name the input and output axes of kernels by axes=',
  )
