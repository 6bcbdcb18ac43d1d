"""Reports a run as one HTML page: `python -m train.report RUN`.

The page contains its pictures, so it needs no other file. This module collects
its contents, and `report.html.jinja` is its form.
"""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import base64
import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, TypeAlias

import jinja2
import numpy as np
import tyro
from rich.console import Console

from train.config import Config
from train.engine import metrics
from train.engine.command import parse_options, user_errors
from train.engine.config_json import flatten
from train.engine.memory_table import memory_of
from train.engine.run import Run
from train.engine.task import task_of
from train.optimizers import subspace_metrics

Lines: TypeAlias = Sequence[Mapping[str, Any]]
Row: TypeAlias = tuple[Any, ...]
"""The cells of a table's row; the first one is the name of the row."""

TEMPLATE = pathlib.Path(__file__).with_name('report.html.jinja')
"""The page without its contents."""

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


class Picture(NamedTuple):
  """A picture that the page contains."""

  title: str
  """Text for readers who do not see the picture."""
  source: str
  """The file as a data URI."""


class Subspaces(NamedTuple):
  """The energy and overlap of subspaces."""

  pictures: list[Picture]
  """Means over layers by step, a picture for each metric."""
  head: list[str]
  """Titles of the table's columns."""
  rows: list[Row]
  """The newest values of each weight."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Writes an HTML page about a run, finished or not."""

  program: ClassVar[str] = 'train.report'
  run: Annotated[
    pathlib.Path, tyro.conf.Positional, tyro.conf.arg(metavar='RUN')
  ]
  """Directory of the run."""
  output: pathlib.Path | None = None
  """File to write; None is RUN/report.html."""


def main(argv: Sequence[str] | None = None) -> None:
  """Writes an HTML page about a run, finished or not."""
  with user_errors():
    args = parse_options(Options, sys.argv[1:] if argv is None else argv)
    run = Run(args.run)
    where = args.output or run.report_path
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
  environment = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  template = environment.from_string(TEMPLATE.read_text(encoding='utf-8'))
  return template.render(
    title=run.directory,
    summary=summary(config, lines),
    curves=curves(lines),
    subspaces=subspaces(lines),
    times=times(lines),
    skipped=skipped(lines),
    memory=memory_text(config),
    texts=sampled_texts(run),
    samples=sampled_images(run),
    configuration=flatten(config),
  )


def summary(config: Config, lines: Lines) -> dict[str, str]:
  """Returns the progress by title: steps, last metrics and median speed."""
  rows = {
    'steps': f'{lines[-1]["step"]:,} of {config.steps:,}',
    'optimizer': type(config.optimizer).__name__,
  }
  for title, name, form in (
    ('last loss', 'loss', '{:.4f}'),
    *((name.replace('_', ' '), name, '{:,.0f}') for name in rates(lines)),
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
  return rows


def rates(lines: Lines) -> list[str]:
  """Returns the names of speeds in the log, except flops.

  >>> rates([{'step': 1}, {'images_per_second': 9.0, 'flops_per_second': 1e9}])
  ['images_per_second']
  """
  names = {name for line in lines for name in line}
  speeds = {name for name in names if name.endswith('_per_second')}
  return sorted(speeds - {'flops_per_second'})


def is_validation(line: Mapping[str, Any]) -> bool:
  """Whether a line of the log belongs to a validation."""
  return any(name.startswith('validation_') for name in line)


def curves(lines: Lines) -> list[Picture]:
  """Returns pictures of loss, learning rate, gradient norms and speed."""
  names = {
    'loss': {'loss': 'training', 'validation_loss': 'held out'},
    'learning rate': {'learning_rate': ''},
    'norm of the gradient': {'grad_norm': ''},
    'norm of the projected gradient': {'projected_grad_norm': ''},
    **{name.replace('_', ' '): {name: ''} for name in rates(lines)},
  }
  return drawn((picture(title, lines, found) for title, found in names.items()))


def subspaces(lines: Lines) -> Subspaces | None:
  """Returns the energy and overlap of subspaces; None if none was found."""
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
    return None
  rows = []
  for path in newest[subspace_metrics.NUMBERS[0]]:
    layers = [found[path] for found in newest.values()]
    numbers = [pick(x) for x in layers for pick in (np.min, np.mean)]
    rows.append((path, *(f'{number:.3f}' for number in numbers)))
  head = ['weight']
  for name in newest:
    head += [f'{name.replace("_", " ")}, lowest', 'mean']
  return Subspaces(drawn(shown), head, rows)


def times(lines: Lines) -> list[Row]:
  """Returns the seconds that each kind of work took, and their shares."""
  seconds = {title: sum(values(lines, name)) for name, title in _PARTS.items()}
  total = sum(seconds.values()) or 1.0
  return [
    (title, f'{spent:,.1f}', f'{spent / total:.1%}')
    for title, spent in seconds.items()
  ]


def skipped(lines: Lines) -> list[Row]:
  """Returns the number and the places of steps skipped, whole or in part."""
  rows = []
  for name in ('skipped_steps', 'partial_steps'):
    where = [line['step'] for line in lines if line.get(name)]
    if where:
      steps = ', '.join(f'{step:,}' for step in where)
      rows.append((name.replace('_', ' '), f'{len(where):,}', steps))
  return rows


def sampled_texts(run: Run) -> list[tuple[str, str]]:
  """Returns the prompts and texts that pre-training wrote, if any."""
  if not run.samples_path.is_file():
    return []
  return json.loads(run.samples_path.read_text())


def sampled_images(run: Run) -> list[Picture]:
  """Returns the grid of images that pre-training wrote, if any."""
  if not run.images_path.is_file():
    return []
  return [Picture('samples', data_uri(run.images_path.read_bytes(), 'png'))]


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


def drawn(pictures: Iterable[Picture | None]) -> list[Picture]:
  """Leaves out the pictures that show nothing."""
  return [picture for picture in pictures if picture is not None]


def picture(
  title: str, lines: Lines, names: Mapping[str, str]
) -> Picture | None:
  """Draws metrics by step; returns None if no line has any of them.

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
    return None
  axes.set(xlabel='step', ylabel=title)
  axes.grid(alpha=0.3)
  if 1 < len(axes.lines) <= _MOST_LABELS:
    axes.legend(fontsize='x-small', loc='center left', bbox_to_anchor=(1, 0.5))
  file = io.BytesIO()
  figure.savefig(file, format='svg', metadata={'Date': None})
  return Picture(f'{title} by step', data_uri(file.getvalue(), 'svg+xml'))


def data_uri(image: bytes, kind: str) -> str:
  """Returns an image file as a data URI.

  >>> data_uri(b'abc', 'png')
  'data:image/png;base64,YWJj'
  """
  return f'data:image/{kind};base64,{base64.b64encode(image).decode()}'


if __name__ == '__main__':
  main()
