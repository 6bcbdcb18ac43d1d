"""Runs the pretraining program in-process, with command-line arguments."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

from models import huggingface
from tests.train.program import (
  SOME_KERNELS,
  lines,
  saved,
  shared_steps,
  write_config,
)
from train import evaluate, export, pretrain, sample
from train.data import tokenizer as tokenizer_lib
from train.engine import loop, metrics, training
from train.engine import step as step_lib
from train.engine.run import Run


@pytest.fixture(scope='module')
def printed(tmp_path_factory):
  """Returns a completed run of 8 steps with its config and its output."""
  directory = tmp_path_factory.mktemp('finished')
  config = write_config(directory, SOME_KERNELS)
  run = Run(directory / 'run')
  with shared_steps(), contextlib.redirect_stdout(io.StringIO()) as out:
    assert pretrain.main([config, '--run', str(run.directory)]) == 0
  return config, run, out.getvalue()


@pytest.fixture
def finished(printed):
  """Returns the config and the run of `printed`, without its output."""
  return printed[:2]


@pytest.fixture
def short(monkeypatch):
  """Skips samples and plots at the end of a run, which `finished` covers."""
  monkeypatch.setattr(pretrain, 'show_samples', lambda *args: None)
  monkeypatch.setattr(metrics, 'plot', lambda *args: None)


def validation(run):
  """Returns the last validation as the loop and `train.evaluate` print it."""
  line = lines(run)[-1]
  return metrics.describe(
    {name: line[f'validation_{name}'] for name in VALIDATED}
  )


VALIDATED = ('loss', 'perplexity', 'bits_per_byte')


def test_a_run_leaves_its_files(finished):
  _, run = finished
  names = {path.name for path in run.directory.iterdir()}
  assert names == {
    *('config.json', 'tokenizer.json', 'tokenizer_config.json'),
    *('metrics.jsonl', 'curves.png', 'samples.json', 'checkpoints'),
  }
  steps = [line['step'] for line in lines(run) if 'loss' in line]
  assert steps == list(range(1, 9))
  validated = [x['step'] for x in lines(run) if 'validation_loss' in x]
  assert validated == [4, 8]
  rates = [line['learning_rate'] for line in lines(run) if 'loss' in line]
  np.testing.assert_allclose(rates[:3], [0, 0.005, 0.01], rtol=1e-6)
  # The log also contains the sums that the model returns, such as the negative
  # log-likelihood.
  for line in lines(run)[:3]:
    assert line['tokens'] == 4 * 24
    assert line['nll'] == pytest.approx(line['loss'] * line['tokens'])


def test_the_table_and_the_device_come_before_the_first_step(printed):
  *_, out = printed
  order = [
    'optimizer state:',
    'device: ',
    'step 4: validation: loss',
    'sample ',
  ]
  places = [out.index(text) for text in order]
  assert places == sorted(places)
  assert out.count('sample ') == 3


@pytest.mark.parametrize(
  'stop',
  [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures('short')
def test_resume_is_bit_equal_to_no_stop(
  finished, tmp_path, monkeypatch, capfd, stop
):
  config, whole = finished
  run = Run(tmp_path / 'run')
  args = [config, '--run', str(run.directory)]
  show = loop.Meter.add

  def interrupt(meter, step, metrics, *rest):
    if step == 4:
      os.kill(os.getpid(), stop)
    show(meter, step, metrics, *rest)

  with monkeypatch.context() as patch, shared_steps():
    patch.setattr(loop.Meter, 'add', interrupt)
    assert pretrain.main(args) == 128 + stop
  out, err = capfd.readouterr()
  assert int(saved(run)[0].step) == 4
  assert f'{stop.name}: will save after this step' in err
  # The printed command must resume the run exactly as printed.
  assert 'stopped and saved at step 4; to go on:' in out
  line = out[out.index('python -m train.pretrain') :].splitlines()[0]
  with shared_steps():
    assert pretrain.main(shlex.split(line)[3:]) == 0
  (ours, position), (theirs, its_position) = saved(run), saved(whole)
  chex.assert_trees_all_equal(ours, theirs)
  assert position == its_position
  assert lines(run) == lines(whole)


def test_an_export_has_no_files_of_the_run(finished, tmp_path):
  """A run has a config.json too, and a tokenizer that is its own."""
  _, run = finished
  out = tmp_path / 'exported'
  export.main([str(run.directory), str(out)])
  fields = json.loads((out / 'config.json').read_text())
  assert fields['model_type'] == 'llama'
  model, params = huggingface.load(out)
  trained = run.config().resolved_model
  assert (model.width, model.vocab_size) == (trained.width, trained.vocab_size)
  state, _ = saved(run)
  chex.assert_trees_all_equal(params, state.params)
  ids = [tokenizer_lib.load(x).encode('hello') for x in (out, run.directory)]
  np.testing.assert_array_equal(*ids)


@pytest.mark.slow
@pytest.mark.usefixtures('short')
def test_resume_drops_log_lines_after_the_checkpoint(
  finished, tmp_path, monkeypatch
):
  config, whole = finished
  run = Run(tmp_path / 'run')
  args = [config, '--run', str(run.directory)]
  show = loop.Meter.add

  def crash(meter, step, metrics, *rest):
    show(meter, step, metrics, *rest)
    if step == 8:
      raise OSError('the machine is gone')

  with monkeypatch.context() as patch:
    patch.setattr(loop.Meter, 'add', crash)
    assert pretrain.main(args) == 1
  assert [line['step'] for line in lines(run)][-1] == 7
  assert pretrain.main([*args, '--resume']) == 0
  assert lines(run) == lines(whole)


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
  """Copies the completed run to runs/, next to its config."""
  config, run = finished
  monkeypatch.chdir(tmp_path)
  shutil.copytree(run.directory, 'runs/tiny')
  return config, Run(tmp_path / 'runs' / 'tiny')


@pytest.mark.slow
def test_resume_goes_on_with_the_runs_own_values(copied, monkeypatch, tmp_path):
  _, run = copied
  # A resumed run uses its stored config, even if the config file is broken.
  edited = tmp_path / 'tiny.py'
  edited.write_text('config = (')
  before = run.config()
  found = []
  monkeypatch.setattr(
    training,
    'train_and_report',
    lambda setup, *args, **options: found.append(setup) or 0,
  )
  assert pretrain.main([str(edited), '--resume']) == 0
  assert found[0].config == before == run.config()
  free = ['--save-every', '3', '--eval-every', '5', '--eval-batches', '1']
  assert pretrain.main([str(edited), '--resume', *free]) == 0
  assert found[1].run.directory.name == 'tiny'
  assert found[1].config == run.config()
  assert run.config().save_every == 3 and run.config().steps == before.steps


def test_resume_refuses_other_values(copied, capsys):
  config, run = copied
  args = [config, '--resume', '--steps', '10', '--learning-rate', '0.005']
  files = sorted(run.directory.parent.rglob('*'))
  with pytest.raises(SystemExit) as stop:
    pretrain.main(args)
  assert stop.value.code == 2
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1
  assert 'steps is 8 in the run and 10 now' in err
  assert 'learning_rate is 0.01 in the run and 0.005 now' in err
  assert 'add --branch to start a new run' in err
  assert sorted(run.directory.parent.rglob('*')) == files


@pytest.mark.slow
@pytest.mark.usefixtures('short')
def test_a_branch_takes_other_values(copied, capsys):
  config, run = copied
  # The message of a refused resume recommends this command.
  args = [config, '--resume', '--steps', '10', '--learning-rate', '0.005']
  assert pretrain.main([*args, '--branch']) == 0
  branch = Run(run.directory.with_name('tiny-2'))
  assert branch.config().steps == 10 and run.config().steps == 8
  steps = [line['step'] for line in lines(branch) if 'loss' in line]
  assert steps == list(range(1, 11))
  assert lines(branch)[:8] == lines(run)[:8]
  assert int(saved(branch)[0].step) == 10 and int(saved(run)[0].step) == 8
  # The branch is now the newest run.
  with pytest.raises(SystemExit):
    pretrain.main([config, '--resume', '--steps', '8'])
  assert 'steps is 10 in the run and 8 now' in capsys.readouterr().err


@pytest.mark.parametrize(
  'args, message',
  [
    (['--optimizer.rank', '2'], 'optimizer.rank is 4 in the run and 2 now'),
    pytest.param(
      ['--optimizer', 'AdamW'],
      "optimizer is 'Galore' in the run and 'AdamW' now",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      ['--learning-rate', '0.1'],
      'steps must be more than 8, which .* got 8',
      marks=pytest.mark.slow,
    ),
    (['--tokenizer', 'other.model'], "tokenizer is None .* 'other.model' now"),
  ],
)
def test_changes_that_a_branch_cannot_make(copied, capsys, args, message):
  config, run = copied
  files = sorted(run.directory.parent.rglob('*'))
  with pytest.raises(SystemExit) as stop:
    pretrain.main([config, '--branch', *args])
  assert stop.value.code == 2
  err = capsys.readouterr().err
  assert re.search(message, err) and err.count('\n') == 1
  assert sorted(run.directory.parent.rglob('*')) == files


def test_a_checkpoint_of_another_layout_ends_with_the_remedy(copied, capsys):
  config, run = copied
  # The state in the checkpoint is that of another optimizer, as if another
  # version of the library had written it.
  path = run.config_path
  data = json.loads(path.read_text())
  data['optimizer'] = {'kind': 'AdamW'}
  path.write_text(json.dumps(data))
  with pytest.raises(SystemExit) as stop:
    pretrain.main([config, '--resume'])
  assert stop.value.code == 2
  err = capsys.readouterr().err
  assert err.startswith('error: cannot read the checkpoint')
  assert 'another version' in err and 'without --resume' in err
  assert err.count('\n') == 1
  # The parameters have the same layout, so they can still be evaluated.
  evaluate.main([str(run.directory), '--batches', '1'])


@pytest.mark.slow
@pytest.mark.usefixtures('short')
def test_resume_from_the_newest_that_is_sound(copied, finished, capsys):
  config, run = copied
  before = lines(run)
  damaged = next((run.checkpoints_path / '8' / 'params' / 'd').iterdir())
  damaged.write_bytes(damaged.read_bytes()[:-1])
  run.config_path.write_bytes(b'\xff' * 9)
  with run.metrics_path.open('a') as file:
    file.write('garbage\n')
  evaluate.main([str(run.directory)])
  sample.main([str(run.directory), '--prompt', 'the', '--num-tokens', '2'])
  err = capsys.readouterr().err
  assert err.count('taken is checkpoint 5') == 2
  assert f'{run.config_path} is no configuration' in err
  assert pretrain.main([config, '--resume']) == 0
  err = capsys.readouterr().err
  assert f'checkpoint 8 is damaged (params/d/{damaged.name}' in err
  assert 'no metrics: ' in err
  assert (run.directory / 'damaged' / '8').is_dir()
  chex.assert_trees_all_equal(saved(run), saved(finished[1]))
  assert lines(run) == before


@pytest.mark.slow
@pytest.mark.parametrize('stop', [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_stopped(finished, tmp_path, stop):
  config, _ = finished
  run = Run(tmp_path / 'run')
  command = [sys.executable, '-m', 'train.pretrain', config]
  command += ['--run', str(run.directory), '--steps', '100000']
  process = subprocess.Popen(
    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  while not metrics.read(run.metrics_path):
    assert process.poll() is None
  process.send_signal(stop)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 128 + stop
  assert f'{stop.name}: will save' in err and 'Traceback' not in err
  assert int(saved(run)[0].step) > 0


@pytest.mark.slow
@pytest.mark.optimized
def test_resume_after_sigkill_is_bit_equal_to_no_stop(finished, tmp_path):
  config, _ = finished
  whole, killed = Run(tmp_path / 'whole'), Run(tmp_path / 'killed')

  def start(run, *options):
    command = [sys.executable, '-m', 'train.pretrain', config]
    command += ['--run', str(run.directory), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)

  options = ['--steps', '200', '--eval-every', '100', '--save-every', '40']
  assert start(whole, *options).wait() == 0
  process = start(killed, *options)
  while len(metrics.read(killed.metrics_path)) < 100:
    assert process.poll() is None
  process.kill()
  assert process.wait() == -signal.SIGKILL
  assert start(killed, '--resume').wait() == 0
  chex.assert_trees_all_equal(saved(killed), saved(whole))
  assert lines(killed) == lines(whole)


@pytest.mark.slow
def test_a_process_that_is_stopped_while_it_imports(finished):
  config, _ = finished
  process = subprocess.Popen(
    [sys.executable, '-X', 'importtime', '-m', 'train.pretrain', config],
    stderr=subprocess.PIPE,
    text=True,
  )
  while 'train.engine.signals' not in (line := process.stderr.readline()):
    assert line
  while 'jax' not in process.stderr.readline():
    pass
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=120)
  assert process.returncode == 130
  assert 'SIGINT: stopped' in err and 'Traceback' not in err


@pytest.mark.slow
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

  monkeypatch.chdir(tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(step_lib, 'make_step', broken)
    args = [config, '--run', str(run.directory), '--max-skipped', '0']
    assert pretrain.main(args) == 1
  err = capsys.readouterr().err
  assert 'loss is inf at step 7' in err and 'Traceback' not in err
  assert f'last sound checkpoint is {run.checkpoints_path / "5"};' in err
  assert int(saved(run)[0].step) == 5
  # The printed command must work exactly as printed, up to the first step.
  begun = []
  monkeypatch.setattr(
    training,
    'train_and_report',
    lambda setup, state, *_, **__: begun.append(state) or 0,
  )
  assert pretrain.main(shlex.split(err.splitlines()[-1])[3:]) == 0
  assert int(begun[0].step) == 5
  assert Run(tmp_path / 'runs' / 'tiny').config().learning_rate == 0.005


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


def test_an_error_of_a_full_disk_names_the_command_to_go_on(
  finished, monkeypatch, capsys
):
  config, run = finished

  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(training.loop, 'train', full)
  assert pretrain.main([config, '--run', str(run.directory), '--resume']) == 1
  *_, said, what, advice = capsys.readouterr().err.splitlines()
  assert 'No space left on device' in said
  assert 'checkpoints are as they were: make room' in what
  assert advice.endswith(f'--run {run.directory} --resume')


def test_evaluate_prints_the_same_validation_as_the_run(finished, capsys):
  _, run = finished
  evaluate.main([str(run.directory), '--batches', '2'])
  assert validation(run) in capsys.readouterr().out


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
