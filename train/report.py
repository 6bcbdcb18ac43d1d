"""The table before the first step: what takes how many bytes."""

import math
from collections.abc import Iterable

import jax
import numpy as np
import optax
from rich import box
from rich.table import Table

import galore_optax
from galore_optax.memory import Row
from galore_optax.paths import paths
from train.method import adamw
from train.step import split
from train.task import Mask, PyTree, everything


def memory_table(
  params: PyTree,
  stored: PyTree,
  tx: optax.GradientTransformation,
  name: str,
  trained: Mask = everything,
) -> Table:
  """Returns each parameter's bytes under `tx`, next to plain AdamW's on all.

  Args:
    params: parameters or their shapes; nothing is allocated.
    stored: the same as they are stored.
    tx: the optimizer.
    name: of the optimizer.
    trained: as in `Task`; of what is not, `tx` keeps nothing.
  """
  ours = with_still(
    galore_optax.describe(tx, split(params, trained)[0]), params
  )
  baseline = galore_optax.describe(adamw(0.0), params)
  sizes = [
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(node))
    for node in jax.tree.structure(params).flatten_up_to(stored)
  ]
  rows = [
    (row, np.array([size, row.basis_bytes, row.moment_bytes, plain.bytes]))
    for row, plain, size in zip(ours, baseline, sizes, strict=True)
  ]
  total = sum(numbers for _, numbers in rows)
  unit, size = ('GB', 1e9) if total[0] >= 1e10 else ('MB', 1e6)
  table = Table(
    title=f'Memory with {name}, in {unit}',
    title_justify='left',
    caption_justify='left',
    box=box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  table.add_column('parameter', overflow='fold')
  for head in ('shape', 'projected', 'weight', 'basis', 'moments', 'AdamW'):
    table.add_column(head, justify='right')
  for row, numbers in rows:
    low = by(row.projected_shape) if row.projected_shape else '-'
    table.add_row(row.path, by(row.shape), low, *decimals(numbers / size))
  table.add_section()
  table.add_row('all', '', '', *decimals(total / size), style='bold')
  count = sum(math.prod(row.shape) for row in ours)
  table.caption = f'{count:,} parameters, {total[0]:,} bytes\n' + compare(
    'optimizer state', total
  )
  projected = [numbers for row, numbers in rows if row.projected_shape]
  if projected:
    table.caption += '\n' + compare('of projected weights', sum(projected))
  return table


def with_still(rows: Iterable[Row], params: PyTree) -> list[Row]:
  """Returns a row for each parameter: of those without one, of no bytes."""
  known = {row.path: row for row in rows}
  return [
    known.get(path, Row(path, tuple(leaf.shape), None, 0, 0))
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True)
  ]


def compare(what: str, numbers: np.ndarray) -> str:
  """Returns the state's bytes in words."""
  _, basis, moments, plain = numbers.tolist()
  return (
    f'{what}: {basis + moments:,} bytes; AdamW: {plain:,} '
    f'({(basis + moments) / plain:.1%})'
  )


def decimals(numbers: np.ndarray) -> list[str]:
  """Returns numbers with two decimals.

  >>> decimals(np.array([1234.567, 0.0]))
  ['1,234.57', '0.00']
  """
  return [f'{number:,.2f}' for number in numbers.tolist()]


def by(shape: tuple[int, ...]) -> str:
  """Returns a shape as text.

  >>> by((8, 64, 256))
  '8x64x256'
  """
  return 'x'.join(map(str, shape))
