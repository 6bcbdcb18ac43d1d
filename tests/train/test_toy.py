"""A task that is defined in tests/ only passes through every program."""

import json

import numpy as np
import pytest

from tests.train.program import assert_same_end, resumed, shared_steps
from tests.train.toy import StripeImages, StripeNet
from train import evaluate, finetune, pretrain, report, sample
from train.config import Config
from train.engine import metrics
from train.engine.config_json import from_json, to_json
from train.engine.run import Run
from train.plan.__main__ import main as plan

CONFIG = """
from tests.train.toy import StripeImages, StripeNet
from train.config import Config
from train.method import Galore

config = Config(
  model=StripeNet(),
  corpus=StripeImages(),
  optimizer=Galore(rank=4, gap=3),
  steps=8,
  learning_rate=0.03,
  batch_size=12,
  eval_every=4,
  save_every=4,
)
"""


@pytest.fixture(scope='module')
def config_path(tmp_path_factory):
  path = tmp_path_factory.mktemp('toy') / 'toy.py'
  path.write_text(CONFIG)
  return str(path)


@pytest.fixture(scope='module')
def run(config_path, tmp_path_factory):
  where = tmp_path_factory.mktemp('toy') / 'run'
  with shared_steps():
    assert pretrain.main([config_path, '--run', str(where)]) == 0
  return Run(where)


def test_it_trains(run):
  lines = metrics.read(run.metrics_path)
  losses = [x['validation_loss'] for x in lines if 'validation_loss' in x]
  assert losses[-1] < losses[0] < np.log(3) + 0.3
  assert all(x['images'] == 12 for x in lines if 'images' in x)
  assert run.curves_path.stat().st_size > 1000


def test_a_resumed_run_is_bit_equal(run, config_path, tmp_path):
  assert_same_end(run, resumed(run, config_path, tmp_path / 'run', 8))


def test_its_config_is_stored_with_its_modules(run):
  stored = json.loads(run.config_path.read_text())
  assert stored['model']['kind'] == 'tests.train.toy:StripeNet'
  config = run.config()
  assert (config.model, config.corpus) == (StripeNet(), StripeImages())
  for name in (
    'absent:StripeNet',
    'tests.train.toy:Absent',
    'json:JSONDecoder',
  ):
    stored['model']['kind'] = name
    with pytest.raises(TypeError, match=name):
      from_json(Config, stored)


def test_a_class_of_a_config_file_cannot_be_stored():
  kind = type('Local', (StripeNet,), {'__module__': '<run_path>'})
  with pytest.raises(ValueError, match='Local must be defined in a module'):
    to_json(kind())


def test_its_options_are_on_the_command_line(config_path, capsys):
  with pytest.raises(SystemExit) as stop:
    pretrain.main([config_path, '--help'])
  assert stop.value.code == 0
  printed = capsys.readouterr().out
  assert '--model.width' in printed and '--corpus.size' in printed


def test_it_is_evaluated(run, capsys):
  evaluate.main([str(run.directory)])
  last = metrics.read(run.metrics_path)
  values = [x['validation_loss'] for x in last if 'validation_loss' in x]
  assert f'loss {values[-1]:.4f}' in capsys.readouterr().out


def test_it_is_reported(run):
  report.main([str(run.directory)])
  page = run.report_path.read_text()
  assert 'images per second' in page and 'hidden/kernel' in page


def test_it_is_estimated(config_path, capsys):
  assert plan([config_path, '--estimate', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  weights = 4 * (30 * 24 + 24 * 3)
  assert found['parameter_bytes'] + found['vocabulary_bytes'] == weights
  assert found['batch'] == '12 images' and found['sequence_length'] is None


@pytest.mark.card
def test_it_is_compiled_for_an_absent_gpu(config_path, capsys):
  assert plan([config_path, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['fits'] and found['attention'] == 'none'
  assert found['total_bytes'] > found['parameter_bytes']


def test_what_it_cannot_do_is_one_line(run, config_path, capsys):
  for program, args, message in (
    (sample.main, [str(run.directory)], 'must hold a model that makes samples'),
    (finetune.main, [config_path], 'fine-tuning starts from a checkpoint'),
    (
      pretrain.main,
      [config_path, '--corpus', 'Chitchat'],
      'the corpus of a StripeNet must hold stripes, got Chitchat, which holds '
      'texts',
    ),
    (
      pretrain.main,
      [config_path, '--update', 'Layerwise'],
      'update Layerwise needs a model whose layers are stacked',
    ),
  ):
    with pytest.raises(SystemExit) as stop:
      program(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
