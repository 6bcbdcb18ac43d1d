"""Vision transformers pass through every program."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from models import huggingface
from models.lowrank import Lora
from models.vit import VitConfig
from tests.train.program import assert_same_end, resumed, saved, trained
from tests.train.tasks import images
from train import evaluate, export, finetune, report
from train.config import Classifier
from train.data.images.corpora import ImageFolders
from train.engine import checkpoint, metrics
from train.engine.command import load
from train.engine.run import Run
from train.engine.task import task_of
from train.method import AdamW, Galore
from train.plan.__main__ import main as plan

VIT = VitConfig(
  image_size=images.SIDE,
  patch_size=4,
  width=16,
  mlp_width=32,
  num_heads=2,
  num_layers=2,
  num_labels=3,
  labels=images.NAMES,
  num_channels=1,
  mean=(0.3,),
  std=(0.3,),
  pool='cls',
  dropout=0.02,
  init_std=0.1,
)
GALORE = Galore(rank=4, gap=20, scale=1.0)
LAST = 60


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return images.write_idx(tmp_path_factory.mktemp('idx'))


@pytest.fixture(scope='module')
def config(directory):
  return images.config(VIT, GALORE, directory, steps=LAST, save_best=True)


@pytest.fixture(scope='module')
def config_path(config, tmp_path_factory):
  return images.write(tmp_path_factory.mktemp('vit') / 'vit.py', config)


@pytest.fixture(scope='module')
def run(config_path, tmp_path_factory):
  return trained(config_path, tmp_path_factory.mktemp('vit') / 'run')


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
  """A directory of transformers with the trained model."""
  where = tmp_path_factory.mktemp('vit') / 'export'
  export.main([str(run.directory), str(where)])
  return where


def logits(run, inputs):
  """Returns the logits that the run's best checkpoint computes."""
  task = task_of(run.config())
  params = checkpoint.restore_params(run.checkpoints_path, task, best=True)
  return np.asarray(task.stored_layers.logits(params, {'inputs': inputs}))


def test_it_learns(run):
  accuracy = images.values(run, 'validation_accuracy')
  assert accuracy[-1] > 0.9
  assert images.values(run, 'validation_loss')[-1] < 0.4
  assert images.values(run, 'loss')[0] > 1.0
  assert all(
    x['images'] == 12 for x in metrics.read(run.metrics_path) if 'images' in x
  )


# A DiT's run, which is quick, resumes with its noise, too.
@pytest.mark.slow
def test_a_resumed_run_is_bit_equal(run, config_path, tmp_path):
  again = resumed(run, config_path, tmp_path / 'run', LAST)
  assert_same_end(run, again)


def test_it_is_evaluated(run, capsys):
  evaluate.main([str(run.directory)])
  loss, accuracy = (
    images.values(run, f'validation_{name}')[-1]
    for name in ('loss', 'accuracy')
  )
  printed = capsys.readouterr().out
  assert f'loss {loss:.4f}, accuracy {accuracy:.4f}' in printed


def test_its_metrics_are_those_of_any_batch_size(run):
  # The last of five batches has three rows of padding.
  config = dataclasses.replace(run.config(), batch_size=5)
  task = task_of(config)
  params = checkpoint.restore_params(run.checkpoints_path, task)
  found = task.evaluate(task.held_out(run.directory))(params)
  for name in ('loss', 'accuracy'):
    expected = images.values(run, f'validation_{name}')[-1]
    assert found[name] == pytest.approx(expected, rel=1e-5), name


def test_the_best_validation_has_the_highest_accuracy(run):
  task = task_of(run.config())
  accuracy = images.values(run, 'validation_accuracy')
  assert max(accuracy) > min(accuracy)
  low, high = ({'loss': 1.0, 'accuracy': f(accuracy)} for f in (min, max))
  assert task.score(high) < task.score(low)


@pytest.mark.slow
def test_it_is_reported(run):
  report.main([str(run.directory)])
  page = run.report_path.read_text()
  last = images.values(run, 'validation_accuracy')[-1]
  assert f'validation accuracy</td><td>{last:.4f}' in page
  assert 'images per second' in page and 'blocks/mlp/up/kernel' in page


@pytest.mark.slow
def test_it_is_exported(run, exported):
  model, params = huggingface.load(exported)
  # The data type and the names of the labels are part of the format.
  assert dataclasses.replace(model, attention='auto') == VIT
  inputs, _ = images.striped(6, channels=1)
  np.testing.assert_array_equal(
    model.layers().logits(params, {'inputs': inputs}), logits(run, inputs)
  )


@pytest.mark.slow
def test_it_is_fine_tuned_from_its_export(
  run, exported, config, tmp_path, capsys
):
  model = Classifier(num_labels=3, labels=images.NAMES, dropout=0.0)
  path = images.write(
    tmp_path / 'tune.py',
    dataclasses.replace(
      config,
      model=model,
      checkpoint=str(exported),
      steps=2,
      eval_every=1,
      learning_rate=0.0,
      save_every=2,
    ),
  )
  where = tmp_path / 'run'
  assert finetune.main([path, '--run', str(where)]) == 0
  printed = capsys.readouterr().out
  # The program shows an example, and the model is the exported one.
  assert 'an image of' in printed and 'train.export' in printed
  found = images.values(Run(where), 'validation_accuracy')
  assert found == [max(images.values(run, 'validation_accuracy'))] * 2
  assert Run(where).config().model.pool == 'cls'
  export.main([str(where), str(tmp_path / 'again')])
  first, second = (
    huggingface.load(x)[1] for x in (exported, tmp_path / 'again')
  )
  jax.tree.map(np.testing.assert_array_equal, first, second)
  assert (tmp_path / 'again' / 'preprocessor_config.json').is_file()


@pytest.mark.slow
def test_layer_wise_it_is_the_same(config_path, run, tmp_path):
  found = trained(config_path, tmp_path / 'run', '--update', 'Layerwise')
  for name in ('loss', 'grad_norm', 'validation_loss'):
    np.testing.assert_allclose(
      images.values(found, name)[:20],
      images.values(run, name)[:20],
      rtol=2e-3,
      err_msg=name,
    )
  again = resumed(found, config_path, tmp_path / 'again', LAST)
  assert_same_end(found, again)


@pytest.mark.slow
def test_with_layers_in_8_bits_it_learns(config_path, tmp_path, capsys):
  found = trained(
    config_path,
    tmp_path / 'run',
    *('--update', 'Layerwise', '--update.weights', 'int8'),
    *('--optimizer', 'Galore8bit', '--optimizer.rank', '4'),
    *('--optimizer.scale', '1.0', '--optimizer.gap', '20'),
  )
  assert images.values(found, 'validation_accuracy')[-1] > 0.9
  kernel = saved(found)[0].params['blocks']['mlp']['up']['kernel']
  assert {x.dtype.name for x in jax.tree.leaves(kernel)} == {'float32', 'uint8'}
  capsys.readouterr()
  evaluate.main([str(found.directory)])
  last = images.values(found, 'validation_accuracy')[-1]
  assert f'accuracy {last:.4f}' in capsys.readouterr().out
  export.main([str(found.directory), str(tmp_path / 'export')])
  assert huggingface.read_config(tmp_path / 'export').num_labels == 3


@pytest.mark.slow
def test_factors_are_trained_and_merged(exported, config, tmp_path):
  path = images.write(
    tmp_path / 'lora.py',
    dataclasses.replace(
      config,
      model=Classifier(num_labels=3, labels=images.NAMES),
      checkpoint=str(exported),
      adapter=Lora(rank=2),
      optimizer=AdamW(),
      steps=8,
      eval_every=8,
      save_every=8,
    ),
  )
  where = tmp_path / 'run'
  assert finetune.main([path, '--run', str(where)]) == 0
  state, _ = saved(Run(where))
  _, before = huggingface.load(exported)
  block = state.params['blocks']['attention']['q']
  np.testing.assert_array_equal(
    block['kernel'], before['blocks']['attention']['q']['kernel']
  )
  assert any(x.any() for name, x in block.items() if 'lora' in name)
  export.main([str(where), str(tmp_path / 'export')])
  model, params = huggingface.load(tmp_path / 'export')
  inputs, _ = images.striped(6, channels=1)
  np.testing.assert_allclose(
    model.layers().logits(params, {'inputs': inputs}),
    logits(Run(where), inputs),
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.slow
def test_folders_of_images_are_learned(config, tmp_path):
  folders = images.write_folders(tmp_path / 'images', number=60)
  corpus = ImageFolders(folders, holdout=0.2, channels=1)
  path = images.write(
    tmp_path / 'folders.py', dataclasses.replace(config, corpus=corpus)
  )
  found = trained(path, tmp_path / 'run')
  assert images.values(found, 'validation_accuracy')[-1] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['data', 'fsdp', 'tensor'])
def test_two_devices_train_as_one_does(config_path, tmp_path, axis):
  one = images.first_steps(config_path, tmp_path / 'one')
  two = images.first_steps(config_path, tmp_path / 'two', f'--mesh.{axis}', '2')
  np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vit_fashion', 'vit_s16_imagenet'])
def test_the_configs_are_estimated(name, capsys):
  assert plan([f'configs/{name}.py', '--estimate', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  task = task_of(load(f'configs/{name}.py'))
  size = sum(4 * x.size for x in jax.tree.leaves(task.shapes))
  assert found['parameter_bytes'] + found['vocabulary_bytes'] == size
  assert found['moment_bytes'] < size
  assert found['batch'] == task.describe_batch()


@pytest.mark.card
def test_it_is_compiled_for_an_absent_gpu(config_path, capsys):
  assert plan([config_path, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['fits'] and found['total_bytes'] > found['parameter_bytes']
