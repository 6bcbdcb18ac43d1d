"""The training loop: steps, validations, saves, and a stop that is asked for.

It knows no model: `train.step` makes the step, `train.task` says what is
validated, `train.signals` who asks.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
)

from train import metrics
from train.config import Config
from train.metrics import Log
from train.signals import Stop
from train.step import State, Step
from train.task import Batch, Metrics, PyTree, Task


def train(
  state: State,
  config: Config,
  *,
  step: Step,
  batches: Iterator[Batch],
  validate: Callable[[PyTree], Metrics],
  save: Callable[[State, float | None], None],
  best: float,
  log: Log,
  console: Console,
  stop: Stop,
  task: Task,
  clock: Callable[[], float] = time.monotonic,
) -> State:
  """Returns the state after the last step, or where a signal stopped it.

  Args:
    state: where to start; donated.
    config: steps, and how often to validate and to save.
    step: one update.
    batches: one for each step.
    validate: parameters to metrics.
    save: writes a checkpoint, with its score if it was validated.
    best: the lowest score that a checkpoint has; infinity where none has one.
    log: takes the metrics of each step and each validation.
    console: shows progress.
    stop: what a signal sets.
    task: says what a batch's weights count, and which validation is better.
    clock: tells when `save_minutes` have passed.

  Raises:
    FloatingPointError: more steps in a row than `max_skipped` came to nothing;
      nothing after the first of them is saved.
  """
  start, saved, late = int(state.step), clock(), False
  limit = math.inf if config.save_minutes is None else 60 * config.save_minutes
  with progress(console, config.steps, start, task.unit) as show:
    meter = Meter(show, log, task.unit, max_skipped=config.max_skipped)
    for done in range(start + 1, config.steps + 1):
      state, found = step(state, next(batches))
      stop.begun = True
      meter.add(done, found)
      last = done == config.steps
      asked, score = stop.signal is not None, None
      due = {
        'eval': last or done % config.eval_every == 0,
        'save': last
        or done % config.save_every == 0
        or late
        or clock() - saved >= limit,
      }
      if asked or any(due.values()):
        # A step that came to nothing must come to light before a save.
        meter.flush()
      if asked:
        # Before a validation, for which there may be no time.
        save(state, None)
      if due['eval']:
        values = validate(state.params)
        log(done, {f'validation_{name}': x for name, x in values.items()})
        console.print(f'step {done}: validation: {metrics.describe(values)}')
        score = task.score(values) if config.save_best else None
        if score is not None and score < best:
          best, due['save'] = score, True
      if asked:
        break
      asked = due['eval'] and stop.signal is not None
      due['save'] |= asked
      # Where a step came to nothing the state may be why: no sound checkpoint
      # makes room for it.
      late = due['save'] and meter.skipped > 0 and not (asked or last)
      if due['save'] and not late:
        save(state, score)
        saved = clock()
      if asked:
        break
      if any(due.values()):
        meter.restart()
  return state


class Show(Protocol):
  """Shows a step."""

  def __call__(self, step: int, values: Metrics, seconds: float | None) -> None:
    """Takes its metrics, and the mean seconds of the steps so far."""


class Meter:
  """Shows and logs the metrics of each step, one step late.

  Reading a metric waits for its step; by then the next step is in the queue.
  Time counts between two readings, so neither the first step, which compiles,
  nor what `flush` and `restart` enclose is part of it.
  """

  def __init__(
    self,
    show: Show,
    log: Log,
    unit: str,
    clock: Callable[[], float] = time.perf_counter,
    *,
    max_skipped: int = 0,
  ):
    """Starts with nothing to show."""
    self.skipped = 0  # the last steps, in a row, that came to nothing
    self._max_skipped = max_skipped
    self._show, self._log, self._unit, self._clock = show, log, unit, clock
    self._pending: tuple[int, PyTree] | None = None
    self._since: float | None = None
    self._seconds, self._steps = 0.0, 0

  def add(self, step: int, values: PyTree) -> None:
    """Takes the metrics of a step, and shows those of the step before."""
    previous, self._pending = self._pending, (step, values)
    self._read(previous)

  def flush(self) -> None:
    """Shows the last step, and stops the clock: what follows is no step."""
    previous, self._pending = self._pending, None
    self._read(previous)
    self._since = None

  def restart(self) -> None:
    """Starts the clock again."""
    self._since = self._clock()

  def _read(self, entry: tuple[int, PyTree] | None) -> None:
    if entry is None:
      return
    step, found = entry
    read = jax.device_get(found)  # all at once: one wait, one transfer
    values = {name: float(value) for name, value in read.items()}
    self._count(step, values)
    weight = values.pop('weight')
    values[self._unit] = weight
    now = self._clock()
    if self._since is not None:
      seconds = now - self._since
      values[f'{self._unit}_per_second'] = weight / seconds
      self._seconds += seconds
      self._steps += 1
    self._since = now
    # JSON has no word for the others.
    self._log(step, {k: x for k, x in values.items() if math.isfinite(x)})
    mean = self._seconds / self._steps if self._steps else None
    self._show(step, values, mean)

  def _count(self, step: int, values: Metrics) -> None:
    """Counts steps that came to nothing, whole or in part."""
    norm = values.get('projected_grad_norm', values.get('grad_norm', 0.0))
    lost = not math.isfinite(values['loss'])
    if not lost and math.isfinite(norm):
      self.skipped = 0
      return
    self.skipped += 1
    if self.skipped > self._max_skipped:
      what = f'loss is {values["loss"]}' if lost else f'gradient is {norm}'
      more = f', as {self.skipped} in a row' if self.skipped > 1 else ''
      raise FloatingPointError(f'the {what} at step {step}{more}')


@contextlib.contextmanager
def progress(
  console: Console, steps: int, start: int, unit: str
) -> Iterator[Show]:
  """Yields a function that moves the progress bar."""
  with Progress(
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TextColumn('{task.fields[text]}'),
    console=console,
  ) as display:
    task = display.add_task(
      'train', total=steps, completed=start, text='compiling the step'
    )

    def show(step: int, values: Metrics, seconds: float | None) -> None:
      text = f'loss {values["loss"]:.3f}  lr {values["learning_rate"]:.2e}'
      if values.get('skipped_steps') or values.get('partial_steps'):
        text += '  not applied: not finite'
      speed = values.get(f'{unit}_per_second')
      if speed:
        text += f'  {speed:,.0f} {unit}/s'
      if seconds:
        text += f'  {left(seconds * (steps - step))} left'
      display.update(task, completed=step, text=text)

    yield show


def left(seconds: float) -> str:
  """Returns a time that is still to go.

  >>> left(3725.4)
  '1:02:05'
  """
  minutes, rest = divmod(round(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02}:{rest:02}'
