"""Reports a run as one HTML page: `python -m train.report RUN`.

The page contains its pictures, so it needs no other file.
"""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import argparse
import base64
import html
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console

from train.config import Config
from train.engine import metrics
from train.engine.command import user_errors
from train.engine.config_json import flatten
from train.engine.memory_table import memory_of
from train.engine.run import Run
from train.engine.task import task_of
from train.optimizers import subspace_metrics

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

_MOST_LABELS = 14
"""Largest number of lines of a picture that has a legend. A longer legend would
leave no room for the picture. A model whose layers are not stacked has a line
for each weight, which the table below the picture names."""

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
    'Samples': samples(run),
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


def samples(run: Run) -> str:
  """Returns the texts or images that pre-training wrote, if any."""
  found = []
  if run.samples_path.is_file():
    found += [
      f'<pre style="white-space: pre-wrap"><b>{html.escape(prompt)}</b>'
      f'{html.escape(said)}</pre>'
      for prompt, said in json.loads(run.samples_path.read_text())
    ]
  if run.images_path.is_file():
    code = base64.b64encode(run.images_path.read_bytes()).decode()
    found.append(f'<img alt="samples" src="data:image/png;base64,{code}">')
  if not found:
    return '<p>None. Pre-training writes them at its end.</p>'
  return '\n'.join(found)


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
  if 1 < len(axes.lines) <= _MOST_LABELS:
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


if __name__ == '__main__':
  main()
