"""Runs the program in-process, as a user would from the command line."""

import os
import signal

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.train.program import lines, saved, write_config
from train import evaluate, loop, pretrain, sample
from train import step as step_lib
from train.run import Run


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of 8 steps that nothing has stopped."""
  directory = tmp_path_factory.mktemp('finished')
  config = write_config(directory)
  run = Run(directory / 'run')
  assert pretrain.main([config, '--run', str(run.directory)]) == 0
  return config, run


def test_a_run_leaves_its_files(finished):
  _, run = finished
  names = {path.name for path in run.directory.iterdir()}
  assert names == {
    *('config.json', 'tokenizer.model', 'metrics.jsonl', 'curves.png'),
    'checkpoints',
  }
  steps = [line['step'] for line in lines(run) if 'loss' in line]
  assert steps == list(range(1, 9))
  validated = [x['step'] for x in lines(run) if 'validation_loss' in x]
  assert validated == [4, 8]
  rates = [line['learning_rate'] for line in lines(run) if 'loss' in line]
  np.testing.assert_allclose(rates[:3], [0, 0.005, 0.01], rtol=1e-6)


def test_the_table_comes_before_the_first_step(tmp_path, capsys):
  config = write_config(tmp_path)
  pretrain.main([config, '--run', str(tmp_path / 'run'), '--steps', '1'])
  out = capsys.readouterr().out
  assert out.index('optimizer state:') < out.index('step 1:')
  assert out.count('sample ') == 3


@pytest.mark.parametrize(
  'stop',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_resume_is_bit_equal_to_no_stop(finished, tmp_path, monkeypatch, stop):
  config, whole = finished
  run = Run(tmp_path / 'run')
  args = [config, '--run', str(run.directory)]
  show = loop.Meter.add

  def interrupt(meter, step, metrics):
    if step == 4:
      os.kill(os.getpid(), stop)
    show(meter, step, metrics)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Meter, 'add', interrupt)
    assert pretrain.main(args) == 0
  assert int(saved(run)[0].step) == 4
  assert pretrain.main([*args, '--resume']) == 0
  (ours, position), (theirs, its_position) = saved(run), saved(whole)
  chex.assert_trees_all_equal(ours, theirs)
  assert position == its_position
  assert lines(run) == lines(whole)


@pytest.mark.slow
def test_resume_drops_what_came_after_the_checkpoint(
  finished, tmp_path, monkeypatch
):
  config, whole = finished
  run = Run(tmp_path / 'run')
  args = [config, '--run', str(run.directory)]
  show = loop.Meter.add

  def crash(meter, step, metrics):
    show(meter, step, metrics)
    if step == 8:
      raise OSError('the machine is gone')

  with monkeypatch.context() as patch:
    patch.setattr(loop.Meter, 'add', crash)
    assert pretrain.main(args) == 1
  assert [line['step'] for line in lines(run)][-1] == 7
  assert pretrain.main([*args, '--resume']) == 0
  assert lines(run) == lines(whole)


def test_a_loss_that_is_not_a_number_ends_the_run(
  tmp_path, monkeypatch, capsys
):
  config = write_config(tmp_path)
  run = Run(tmp_path / 'run')
  make = step_lib.make_step

  def broken(*args, **kwargs):
    step = make(*args, **kwargs)

    def after(state, batch):
      state, metrics = step(state, batch)
      return state, {**metrics, 'loss': metrics['loss'] / (7 - state.step)}

    return after

  monkeypatch.setattr(step_lib, 'make_step', broken)
  assert pretrain.main([config, '--run', str(run.directory)]) == 1
  err = capsys.readouterr().err
  assert 'loss is inf at step 7' in err and 'Traceback' not in err
  assert int(saved(run)[0].step) == 5


@pytest.mark.slow
@pytest.mark.parametrize('error', [OSError, ValueError])
def test_a_save_that_fails_leaves_the_one_before(
  finished, tmp_path, monkeypatch, capsys, error
):
  config, whole = finished
  run = Run(tmp_path / 'run')
  args = [config, '--run', str(run.directory)]
  write = ocp.CheckpointManager.save

  def full(manager, step, **kwargs):
    if step == 8:
      (manager.directory / '8.orbax-checkpoint-tmp').mkdir()
      raise error('No space left on device')
    write(manager, step, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', full)
    assert pretrain.main(args) == 1
  err = capsys.readouterr().err
  assert 'cannot save step 8: No space left on device' in err
  assert int(saved(run)[0].step) == 5
  assert pretrain.main([*args, '--resume']) == 0
  chex.assert_trees_all_equal(saved(run)[0], saved(whole)[0])


def test_evaluate_prints_what_the_run_printed(finished, capsys):
  _, run = finished
  evaluate.main([str(run.directory), '--batches', '2'])
  line = lines(run)[-1]
  assert evaluate.describe(line) in capsys.readouterr().out


def test_sample_continues_a_prompt(finished, capsys):
  _, run = finished
  args = [str(run.directory), '--prompt', 'the old dog', '--num-tokens', '40']
  sample.main(args)
  first = capsys.readouterr().out
  sample.main(args)
  assert first.startswith('the old dog') and len(first) > len('the old dog\n')
  assert capsys.readouterr().out == first
  sample.main([*args, '--seed', '1'])
  assert capsys.readouterr().out != first
