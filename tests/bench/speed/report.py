"""Writes speed.md and speed.png from speed.json."""

import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
COMMAND = '.venv-parity/bin/python -m tests.bench.speed'

BELOW = """## Why some updates reach less than 60% of their limit

The reasons are from profiles (`jax.profiler.trace` around one update, 25
November 2026):

- Adam. XLA's CPU backend makes one loop for each of mu, nu and the weight. The
  last loop computes mu and nu again from their old values, so XLA copies these
  before it overwrites them. The copies take 279 MB of scratch memory in
  `Galore()` and 465 MB in `optax.adamw`, which are freed and allocated again in
  each call. The flag
  `XLA_FLAGS=--xla_cpu_copy_insertion_use_region_analysis=true` halves them (148
  and 232 MB). It reduces `Galore()` from 0.147 to 0.115 s and `optax.adamw`
  from 0.113 to 0.056 s. The training program does not set this flag, because
  XLA turns it off by default.
- PyTorch's fused AdamW uses one loop for everything and takes 0.028 s.
- 8 bits. Quantizing and dequantizing 4.1 million elements take 1.8 and 1.2 ms
  of arithmetic on one core. A separate pass finds the largest entry of each
  block. It reads a copy in which NaN is replaced, because XLA's maximum can
  miss a NaN.
- Muon. The limit does not include 17 Gflop for five Newton-Schulz steps on
  matrices [128, n].
"""


def write(found: dict[str, Any], folder: pathlib.Path) -> None:
  """Writes both files from the results of the sections so far."""
  limit = limits(found)
  parts = [
    '# Speed compared with galore-torch, PyTorch and optax\n\nBy'
    f' `{COMMAND}` (`make parity` creates its environment). The model is the'
    ' 60M LLaMA in float32 with rank 128, and a batch has 4 x 256 tokens. Each'
    ' row runs in its own process, only one process works at a time, and the'
    ' rounds are interleaved. Times are medians, with quartiles in brackets. A'
    ' ratio is the median of the ratios of all rounds. `galore-torch` is the'
    ' unmodified reference; its whole step uses the LLaMA of transformers. The'
    ' limit is the time for the necessary flops or the necessary bytes,'
    ' whichever is longer, at the rates of this machine in the same run (a'
    ' product of 2048 x 2048 matrices, and x + 2 y in place).'
  ]
  drawn = 'steps' in found and 'updates' in found
  if drawn:
    parts.append('![Speed of steps and updates](speed.png)')
  for name, (title, heads, cells) in TABLES.items():
    if name in found:
      parts.append(table(title, found[name], heads, cells, limit))
  if 'updates' in found:
    parts.append(BELOW.strip())
  (folder / 'speed.md').write_text('\n\n'.join(parts) + '\n')
  if drawn:
    plot(found, folder / 'speed.png')


def limits(found: dict[str, Any]) -> Callable[[Row], float]:
  """Returns a function that computes the minimal seconds of a row's work."""
  rows = found.get('rates', {}).get('rows', [])
  rate = {row['name']: row['median'] for row in rows}

  def limit(row: Row) -> float:
    if not rate or 'flops' not in row:
      return float('nan')
    return max(row['flops'] / rate['flops'], row['bytes'] / rate['bytes'])

  return limit


def table(
  title: str,
  section: dict[str, Any],
  heads: Sequence[str],
  cells: Callable[[Row, Callable], Sequence[str]],
  limit: Callable[[Row], float],
) -> str:
  """Returns a section as Markdown."""
  lines = [
    f'## {title}\n\n{section["date"]}, {section["machine"]},'
    f' `--rounds {section["rounds"]}`, load average at the start'
    f' {section["load"]:.1f}.\n',
    '| ' + ' | '.join(heads) + ' |',
    '|' + ' --- |' * len(heads),
  ]
  for row in section['rows']:
    lines.append('| ' + ' | '.join(cells(row, limit)) + ' |')
  return '\n'.join(lines)


def seconds(row: Row) -> str:
  """Returns a median and its quartiles as text.

  >>> seconds({'median': 1.25, 'low': 1.0, 'high': 1.5})
  '1.250 (1.000-1.500)'
  """
  if 'low' not in row:
    return f'{row["median"]:.3f}'
  return f'{row["median"]:.3f} ({row["low"]:.3f}-{row["high"]:.3f})'


def update_cells(row: Row, limit: Callable[[Row], float]) -> Sequence[str]:
  """Returns the table cells of an update."""
  return (
    f'`{row["name"]}`',
    seconds(row),
    f'{row["ratio"]:.2f}',
    *share_cells(row, limit(row), '.3f'),
    f'{row["compile"]:.1f}' if 'compile' in row else '-',
    f'{row["peak_bytes"] / 1e9:.2f}',
  )


def step_cells(row: Row, limit: Callable[[Row], float]) -> Sequence[str]:
  """Returns the table cells of a whole step."""
  return (
    f'`{row["name"]}`',
    seconds(row),
    f'{row["tokens"] / row["median"]:.0f}',
    f'{1 / row["ratio"]:.2f}',
    *share_cells(row, limit(row), '.2f'),
    f'{row["peak_bytes"] / 1e9:.2f}',
  )


def share_cells(row: Row, least: float, digits: str) -> Sequence[str]:
  """Returns a limit and its share of the time, or dashes without a limit."""
  if math.isnan(least):
    return '-', '-'
  return f'{least:{digits}}', f'{least / row["median"]:.0%}'


STEP = (
  'row',
  'seconds',
  'tokens/s',
  'speed / galore-torch',
  'limit, s',
  'limit / time',
  'peak memory, GB',
)
TABLES: dict[str, tuple[str, Sequence[str], Callable]] = {
  'rates': (
    'Rates of the machine',
    ('rate', 'GFLOP/s or GB/s'),
    lambda row, _: (row['name'], f'{row["median"] / 1e9:.0f}'),
  ),
  'steps': ('Whole step', STEP, step_cells),
  '130m': ('Whole step of the 130M model', STEP, step_cells),
  'updates': (
    'Update between two refreshes, in place',
    (
      'row',
      'seconds',
      'time / galore-torch',
      'limit, s',
      'limit / time',
      'compilation, s',
      'peak memory, GB',
    ),
    update_cells,
  ),
  'refreshes': (
    'Warm refresh of all 56 matrices (an update with it minus one without)',
    ('finder', 'seconds', 'time / galore-torch'),
    lambda row, _: (
      f'`{row["name"]}`',
      f'{row["median"]:.3f}',
      f'{row["ratio"]:.2f}',
    ),
  ),
  'first': (
    'From the start of a process to the end of its first step (JAX: `power`)',
    ('process', 'seconds', 'seconds of the step (compile or load, and run)'),
    lambda row, _: (row['name'], seconds(row), f'{row["step"]:.2f}'),
  ),
  'program': (
    "From the start of the quickstart's training to its first metrics",
    ('start', 'seconds'),
    lambda row, _: (row['name'], seconds(row)),
  ),
  'staggered': (
    'Steps with refreshes spread over 28 steps, two matrices in each',
    ('row', 'median, s', 'slowest, s', 'ratio'),
    lambda row, _: (
      row['name'],
      f'{row["median"]:.3f}',
      f'{row["slowest"]:.3f}',
      f'{row["ratio"]:.2f}',
    ),
  ),
  'compilation': (
    'Compilation of an update (layers of seven matrices, or 32 matrices)',
    ('kind, finder, number of layers or shapes', 'seconds'),
    lambda row, _: (row['name'], seconds(row)),
  ),
}
"""Title, column heads and the function for the cells of a row, by section."""


def plot(found: dict[str, Any], path: pathlib.Path) -> None:
  """Draws bars of tokens per second and of update times."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import patches, pyplot

  figure, panels = pyplot.subplots(
    1, 2, figsize=(9.6, 5.6), layout='constrained'
  )
  drawn = {
    'steps': (
      'tokens per second of the whole step (higher is better)',
      lambda row: row['tokens'] / row['median'],
    ),
    'updates': (
      'milliseconds per update (lower is better)',
      lambda row: 1e3 * row['median'],
    ),
  }
  for axes, (name, (label, value)) in zip(panels, drawn.items(), strict=True):
    rows = found[name]['rows'][::-1]
    peer = ['torch' in row['name'] or 'ptax' in row['name'] for row in rows]
    colors = ['tab:gray' if yes else 'tab:blue' for yes in peer]
    axes.barh([x['name'] for x in rows], [*map(value, rows)], color=colors)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
  cores, platform, *_ = found['steps']['machine'].split(', ')
  figure.legend(
    handles=[
      patches.Patch(color='tab:blue', label='this library'),
      patches.Patch(color='tab:gray', label='PyTorch and optax'),
    ],
    title=f'60M LLaMA, rank 128, on {cores} ({platform})',
    title_fontsize=10,
    fontsize=9,
    loc='outside upper center',
    ncols=2,
    frameon=False,
  )
  figure.savefig(path, dpi=200)
