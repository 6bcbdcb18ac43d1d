"""Tests the U-Net: its blocks against float64 formulas, and its training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import names
from models import unet as lib
from models.denoiser import make_sampler
from models.diffusion import Diffusion, Sampler
from models.unet import UnetConfig
from tests.models import jaxpr_flops
from tests.models.program import trained_on_two_images
from tests.rounding import assert_close, distance, units

B = 3
# Number of roundings: eight convolutions or norms, with sums of up to 150
# terms.
_ROUNDINGS = 8 * 150


def _config(**changes):
  changes = {'num_classes': 3, 'diffusion': Diffusion(steps=50)} | changes
  sizes = {
    'image_size': 8,
    'num_channels': 2,
    'width': 8,
    'multipliers': (1, 2),
    'num_blocks': 1,
    'attention_sizes': (),
    'groups': 4,
  }
  return UnetConfig(**(sizes | changes))


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'inputs': rng.integers(0, 256, (B, 8, 8, 2), dtype=np.uint8),
    'labels': rng.integers(0, 3, B, dtype=np.int32),
    'noise': rng.integers(0, 2**32, (B, 2), dtype=np.uint32),
    'weights': np.float32([1, 0.5, 1.5]),
  }


def _random(shapes):
  """Returns random parameters, also where the initial ones are zero."""
  rng = np.random.default_rng(1)
  draw = lambda x: np.float32(0.2 * rng.standard_normal(x.shape))
  return jax.tree.map(draw, shapes)


def _shapes(config):
  return jax.eval_shape(config.layers().init, jax.random.key(0))


@functools.cache
def _loss(config):
  return jax.jit(config.layers())


@functools.cache
def _predict(config):
  return jax.jit(config.layers().predict)


def _inputs():
  x = np.random.default_rng(2).standard_normal((B, 8, 8, 2))
  return np.float32(x), np.int32([0, 30, 49]), np.int32([0, 2, 3])


def _normed(h, p, groups=4):
  """Returns the group norm of activations [B, H, W, C] in float64."""
  grouped = h.reshape(len(h), -1, groups, h.shape[-1] // groups)
  mean = grouped.mean((1, 3), keepdims=True)
  variance = grouped.var((1, 3), keepdims=True)
  normal = (grouped - mean) / np.sqrt(variance + 1e-6)
  return normal.reshape(h.shape) * p['scale'] + p['bias']


def _silu(x):
  return x / (1 + np.exp(-x))


def _convolved(h, p):
  """Returns a 'SAME' convolution of stride 1 in float64."""
  kernel = p['kernel']
  border = kernel.shape[0] // 2
  padded = np.pad(h, ((0, 0), (border, border), (border, border), (0, 0)))
  y = np.zeros((*h.shape[:3], kernel.shape[-1]))
  for i in range(kernel.shape[0]):
    for j in range(kernel.shape[1]):
      window = padded[:, i : i + h.shape[1], j : j + h.shape[2]]
      y += window @ kernel[i, j]
  return y + p['bias']


@pytest.mark.parametrize('channels', [8, 12])
def test_a_residual_block_is_the_formula(channels):
  rng = np.random.default_rng(3)
  h, c = rng.standard_normal((2, 4, 4, 8)), rng.standard_normal((2, 32))
  block = lib.ResidualBlock(_config(), channels, 5)
  args = np.float32(h), np.float32(c), None
  shapes = jax.eval_shape(block.init, jax.random.key(0), *args)
  params = _random(shapes)
  found = jax.jit(block.apply)(params, *args)

  p = jax.tree.map(np.float64, params)['params']
  y = _convolved(_silu(_normed(h, p['norm1'])), p['conv1'])
  shift = _silu(c) @ p['condition']['kernel'] + p['condition']['bias']
  y = _silu(_normed(y + shift[:, None, None], p['norm2']))
  y = _convolved(y, p['conv2'])
  shortcut = _convolved(h, p['conv_shortcut']) if channels != 8 else h
  assert ('conv_shortcut' in p) == (channels != 8)
  assert_close(found, shortcut + y, _ROUNDINGS)


@pytest.mark.parametrize('head_dim', [None, 2])
def test_attention_is_the_formula(head_dim):
  rng = np.random.default_rng(4)
  h = rng.standard_normal((2, 3, 3, 8))
  module = lib.Attention(_config(head_dim=head_dim))
  shapes = jax.eval_shape(module.init, jax.random.key(0), np.float32(h))
  params = _random(shapes)
  found = jax.jit(module.apply)(params, np.float32(h))

  p = jax.tree.map(np.float64, params)['params']
  linear = lambda name, x: x @ p[name]['kernel'] + p[name]['bias']
  size = head_dim or 8
  heads = lambda x: x.reshape(2, 9, 8 // size, size).swapaxes(1, 2)
  y = _normed(h, p['norm']).reshape(2, 9, 8)
  q, k, v = (heads(linear(name, y)) for name in 'qkv')
  scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(size))
  y = scores / scores.sum(-1, keepdims=True) @ v
  y = linear('o', y.swapaxes(1, 2).reshape(2, 9, 8))
  assert_close(found, h + y.reshape(h.shape), _ROUNDINGS)


def test_sampling_changes_the_size_by_two():
  h = np.float32(np.random.default_rng(5).standard_normal((2, 4, 4, 3)))
  kernel = np.zeros((3, 3, 3, 3), np.float32)
  # The tap (1, 1) is the pixel itself.
  kernel[1, 1] = np.eye(3)
  params = {'params': {'conv': {'kernel': kernel, 'bias': np.zeros(3)}}}
  up = lib.Upsample(_config()).apply(params, h)
  np.testing.assert_array_equal(up, h.repeat(2, axis=1).repeat(2, axis=2))
  down = lib.Downsample(_config()).apply(params, h)
  # An even height is padded at its end only.
  np.testing.assert_array_equal(down, h[:, 1::2, 1::2])


def test_the_default_is_the_model_of_ddpm():
  """DDPM's network for CIFAR-10 has 35.7 million parameters."""
  params = _shapes(UnetConfig())
  assert sum(x.size for x in jax.tree.leaves(params)) == 35_746_307


def test_convolutions_are_recognized_by_their_names():
  config = _config(attention_sizes=(4,))
  leaves = jax.tree_util.tree_leaves_with_path(_shapes(config))
  kernels = 0
  for path, x in leaves:
    path = '/'.join(key.key for key in path)
    if path.endswith('kernel'):
      kind = 'convolution' if x.ndim == 4 else 'matrix'
      assert names.of(path, x.shape).kind == kind, path
      kernels += x.ndim == 4
  # The convolutions of seven blocks, of whose ways up and down five have a
  # shortcut; in, out, down and up.
  assert kernels == 2 * 8 + 5 + 4


def test_the_output_is_zero_initially():
  config = _config(multipliers=(1,))
  params = jax.jit(config.layers().init)(jax.random.key(0))
  assert not _predict(config)(params, *_inputs()).any()


def test_an_image_depends_only_on_itself_and_its_condition():
  config = _config()
  params = _random(_shapes(config))
  x, times, labels = _inputs()
  whole = _predict(config)(params, x, times, labels)
  assert whole.shape == x.shape and whole.dtype == jnp.float32
  turned = _predict(config)(params, x[::-1], times[::-1], labels[::-1])
  assert_close(turned[::-1], whole, _ROUNDINGS)
  later = _predict(config)(params, x, times + np.int32([0, 1, 0]), labels)
  changed = np.abs(later - whole).max((1, 2, 3)) > 1e-4
  np.testing.assert_array_equal(changed, [False, True, False])
  # The label 3 is the class 'none', which None means.
  none = _predict(config)(params, x, times)
  changed = np.abs(none - whole).max((1, 2, 3)) > 1e-4
  np.testing.assert_array_equal(changed, [True, True, False])


@pytest.mark.slow
def test_dropout_is_drawn_from_a_row_and_off_in_evaluation():
  config = _config(dropout=0.3, diffusion=Diffusion(label_dropout=0.0))
  params, batch = _random(_shapes(config)), _batch()
  # The loss is linear in the weights, so that its gradient is the cost of rows.
  costs = jax.jit(jax.grad(
    lambda weights: config.layers()(params, batch | {'weights': weights})[0]
  ))  # fmt: skip
  dropped = B * costs(batch['weights'])
  evaluated, _ = _loss(config.without_dropout())(params, batch)
  without, _ = _loss(dataclasses.replace(config, dropout=0.0))(params, batch)
  assert_close(evaluated, without, _ROUNDINGS)
  found, _ = _loss(config)(params, batch)
  assert_close(found, np.mean(dropped * batch['weights']), _ROUNDINGS)
  assert abs(found - without) > 1e-3
  order = np.array([2, 0, 1])
  turned = {name: x[order] for name, x in batch.items()}
  again, _ = _loss(config)(params, turned)
  assert_close(again, found, _ROUNDINGS)


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
  params, batch = _random(_shapes(_config())), _batch()
  plain, again = (
    jax.jit(jax.grad(_config(remat=remat).layers(), has_aux=True))(
      params, batch
    )[0]
    for remat in (False, True)
  )
  assert distance(again, plain) < units(2 * _ROUNDINGS)


def test_types_are_those_of_the_config():
  config = _config(dtype='bfloat16', param_dtype='bfloat16')
  params = _shapes(config)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  loss, sums = jax.eval_shape(config.layers(), params, _batch())
  types = {loss.dtype, *(y.dtype for y in sums.values())}
  assert types == {jnp.dtype('float32')}
  text = str(jax.make_jaxpr(config.layers())(params, _batch()))
  products = [line for line in text.splitlines() if 'conv_general' in line]
  assert products and all('bf16' in line for line in products)


@pytest.mark.parametrize(
  'head_dim', [pytest.param(None, marks=pytest.mark.slow), 4]
)
def test_flops_are_those_of_the_products(head_dim):
  config = _config(attention_sizes=(4,), head_dim=head_dim)
  params = _shapes(config)
  forward = jaxpr_flops.count(config.layers().predict, params, *_inputs())
  everything = jax.tree.map(lambda w: True, params)
  assert config.flops(params, everything, _batch()) == 3 * forward


def test_attention_is_resolved_for_a_gpu(monkeypatch):
  config = _config(attention_sizes=(8,))
  assert config.attention_shapes == [(64, 1, 8)] * 3 + [(16, 1, 16)]
  for refused, kind in ((None, 'cudnn'), (16, 'blockwise')):
    monkeypatch.setattr(
      'models.attention.refusal',
      lambda q, *args, refused=refused: q.shape[-1] == refused or None,
    )
    assert config.on_gpu(_batch()).attention_kind == kind


@pytest.mark.slow
def test_it_learns_a_toy_distribution():
  """GaLore trains it on two images, one of each class, and it draws them."""
  diffusion = Diffusion(steps=50, prediction='v')
  config = _config(num_classes=2, multipliers=(1,), diffusion=diffusion)
  params, losses, images = trained_on_two_images(config, 16)
  assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
  draw_images = make_sampler(config.layers(), Sampler(steps=20), 4)
  labels = np.int32([0, 1] * 2)
  found = draw_images(params, jax.random.key(1), labels)
  assert found.shape == (4, 8, 8, 2) and np.isfinite(found).all()
  again = draw_images(params, jax.random.key(1), labels)
  np.testing.assert_array_equal(found, again)
  # The signs of most pixels are those of the image of the class.
  assert np.mean(np.sign(found) == images[labels]) > 0.9


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'image_size': 6, 'multipliers': (1, 1, 2)},
      'image_size must be a multiple of 4, for 3 levels .*got 6',
    ),
    ({'groups': 3}, 'groups must divide the channels .*8 here, got 3'),
    ({'width': 9, 'groups': 3}, 'width must be even.*got 9'),
    ({'attention_sizes': (16,)}, 'must be heights of levels, 8, 4, got 16'),
    ({'head_dim': 3}, 'head_dim must divide .*16 at height 4, got 3'),
    ({'multipliers': ()}, r'one number for each level, got \(\)'),
    ({'num_blocks': 0}, 'num_blocks must be at least 1, got 0'),
    ({'dropout': 1.0}, r'dropout is a share .*\[0, 1\), got 1.0'),
  ],
)
def test_what_is_impossible_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _config(**changes)
