"""The tables and pictures of a study."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.studies.comparison import pictures
from configs.studies.comparison.intervals import less
from configs.studies.comparison.results import (
  best_at,
  finals,
  firsts,
  held,
  last_runs,
  machines,
  rows_of,
)
from configs.studies.comparison.study import Done, Metric, Study


def first_table(study: Study, done: Done) -> list[str]:
  """Returns the table of the first round: best first, incomplete ones last."""
  titles = ' | '.join(metric.title for metric in study.metrics)
  heads = (
    f'| method | rate of matrices | rate of the rest | {titles} |'
    ' state, kB | weights and state, kB | s / step | runs |'
  )
  lines, best = [], firsts(study, done)
  last = study.size.first[-1].steps
  empty = ' |' * len(study.metrics)
  for name in study.methods:
    runs = [r for j, r in done.items() if j.method == name and j.steps <= last]
    count = len(runs)
    if name in best:
      run = best[name]
      there = [r['seconds'] for r in runs if r['machine'] == run['machine']]
      values = ' | '.join(f'{run[x.key]:.3f}' for x in study.metrics)
      lines.append(
        (
          run[study.metric.key],
          f'| {name} | {run["matrix"]:g} | {run["rest"]:g} | '
          f'{values} | {run["state_bytes"] / 1e3:,.0f} | '
          f'{held(run) / 1e3:,.0f} | {min(there):.3f} | {count} |',
        )
      )
    elif count:
      lines.append(
        (np.inf, f'| {name} | | | {count} runs so far{empty} | | | |')
      )
  columns = 7 + len(study.metrics)
  return [heads, '| --- ' * columns + '|', *(line for _, line in sorted(lines))]


def final_rows(corpus: str, study: Study, done: Done) -> list[str]:
  """Returns the table rows of the finals on a corpus, the best first."""
  found, lines = finals(corpus, study, done), []
  rows = {name: rows_of(runs) for name, runs in found.items()}
  for name, runs in found.items():
    first = [x[study.metric.key] for x in runs]
    known = name != study.baseline and study.baseline in rows
    paired = less(rows[name], rows[study.baseline]) if known else '-'
    others = ''.join(
      f'{np.mean([x[metric.key] for x in runs]):.4f} | '
      for metric in study.metrics[1:]
    )
    lines.append(
      (
        np.mean(first),
        f'| {name} | {runs[0]["matrix"]:g} | {runs[0]["rest"]:g} | '
        f'{np.mean(first):.4f} | {min(first):.4f} - {max(first):.4f} | '
        f'{paired} | {others}{held(runs[0]) / 1e3:,.0f} |',
      )
    )
  return [line for _, line in sorted(lines)]


def final_section(corpus: str, study: Study, done: Done) -> list[str]:
  """Returns the section of the finals on a corpus; [] if there are none."""
  rows = final_rows(corpus, study, done)
  if not rows:
    return []
  size, title = study.size, study.metric.title
  runs = finals(corpus, study, done).values()
  on = machines(run for of_method in runs for run in of_method)
  others = ''.join(f' {metric.title} |' for metric in study.metrics[1:])
  count = rows_of(next(iter(runs))).shape[1]
  return [
    '',
    f'## Final round on {corpus}: {study.amount(size.final):,} {study.unit}, '
    f'{size.seeds} seeds, on {on}',
    '',
    f'The finalists are {study.baseline}, the best other methods of the first '
    'round, and methods that papers compare. Their learning rates are '
    f'tuned again. The difference to {study.baseline} is computed for the same '
    f'seeds and the same {count} {study.rows}. Its 95% interval '
    'treats both as random samples.',
    '',
    f'| method | rate of matrices | rate of the rest | {title} |'
    f' range over seeds | minus {study.baseline} |{others}'
    ' weights and state, kB |',
    '| --- ' * (6 + len(study.metrics)) + '|',
    *rows,
    *unselected(corpus, study, done),
    '',
    f'### With more {study.unit}',
    '',
    f'{title[:1].upper()}{title[1:]} minus those of {study.baseline} after the '
    f'same number of {study.unit}, with seed 0 and the best rates of each '
    'method.',
    '',
    *by_length(corpus, study, done),
  ]


def unselected(corpus: str, study: Study, done: Done) -> list[str]:
  """Returns a remark if other rates of the baseline had better last runs."""

  def mean(runs: Sequence[dict[str, Any]]) -> float:
    return float(np.mean([run[study.metric.key] for run in runs]))

  selected = finals(corpus, study, done).get(study.baseline)
  if selected is None:
    return []
  best = min(
    (
      runs
      for job, runs in last_runs(corpus, study, done).items()
      if job.method == study.baseline
    ),
    key=mean,
  )
  if mean(best) >= mean(selected):
    return []
  return [
    '',
    f'Tuning did not select the best rates of {study.baseline}: with '
    f'{best[0]["matrix"]:g} and {best[0]["rest"]:g} the mean of its last runs '
    f'is {mean(best):.4f}. The differences above are too favourable to other '
    f'methods by {mean(selected) - mean(best):.4f}.',
  ]


def by_length(corpus: str, study: Study, done: Done) -> list[str]:
  """Returns the table of differences to the baseline, by length of the run."""
  size, key = study.size, study.metric.key
  lengths = [size.tuned, size.final]
  if corpus == study.corpora[0]:
    lengths = [size.first[-1].steps, *lengths]
  best = [best_at(corpus, steps, study, done) for steps in lengths]
  base = [found.get(study.baseline) for found in best]

  def difference(name: str, i: int) -> str:
    at_base = base[i]
    if at_base is None or name not in best[i]:
      return ''
    return f'{best[i][name][key] - at_base[key]:+.4f}'

  amounts = [study.amount(steps) for steps in lengths]
  return [
    '| method | ' + ' | '.join(f'{x:,}' for x in amounts) + ' |',
    '| --- ' * (1 + len(lengths)) + '|',
    *(
      f'| {name} | '
      f'{" | ".join(difference(name, i) for i in range(len(lengths)))} |'
      for name in sorted(best[-1], key=lambda x: best[-1][x][key])
      if name != study.baseline
    ),
  ]


def picture(study: Study, metric: Metric) -> str:
  """Returns the file name of the picture of a metric against memory."""
  first = metric == study.metric
  return f'{study.name}.png' if first else f'{study.name}_{metric.key}.png'


def draw(study: Study, done: Done, directory: pathlib.Path) -> None:
  """Draws each metric against memory, of the finals or the first round.

  If there are finals, another picture, whose name ends in `_first`, has the
  first round.
  """
  for metric in study.metrics:
    path = directory / picture(study, metric)
    pictures.scatter(panels(study, done, metric), label(metric), path)
  if any(finals(corpus, study, done) for corpus in study.corpora):
    rows = [
      pictures.Ranked(
        name,
        run[study.metric.key],
        run['weight_bytes'] / 1e6,
        run['state_bytes'] / 1e6,
      )
      for name, run in firsts(study, done).items()
    ]
    pictures.ranking(
      rows,
      study.baseline,
      first_title(study),
      label(study.metric),
      directory / f'{study.name}_first.png',
    )


def panels(
  study: Study, done: Done, metric: Metric
) -> dict[str, dict[str, pictures.Point]]:
  """Returns the points of each corpus in the finals, else of the first round.

  Args:
    study: defines corpora and sizes.
    done: the records.
    metric: the metric of the points.

  Returns:
    The point of each method, by the title of the panel.
  """
  amount = f'{study.amount(study.size.final):,} {study.unit}'
  found = {}
  for corpus in study.corpora:
    of_corpus = finals(corpus, study, done)
    if of_corpus:
      found[f'{corpus}, {amount}, {study.size.seeds} seeds'] = {
        name: point(metric, runs) for name, runs in of_corpus.items()
      }
  first = {name: [run] for name, run in firsts(study, done).items()}
  return found or {
    first_title(study): {name: point(metric, x) for name, x in first.items()}
  }


def first_title(study: Study) -> str:
  """Returns the title of a picture of the first round."""
  amount = study.amount(study.size.first[-1].steps)
  return f'First round: {study.corpora[0]}, {amount:,} {study.unit}, 1 seed'


def label(metric: Metric) -> str:
  """Returns the text at the axis of a metric."""
  return f'validation {metric.title} (lower is better)'


def point(metric: Metric, runs: Sequence[dict[str, Any]]) -> pictures.Point:
  """Returns the point of a method from its runs with several seeds."""
  values = [run[metric.key] for run in runs]
  return pictures.Point(
    held(runs[0]) / 1e6, float(np.mean(values)), min(values), max(values)
  )
