"""Reports a run as one HTML page: `python -m train.report RUN`.

The page contains its pictures, so it needs no other file. `memory_table` is
also printed before the first step of a training.
"""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import argparse
import base64
import html
import io
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import galore_optax
from galore_optax.memory import Row
from galore_optax.paths import paths
from train.config import Config, flatten
from train.engine import metrics
from train.engine.command import user_errors
from train.engine.run import Run
from train.engine.step import split_trained
from train.engine.task import (
  Mask,
  PyTree,
  Task,
  array_shapes,
  everything,
  task_of,
)
from train.optimizers import subspace_metrics
from train.optimizers.baselines import adamw

Lines: TypeAlias = Sequence[Mapping[str, Any]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: 0.5rem 0; }
th, td { padding: 0.1rem 0.8rem 0.1rem 0; text-align: left;
  border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; font-size: 12px; line-height: 1.35; }
img { max-width: 100%; } .note { color: #555; }
"""

_PARTS = {
  'step_seconds': 'steps',
  'data_seconds': 'waiting for data',
  'evaluation_seconds': 'validation',
  'save_seconds': 'saving',
}
"""Kinds of work that take a run's time, by their names in the log."""


def main(argv: Sequence[str] | None = None) -> None:
  """Writes an HTML page about a run, finished or not."""
  parser = argparse.ArgumentParser(
    'python -m train.report', description=main.__doc__
  )
  parser.add_argument('run', type=pathlib.Path, help='directory of the run')
  parser.add_argument(
    '--output',
    type=pathlib.Path,
    help='file to write (default: RUN/report.html)',
  )
  args = parser.parse_args(argv)
  run = Run(args.run)
  where = args.output or run.report_path
  with user_errors():
    where.write_text(page(run), encoding='utf-8')
  print(f'written: {where}')


def page(run: Run) -> str:
  """Returns the HTML page of a run.

  Raises:
    FileNotFoundError: the run does not exist, or has no metrics yet.
  """
  config = run.config()
  lines = metrics.read(run.metrics_path)
  if not lines:
    raise FileNotFoundError(
      f'no metrics in {run.metrics_path} yet: wait for the first steps'
    )
  sections = {
    'Summary': summary(config, lines),
    'Curves': curves(lines),
    'Subspaces': subspaces(lines),
    'Time': times(lines),
    'Skipped steps': skipped(lines),
    'Memory': f'<pre>{html.escape(memory_text(config))}</pre>',
    'Samples': samples(run.samples_path),
    'Configuration': table(flatten(config)),
  }
  body = '\n'.join(
    f'<section id="{title.split()[0].lower()}"><h2>{title}</h2>\n{inside}\n'
    '</section>'
    for title, inside in sections.items()
  )
  title = html.escape(str(run.directory))
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
    f'<title>{title}</title>\n<style>{_STYLE}</style></head>\n'
    f'<body><h1>{title}</h1>\n{body}\n</body>\n</html>\n'
  )


def summary(config: Config, lines: Lines) -> str:
  """Returns a table of progress: steps, last metrics and median speed."""
  rows: dict[str, Any] = {
    'steps': f'{lines[-1]["step"]:,} of {config.steps:,}',
    'optimizer': type(config.optimizer).__name__,
  }
  for title, name, form in (
    ('last loss', 'loss', '{:.4f}'),
    ('examples per second', 'examples_per_second', '{:,.0f}'),
    ('tokens per second', 'tokens_per_second', '{:,.0f}'),
    ('model flops per second', 'flops_per_second', '{:.3g}'),
    ("share of the card's peak", 'share_of_peak', '{:.1%}'),
    ('most bytes on a device', 'peak_bytes', '{:,.0f}'),
  ):
    found = values(lines, name)
    if found:
      # Take the median speed: one step can be slow for many reasons.
      is_speed = name.endswith('_per_second') or name.startswith('share')
      rows[title] = form.format(np.median(found) if is_speed else found[-1])
  last = next((x for x in reversed(lines) if is_validation(x)), {})
  for name, value in last.items():
    if name.startswith('validation_'):
      rows[name.replace('_', ' ')] = f'{value:.4f}'
  return table(rows)


def is_validation(line: Mapping[str, Any]) -> bool:
  """Whether a line of the log belongs to a validation."""
  return any(name.startswith('validation_') for name in line)


def curves(lines: Lines) -> str:
  """Returns pictures of loss, learning rate, gradient norm and speed."""
  speeds = {x for line in lines for x in line if x.endswith('s_per_second')}
  (unit, *_) = sorted(speeds - {'flops_per_second'}) or ['tokens_per_second']
  shown = [
    picture('loss', lines, {'loss': 'training', 'validation_loss': 'held out'}),
    picture('learning rate', lines, {'learning_rate': ''}),
    picture('norm of the gradient', lines, {'grad_norm': ''}),
    picture(
      'norm of the projected gradient', lines, {'projected_grad_norm': ''}
    ),
    picture(unit.replace('_', ' '), lines, {unit: ''}),
  ]
  return '\n'.join(filter(None, shown))


def subspaces(lines: Lines) -> str:
  """Returns the energy and overlap of subspaces: pictures and a table."""
  flat = [{'step': x['step'], **metrics.scalars(x)} for x in lines]
  shown = []
  newest = {}
  for name in subspace_metrics.NUMBERS:
    here = [line[name] for line in lines if name in line]
    if here:
      labels = {f'{name}/{path}': path for path in here[-1]}
      shown.append(picture(name.replace('_', ' '), flat, labels))
      newest[name] = here[-1]
  if not newest:
    return '<p>No subspace was found from gradients.</p>'
  rows = {
    path: [
      f'{pick(found[path]):.3f}'
      for found in newest.values()
      for pick in (np.min, np.mean)
    ]
    for path in newest[subspace_metrics.NUMBERS[0]]
  }
  head = ['weight']
  for name in newest:
    head += [f'{name.replace("_", " ")}, lowest', 'mean']
  note = (
    '<p class="note">Captured energy is the share of the gradient in a '
    'subspace when the subspace was found. If it is low, a higher rank would '
    'learn more. Overlap is the share of a subspace in the subspace before, 1 '
    'if they are equal. If it is near 1, a longer gap would suffice. If it is '
    'low, the old subspace was out of date. Lines are means over layers.</p>'
  )
  return '\n'.join([note, *shown, table(rows, head)])


def times(lines: Lines) -> str:
  """Returns a table of the seconds that each kind of work took."""
  seconds = {title: sum(values(lines, name)) for name, title in _PARTS.items()}
  total = sum(seconds.values()) or 1.0
  rows = {
    title: [f'{spent:,.1f}', f'{spent / total:.1%}']
    for title, spent in seconds.items()
  }
  note = (
    '<p class="note">Compilation is not included: the first step after a '
    'start is not timed.</p>'
  )
  return note + table(rows, ['', 'seconds', 'share'])


def skipped(lines: Lines) -> str:
  """Returns a table of skipped steps, whole or in part."""
  rows = {}
  for name in ('skipped_steps', 'partial_steps'):
    where = [line['step'] for line in lines if line.get(name)]
    if where:
      steps = ', '.join(f'{step:,}' for step in where)
      rows[name.replace('_', ' ')] = [f'{len(where):,}', steps]
  if not rows:
    return '<p>None.</p>'
  return table(rows, ['', 'number', 'at step'])


def samples(path: pathlib.Path) -> str:
  """Returns the prompts and continuations that pre-training wrote, if any."""
  if not path.is_file():
    return '<p>None. Pre-training writes them at its end.</p>'
  pairs = json.loads(path.read_text())
  return '\n'.join(
    f'<pre style="white-space: pre-wrap"><b>{html.escape(prompt)}</b>'
    f'{html.escape(said)}</pre>'
    for prompt, said in pairs
  )


def memory_text(config: Config) -> str:
  """Returns the memory table of a config as text."""
  text = io.StringIO()
  Console(file=text, width=100).print(memory_of(config, task_of(config)))
  return text.getvalue()


def values(lines: Lines, name: str) -> list[float]:
  """Returns the values of a metric from all lines that have it.

  >>> values([{'loss': 2.0}, {'step': 1}], 'loss')
  [2.0]
  """
  return [line[name] for line in lines if name in line]


def picture(title: str, lines: Lines, names: Mapping[str, str]) -> str:
  """Returns an HTML image of metrics by step, '' if no line has any of them.

  Args:
    title: title of the vertical axis.
    lines: lines of the log.
    names: names of the metrics, and their labels.
  """
  # Import matplotlib only here: it takes a third of a second.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 3), layout='constrained')
  axes = figure.subplots()
  for name, label in names.items():
    points = [(x['step'], x[name]) for x in lines if name in x]
    if points:
      few = len(points) < 50
      style = {'marker': 'o', 'markersize': 3} if few else {}
      axes.plot(*zip(*points, strict=True), linewidth=0.9, label=label, **style)
  if not axes.lines:
    return ''
  axes.set(xlabel='step', ylabel=title)
  axes.grid(alpha=0.3)
  if len(axes.lines) > 1:
    axes.legend(fontsize='x-small', loc='center left', bbox_to_anchor=(1, 0.5))
  file = io.BytesIO()
  figure.savefig(file, format='svg', metadata={'Date': None})
  code = base64.b64encode(file.getvalue()).decode()
  alt = html.escape(title)
  return f'<img alt="{alt} by step" src="data:image/svg+xml;base64,{code}">'


def table(rows: Mapping[str, Any], head: Sequence[str] = ()) -> str:
  """Formats rows as an HTML table; the key of a row is its first cell.

  A row's value is the text of its second cell, or a list of numbers.

  >>> table({'a<b': 1})
  '<table><tr><td>a&lt;b</td><td>1</td></tr></table>'
  """
  titles = ''.join(f'<th>{html.escape(title)}</th>' for title in head)
  found = [f'<tr>{titles}</tr>'] if head else []
  for name, cells in rows.items():
    kind = ' class="number"' if isinstance(cells, list) else ''
    cells = cells if isinstance(cells, list) else [cells]
    texts = [f'<td{kind}>{html.escape(str(cell))}</td>' for cell in cells]
    found.append(f'<tr><td>{html.escape(name)}</td>{"".join(texts)}</tr>')
  return f'<table>{"".join(found)}</table>'


def memory_of(config: Config, task: Task) -> Table:
  """Returns the memory table of a config."""
  return memory_table(
    array_shapes(config, task),
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


if __name__ == '__main__':
  main()
