"""The training loop: steps, validations, saves, and a stop that is asked for.

It knows no model: `train.step` makes the step, `train.task` says what is
validated, `train.signals` who asks.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
)

from train import machine, metrics, subspace
from train import mesh as mesh_lib
from train.config import Config
from train.metrics import Log
from train.signals import Stop
from train.step import State, Step
from train.task import Batch, Metrics, PyTree, Task

PROFILED = range(3, 6)
"""Steps in a profile, counted from the start: the first one compiles."""

WAITING = 0.5
"""Share of the time that the data may take before the user is told."""


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
  profile: pathlib.Path | None = None,
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
    profile: where the profiler's trace of some steps goes; None for no trace.
    clock: tells when `save_minutes` have passed.

  Raises:
    FloatingPointError: more steps in a row than `max_skipped` came to nothing;
      nothing after the first of them is saved.
  """
  start, saved, late = int(state.step), clock(), False
  limit = math.inf if config.save_minutes is None else 60 * config.save_minutes
  with (
    progress(console, config.steps, start, task.unit) as show,
    contextlib.ExitStack() as tracing,
  ):
    meter = Meter(
      show,
      log,
      task.unit,
      machine.peak_flops(config.model.dtype),
      max_skipped=config.max_skipped,
    )
    for done in range(start + 1, config.steps + 1):
      at = done - start
      if profile is not None and at in (PROFILED.start, PROFILED.stop):
        meter.flush()
        tracing.close()
        if at == PROFILED.start:
          tracing.enter_context(trace(profile, console))
        meter.restart()
      with meter.timed('data'):
        batch = next(batches)
      state, found = step(state, batch)
      stop.begun = True
      meter.add(done, found, task.flops(batch) if task.flops else None)
      last = done == config.steps
      asked, score = of_any(stop), None
      # By one process's clock for all: a save takes all of them.
      passed = math.isfinite(limit) and bool(
        mesh_lib.of_any(int(clock() - saved >= limit))
      )
      due = {
        'eval': last or done % config.eval_every == 0,
        'save': last or done % config.save_every == 0 or late or passed,
      }
      if asked or any(due.values()):
        # A step that came to nothing must come to light before a save.
        meter.flush()
      if asked:
        # Before a validation, for which there may be no time.
        save(state, None)
      if due['eval']:
        with meter.timed('evaluation'):
          values = validate(state.params)
        named = {f'validation_{name}': x for name, x in values.items()}
        log(done, named | meter.spent('evaluation'))
        console.print(f'step {done}: validation: {metrics.describe(values)}')
        if meter.waiting > WAITING:
          console.print(
            f'{meter.waiting:.0%} of the time went by waiting for data: '
            f'{config.corpus} is too slow for this model',
            highlight=False,
          )
        score = task.score(values) if config.save_best else None
        if score is not None and score < best:
          best, due['save'] = score, True
      if asked:
        break
      asked = due['eval'] and of_any(stop)
      due['save'] |= asked
      # Where a step came to nothing the state may be why: no sound checkpoint
      # makes room for it.
      late = due['save'] and meter.skipped > 0 and not (asked or last)
      if due['save'] and not late:
        with meter.timed('save'):
          save(state, score)
        log(done, meter.spent('save'))
        saved = clock()
      if asked:
        break
      if any(due.values()):
        meter.restart()
  return state


def of_any(stop: Stop) -> bool:
  """Whether a signal asked any of the processes to stop; then all know it."""
  number = mesh_lib.of_any(stop.signal)
  if number is not None:
    # Not otherwise: one may have come while the others were asked.
    stop.signal = number
  return number is not None


@contextlib.contextmanager
def trace(directory: pathlib.Path, console: Console) -> Iterator[None]:
  """Has the profiler watch, and says how to open what it wrote."""
  with jax.profiler.trace(str(directory), create_perfetto_trace=True):
    yield
  console.print(
    f'trace: {directory}; open its perfetto_trace.json.gz at '
    'https://ui.perfetto.dev, or all of it with `tensorboard --logdir '
    f"{directory}` and TensorBoard's plugin xprof",
    highlight=False,
    soft_wrap=True,
  )


class Show(Protocol):
  """Shows a step."""

  def __call__(self, step: int, values: Metrics, seconds: float | None) -> None:
    """Takes its metrics, and the mean seconds of the steps so far."""


class Meter:
  """Shows and logs the metrics of each step, one step late.

  Reading a metric waits for its step; by then the next step is in the queue.
  Time counts between two readings, so neither the first step, which compiles,
  nor what `flush` and `restart` enclose is part of it. It is `data_seconds`,
  where the loop waited for a batch, and `step_seconds`, the rest.
  """

  def __init__(
    self,
    show: Show,
    log: Log,
    unit: str,
    peak: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
    *,
    max_skipped: int = 0,
  ):
    """Starts with nothing to show; `peak` is flops per second at most."""
    self.skipped = 0  # the last steps, in a row, that came to nothing
    self._max_skipped = max_skipped
    self._show, self._log, self._unit, self._clock = show, log, unit, clock
    self._pending: tuple[int, PyTree, float | None] | None = None
    self._since: float | None = None
    self._seconds, self._waited, self._steps = 0.0, 0.0, 0
    self._peak, self._spent = peak, {}

  def add(self, step: int, values: PyTree, flops: float | None = None) -> None:
    """Takes the metrics of a step, and shows those of the step before."""
    previous, self._pending = self._pending, (step, values, flops)
    self._read(previous)

  @contextlib.contextmanager
  def timed(self, what: str) -> Iterator[None]:
    """Counts the time inside for `spent`."""
    start = self._clock()
    yield
    self._spent[what] = self._spent.get(what, 0.0) + self._clock() - start

  def spent(self, what: str) -> Metrics:
    """Returns the seconds that something took since this was asked last."""
    return {f'{what}_seconds': self._spent.pop(what, 0.0)}

  @property
  def waiting(self) -> float:
    """The share of the time of all steps that went by waiting for data."""
    return self._waited / self._seconds if self._seconds else 0.0

  def flush(self) -> None:
    """Shows the last step, and stops the clock: what follows is no step."""
    previous, self._pending = self._pending, None
    self._read(previous)
    self._since = None

  def restart(self) -> None:
    """Starts the clock again."""
    self._since = self._clock()
    self.spent('data')

  def _read(self, entry: tuple[int, PyTree, float | None] | None) -> None:
    if entry is None:
      return
    step, found, flops = entry
    scalars = {k: x for k, x in found.items() if k != 'subspace'}
    read = jax.device_get(scalars)  # all at once: one wait, one transfer
    values = {name: float(x) for name, x in read.items()}
    self._count(step, values)
    refreshed = values.pop('refreshed', 0)
    weight = values.pop('weight')
    values[self._unit] = weight
    now = self._clock()
    waited = self.spent('data')['data_seconds']
    if self._since is not None:
      seconds = now - self._since
      values |= self._speed(seconds, waited, weight, flops)
      self._seconds += seconds
      self._waited += waited
      self._steps += 1
    self._since = now
    peak = machine.peak_bytes()
    if peak is not None:
      values['peak_bytes'] = peak
    # JSON has no word for the others.
    noted: dict[str, Any] = {
      k: x for k, x in values.items() if math.isfinite(x)
    }
    if refreshed:
      noted |= subspace.by_number(jax.device_get(found['subspace']))
    self._log(step, noted)
    mean = self._seconds / self._steps if self._steps else None
    self._show(step, values, mean)

  def _speed(
    self, seconds: float, waited: float, weight: float, flops: float | None
  ) -> Metrics:
    """Returns how fast a step was, and where its time went."""
    values = {
      f'{self._unit}_per_second': weight / seconds,
      'data_seconds': waited,
      'step_seconds': seconds - waited,
    }
    if flops is not None:
      values['flops_per_second'] = flops / seconds
      if self._peak is not None:
        values['share_of_peak'] = flops / seconds / self._peak
    return values

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
