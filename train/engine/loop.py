"""The training loop: steps, validations, checkpoints, and stopping on a signal.

The loop does not depend on the model. `train.engine.step` makes the step,
`train.engine.task` defines the validation, and `train.engine.signals` handles
Ctrl-C and SIGTERM.
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

from train.config import Config
from train.engine import cluster, machine, metrics
from train.engine.metrics import Log
from train.engine.signals import Stop
from train.engine.step import State, Step
from train.engine.task import Batch, Metrics, PyTree, Task
from train.optimizers import subspace_metrics

PROFILED = range(3, 6)
"""Steps to profile, counted from the start; step 1 compiles."""

WAITING = 0.5
"""A warning is printed if waiting for data takes more than this share."""


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
  """Trains until the last step, or until a signal; returns the last state.

  Args:
    state: the state to start from; donated.
    config: sets the number of steps, and when to validate and to save.
    step: computes one update.
    batches: yields one batch for each step.
    validate: computes metrics from parameters.
    save: writes a checkpoint, with its score if it was validated.
    best: the lowest score of the existing checkpoints; infinity if none has a
      score.
    log: receives the metrics of each step and each validation.
    console: displays the progress.
    stop: holds the signal that arrived, if any.
    task: counts a batch's units and flops, and scores a validation.
    profile: directory for the profiler's trace of some steps; None for no
      trace.
    clock: returns seconds; `save_minutes` is measured with it.

  Raises:
    FloatingPointError: more than `max_skipped` successive steps were skipped,
      or updated only in part. No checkpoint was saved since the first of them.
  """
  start = int(state.step)
  saved = clock()
  late = False
  limit = math.inf if config.save_minutes is None else 60 * config.save_minutes
  with (
    progress(console, config.steps, start, task.unit) as show,
    contextlib.ExitStack() as tracing,
  ):
    meter = Meter(
      show,
      log,
      task.unit,
      machine.peak_flops(config.resolved_model.dtype),
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
      asked = stopped_anywhere(stop)
      score = None
      # Use one process's clock for all: a save needs all processes.
      passed = math.isfinite(limit) and bool(
        cluster.largest_of_all(int(clock() - saved >= limit))
      )
      due = {
        'eval': last or done % config.eval_every == 0,
        'save': last or done % config.save_every == 0 or late or passed,
      }
      if asked or any(due.values()):
        # Flush first, so that a skipped step is detected before saving.
        meter.flush()
      if asked:
        # Save before the validation, for which there may be no time left.
        save(state, None)
      if due['eval']:
        with meter.timed('evaluation'):
          values = validate(state.evaluated)
        named = {f'validation_{name}': x for name, x in values.items()}
        log(done, named | meter.spent('evaluation'))
        console.print(f'step {done}: validation: {metrics.describe(values)}')
        if meter.waiting > WAITING:
          console.print(
            f'{meter.waiting:.0%} of the time was spent waiting for data: '
            f'{config.corpus} is too slow for this model',
            highlight=False,
          )
        score = task.score(values) if config.save_best else None
        if score is not None and score < best:
          best = score
          due['save'] = True
      if asked:
        break
      asked = due['eval'] and stopped_anywhere(stop)
      due['save'] |= asked
      # After a skipped step, the state itself may be the cause. Postpone the
      # save: it would replace an older, sound checkpoint.
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


def stopped_anywhere(stop: Stop) -> bool:
  """Whether any process received a signal to stop; informs all processes."""
  number = cluster.largest_of_all(stop.signal)
  if number is not None:
    # Never set it to None: a signal may have arrived since the exchange.
    stop.signal = number
  return number is not None


@contextlib.contextmanager
def trace(directory: pathlib.Path, console: Console) -> Iterator[None]:
  """Records a profiler trace, then prints how to open it."""
  with jax.profiler.trace(str(directory), create_perfetto_trace=True):
    yield
  console.print(
    f'trace: {directory}; open its perfetto_trace.json.gz at '
    'https://ui.perfetto.dev, or the directory with `tensorboard --logdir '
    f"{directory}` and TensorBoard's plugin xprof",
    highlight=False,
    soft_wrap=True,
  )


class Show(Protocol):
  """Displays the progress of training."""

  def __call__(self, step: int, values: Metrics, seconds: float | None) -> None:
    """Displays a step.

    Args:
      step: number of the step.
      values: its metrics.
      seconds: mean seconds per step so far; None if no step has been timed.
    """


class Meter:
  """Shows and logs the metrics of each step, one step late.

  Reading a metric waits for its step. Reading it one step late leaves the next
  step queued on the device meanwhile.

  A step is timed from one reading to the next. The first step, which compiles,
  is not timed, nor is the work between `flush` and `restart`. The time is split
  into `data_seconds`, in which the loop waited for a batch, and `step_seconds`.
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
  ) -> None:
    """Creates a meter.

    Args:
      show: displays the metrics of a step.
      log: writes the metrics of a step.
      unit: the unit of a batch's weight, 'tokens' or 'examples'.
      peak: peak flops per second of all devices, if known.
      clock: returns seconds.
      max_skipped: number of successive steps that may be skipped.
    """
    # Number of latest successive steps that were skipped, whole or in part.
    self.skipped = 0
    self._max_skipped = max_skipped
    self._show = show
    self._log = log
    self._unit = unit
    self._clock = clock
    self._pending: tuple[int, PyTree, float | None] | None = None
    self._since: float | None = None
    self._seconds = 0.0
    self._waited = 0.0
    self._steps = 0
    self._peak = peak
    self._spent: dict[str, float] = {}

  def add(self, step: int, values: PyTree, flops: float | None = None) -> None:
    """Queues the metrics of a step, and shows those of the step before."""
    previous, self._pending = self._pending, (step, values, flops)
    self._read(previous)

  @contextlib.contextmanager
  def timed(self, what: str) -> Iterator[None]:
    """Adds the seconds spent in its body to the total that `spent` returns."""
    start = self._clock()
    yield
    self._spent[what] = self._spent.get(what, 0.0) + self._clock() - start

  def spent(self, what: str) -> Metrics:
    """Returns the seconds of one kind of work since the last such call."""
    return {f'{what}_seconds': self._spent.pop(what, 0.0)}

  @property
  def waiting(self) -> float:
    """Fraction of the timed steps that was spent waiting for data."""
    return self._waited / self._seconds if self._seconds else 0.0

  def flush(self) -> None:
    """Shows the last step and stops the clock; later work is not timed."""
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
    read = jax.device_get(scalars)  # all at once: one wait and one transfer
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
    # JSON cannot represent non-finite numbers.
    noted: dict[str, Any] = {
      k: x for k, x in values.items() if math.isfinite(x)
    }
    if refreshed:
      noted |= subspace_metrics.by_number(jax.device_get(found['subspace']))
    self._log(step, noted)
    mean = self._seconds / self._steps if self._steps else None
    self._show(step, values, mean)

  def _speed(
    self, seconds: float, waited: float, weight: float, flops: float | None
  ) -> Metrics:
    """Returns the speed of a step, and where its time went."""
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
    """Counts successive steps that were skipped, whole or in part.

    Raises:
      FloatingPointError: there are more than `max_skipped` of them.
    """
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
  """Displays a progress bar; yields the function that advances it."""
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
        text += '  not applied: non-finite'
      speed = values.get(f'{unit}_per_second')
      if speed:
        text += f'  {speed:,.0f} {unit}/s'
      if seconds:
        text += f'  {clock_time(seconds * (steps - step))} left'
      display.update(task, completed=step, text=text)

    yield show


def clock_time(seconds: float) -> str:
  """Formats seconds as hours, minutes and seconds.

  >>> clock_time(3725.4)
  '1:02:05'
  """
  minutes, rest = divmod(round(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02}:{rest:02}'
