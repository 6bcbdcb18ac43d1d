"""Tests the noise of a training batch, the loss, and sampling from a model."""

import dataclasses
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import denoiser
from models.denoiser import DenoiserConfig
from models.diffusion import Diffusion, Sampler
from tests.rounding import assert_close

B = 6


class _Scale(nn.Module):
  """A network of one weight: the output is the weight times x_t."""

  config: DenoiserConfig

  @nn.compact
  def predict(self, x_t, times_B, labels_B):
    output = self.param('w', nn.initializers.ones, ()) * x_t
    if labels_B is None:
      return output
    return output + labels_B.astype(jnp.float32)[:, None, None, None]

  def __call__(self, batch):
    drawn = denoiser.draw(self.config, batch)
    output = self.predict(drawn.x_t, drawn.times, drawn.labels)
    return denoiser.score(output, drawn, batch['weights'])


@dataclasses.dataclass(frozen=True)
class _Layers(denoiser.Layers):
  def module(self):
    return _Scale(self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Config(DenoiserConfig):
  attention_shapes: ClassVar[list[tuple[int, int, int]]] = []

  def layers(self, *, read=None, intercept=None):
    return _Layers(self, read, intercept)


def _config(**changes):
  return _Config(image_size=3, num_channels=2, **changes)


def _batch(rows=B, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'inputs': rng.integers(0, 256, (rows, 3, 3, 2), dtype=np.uint8),
    'labels': rng.integers(0, 4, rows, dtype=np.int32),
    'noise': rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
    'weights': np.ones(rows, np.float32),
  }


@functools.cache
def _draw(config):
  return jax.jit(functools.partial(denoiser.draw, config))


def _unweighted(batch):
  """Returns the arrays of a batch that a draw reads."""
  return {name: batch[name] for name in ('inputs', 'labels', 'noise')}


@pytest.mark.parametrize('prediction', ['epsilon', 'v'])
def test_a_drawn_batch_is_images_and_noise(prediction):
  diffusion = Diffusion(steps=20, prediction=prediction)
  batch = _batch()
  drawn = _draw(_config(diffusion=diffusion))(_unweighted(batch))
  same = dataclasses.replace(diffusion, prediction='epsilon')
  epsilon = _draw(_config(diffusion=same))(_unweighted(batch)).target
  alpha, sigma = (x[drawn.times][:, None, None, None] for x in diffusion.levels)
  x_0 = np.float64(batch['inputs']) / 127.5 - 1
  epsilon = np.float64(epsilon)
  assert_close(drawn.x_t, alpha * x_0 + sigma * epsilon, 5)
  if prediction == 'v':
    assert_close(drawn.target, alpha * epsilon - sigma * x_0, 5)
  assert drawn.labels is None


def test_a_row_is_drawn_from_its_key_only():
  diffusion = Diffusion(steps=20, label_dropout=0.5)
  config = _config(num_classes=4, diffusion=diffusion)
  batch = _unweighted(_batch(rows=30))
  whole = _draw(config)(batch)
  part = _draw(config)({name: x[3:20] for name, x in batch.items()})
  expected = jax.tree.map(lambda x: x[3:20], whole)
  jax.tree.map(np.testing.assert_array_equal, part, expected)
  other = _draw(config)(batch | {'noise': batch['noise'][::-1]})
  assert np.abs(other.target - whole.target).min() > 0


def test_times_and_noise_have_their_distributions():
  config = _config(num_classes=4, diffusion=Diffusion(steps=4))
  batch = _unweighted(_batch(rows=4000, seed=1))
  drawn = _draw(config)(batch)
  # Four standard errors of a share of 1/4, and of a share of 1/10.
  shares = np.bincount(drawn.times, minlength=4) / 4000
  np.testing.assert_allclose(shares, 0.25, rtol=0, atol=4 * 0.0069)
  dropped = np.asarray(drawn.labels) == 4
  assert abs(dropped.mean() - 0.1) < 4 * 0.0048
  kept = np.asarray(drawn.labels)[~dropped]
  np.testing.assert_array_equal(kept, batch['labels'][~dropped])
  # 72,000 numbers have a mean with a standard error of 0.004.
  assert abs(drawn.target.mean()) < 0.016
  assert abs(drawn.target.std() - 1) < 0.016
  # Which labels are dropped does not depend on the time.
  late = np.asarray(drawn.times) >= 2
  assert abs(dropped[late].mean() - dropped[~late].mean()) < 4 * 0.0095


def test_given_times_replace_only_the_times():
  config = _config(diffusion=Diffusion(steps=20))
  batch = _unweighted(_batch())
  times = np.arange(B, dtype=np.int32)
  drawn = _draw(config)(batch)
  fixed = _draw(config)(batch | {'times': times})
  np.testing.assert_array_equal(fixed.times, times)
  np.testing.assert_array_equal(fixed.target, drawn.target)
  again = _draw(config)(batch | {'times': np.asarray(drawn.times)})
  jax.tree.map(np.testing.assert_array_equal, again, drawn)


def test_evaluation_keeps_all_labels():
  config = _config(num_classes=4, diffusion=Diffusion(label_dropout=0.5))
  batch = _unweighted(_batch(rows=50))
  found = _draw(config.without_dropout())(batch)
  np.testing.assert_array_equal(found.labels, batch['labels'])
  trained = _draw(config)(batch)
  assert np.mean(trained.labels == 4) > 0.2
  np.testing.assert_array_equal(found.x_t, trained.x_t)


def test_floats_are_images_between_minus_one_and_one():
  config, batch = _config(), _unweighted(_batch())
  floats = np.float32(batch['inputs']) / np.float32(127.5) - 1
  found = _draw(config)(batch | {'inputs': floats})
  assert_close(found.x_t, _draw(config)(batch).x_t, 4)


@pytest.mark.parametrize('min_snr', [None, 2.0])
def test_the_loss_is_the_weighted_squared_error(min_snr):
  diffusion = Diffusion(steps=20, min_snr=min_snr, prediction='v')
  config, batch = _config(diffusion=diffusion), _batch()
  drawn = _draw(config)(_unweighted(batch))
  weights = np.float32([1, 0, 3, 0, 0.5, 1])
  batch['weights'] = weights
  loss, sums = jax.jit(config.layers())({'w': jnp.float32(0.7)}, batch)
  error = 0.7 * np.float64(drawn.x_t) - drawn.target
  alpha, sigma = (x[drawn.times] for x in diffusion.levels)
  cost = np.mean(error**2, axis=(1, 2, 3))
  if min_snr:
    cost *= np.minimum(alpha**2, min_snr * sigma**2)
  assert_close(sums['cost'], np.sum(weights * cost), 40)
  assert_close(loss, np.sum(weights * cost) / B, 40)
  assert sums['weight'] == 5.5


def test_time_embedding_has_waves_of_geometric_lengths():
  times = np.int32([0, 3, 99])
  found = denoiser.embed_times(jnp.asarray(times), 100, 8, 'float32')
  turns = 10_000.0 ** (-np.arange(4) / 4)
  # A diffusion of 100 steps has the times of one of 1,000 steps.
  angles = 10 * times[:, None] * turns[None]
  expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
  # An angle of up to 990 has an absolute rounding error of 2**-15.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  # Columns 3 and 7 have a period of 6,283 of these times.
  assert np.ptp(found[:, 3]) < 1


def test_sampling_repeats_and_follows_the_labels():
  config = _config(num_classes=4, diffusion=Diffusion(steps=20))
  layers = config.layers()
  params = {'w': jnp.float32(0.2)}
  labels = np.int32([0, 1, 2, 3, 4, 4])
  sampler = Sampler(steps=5, guidance=2.0, clip=False)
  draw_images = denoiser.make_sampler(layers, sampler, B)
  found = draw_images(params, jax.random.key(0), labels)
  assert found.shape == (B, 3, 3, 2) and found.dtype == jnp.float32
  assert np.isfinite(found).all()
  again = draw_images(params, jax.random.key(0), labels)
  np.testing.assert_array_equal(found, again)
  # Without labels, all images are of the class 'none'.
  none = draw_images(params, jax.random.key(0))
  np.testing.assert_array_equal(none[4:], found[4:])
  assert np.abs(none[:4] - found[:4]).min() > 0


def test_a_model_without_classes_refuses_labels_and_guidance():
  layers = _config().layers()
  with pytest.raises(ValueError, match=r'guidance needs .*num_classes.*got'):
    denoiser.make_sampler(layers, Sampler(guidance=2.0), 1)
  draw_images = denoiser.make_sampler(layers, Sampler(steps=2), 1)
  with pytest.raises(ValueError, match='labels need a model with num_classes'):
    draw_images({'w': jnp.float32(1)}, jax.random.key(0), np.int32([1]))
  many = Sampler(steps=2000)
  with pytest.raises(ValueError, match=r'at most diffusion.steps = 1000'):
    denoiser.make_sampler(layers, many, 1)


def test_images_of_another_size_are_refused():
  batch = _unweighted(_batch())
  batch['inputs'] = batch['inputs'][..., :1]
  with pytest.raises(ValueError, match=r'\(3, 3, 2\).*got \(3, 3, 1\)'):
    _draw(_config())(batch)


@pytest.mark.parametrize('name', ['image_size', 'num_channels', 'num_classes'])
def test_sizes_are_positive(name):
  with pytest.raises(ValueError, match=f'{name} must be at least 1, got 0'):
    dataclasses.replace(_config(), **{name: 0})
