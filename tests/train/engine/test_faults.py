"""A short version of the fault-injection benchmark, `tests.bench.faults`."""

import pytest

from tests.bench import faults
from tests.train.program import write_config
from train.engine.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


@pytest.fixture(scope='module')
def program(tmp_path_factory):
  config = write_config(tmp_path_factory.mktemp('config'))
  return faults.Program(config, steps=3 * faults.SAVE_EVERY)


@pytest.fixture(scope='module')
def whole(program, tmp_path_factory):
  run = Run(tmp_path_factory.mktemp('whole') / 'run')
  program.finish(run)
  return run


def test_eight_kills_change_no_bit_and_cost_no_checkpoint(program, tmp_path):
  long = faults.Program(program.config, steps=8 * faults.STEPS_A_KILL)
  whole, run = Run(tmp_path / 'whole'), Run(tmp_path / 'killed')
  long.finish(whole)
  assert sum(faults.kills(long, run, 8)['moments'].values()) == 8
  faults.equal(run, whole)


@pytest.mark.parametrize('name', [x for x in faults.FAULTS if 'SIGTERM' in x])
def test_a_signal_loses_nothing(program, whole, tmp_path, name):
  said = faults.FAULTS[name](program, Run(tmp_path / 'run'), whole)
  assert 'SIGTERM: ' in said
