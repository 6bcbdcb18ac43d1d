"""This module holds the training loop: steps, validations, saves, signals."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeRemainingColumn,
)

from train import evaluate
from train.config import Config
from train.data.batches import Batch
from train.metrics import Log
from train.step import PyTree, State, Step


def train(
  state: State,
  config: Config,
  *,
  step: Step,
  batches: Iterator[Batch],
  validate: Callable[[PyTree], dict[str, float]],
  save: Callable[[State], None],
  log: Log,
  console: Console,
) -> State:
  """Returns the state after the last step, or where a signal stopped it.

  Args:
    state: where to start; donated.
    config: steps, and how often to validate and to save.
    step: one update.
    batches: one for each step.
    validate: parameters to metrics.
    save: writes a checkpoint.
    log: takes the metrics of each step and each validation.
    console: shows progress.

  Raises:
    FloatingPointError: the loss is not finite; nothing after that is saved.
  """
  start = int(state.step)
  with stop_signals() as stop, progress(console, config.steps, start) as bar:
    meter = Meter(bar, log)
    for done in range(start + 1, config.steps + 1):
      state, metrics = step(state, next(batches))
      meter.add(done, metrics)
      last = done == config.steps
      due = {
        'eval': last or done % config.eval_every == 0,
        'save': last or done % config.save_every == 0 or stop.is_set(),
      }
      if any(due.values()):
        # A loss that is not finite must come to light before a save.
        meter.flush()
      if due['eval']:
        values = validate(state.params)
        log(done, values)
        console.print(f'step {done}: {evaluate.describe(values)}')
      if due['save']:
        save(state)
      if stop.is_set():
        break
  return state


class Meter:
  """Shows and logs the metrics of each step, one step late.

  Reading a metric waits for its step; by then the next step is in the queue.
  """

  def __init__(self, bar: Callable[..., None], log: Log):
    """Starts with nothing to show."""
    self._bar, self._log = bar, log
    self._pending: tuple[int, PyTree] | None = None
    self._clock: float | None = None

  def add(self, step: int, metrics: PyTree) -> None:
    """Takes the metrics of a step, and shows those of the step before."""
    previous, self._pending = self._pending, (step, metrics)
    self._show(previous)

  def flush(self) -> None:
    """Shows the last step, and forgets the time: what follows is no step."""
    previous, self._pending = self._pending, None
    self._show(previous)
    self._clock = None

  def _show(self, entry: tuple[int, PyTree] | None) -> None:
    if entry is None:
      return
    step, metrics = entry
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values['loss']):
      raise FloatingPointError(
        f'the loss is {values["loss"]} at step {step}; the checkpoints before '
        'it are intact. A lower learning rate or clip_norm may help'
      )
    now = time.perf_counter()
    if self._clock is not None:
      values['tokens_per_second'] = values['tokens'] / (now - self._clock)
    self._clock = now
    self._log(step, values)
    self._bar(step, values)


@contextlib.contextmanager
def progress(
  console: Console, steps: int, start: int
) -> Iterator[Callable[[int, dict[str, float]], None]]:
  """Yields a function that moves the progress bar."""
  with Progress(
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TextColumn('{task.fields[text]}'),
    TimeRemainingColumn(),
    console=console,
    speed_estimate_period=120,
  ) as display:
    task = display.add_task(
      'train', total=steps, completed=start, text='compiling the step'
    )

    def show(step: int, values: dict[str, float]) -> None:
      text = f'loss {values["loss"]:.3f}  lr {values["learning_rate"]:.2e}'
      if 'tokens_per_second' in values:
        text += f'  {values["tokens_per_second"]:,.0f} tok/s'
      display.update(task, completed=step, text=text)

    yield show


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
  """Yields what the first SIGINT or SIGTERM sets; the second one kills."""
  stop = threading.Event()

  def ask(number, frame):
    del frame
    stop.set()
    signal.signal(number, before[number])

  before = {
    number: signal.signal(number, ask)
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
