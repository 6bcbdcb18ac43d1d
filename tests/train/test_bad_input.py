"""Each mistake prints one clear message, exits with 2, and writes nothing."""

import re

import pytest

from tests.train.program import shared_steps, write_config
from train import evaluate, pretrain, sample
from train.engine import training
from train.engine.run import Run, numbered


def start(config, monkeypatch):
  """Writes the first files of a run without training."""
  with monkeypatch.context() as patch, shared_steps():
    patch.setattr(training, 'train_and_report', lambda *args, **options: 0)
    assert pretrain.main([config]) == 0


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """Returns the path of a config, of which all runs share their functions."""
  return write_config(tmp_path_factory.mktemp('config'))


@pytest.fixture
def config(written, tmp_path, monkeypatch):
  """Returns the path of a config, with an empty working directory.

  Tests check that the program creates no files there.
  """
  monkeypatch.chdir(tmp_path)
  return written


def refusal(capsys, main, args):
  with pytest.raises(SystemExit) as stop:
    main(args)
  assert stop.value.code == 2
  out, err = capsys.readouterr()
  assert out == '' and err.startswith('error: ') and err.count('\n') == 1
  return err


def contents(directory):
  return sorted(str(path) for path in directory.rglob('*'))


@pytest.mark.parametrize(
  'args, message',
  [
    (['--corpus.train', 'no/*.txt'], "no file matches 'no/.*txt'"),
    (['--corpus.train', 'none.txt'], 'none.txt'),
    (['--corpus.train', 'empty.txt'], 'empty.txt'),
    (['--optimizer.rank', '0'], 'rank must be .* got 0'),
    (['--optimizer.rank', '-3'], 'rank must be .* got -3'),
    (['--optimizer.rank', '16'], 'rank 16 projects no parameter'),
    (
      ['--optimizer.rank', '17', '--optimizer.targets', '.*/q/.*'],
      r'rank must be in 1..16 for blocks/attention/q/kernel',
    ),
    (['--optimizer.targets', '.*/nothing'], 'nothing.* match no parameter'),
    (['--model.vocab-size', '9000'], '9000'),
    (['--tokenizer', 'none.model'], 'none.model'),
    (['--optimizer', 'Sgd'], "one of Galore, .* got 'Sgd'"),
    (['--resume'], 'no run of tiny'),
    (['--resume', '--run', 'runs/none'], 'none is not a run'),
    (['--resume', '--run', '.'], '. is not a run'),
    (['--branch'], 'no run of tiny'),
    (['--run', '.'], '. exists and is no run; name another --run'),
    (['--batch-size', '0'], 'batch_size must be at least 1, got 0'),
    (['--model.num-layers', '0'], 'num_layers must be at least 1, got 0'),
    (['--model.width', '0'], 'width must be at least 1, got 0'),
    (['--model.num-heads', '0'], 'num_heads must be at least 1, got 0'),
    (['--learning-rate', 'inf'], 'learning_rate must be finite .* got inf'),
    (['--learning-rate', 'nan'], 'learning_rate must be finite .* got nan'),
    (['--final', '-3'], 'final is a share .* got -3'),
    (
      ['--update', 'Layerwise', '--update.slices', '0'],
      'update.slices must be at least 1, got 0',
    ),
  ],
)
def test_training(config, args, message, tmp_path, capsys):
  (tmp_path / 'empty.txt').write_text('\n\n \n')
  before = contents(tmp_path)
  err = refusal(capsys, pretrain.main, [config, *args])
  assert re.search(message, err), err
  assert contents(tmp_path) == before


def test_unknown_config_file(config, tmp_path, capsys):
  del config
  before = contents(tmp_path)
  assert 'none.py' in refusal(capsys, pretrain.main, ['none.py'])
  assert contents(tmp_path) == before


def test_unknown_config_key(config, tmp_path, capsys):
  before = contents(tmp_path)
  with pytest.raises(SystemExit) as stop:
    pretrain.main([config, '--stepz', '3'])
  assert stop.value.code == 2
  assert 'valid keys: --run' in capsys.readouterr().err
  assert contents(tmp_path) == before


@pytest.mark.parametrize(
  'text, message',
  [
    ('config = (', r"line 1: SyntaxError: '\(' was never closed"),
    ('raise RuntimeError("one\\ntwo")', 'line 1: RuntimeError: one two'),
  ],
)
def test_a_config_file_that_is_broken(config, tmp_path, capsys, text, message):
  del config
  (tmp_path / 'broken.py').write_text(f'{text}\n')
  before = contents(tmp_path)
  err = refusal(capsys, pretrain.main, ['broken.py'])
  assert re.search(
    rf'broken\.py, {message}' if 'line' in message else message, err
  )
  assert contents(tmp_path) == before


def test_tensorboard_without_the_extra(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tensorboardX', None)
  before = contents(tmp_path)
  err = refusal(capsys, pretrain.main, [config, '--tensorboard'])
  assert "pip install 'galore-optax[tensorboard]'" in err
  assert contents(tmp_path) == before


@pytest.mark.parametrize(
  'main, args', [(evaluate.main, []), (sample.main, ['--prompt', 'a'])]
)
def test_a_directory_that_is_not_a_run(config, main, args, tmp_path, capsys):
  del config
  err = refusal(capsys, main, [str(tmp_path), *args])
  assert 'is not a run' in err


@pytest.mark.parametrize(
  'main, args, message',
  [
    (evaluate.main, ['--batches', '0'], '--batches must be at least 1, got 0'),
    (sample.main, ['--num-tokens', '0'], '--num-tokens must be .* 1, got 0'),
    (sample.main, ['--top-k', '0'], '--top-k must be at least 1, got 0'),
    (sample.main, ['--temperature', '-5'], '--temperature must be .* got -5'),
    (sample.main, ['--temperature', 'nan'], '--temperature must be .* got nan'),
  ],
)
def test_numbers_that_mean_nothing(main, args, message, capsys):
  prompt = ['--prompt', 'a'] if main is sample.main else []
  # The run does not exist, so the arguments must be checked before it is read.
  err = refusal(capsys, main, ['runs/none', *prompt, *args])
  assert re.search(message, err), err


@pytest.mark.parametrize(
  'main, args',
  [
    (evaluate.main, []),
    pytest.param(sample.main, ['--prompt', 'a'], marks=pytest.mark.slow),
  ],
)
def test_a_run_without_a_checkpoint(
  config, main, args, capsys, tmp_path, monkeypatch
):
  start(config, monkeypatch)
  capsys.readouterr()
  before = contents(tmp_path)
  err = refusal(capsys, main, ['runs/tiny', *args])
  assert 'no checkpoint in runs/tiny/checkpoints' in err
  assert contents(tmp_path) == before
  err = refusal(capsys, pretrain.main, [config, '--branch'])
  assert 'no checkpoint in runs/tiny/checkpoints to start from' in err


def test_a_run_that_exists(config, capsys, monkeypatch):
  start(config, monkeypatch)
  capsys.readouterr()
  err = refusal(capsys, pretrain.main, [config, '--run', 'runs/tiny'])
  assert 'runs/tiny exists; continue it with --resume' in err


def test_runs_are_numbered(config, tmp_path, monkeypatch):
  for _ in range(2):
    start(config, monkeypatch)
  runs = tmp_path / 'runs'
  assert {x.name for x in runs.iterdir()} == {'tiny', 'tiny-2'}
  # A directory without a config is left over from a start that failed, so
  # --resume must skip it.
  (runs / 'tiny-3').mkdir()
  assert sorted(numbered('tiny')) == [1, 2, 3]
  found = []
  monkeypatch.setattr(
    training,
    'train_and_report',
    lambda setup, *args, **options: found.append(setup.run),
  )
  pretrain.main([config, '--resume'])
  assert found[0].directory.name == Run(runs / 'tiny-2').directory.name
