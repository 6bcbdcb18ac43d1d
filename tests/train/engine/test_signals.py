"""Signal handling in separate processes, which import no heavy packages."""

import os
import signal
import subprocess
import sys
import time

import pytest

from train.engine import signals

BOTH = pytest.mark.parametrize('number', signals.SIGNALS)

BEFORE = """
from train.engine import signals
signals.end_quietly()
print('ready', flush=True)
import time
time.sleep(60)
"""

TRAINING = """
import sys, time
from train.engine import signals
with signals.asked() as stop:
  stop.begun = True
  print('ready', flush=True)
  while stop.signal is None:
    time.sleep(0.01)
print('saved')
sys.exit(stop.code)
"""


FOR_EVER = """
import time
from train.engine import signals
with signals.asked() as stop:
  stop.begun = BEGUN
  print('ready', flush=True)
  while True:
    time.sleep(1)
"""


def started(code):
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'ready\n'
  return process


@BOTH
def test_before_training_a_signal_ends_the_program(number):
  process = started(BEFORE)
  process.send_signal(number)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 128 + number
  assert err == f'{signals.name(number)}: stopped, with nothing to save\n'


@BOTH
def test_in_training_a_signal_is_acknowledged_and_the_step_goes_on(number):
  process = started(TRAINING)
  process.send_signal(number)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 128 + number and out == 'saved\n'
  assert err.strip().startswith(f'{signals.name(number)}: will save after')


def test_a_second_signal_ends_the_program_at_once():
  process = started(FOR_EVER.replace('BEGUN', 'True'))
  process.send_signal(signal.SIGTERM)
  assert process.stderr.readline() == '\n'
  assert 'SIGTERM' in process.stderr.readline()
  process.send_signal(signal.SIGINT)
  process.communicate(timeout=30)
  assert process.returncode == 130


@BOTH
def test_while_the_first_step_compiles_the_first_signal_does(number):
  process = started(FOR_EVER.replace('BEGUN', 'False'))
  process.send_signal(number)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 128 + number
  line = f'{signals.name(number)}: stopped, with nothing new to save'
  assert err.strip() == line


def test_an_answer_does_not_wait_for_the_interpreter(capfd):
  with signals.asked() as stop:
    stop.begun = True
    # Python's C code writes the signal number to this descriptor at once.
    # Python handlers would wait until a compiled step returns.
    os.write(signal.set_wakeup_fd(-1), bytes([signal.SIGTERM]))
    limit = time.monotonic() + 30
    while stop.signal is None and time.monotonic() < limit:
      time.sleep(0.001)
  assert stop.code == 143
  assert 'SIGTERM: will save after this step' in capfd.readouterr().err


def test_handlers_before_come_back():
  before = [signal.getsignal(number) for number in signals.SIGNALS]
  with signals.asked() as stop:
    pass
  assert stop.code == 0
  assert [signal.getsignal(number) for number in signals.SIGNALS] == before
