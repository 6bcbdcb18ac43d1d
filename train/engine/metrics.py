"""Writes metrics to a JSONL file, TensorBoard, a line of text or a picture."""

import contextlib
import importlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np


class Log(Protocol):
  """Writes the metrics of a step."""

  def __call__(self, step: int, values: dict[str, Any]) -> None:
    """Writes metrics.

    Args:
      step: number of the step.
      values: by name, a number, or lists of numbers by the path of a weight.
    """


@contextlib.contextmanager
def opened(
  path: pathlib.Path, *, step: int, tensorboard: bool
) -> Iterator[Log]:
  """Yields the log of a run that has done `step` steps.

  Lines of later steps, which a run wrote before it was resumed at an earlier
  step, are removed from the file.

  Args:
    path: the JSONL file; TensorBoard's events are written to its directory.
    step: number of steps done.
    tensorboard: whether to write TensorBoard events, too.
  """
  found, bad = parsed(path)
  if bad:
    numbers = ', '.join(map(str, bad))
    print(
      f'{path}: left out are lines that are no metrics: {numbers}',
      file=sys.stderr,
    )
  kept = [line for line in found if line['step'] <= step]
  path.write_text(''.join(json.dumps(line) + '\n' for line in kept))
  with contextlib.ExitStack() as stack:
    file = stack.enter_context(path.open('a', buffering=1))
    events = None
    if tensorboard:
      events = event_writer()(str(path.parent), purge_step=step + 1)
      stack.callback(events.close)

    def log(step: int, values: dict[str, Any]) -> None:
      file.write(json.dumps({'step': step, **values}) + '\n')
      if events:
        for name, value in scalars(values).items():
          events.add_scalar(name, value, step)

    yield log


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
  """Flattens metrics to numbers by name and path; a list becomes its mean.

  >>> scalars({'loss': 2.0, 'captured_energy': {'q/kernel': [0.5, 0.75]}})
  {'loss': 2.0, 'captured_energy/q/kernel': 0.625}
  """
  flat = {}
  for name, value in values.items():
    if isinstance(value, dict):
      flat |= {f'{name}/{path}': float(np.mean(x)) for path, x in value.items()}
    else:
      flat[name] = value
  return flat


def describe(values: dict[str, float]) -> str:
  """Formats metrics as text.

  >>> describe({'loss': 2.25, 'bits_per_byte': 1.5})
  'loss 2.2500, bits per byte 1.5000'
  """
  return ', '.join(
    f'{name.replace("_", " ")} {value:.4f}' for name, value in values.items()
  )


def event_writer() -> Any:
  """Returns TensorBoard's writer class.

  Raises:
    ImportError: tensorboardX is not installed.
  """
  try:
    return importlib.import_module('tensorboardX').SummaryWriter
  except ImportError as error:
    raise ImportError(
      '--tensorboard needs tensorboardX: '
      "pip install 'galore-optax[tensorboard]', or leave the flag out"
    ) from error


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines of a metrics file; none if the file does not exist."""
  return parsed(path)[0]


def parsed(path: pathlib.Path) -> tuple[list[dict[str, float]], list[int]]:
  """Returns the lines of a metrics file, and the numbers of malformed lines."""
  if not path.exists():
    return [], []
  found = []
  bad = []
  # Skip the end of the file after the last newline: a process that was killed
  # may have left half a line there.
  for number, text in enumerate(path.read_bytes().split(b'\n')[:-1], 1):
    try:
      line = json.loads(text)
      check_step(line['step'])
    except (ValueError, TypeError, KeyError):
      bad.append(number)
    else:
      found.append(line)
  return found, bad


def check_step(step: Any) -> None:
  """Raises TypeError unless a step is a number."""
  if not isinstance(step, int | float):
    raise TypeError(f'step must be a number, got {step!r}')


def plot(
  metrics: pathlib.Path, picture: pathlib.Path, title: str, label: str = 'loss'
) -> None:
  """Plots the losses in a metrics file as a PNG picture.

  Args:
    metrics: the metrics file.
    picture: the file to write.
    title: title of the picture.
    label: label of the vertical axis.
  """
  # Import matplotlib only here: it takes a third of a second.
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7, 4), dpi=150, layout='constrained')
  axes = figure.subplots()
  lines = read(metrics)
  for name, style in {
    'loss': {'color': 'tab:blue', 'linewidth': 0.8, 'label': 'training'},
    'validation_loss': {
      'color': 'tab:orange',
      'marker': 'o',
      'markersize': 3,
      'label': 'validation',
    },
  }.items():
    points = [(line['step'], line[name]) for line in lines if name in line]
    axes.plot(*zip(*points, strict=True), **style)
  axes.set(xlabel='step', ylabel=label, title=title)
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(picture)
