import os
import signal

import pytest

from train import evaluate, loop


@pytest.fixture
def interrupts():
  """A job in a shell's background starts with this signal ignored."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('interrupts')
def test_the_second_signal_gets_the_handler_back():
  with loop.stop_signals() as stop:
    assert not stop.is_set()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.is_set()
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_metrics_are_read_one_step_late():
  shown = []
  meter = loop.Meter(lambda *args: None, lambda step, _: shown.append(step))
  values = {'loss': 1.0, 'tokens': 8.0, 'learning_rate': 0.1}
  meter.add(1, values)
  assert shown == []
  meter.add(2, values)
  assert shown == [1]
  meter.flush()
  assert shown == [1, 2]


def test_a_loss_that_is_not_finite_names_its_step():
  meter = loop.Meter(lambda *args: None, lambda *args: None)
  meter.add(7, {'loss': float('nan')})
  with pytest.raises(FloatingPointError, match='loss is nan at step 7'):
    meter.flush()


def test_perplexity_weighs_tokens_not_batches():
  sums = lambda params, batch: {
    'nll': batch['weights'].sum() * params,
    'weight': batch['weights'].sum(),
  }
  import numpy as np

  def batch(scored):
    weights = np.zeros((1, 4), np.float32)
    weights[0, :scored] = 1
    same = dict.fromkeys(evaluate.INPUTS, weights)
    return {**same, 'bytes': np.full((1, 4), 3)}

  found = evaluate.evaluate(
    lambda scale, inputs: sums(scale * inputs['weights'].sum(), inputs),
    1.0,
    [batch(4), batch(1)],
  )
  # Four tokens of loss 4 and one of loss 1, of three bytes each.
  assert found['validation_loss'] == pytest.approx(17 / 5)
  assert found['validation_perplexity'] == pytest.approx(np.exp(17 / 5))
  assert found['validation_bits_per_byte'] == pytest.approx(17 / np.log(2) / 15)
