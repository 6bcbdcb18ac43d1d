"""What the loop shows and logs, and how long it says that takes."""

import itertools

import numpy as np
import pytest

from train import loop
from train.task import INPUTS, perplexity

VALUES = {'loss': 1.0, 'weight': 8.0, 'learning_rate': 0.1, 'correct': 3.0}


class Clock:
  """Tells what time a test says it is."""

  now = 0.0

  def __call__(self):
    return self.now


def meter(clock=None):
  shown, logged = [], []
  found = loop.Meter(
    lambda step, values, seconds: shown.append((step, seconds)),
    lambda step, values: logged.append((step, values)),
    'tokens',
    clock or itertools.count().__next__,
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
  # A batch's weight by its unit; what else a model sums by its own name.
  values = {'loss': 1.0, 'tokens': 8.0, 'learning_rate': 0.1, 'correct': 3.0}
  assert logged[0] == (1, values)


class Waited(float):
  """A loss that is ready two seconds after the one before."""

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
  clock.now += 100  # compiling
  for step in range(1, 7):
    found.add(step, {**VALUES, 'loss': Waited(clock)})
    if step % every == 0:
      found.flush()
      clock.now += 50  # validating, saving
      found.restart()
  speeds = [values.get('tokens_per_second') for _, values in logged]
  assert speeds == [None, *5 * [4.0]]
  assert [seconds for _, seconds in shown] == [None, *5 * [2.0]]


def test_a_loss_that_is_not_finite_names_its_step():
  found, _, logged = meter()
  found.add(7, {'loss': float('nan')})
  with pytest.raises(FloatingPointError, match='loss is nan at step 7'):
    found.flush()
  assert not logged


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
  # Four tokens of loss 4 and one of loss 1, of three bytes each.
  assert found['loss'] == pytest.approx(17 / 5)
  assert found['perplexity'] == pytest.approx(np.exp(17 / 5))
  assert found['bits_per_byte'] == pytest.approx(17 / np.log(2) / 15)
