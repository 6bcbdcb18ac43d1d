"""Trains single runs of a study: `Runner`.

It needs only the config and the task of a run, so a study of another kind of
data needs no change here.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

import galore_optax as go
from configs.studies.comparison.runs import finite
from configs.studies.comparison.study import Around, Job, Score, Study
from models.lowrank import Relora
from train.config import Config
from train.engine import step as step_lib
from train.engine.task import task_of
from train.method import AdamW
from train.optimizers import adapter as adapter_lib
from train.plan.account import account


class Runner:
  """Trains single runs and caches their data, batches and programs."""

  def __init__(self, study: Study, scratch: pathlib.Path) -> None:
    """Sets up the caches; data are read when the first run needs them.

    Args:
      study: defines data, methods and sizes.
      scratch: an empty directory, for files that a corpus consists of.
    """
    self.study, self.scratch = study, scratch
    self.corpus = functools.cache(self._corpus)
    self.data = functools.cache(self._data)
    self.held_out = functools.cache(self._held_out)
    # Only the last program and the last order of batches stay in memory.
    self.compiled = functools.lru_cache(1)(self._compiled)
    self.batches = functools.lru_cache(1)(self._batches)

  def config(self, job: Job) -> Config:
    """Returns the config of a run, with a peak learning rate of 1."""
    return self._config(job, self.study.around(job.steps))

  def _config(self, job: Job, around: Around) -> Config:
    adapter = self.study.methods[job.method].adapter
    return dataclasses.replace(
      self.study.config(self.corpus(job.corpus)),
      optimizer=AdamW(),
      adapter=adapter and adapter(around),
      learning_rate=1.0,
      steps=job.steps,
      seed=job.seed,
    )

  def _corpus(self, name: str) -> Any:
    return self.study.corpus(name, self.scratch)

  def _plain(self, corpus: str, seed: int = 0) -> Config:
    """Returns the config of a run of the baseline."""
    return self.config(Job(corpus, self.study.baseline, 1.0, 1.0, seed, 1))

  def _data(self, corpus: str) -> Any:
    return self.study.data(self._plain(corpus))

  def _held_out(self, corpus: str) -> Any:
    return self.study.held_out(self._plain(corpus), self.data(corpus))

  def _batches(self, corpus: str, seed: int) -> tuple[list[Any], Iterator[Any]]:
    return [], task_of(self._plain(corpus, seed)).batches(self.data(corpus))

  def first_batches(self, job: Job) -> list[Any]:
    """Returns the batches of a run, which are the same for all methods."""
    made, more = self.batches(job.corpus, job.seed)
    while len(made) < job.steps:
      made.append(jax.device_get(next(more)))
    return made[: job.steps]

  def _compiled(
    self, name: str, around: Around
  ) -> tuple[Callable, Callable, Any]:
    """Returns a method's jitted `key -> state`, its step and its score."""
    # Otherwise the programs of all methods would stay in memory.
    jax.clear_caches()
    method = self.study.methods[name]
    # The number of steps is an argument of the step, so runs of all lengths
    # with the same gap share one program.
    job = Job(self.study.corpora[0], name, 1.0, 1.0, 0, around.gap * 20)
    config = self._config(job, around)
    whole = dataclasses.replace(config, adapter=None).schedule()
    task = task_of(config)

    def optimizer(
      rates: tuple[Any, Any], steps: Any
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
      schedule: optax.Schedule = stretched(whole, config.steps, steps)
      if isinstance(config.adapter, Relora):
        schedule = adapter_lib.jagged(schedule, config.adapter)
      matrix, rest = rates
      make = go.grouped(
        lambda learning_rate: method.make(around, learning_rate),
        [go.Group(self.study.matrices, rate=matrix / rest)],
      )
      clip = optax.clip_by_global_norm(1.0)
      tx = make(lambda count: rest * schedule(count))
      return optax.chain(clip, tx), schedule

    @jax.jit
    def start(key: jax.Array) -> step_lib.State:
      tx, _ = optimizer((1.0, 1.0), 1)
      return step_lib.init(task.init(key), tx, task.trained)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
      state: step_lib.State, batch: Any, rates: tuple[Any, Any], steps: Any
    ) -> tuple[step_lib.State, dict[str, Any]]:
      tx, schedule = optimizer(rates, steps)
      run = step_lib.make_step(
        task.loss, tx, schedule=schedule, trained=task.trained
      )
      return step_lib.with_adapter(run, config)(state, batch)

    return start, step, jax.jit(self.study.score(task))

  def run(self, job: Job) -> dict[str, Any]:
    """Trains one run and returns its record."""
    around = self.study.around(job.steps)
    start, step, score = self.compiled(job.method, around)
    batches, rates = self.first_batches(job), (job.matrix, job.rest)
    # Compile first, so that the measured time does not contain compilation.
    jax.block_until_ready(
      step(start(jax.random.key(0)), batches[0], rates, job.steps)
    )
    state = jax.block_until_ready(start(jax.random.key(job.seed)))
    sizes = self.sizes(job)
    metrics: dict[str, Any] = {}
    clock = time.perf_counter()
    for batch in batches:
      state, metrics = step(state, batch, rates, job.steps)
    last = float(metrics['loss'])
    seconds = (time.perf_counter() - clock) / job.steps
    return {
      **self.measured(job.corpus, functools.partial(score, state.params)),
      'loss': finite(last),
      self.study.unit: self.study.amount(job.steps),
      'seconds': seconds,
      **sizes,
      'command': self.study.command(job),
    }

  def measured(self, corpus: str, score: Score) -> dict[str, Any]:
    """Returns the numbers of a run on the held-out data of a corpus."""
    return self.study.measured(self.held_out(corpus), score)

  def sizes(self, job: Job) -> dict[str, int]:
    """Returns the bytes of the weights and of the optimizer state of a run."""
    task = task_of(self.config(job))
    method = self.study.methods[job.method]
    params = jax.eval_shape(task.init, jax.random.key(0))
    moving, _ = step_lib.split_trained(params, task.trained)
    tx = method.make(self.study.around(job.steps), 1.0)
    found = account(params, jax.eval_shape(lambda w: tx.init(w), moving))
    return {'weight_bytes': found.weights, 'state_bytes': found.state}


def stretched(
  schedule: optax.Schedule, length: int, steps: Any
) -> optax.Schedule:
  """Returns a schedule of `length` steps, stretched to another number of steps.

  Args:
    schedule: a schedule of `length` steps.
    length: its number of steps.
    steps: the new number of steps, which may be traced.
  """
  return lambda count: schedule(count * (length / steps))
