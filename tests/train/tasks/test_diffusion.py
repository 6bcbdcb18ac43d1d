"""Diffusion models pass through every program, and draw images."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from models import denoiser, diffusion
from models.diffusion import Diffusion, Sampler
from models.dit import DitConfig
from models.unet import UnetConfig
from models.vit import VitConfig
from tests.train.program import assert_same_end, resumed, saved, trained
from tests.train.tasks import images
from train import evaluate, pretrain, report, sample
from train.engine import metrics
from train.engine.command import load
from train.engine.run import Run
from train.engine.task import task_of
from train.method import Galore
from train.plan.__main__ import main as plan
from train.tasks import diffusion as tasks

GALORE = Galore(rank=4, gap=20, scale=1.0)
UNET = UnetConfig(
  image_size=images.SIDE,
  num_channels=1,
  num_classes=3,
  width=8,
  multipliers=(1, 2),
  num_blocks=1,
  attention_sizes=(),
  groups=4,
  dropout=0.02,
  diffusion=Diffusion(prediction='v'),
)
DIT = DitConfig(
  image_size=images.SIDE,
  num_channels=1,
  num_classes=3,
  patch_size=4,
  width=16,
  num_heads=2,
  num_layers=2,
)
LAST = 40


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return images.write_idx(tmp_path_factory.mktemp('idx'))


def config(model, directory, **changes):
  options = dict(steps=LAST, eval_every=20, save_every=20, average=0.9)
  return images.config(model, GALORE, directory, **options | changes)


@pytest.fixture(scope='module')
def unet_path(directory, tmp_path_factory):
  path = tmp_path_factory.mktemp('unet') / 'unet.py'
  return images.write(path, config(UNET, directory))


@pytest.fixture(scope='module')
def dit_path(directory, tmp_path_factory):
  path = tmp_path_factory.mktemp('dit') / 'dit.py'
  return images.write(path, config(DIT, directory))


@pytest.fixture(
  scope='module', params=['dit', pytest.param('unet', marks=pytest.mark.slow)]
)
def config_path(request, unet_path, dit_path):
  return {'unet': unet_path, 'dit': dit_path}[request.param]


@pytest.fixture(scope='module')
def run(config_path, tmp_path_factory):
  return trained(config_path, tmp_path_factory.mktemp('diffusion') / 'run')


@pytest.fixture(scope='module')
def classifier(directory, tmp_path_factory):
  """A run of a classifier of the same images."""
  model = VitConfig(
    image_size=images.SIDE,
    patch_size=4,
    width=8,
    mlp_width=16,
    num_heads=2,
    num_layers=1,
    num_labels=3,
    num_channels=1,
    mean=(0.3,),
    std=(0.3,),
  )
  where = tmp_path_factory.mktemp('vit') / 'run'
  found = images.config(model, GALORE, directory, steps=4, eval_every=4)
  path = images.write(where.with_suffix('.py'), found)
  assert pretrain.main([path, '--run', str(where)]) == 0
  return Run(where)


def picture(path):
  return np.asarray(Image.open(path))


def draw(run, output, *options):
  """Draws images with the program; returns the grid."""
  sample.main(
    [str(run.directory), '--output', str(output), '--steps', '4', *options]
  )
  return picture(output)


def test_it_learns(run):
  losses = images.values(run, 'loss')
  assert np.mean(losses[-10:]) < 0.8 * losses[0]
  first, last = images.values(run, 'validation_loss')
  assert last < first
  levels = [
    images.values(run, f'validation_loss_{k}')[-1]
    for k in range(1, tasks.NUM_LEVELS + 1)
  ]
  assert last == pytest.approx(np.mean(levels))
  assert all(
    x['images'] == 12 for x in metrics.read(run.metrics_path) if 'images' in x
  )


def test_a_resumed_run_is_bit_equal(run, config_path, tmp_path):
  again = resumed(run, config_path, tmp_path / 'run', LAST)
  assert_same_end(run, again)
  first, second = (x.images_path.read_bytes() for x in (run, again))
  assert first == second


def test_it_is_evaluated(run, capsys):
  evaluate.main([str(run.directory)])
  printed = capsys.readouterr().out
  for name in ('loss', 'loss_1', f'loss_{tasks.NUM_LEVELS}'):
    last = images.values(run, f'validation_{name}')[-1]
    assert f'{name.replace("_", " ")} {last:.4f}' in printed


def test_it_is_reported_with_its_samples(run):
  grid = picture(run.images_path)
  rows = tasks.NUM_SAMPLES // tasks.COLUMNS
  assert grid.shape == tuple(
    n * (images.SIDE + 2) - 2 for n in (rows, tasks.COLUMNS)
  )
  report.main([str(run.directory)])
  page = run.report_path.read_text()
  assert 'src="data:image/png;base64,' in page
  last = images.values(run, 'validation_loss_2')[-1]
  assert f'validation loss 2</td><td>{last:.4f}' in page


@pytest.mark.slow
def test_the_average_is_drawn(run, tmp_path):
  state, _ = saved(run)
  task = task_of(run.config())
  by_weights = {}
  for name in ('params', 'average'):
    layers = task.evaluated_layers
    draw_images = denoiser.make_sampler(layers, Sampler(steps=4), 64)
    found = draw_images(
      getattr(state, name),
      jax.random.fold_in(jax.random.key(0), 0),
      jnp.arange(64) % 3,
    )
    by_weights[name] = np.asarray(diffusion.to_pixels(found))
  expected = by_weights['average']
  assert (expected != by_weights['params']).any()
  grid = draw(run, tmp_path / 'drawn.png')
  np.testing.assert_array_equal(
    grid[: images.SIDE, : images.SIDE], expected[0, :, :, 0]
  )


@pytest.mark.slow
def test_options_of_the_sampler(run, tmp_path, capsys):
  plain = draw(run, tmp_path / 'plain.png')
  again = draw(run, tmp_path / 'again.png')
  np.testing.assert_array_equal(plain, again)
  assert (tmp_path / 'plain.png').read_bytes() == (
    tmp_path / 'again.png'
  ).read_bytes()
  for number, options in enumerate(
    [
      ('--label', '1'),
      ('--guidance', '3'),
      ('--eta', '1'),
      ('--seed', '1'),
    ]
  ):
    found = draw(run, tmp_path / f'{number}.png', *options)
    assert found.shape == plain.shape
    assert (found != plain).any(), options
  # With one label, and the same noise, the images of that class are the same.
  of_class = draw(run, tmp_path / 'of_class.png', '--label', '0')
  side = images.SIDE
  np.testing.assert_array_equal(of_class[:side, :side], plain[:side, :side])
  few = draw(run, tmp_path / 'few.png', '--num-images', '3')
  assert few.shape == (side, 3 * (side + 2) - 2)
  np.testing.assert_array_equal(few, plain[:side, : few.shape[1]])
  capsys.readouterr()
  sample.main([str(run.directory), '--steps', '2', '--best'])
  assert 'drawn.png' in capsys.readouterr().out
  assert (run.directory / 'drawn.png').is_file()


@pytest.mark.slow
def test_the_distance_in_features_of_a_classifier(
  run, classifier, tmp_path, capsys
):
  distances = []
  for options in (
    ('--classifier', str(classifier.directory), str(run.directory)),
    (str(run.directory), '--classifier', str(classifier.directory)),
  ):
    capsys.readouterr()
    output = str(tmp_path / 'drawn.png')
    sample.main([*options, '--steps', '4', '--output', output])
    printed = capsys.readouterr().out
    assert '(22 drawn and held-out images)' in printed
    (found,) = re.findall(r'Frechet distance: (\S+)', printed)
    distances.append(float(found))
  assert distances[0] == distances[1] > 0


class Zeros(denoiser.Layers):
  """A network whose output is zero."""

  def module(self):
    raise NotImplementedError

  def predict(self, params, x_t, times_B, labels_B=None):
    return params * jnp.ones_like(x_t)


def hand_made(batch_size, *, number=22):
  """Returns the held-out losses of a network whose output is a constant."""
  shown, labels = images.striped(number, channels=1)
  model = dataclasses.replace(UNET, num_classes=None).without_dropout()
  whole = range(0, number, batch_size)

  def batches():
    for first in whole:
      rows = slice(first, first + batch_size)
      padding = max(0, first + batch_size - number)
      # The pixels of the padding must not count.
      batch = {
        'inputs': np.pad(
          shown[rows],
          [(0, padding)] + [(0, 0)] * 3,
          constant_values=255,
        ),
        'targets': np.pad(labels[rows], (0, padding)),
        'weights': np.pad(np.ones(len(shown[rows]), np.float32), (0, padding)),
      }
      yield batch

  def sums(params, batch):
    return tasks.level_sums(model, Zeros(model), params, batch)

  rows = [*tasks.with_times(model, batches())]
  return tasks.losses(jax.jit(sums), 0.5, batches=lambda: rows), rows


def test_the_loss_by_level_is_that_of_each_image():
  found, rows = hand_made(7)
  batch = {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
  drawn = denoiser.draw(
    UNET.without_dropout(), batch | {'labels': batch['levels']}
  )
  cost = np.mean((np.asarray(drawn.target) - 0.5) ** 2, axis=(1, 2, 3))
  steps = UNET.diffusion.steps
  level = drawn.times * tasks.NUM_LEVELS // steps
  means = [cost[:22][level[:22] == k].mean() for k in range(tasks.NUM_LEVELS)]
  for k, mean in enumerate(means, 1):
    assert found[f'loss_{k}'] == pytest.approx(mean, rel=1e-5)
  assert found['loss'] == pytest.approx(np.mean(means), rel=1e-5)


@pytest.mark.parametrize('batch_size', [5, 22, 64])
def test_the_loss_by_level_is_that_of_any_batch_size(batch_size):
  expected, _ = hand_made(1)
  found, _ = hand_made(batch_size)
  assert found == pytest.approx(expected, rel=1e-5)


def test_few_images_do_not_reach_every_level():
  found, _ = hand_made(2, number=2)
  assert np.isfinite(found['loss'])
  assert np.isnan(found[f'loss_{tasks.NUM_LEVELS}'])


@pytest.mark.slow
def test_a_dit_is_the_same_layer_by_layer(dit_path, tmp_path):
  found = {}
  for update in ('WholeTree', 'Layerwise'):
    where = tmp_path / update
    options = ['--run', str(where), '--update', update]
    assert pretrain.main([dit_path, *options]) == 0
    found[update] = Run(where)
  for name in ('loss', 'grad_norm', 'validation_loss'):
    whole, layerwise = (images.values(x, name)[:20] for x in found.values())
    np.testing.assert_allclose(layerwise, whole, rtol=2e-3, err_msg=name)
  losses = images.values(found['Layerwise'], 'loss')
  assert np.mean(losses[-5:]) < losses[0]
  layerwise = found['Layerwise']
  again = resumed(layerwise, dit_path, tmp_path / 'again', LAST)
  assert_same_end(layerwise, again)
  draw(layerwise, tmp_path / 'drawn.png', '--guidance', '2')


@pytest.mark.slow
@pytest.mark.parametrize('axis', ['data', 'fsdp'])
def test_two_devices_train_as_one_does(config_path, tmp_path, axis):
  one = images.first_steps(config_path, tmp_path / 'one')
  two = images.first_steps(config_path, tmp_path / 'two', f'--mesh.{axis}', '2')
  np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
def test_a_run_of_two_devices_is_drawn_on_one(config_path, run, tmp_path):
  where = tmp_path / 'run'
  options = ['--run', str(where), '--mesh.fsdp', '2']
  assert pretrain.main([config_path, *options]) == 0
  found = draw(Run(where), tmp_path / 'drawn.png').astype(int)
  expected = draw(run, tmp_path / 'expected.png')
  assert np.abs(found - expected).max() < 30


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['ddpm_fashion', 'dit_fashion', 'dit_xl_imagenet']
)
def test_the_configs_are_estimated(name, capsys):
  assert plan([f'configs/{name}.py', '--estimate', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  task = task_of(load(f'configs/{name}.py'))
  size = sum(x.dtype.itemsize * x.size for x in jax.tree.leaves(task.shapes))
  assert found['parameter_bytes'] + found['vocabulary_bytes'] == size
  assert found['batch'] == task.describe_batch()


@pytest.mark.card
@pytest.mark.parametrize('model', ['unet', 'dit'])
def test_they_are_compiled_for_an_absent_gpu(
  model, unet_path, dit_path, capsys
):
  path = {'unet': unet_path, 'dit': dit_path}[model]
  assert plan([path, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['fits'] and found['total_bytes'] > found['parameter_bytes']
