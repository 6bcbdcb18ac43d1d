"""Pictures of the results of studies: `scatter` and `ranking`."""

import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

DPI = 200
"""Pixels per inch. A picture 8 inches wide is sharp at 800 and 1,600 pixels."""

MEMORY = 'weights and optimizer state, MB (lower is better)'

PLACES = tuple(
  (dx * distance, dy * distance, ha, va)
  for distance in (4.0, 9.0, 16.0)
  for dx, dy, ha, va in (
    (0.7, 0.7, 'left', 'bottom'),
    (1.0, 0.0, 'left', 'center'),
    (0.7, -0.7, 'left', 'top'),
    (-1.0, 0.0, 'right', 'center'),
    (-0.7, 0.7, 'right', 'bottom'),
    (-0.7, -0.7, 'right', 'top'),
    (0.0, 1.0, 'center', 'bottom'),
    (0.0, -1.0, 'center', 'top'),
  )
)
"""Positions of a name around its point, in points; the first that fits is used.

Each has horizontal and vertical offsets and the alignment of the text.
"""


class Point(NamedTuple):
  """The result of one method."""

  megabytes: float
  score: float
  """The mean of the metric over all seeds."""
  low: float
  """The lowest value of all seeds."""
  high: float
  """The highest value of all seeds."""


def scatter(
  panels: Mapping[str, Mapping[str, Point]], label: str, path: pathlib.Path
) -> None:
  """Draws a metric against memory, with the Pareto front.

  Args:
    panels: the results of each method, by the title of the panel.
    label: the text at the axis of the metric.
    path: where the picture is written.
  """
  width = max(8.0, 4.8 * len(panels))
  figure = Figure(figsize=(width, 4.5), dpi=DPI, layout='constrained')
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, (title, points) in zip(grid, panels.items(), strict=True):
    draw_points(axes, [*points.values()], label)
    axes.set_title(title, fontsize=10)
  # Text boxes have a size in pixels only once the layout is final.
  FigureCanvasAgg(figure)
  figure.draw_without_rendering()
  for axes, points in zip(grid, panels.values(), strict=True):
    write_names(axes, points)
  figure.savefig(path)


def draw_points(axes: Axes, points: Sequence[Point], label: str) -> None:
  """Draws points, their ranges over seeds, the Pareto front and the axes."""
  megabytes = [point.megabytes for point in points]
  lows, highs = [x.low for x in points], [x.high for x in points]
  front = [*zip(*front_corners(points), strict=True)]
  axes.plot(*front, color='0.75', linewidth=1, label='Pareto front')
  if lows != highs:
    axes.vlines(
      megabytes,
      lows,
      highs,
      color='tab:blue',
      linewidth=1,
      alpha=0.5,
      label='range over seeds',
    )
  axes.scatter(megabytes, [x.score for x in points], s=18, zorder=3)
  axes.margins(x=0.15, y=0.08)
  axes.set_xlabel(MEMORY, fontsize=9)
  axes.set_ylabel(label, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.legend(fontsize=8, loc='best', frameon=False)


def front_corners(points: Sequence[Point]) -> list[tuple[float, float]]:
  """Returns the corners of the Pareto front, from left to right.

  >>> front_corners([Point(1, 5, 5, 5), Point(2, 4, 4, 4), Point(3, 6, 6, 6)])
  [(1, 5), (2, 5), (2, 4), (3, 4), (3, 4)]
  """
  order = sorted((point.megabytes, point.score) for point in points)
  lowest = [*itertools.accumulate((score for _, score in order), min)]
  corners = [order[0]]
  for (x, _), before, now in zip(order[1:], lowest, lowest[1:], strict=False):
    corners += [(x, before), (x, now)]
  return corners


def write_names(axes: Axes, points: Mapping[str, Point]) -> None:
  """Writes names next to their points, without overlaps if possible.

  A name should not overlap points, lines, the legend or other names.
  """
  lines = [*itertools.pairwise(front_corners([*points.values()]))]
  for point in points.values():
    lines.append(((point.megabytes, point.low), (point.megabytes, point.high)))
    place = point.megabytes, point.score
    lines.append((place, place))
  pixels = {
    name: axes.transData.transform((point.megabytes, point.score))
    for name, point in points.items()
  }
  # Boxes around all lines and points, in pixels.
  taken = [Bbox(axes.transData.transform(sorted(x))).padded(5) for x in lines]
  legend = axes.get_legend()
  if legend is not None:
    taken.append(legend.get_window_extent())
  # From top to bottom, so that the names of close points are in their order.
  for name, point in sorted(points.items(), key=lambda item: -item[1].score):
    unclear = None
    for dx, dy, ha, va in PLACES:
      text = axes.annotate(
        name,
        (point.megabytes, point.score),
        (dx, dy),
        textcoords='offset points',
        ha=ha,
        va=va,
        fontsize=8,
      )
      # A name must not change the layout, from which its place is computed.
      text.set_in_layout(False)
      box = text.get_window_extent()
      inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
      inside = inside and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1
      free = inside and not any(box.overlaps(x) for x in taken)
      gaps = {key: gap(box, pixel) for key, pixel in pixels.items()}
      # Prefer a place that is clearly closer to this point than to all others.
      clear = all(gaps[name] < x - 1 for key, x in gaps.items() if key != name)
      if free and clear:
        break
      text.set_visible(False)
      if unclear is None or (free and not unclear[0]):
        unclear = free, text, box
    else:
      # No place is clear: take the first free place, or the first of all.
      assert unclear is not None
      _, text, box = unclear
      text.set_visible(True)
    taken.append(box)


def gap(box: Bbox, pixel: Any) -> float:
  """Returns the distance of a point from a box, both in pixels.

  >>> gap(Bbox.from_bounds(3, 0, 2, 9), (0, 5))
  3.0
  """
  x, y = pixel
  return math.hypot(
    max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0)
  )


class Ranked(NamedTuple):
  """The result of one method in a ranking."""

  name: str
  score: float
  """The value of the metric."""
  weights: float
  """Megabytes of the weights."""
  state: float
  """Megabytes of the optimizer state."""


def ranking(
  rows: Sequence[Ranked],
  baseline: str,
  title: str,
  label: str,
  path: pathlib.Path,
) -> None:
  """Draws methods in the order of a metric, with their memory.

  Args:
    rows: the results of the methods.
    baseline: name of the method that a line marks.
    title: title of the picture.
    label: the text at the axis of the metric.
    path: where the picture is written.
  """
  rows = sorted(rows, key=lambda row: -row.score)
  names = [row.name for row in rows]
  height = 1.3 + 0.2 * len(rows)
  figure = Figure(figsize=(8, height), dpi=DPI, layout='constrained')
  scores, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
  known = [row.score for row in rows if row.name == baseline]
  for value in known:
    scores.axvline(value, color='0.75', linewidth=1, zorder=0)
  scores.scatter(
    [row.score for row in rows],
    names,
    color=['tab:orange' if x == baseline else 'tab:blue' for x in names],
    s=22,
  )
  scores.grid(axis='y', color='0.92')
  scores.set_axisbelow(True)
  scores.set_xlabel(label, fontsize=9)
  weights = [row.weights for row in rows]
  memory.barh(names, weights, color='0.7', label='weights')
  memory.barh(
    names,
    [row.state for row in rows],
    left=weights,
    color='tab:blue',
    label='optimizer state',
  )
  memory.set_xlabel('MB (lower is better)', fontsize=9)
  # Above the bars: every corner inside may have a bar.
  memory.legend(
    fontsize=8,
    loc='lower center',
    bbox_to_anchor=(0.5, 1.0),
    ncols=2,
    frameon=False,
  )
  for axes in (scores, memory):
    axes.tick_params(labelsize=8)
  scores.set_ylim(-0.7, len(rows) - 0.3)
  scores.set_title(title, fontsize=10)
  figure.savefig(path)
