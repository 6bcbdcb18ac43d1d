"""The table of each parameter's bytes that programs print before training."""

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
from train.config import Config
from train.engine.step import split_trained
from train.engine.task import Mask, PyTree, Task, everything
from train.optimizers.baselines import adamw


def memory_of(config: Config, task: Task) -> Table:
  """Returns the memory table of a config."""
  return memory_table(
    task.shapes,
    jax.eval_shape(task.init, jax.random.key(0)),
    config.transformation(),
    type(config.optimizer).__name__,
    task.trained,
    has_groups=bool(config.groups),
  )


def memory_table(
  params: PyTree,
  stored: PyTree,
  tx: optax.GradientTransformation,
  name: str,
  trained: Mask = everything,
  *,
  has_groups: bool = False,
) -> Table:
  """Returns a table of each parameter's bytes, with AdamW's for comparison.

  Args:
    params: parameters or their shapes; nothing is allocated.
    stored: the same parameters as they are stored.
    tx: the optimizer.
    name: name of the optimizer.
    trained: as in `Task`; `tx` keeps no state for other parameters.
    has_groups: whether to show multipliers even if `tx` has none because all
      groups are frozen.
  """
  described = galore_optax.describe(tx, split_trained(params, trained)[0])
  ours = with_frozen(described, params)
  baseline = galore_optax.describe(adamw(0.0), params)
  sizes = [
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(node))
    for node in jax.tree.structure(params).flatten_up_to(stored)
  ]
  rows = [
    (row, np.array([size, row.basis_bytes, row.moment_bytes, plain.bytes]))
    for row, plain, size in zip(ours, baseline, sizes, strict=True)
  ]
  total = np.sum([numbers for _, numbers in rows], axis=0)
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
  factors = dict(described.multipliers)
  if has_groups and not factors:
    factors = dict.fromkeys([row.path for row in described], (1.0, 1.0))
  heads = ['shape', 'projected', 'weight', 'basis', 'moments', 'AdamW']
  if factors:
    heads += ['rate', 'decay']
  for head in heads:
    table.add_column(head, justify='right')
  for row, numbers in rows:
    low = by(row.projected_shape) if row.projected_shape else '-'
    # Parameters without a described state are frozen.
    own = [f'{x:g}' for x in factors.get(row.path, (0.0, 0.0))]
    cells = [row.path, by(row.shape), low, *decimals(numbers / size)]
    if factors:
      cells += own
    table.add_row(*cells)
  table.add_section()
  table.add_row('all', '', '', *decimals(total / size), style='bold')
  count = sum(math.prod(row.shape) for row in ours)
  table.caption = f'{count:,} parameters, {total[0]:,} bytes\n' + compare(
    'optimizer state', total
  )
  projected = [numbers for row, numbers in rows if row.projected_shape]
  if projected:
    part = np.sum(projected, axis=0)
    table.caption += '\n' + compare('of projected weights', part)
  table.caption = '\n'.join([table.caption, *described.notes])
  return table


def with_frozen(rows: Iterable[Row], params: PyTree) -> list[Row]:
  """Returns a row for each parameter; frozen ones have a state of 0 bytes."""
  known = {row.path: row for row in rows}
  return [
    known.get(path, Row(path, tuple(leaf.shape), None, 0, 0))
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True)
  ]


def compare(what: str, numbers: np.ndarray) -> str:
  """Compares the bytes of two optimizer states, as text."""
  _, basis, moments, plain = numbers.tolist()
  return (
    f'{what}: {basis + moments:,} bytes; AdamW: {plain:,} '
    f'({(basis + moments) / plain:.1%})'
  )


def decimals(numbers: np.ndarray) -> list[str]:
  """Formats numbers with two decimals.

  >>> decimals(np.array([1234.567, 0.0]))
  ['1,234.57', '0.00']
  """
  return [f'{number:,.2f}' for number in numbers.tolist()]


def by(shape: tuple[int, ...]) -> str:
  """Formats a shape.

  >>> by((8, 64, 256))
  '8x64x256'
  """
  return 'x'.join(map(str, shape))
