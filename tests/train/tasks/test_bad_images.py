"""Each mistake with images prints one clear message and exits with 2."""

import dataclasses
import re
import sys

import jax
import pytest

from models import huggingface
from models.encoder import EncoderConfig
from models.llama import LlamaConfig
from tests.train.program import write_config
from tests.train.tasks import images
from tests.train.tasks.test_diffusion import DIT, GALORE, UNET
from tests.train.tasks.test_image_classification import VIT
from tests.train.test_bad_input import contents, refusal, start
from train import evaluate, export, finetune, pretrain, sample
from train.config import Classifier
from train.data.images.corpora import ImageFolders
from train.engine import checkpoint, training
from train.plan.__main__ import main as plan

# Together these tests take half a minute.
pytestmark = pytest.mark.slow

MODELS = {
  'vit': VIT,
  'mean': dataclasses.replace(VIT, pool='mean'),
  'unet': UNET,
  'free': dataclasses.replace(DIT, num_classes=None),
  'dit': DIT,
}


@pytest.fixture(scope='module')
def idx(tmp_path_factory):
  return images.write_idx(tmp_path_factory.mktemp('idx'))


@pytest.fixture
def config_of(tmp_path, idx, monkeypatch):
  """Writes configs into an empty working directory."""
  monkeypatch.chdir(tmp_path)

  def write(name, **changes):
    found = images.config(MODELS[name], GALORE, idx)
    return images.write(
      tmp_path / f'{name}.py', dataclasses.replace(found, **changes)
    )

  return write


def saved(path, where):
  """Writes a run with an untrained checkpoint; returns its directory."""
  setup = training.prepare([path, '--run', str(where)])
  state = training.begin(setup)
  with checkpoint.opened(setup.run.checkpoints_path) as manager:
    checkpoint.save(manager, state, setup.batches, setup.config)
  return str(where)


class Runs(dict):
  """Untrained runs of each model by name, which are made on first use."""

  def __init__(self, idx, where):
    super().__init__()
    self._idx, self._where = idx, where

  def __missing__(self, name):
    found = images.config(MODELS[name], GALORE, self._idx)
    path = images.write(self._where / f'{name}.py', found)
    self[name] = saved(path, self._where / name)
    return self[name]


@pytest.fixture(scope='module')
def runs(idx, tmp_path_factory):
  return Runs(idx, tmp_path_factory.mktemp('runs'))


def check(capsys, main, args, message):
  err = refusal(capsys, main, args)
  assert re.search(message, err), err


@pytest.mark.parametrize(
  'name, args, message',
  [
    (
      'vit',
      ['--model.image-size', '12'],
      r'images must have the shape \(12, 12, 1\) of the model, got \(8, 8, 1\)',
    ),
    ('dit', ['--model.image-size', '12'], r'shape \(12, 12, 1\) of the model'),
    (
      'vit',
      ['--model.num-channels', '3'],
      'mean must have one number for each of 3',
    ),
    ('unet', ['--model.num-channels', '3'], r'shape \(8, 8, 3\) of the model'),
    ('unet', ['--model.num-channels', '2'], r'channels must be 1 .*, got 2'),
    (
      'vit',
      ['--model.labels', 'None', '--model.num-labels', '2'],
      'num_labels must be at least 3, .* in the corpus, got 2',
    ),
    (
      'dit',
      ['--model.num-classes', '2'],
      'num_classes must be at least 3, .* in the corpus, got 2',
    ),
    (
      'vit',
      ['--model.labels', 'right', 'middle', 'left'],
      'labels must be the classes of the corpus in order',
    ),
    (
      'vit',
      ['--corpus', 'Chitchat'],
      'corpus of a VitConfig must hold images, got Chitchat, which holds texts',
    ),
    ('unet', ['--corpus', 'Chitchat'], 'corpus of a UnetConfig must hold ima'),
    ('dit', ['--corpus', 'Chitchat'], 'corpus of a DitConfig must hold images'),
    ('vit', ['--model.patch-size', '3'], 'image_size must be a multiple of pa'),
    ('dit', ['--model.patch-size', '3'], 'image_size must be a multiple of pa'),
    ('unet', ['--model.groups', '3'], 'groups must divide the channels'),
    ('unet', ['--update', 'Layerwise'], 'needs a model whose layers are stack'),
    ('dit', ['--batch-size', '0'], 'batch_size must be at least 1, got 0'),
    ('vit', ['--corpus.directory', 'none'], 'no train-labels.* in none'),
    ('vit', ['--corpus.augment.crop', '-1'], 'crop must be at least 0 pixels'),
  ],
)
def test_training(config_of, name, args, message, tmp_path, capsys):
  path = config_of(name)
  before = contents(tmp_path)
  check(capsys, pretrain.main, [path, *args], message)
  assert contents(tmp_path) == before


def test_images_for_a_language_model(config_of, tmp_path, capsys):
  path = write_config(tmp_path)
  message = 'corpus of a LlamaConfig must hold .*, got IdxImages, which holds i'
  check(capsys, pretrain.main, [path, '--corpus', 'IdxImages'], message)


def spoil(folder):
  """Truncates an image of a folder; returns its path."""
  image = next(folder.rglob('*.png'))
  image.write_bytes(image.read_bytes()[:40])
  return image


def test_an_unreadable_image(config_of, tmp_path, capsys):
  folders = images.write_folders(tmp_path / 'images')
  image = spoil(tmp_path / 'images' / 'left')
  corpus = ImageFolders(folders, folders, channels=1)
  path = config_of('vit', corpus=corpus)
  before = contents(tmp_path)
  message = f'{image}: Pillow cannot read it.*set corpus.skip_unreadable'
  check(capsys, pretrain.main, [path], message)
  assert contents(tmp_path) == before


def test_an_image_that_is_unreadable_when_it_is_trained_on(
  config_of, tmp_path, capsys
):
  # With a size, no header is read when the corpus is opened.
  folders = images.write_folders(tmp_path / 'images')
  image = spoil(tmp_path / 'images' / 'left')
  corpus = ImageFolders(folders, folders, channels=1, size=images.SIDE)
  path = config_of('vit', corpus=corpus)
  assert pretrain.main([path]) == 1
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and error.startswith(f'error: {image}: Pillow')
  assert 'corpus.skip_unreadable' in error
  options = ['--corpus.skip-unreadable', '--steps', '2', '--run', 'sound']
  assert pretrain.main([path, *options]) == 0


@pytest.mark.parametrize(
  'folders, message',
  [
    ((), 'images has no folders: put the images of each class into a folder'),
    (('empty',), 'empty has no image: file names must end in one of'),
  ],
)
def test_folders_without_images(config_of, tmp_path, capsys, folders, message):
  for name in ('.', *folders):
    (tmp_path / 'images' / name).mkdir(parents=True)
  path = config_of('vit', corpus=ImageFolders('images', channels=1))
  check(capsys, pretrain.main, [path], message)


@pytest.fixture
def directories(tmp_path):
  """Directories of transformers with other kinds of models."""
  shared = dict(width=8, mlp_width=12, num_heads=2, num_layers=1)
  models = {
    'encoder': EncoderConfig(40, **shared, num_positions=8, num_labels=3),
    'llama': LlamaConfig(40, **shared),
    'vit': VIT,
  }
  found = {}
  for name, model in models.items():
    params = jax.jit(model.layers().init)(jax.random.key(0))
    found[name] = str(tmp_path / name)
    huggingface.save(found[name], model, params)
  return found


@pytest.mark.parametrize(
  'name, kind, message',
  [
    ('vit', 'encoder', 'has a EncoderConfig, for which .* got VitConfig'),
    ('vit', 'llama', 'has a LlamaConfig, for which .* got VitConfig'),
    ('unet', 'vit', 'has a VitConfig, for which .* got UnetConfig'),
    ('dit', 'llama', 'has a LlamaConfig, for which .* got DitConfig'),
  ],
)
def test_a_checkpoint_of_another_model(
  config_of, directories, name, kind, message, capsys
):
  path = config_of(name, checkpoint=directories[kind])
  check(capsys, finetune.main, [path], message)


def test_a_classifier_of_another_kind(config_of, directories, capsys):
  model = Classifier(num_labels=3)
  path = config_of('vit', model=model, checkpoint=directories['encoder'])
  message = 'corpus of a .* must hold labelled texts, got IdxImages'
  check(capsys, finetune.main, [path], message)
  path = config_of('vit', model=model, checkpoint=directories['llama'])
  check(capsys, finetune.main, [path], 'has a LlamaConfig, for which')
  path = config_of('vit', model=model)
  check(capsys, finetune.main, [path], 'name a directory .* with --checkpoint')
  for name in ('vit', 'dit'):
    path = config_of(name)
    check(capsys, finetune.main, [path], 'fine-tuning starts from a checkpoint')
  model = Classifier(num_labels=2)
  path = config_of('vit', model=model, checkpoint=directories['vit'])
  check(capsys, finetune.main, [path], 'num_labels must be at least 3')


@pytest.mark.parametrize(
  'name, message',
  [
    ('unet', 'a UnetConfig has no checkpoints of transformers'),
    ('dit', 'a DitConfig has no checkpoints of transformers'),
    ('mean', "must have pool='cls' .* got pool='mean'"),
  ],
)
def test_export(runs, name, message, tmp_path, capsys, monkeypatch):
  where = tmp_path / 'export'
  # The error comes before the weights are read.
  monkeypatch.setattr(checkpoint, 'restore_params', None)
  check(capsys, export.main, [runs[name], str(where)], message)
  assert not where.exists()


@pytest.mark.parametrize(
  'name, args, message',
  [
    ('vit', [], 'must hold a model that makes samples, got VitConfig'),
    ('dit', ['--label', '3'], r'--label must be in 0..2 for this model, got 3'),
    ('dit', ['--label', '-1'], r'--label must be in 0..2 .* got -1'),
    ('free', ['--label', '0'], '--label must be absent for this model, got 0'),
    ('free', ['--guidance', '2'], 'guidance needs .* num_classes, got .*2.0'),
    ('dit', ['--guidance', '-1'], 'guidance must be finite and not negative'),
    ('dit', ['--eta', '2'], r'eta is a share in \[0, 1\], got 2.0'),
    ('dit', ['--steps', '0'], 'steps must be at least 1, got 0'),
    ('dit', ['--steps', '2000'], 'steps must be at most .* 1000, got 2000'),
    ('dit', ['--num-images', '0'], '--num-images must be at least 1, got 0'),
    ('dit', ['--num-measured', '1'], '--num-measured must be at least 2'),
    ('dit', ['--seed', '-1'], '--seed must be at least 0, got -1'),
    ('dit', ['--output', 'no/a.png'], 'there is no directory no; make it'),
    ('dit', ['--output', '.'], '--output must be a file, got the directory'),
    ('dit', ['--classifier', 'none'], 'none is not a run'),
    ('dit', ['--classifier', '{free}'], 'must be the run of an image class'),
    ('dit', ['--classifier', '{directory}'], 'must be the run of an image cl'),
  ],
)
def test_sampling(
  runs, directories, name, args, message, monkeypatch, tmp_path, capsys
):
  monkeypatch.chdir(tmp_path)
  places = {'free': runs['free'], 'directory': directories['vit']}
  before = contents(tmp_path)
  args = [runs[name], *(x.format(**places) for x in args)]
  check(capsys, sample.main, args, message)
  assert contents(tmp_path) == before


def test_sampling_of_other_models(runs, directories, tmp_path, capsys):
  for args, message in (
    ([directories['vit']], 'model that makes samples, got VitConfig'),
    (
      [runs['dit'], '--classifier', str(tmp_path)],
      'not a run',
    ),
  ):
    check(capsys, sample.main, args, message)


def test_a_classifier_of_other_images(config_of, runs, tmp_path, capsys):
  folder = images.write_idx(tmp_path / 'large', side=12)
  model = dataclasses.replace(VIT, image_size=12)
  corpus = images.config(VIT, GALORE, folder).corpus
  path = config_of('vit', model=model, corpus=corpus)
  where = saved(path, tmp_path / 'classifier')
  message = r'must read images of \(8, 8, 1\), got \(12, 12, 1\)'
  check(capsys, sample.main, [runs['dit'], '--classifier', where], message)


@pytest.mark.parametrize('option', ['--text', '--choices'])
@pytest.mark.parametrize('name', ['vit', 'dit'])
def test_texts_for_a_model_of_images(runs, option, name, tmp_path, capsys):
  file = tmp_path / 'a.jsonl'
  file.write_text('{"question": "1", "choices": ["1", "2"], "answer": 0}\n')
  message = 'must hold a model that writes text, got'
  check(capsys, evaluate.main, [runs[name], option, str(file)], message)


def test_without_pillow(config_of, runs, tmp_path, capsys, monkeypatch):
  for name in ('PIL', 'PIL.Image', 'PIL.ExifTags', 'PIL.ImageOps'):
    monkeypatch.setitem(sys.modules, name, None)
  path = config_of('dit')
  before = contents(tmp_path)
  message = r'needs? the package Pillow.*galore-optax\[images\]'
  check(capsys, pretrain.main, [path], message)
  check(capsys, sample.main, [runs['dit']], message)
  assert contents(tmp_path) == before
  # idx files and the training of a classifier do not need it.
  start(config_of('vit'), monkeypatch)
  capsys.readouterr()
  scale = ['--corpus.augment.crop', '0', '--corpus.augment.scale', '0.5', '1']
  check(capsys, pretrain.main, [config_of('vit'), *scale], message)


def test_planning(config_of, capsys):
  path = config_of('dit')
  args = [path, '--estimate', '--model.patch-size', '3']
  check(capsys, plan, args, 'image_size must be a multiple of patch_size')
