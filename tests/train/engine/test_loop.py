"""Output and logs of the training loop, and the times that it reports."""

import dataclasses
import gzip
import inspect
import io
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.train.test_config import CONFIG
from train.engine import checkpoint, loop, metrics
from train.engine import step as step_lib
from train.engine.signals import Stop
from train.engine.task import Task
from train.method import AdamW
from train.tasks.language import INPUTS, LanguageModel, perplexity

VALUES = {'loss': 1.0, 'weight': 8.0, 'learning_rate': 0.1, 'correct': 3.0}


class Clock:
  """A clock whose time the test sets."""

  now = 0.0

  def __call__(self):
    return self.now


class Uncounted(LanguageModel):
  def flops(self, batch):
    return None


class Counted(LanguageModel):
  def flops(self, batch):
    return float(batch['inputs'].size)


def meter(clock=None, peak=None):
  shown, logged = [], []
  found = loop.Meter(
    lambda step, values, seconds: shown.append((step, seconds)),
    lambda step, values: logged.append((step, values)),
    'tokens',
    peak,
    clock=clock or itertools.count().__next__,
  )
  return found, shown, logged


def test_metrics_are_read_one_step_late():
  found, shown, logged = meter()
  found.add(1, VALUES)
  assert shown == []
  found.add(2, VALUES)
  assert [step for step, _ in shown] == [1]
  found.flush()
  assert [step for step, _ in shown] == [1, 2]
  # The weight of a batch is logged under its unit. Other sums keep their names.
  values = {'loss': 1.0, 'tokens': 8.0, 'learning_rate': 0.1, 'correct': 3.0}
  assert logged[0] == (1, values)


class Read:
  """A number on the device, which records in `events` that it is read."""

  def __init__(self, events, name, value):
    self.events, self.name, self.value = events, name, value

  def __array__(self, *args, **kwargs):
    self.events.append(f'read {self.name}')
    return np.asarray(self.value)

  # These conversions would wait for the device as well, so they must not be
  # used.
  __float__ = __int__ = __bool__ = __index__ = None


def test_the_loop_reads_a_step_once_the_next_is_in_the_queue(tmp_path):
  events = []

  def step(state, batch):
    done = state.step + 1
    events.append(f'step {done}')
    found = {k: Read(events, done, x) for k, x in VALUES.items()}
    return state._replace(step=done), found

  def batches():
    for number in itertools.count(1):
      events.append(f'batch {number}')
      yield {}

  def validate(params):
    events.append('validate')
    return {'loss': 1.0}

  config = dataclasses.replace(CONFIG, steps=4, eval_every=3, save_every=9)
  loop.train(
    step_lib.State(0, {}, ()),
    config,
    step=step,
    batches=batches(),
    validate=validate,
    save=lambda state, score: events.append('save'),
    best=math.inf,
    log=lambda step, values: None,
    console=Console(file=io.StringIO()),
    stop=Stop(),
    task=Uncounted(CONFIG),
  )
  in_turn = [name for name, _ in itertools.groupby(events)]
  assert in_turn == [
    *('batch 1', 'step 1', 'batch 2', 'step 2', 'read 1'),
    *('batch 3', 'step 3', 'read 2', 'read 3', 'validate'),
    *('batch 4', 'step 4', 'read 4', 'validate', 'save'),
  ]


def test_minutes_make_a_save_due():
  clock, saved = Clock(), []

  def step(state, batch):
    clock.now += 40
    return state._replace(step=state.step + 1), VALUES

  config = dataclasses.replace(
    CONFIG, steps=7, eval_every=9, save_every=5, save_minutes=1
  )
  loop.train(
    step_lib.State(0, {}, ()),
    config,
    step=step,
    batches=itertools.repeat({}),
    validate=lambda params: {'loss': 1.0},
    save=lambda state, score: saved.append(state.step),
    best=math.inf,
    log=lambda step, values: None,
    console=Console(file=io.StringIO()),
    stop=Stop(),
    task=Uncounted(CONFIG),
    clock=clock,
  )
  assert saved == [2, 4, 5, 7]


@pytest.mark.parametrize('when', ['step', 'validation'])
def test_a_signal_saves_before_the_next_long_thing(when):
  events, stop = [], Stop()

  def happens(name):
    events.append(name)
    if name == when:
      stop.signal = 15

  def step(state, batch):
    happens('step')
    return state._replace(step=state.step + 1), VALUES

  loop.train(
    step_lib.State(0, {}, ()),
    dataclasses.replace(CONFIG, steps=3, eval_every=1, save_every=9),
    step=step,
    batches=itertools.repeat({}),
    validate=lambda params: happens('validation') or {'loss': 1.0},
    save=lambda state, score: events.append(f'save {state.step}'),
    best=math.inf,
    log=lambda step, values: None,
    console=Console(file=io.StringIO()),
    stop=stop,
    task=Uncounted(CONFIG),
  )
  save = events.index('save 1')
  assert events.pop(save) and events == ['step', 'validation']
  assert save == (1 if when == 'step' else 2) and stop.begun


class Waited(float):
  """A loss that makes the loop wait for two seconds."""

  def __new__(cls, clock):
    found = super().__new__(cls, 1.0)
    found.clock = clock
    return found

  def __float__(self):
    self.clock.now += 2
    return 1.0


@pytest.mark.parametrize('every', [1, 3])
def test_time_leaves_out_compilation_validations_and_saves(every):
  clock = Clock()
  found, shown, logged = meter(clock)
  clock.now += 100  # compilation
  for step in range(1, 7):
    found.add(step, {**VALUES, 'loss': Waited(clock)})
    if step % every == 0:
      found.flush()
      clock.now += 50  # validation and save
      found.restart()
  speeds = [values.get('tokens_per_second') for _, values in logged]
  assert speeds == [None, *5 * [4.0]]
  assert [seconds for _, seconds in shown] == [None, *5 * [2.0]]


def test_where_the_time_went():
  clock = Clock()
  found, _, logged = meter(clock)
  for step in range(1, 4):
    with found.timed('data'):
      clock.now += 1
    found.add(step, {**VALUES, 'loss': Waited(clock)})
  found.flush()
  with found.timed('save'):
    clock.now += 7
  assert found.spent('save') == {'save_seconds': 7}
  names = ('data_seconds', 'step_seconds')
  split = [[x.get(name) for name in names] for _, x in logged]
  # Metrics are read one step late, so no batch is loaded between the last two
  # reads.
  assert split == [[None, None], [1, 2], [0, 2]]
  assert found.waiting == pytest.approx(1 / 5)


def test_flops_and_their_share_of_the_peak(monkeypatch):
  clock = Clock()
  found, _, logged = meter(clock, peak=8.0)
  monkeypatch.setattr(loop.machine, 'peak_bytes', lambda: 123)
  for step in range(1, 4):
    found.add(step, {**VALUES, 'loss': Waited(clock)}, flops=6.0)
  found.flush()
  first, second, _ = (values for _, values in logged)
  assert 'flops_per_second' not in first
  assert second['flops_per_second'] == 3 and second['share_of_peak'] == 3 / 8
  assert second['peak_bytes'] == 123


def test_subspaces_are_logged_where_they_are_new():
  found, _, logged = meter()
  noted = {'w': np.array([[0.5, 0.75], [0.25, 1], [2, 2]])}
  for step, new in enumerate([True, False], 1):
    found.add(step, {**VALUES, 'subspace': noted, 'refreshed': new})
  found.flush()
  assert logged[0][1]['captured_energy'] == {'w': [0.5, 0.75]}
  assert logged[0][1]['subspace_overlap'] == {'w': [0.25, 1]}
  assert 'captured_energy' not in logged[1][1]
  assert 'refreshed' not in logged[0][1]


def looped(directory, *, steps, batches=None, profile=None):
  """Runs the loop with steps that do nothing; returns its output and log."""
  lines, console = [], Console(file=io.StringIO(), width=200)

  def step(state, batch):
    return state._replace(step=state.step + 1), VALUES

  config = dataclasses.replace(CONFIG, steps=steps, eval_every=99)
  loop.train(
    step_lib.State(0, {}, ()),
    config,
    step=step,
    batches=batches or itertools.repeat({'inputs': np.zeros((2, 3), int)}),
    validate=lambda params: {'loss': 1.0},
    save=lambda state, score: None,
    best=math.inf,
    log=lambda step, values: lines.append((step, values)),
    console=console,
    stop=Stop(),
    task=Counted(CONFIG),
    profile=profile,
  )
  return console.file.getvalue(), lines


def test_the_loop_logs_flops_validations_and_saves(tmp_path):
  _, lines = looped(tmp_path, steps=3)
  speed = lines[1][1]
  seconds = speed['data_seconds'] + speed['step_seconds']
  assert speed['flops_per_second'] == pytest.approx(6 / seconds)
  *_, validation, save = lines
  assert validation[1].keys() == {'validation_loss', 'evaluation_seconds'}
  assert save[1].keys() == {'save_seconds'} and validation[0] == save[0] == 3


def test_data_that_are_too_slow_are_named(tmp_path):
  def slow():
    while True:
      time.sleep(0.02)
      yield {'inputs': np.zeros((2, 3), int)}

  said, _ = looped(tmp_path, steps=6, batches=slow())
  assert "waiting for data: TextFiles(train='a.txt'" in said
  assert 'waiting for data' not in looped(tmp_path, steps=6)[0]


@pytest.mark.parametrize('steps', [4, 8])
def test_a_profile_is_a_trace_that_can_be_opened(steps, tmp_path):
  """The trace is also complete if the run ends within the traced steps."""
  said, _ = looped(tmp_path, steps=steps, profile=tmp_path / 'profile')
  (trace,) = (tmp_path / 'profile').rglob('perfetto_trace.json.gz')
  assert json.loads(gzip.decompress(trace.read_bytes()))['traceEvents']
  assert f'trace: {tmp_path}/profile' in said.replace('\n', '')


def test_a_loss_that_is_not_finite_names_its_step():
  found, _, logged = meter()
  found.add(7, VALUES | {'loss': float('nan')})
  with pytest.raises(FloatingPointError, match='loss is nan at step 7'):
    found.flush()
  assert not logged


class Regression(Task):
  """Linear regression, without a model file, text or tokens."""

  unit = 'examples'
  holds = ('texts',)

  def init(self, key):
    return {'w': jnp.zeros(4)}

  def loss(self, params, batch):
    error = batch['x'] @ params['w'] - batch['y']
    square = jnp.sum(batch['weights'] * error**2)
    return square / batch['weights'].size, {'square': square}

  def inputs(self):
    raise NotImplementedError

  def batches(self, data):
    random = np.random.default_rng(0)
    while True:
      x = random.normal(size=(6, 4)).astype(np.float32)
      weights = np.array([2, 1, 1, 1, 0, 0], np.float32)
      yield {'x': x, 'y': x.sum(1), 'weights': weights}

  def evaluate(self, data):
    return lambda params: {'far': float(params['w'].sum())}

  def flops(self, batch):
    return None


def test_a_second_task_needs_no_second_loop(tmp_path):
  config = dataclasses.replace(
    CONFIG, optimizer=AdamW(), microbatches=2, steps=3, eval_every=2
  )
  task = Regression(config)
  init, step = step_lib.build(config, task)
  saved = []
  path = tmp_path / 'metrics.jsonl'
  with metrics.opened(path, step=0, tensorboard=False) as log:
    state = loop.train(
      init(jax.random.key(0)),
      config,
      step=step,
      batches=task.batches(None),
      validate=task.evaluate(None),
      save=lambda state, score: saved.append(int(state.step)),
      best=math.inf,
      log=log,
      console=Console(file=io.StringIO()),
      stop=Stop(),
      task=task,
    )
  assert int(state.step) == 3 and saved == [3]
  lines = metrics.read(path)
  assert [x['step'] for x in lines if 'validation_far' in x] == [2, 3]
  first = lines[0]
  assert first['examples'] == 5
  assert first['square'] == pytest.approx(5 * first['loss'])


@pytest.mark.parametrize('module', [loop, step_lib, metrics, checkpoint])
def test_modules_of_every_task_import_no_model_and_no_text(module):
  source = inspect.getsource(module)
  assert 'models' not in source and 'train.data' not in source


def test_a_validation_is_read_once_all_of_it_is_in_the_queue():
  events = []

  def loss(params, inputs):
    events.append('queued')
    return None, {x: Read(events, x, 2.0) for x in ('nll', 'weight')}

  ones = np.ones((1, 4), np.float32)
  batch = dict.fromkeys([*INPUTS, 'bytes'], ones)
  assert perplexity(loss, {}, batches=3 * [batch])['loss'] == 1.0
  assert events[:3] == 3 * ['queued']
  assert events[3:] == 3 * ['read nll', 'read weight']


def test_perplexity_weighs_tokens_not_batches():
  def loss(scale, inputs):
    weight = inputs['weights'].sum()
    return None, {'nll': scale * weight**2, 'weight': weight}

  def batch(scored):
    weights = np.zeros((1, 4), np.float32)
    weights[0, :scored] = 1
    same = dict.fromkeys(INPUTS, weights)
    return {**same, 'bytes': np.full((1, 4), 3)}

  found = perplexity(loss, 1.0, batches=[batch(4), batch(1)])
  # There are four tokens of loss 4 and one of loss 1, of three bytes each.
  assert found['loss'] == pytest.approx(17 / 5)
  assert found['perplexity'] == pytest.approx(np.exp(17 / 5))
  assert found['bits_per_byte'] == pytest.approx(17 / np.log(2) / 15)
