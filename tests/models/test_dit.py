"""Tests the DiT against float64 formulas, and that its layers compose to it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.layerwise.step import layerwise
from models import dit as lib
from models import lowrank
from models.denoiser import make_sampler
from models.diffusion import Diffusion, Sampler
from models.dit import DitConfig, dit
from tests.models import jaxpr_flops
from tests.models.program import loss_of_pieces, trained_on_two_images
from tests.rounding import assert_close, distance, units

B = 4
# Number of roundings if sums have another order: six sums of up to 32 terms in
# each of three layers.
_ROUNDINGS = 3 * 6 * 32


def _config(**changes):
  changes = {'num_classes': 3, 'diffusion': Diffusion(steps=50)} | changes
  return DitConfig(
    image_size=6,
    num_channels=2,
    patch_size=2,
    width=16,
    num_heads=4,
    num_layers=3,
    mlp_width=24,
    **changes,
  )


def _batch(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'inputs': rng.integers(0, 256, (B, 6, 6, 2), dtype=np.uint8),
    'labels': rng.integers(0, 3, B, dtype=np.int32),
    'noise': rng.integers(0, 2**32, (B, 2), dtype=np.uint32),
    'weights': np.float32([1, 1, 0.5, 1.5]),
  }


def _params(config):
  """Returns random parameters, also where the initial ones are zero."""
  shapes = jax.eval_shape(config.layers().init, jax.random.key(0))
  rng = np.random.default_rng(1)
  draw = lambda x: np.float32(0.2 * rng.standard_normal(x.shape))
  return jax.tree.map(draw, shapes)


@functools.cache
def _loss(config):
  return jax.jit(config.layers())


@functools.cache
def _network(config):
  return jax.jit(config.layers().predict)


def _predict(config, params, rows=slice(None)):
  """Returns the output of the network for noisy images, times and labels."""
  x = np.float32(np.random.default_rng(2).standard_normal((B, 6, 6, 2)))
  times, labels = np.int32([0, 7, 30, 49]), np.int32([0, 2, 3, 1])
  return _network(config)(params, x[rows], times[rows], labels[rows])


def test_each_layer_is_the_identity_initially():
  """This is adaLN-zero. The output of the network is zero, too."""
  config = _config()
  layers = config.layers()
  params = jax.jit(layers.init)(jax.random.key(0))
  rng = np.random.default_rng(3)
  x = {
    'h': np.float32(rng.standard_normal((B, 9, 16))),
    'c': np.float32(rng.standard_normal((B, 16))),
  }
  layer = jax.tree.map(lambda w: w[1], params['blocks'])
  found = jax.jit(layers.block)(layer, x)
  jax.tree.map(np.testing.assert_array_equal, found, x)
  assert not _predict(config, params).any()
  # Each layer has kernels of its own.
  kernel = params['blocks']['attention']['q']['kernel']
  assert np.abs(kernel[0] - kernel[1]).min() > 0
  np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / 32), rtol=0.1)


def test_a_layer_is_the_formula_of_the_paper():
  config = _config()
  layer = jax.tree.map(lambda w: w[0], _params(config)['blocks'])
  rng = np.random.default_rng(4)
  h, c = rng.standard_normal((B, 9, 16)), rng.standard_normal((B, 16))
  x = {'h': np.float32(h), 'c': np.float32(c)}
  found = jax.jit(config.layers().block)(layer, x)['h']

  wide = jax.tree.map(np.float64, layer)
  linear = lambda p, x: x @ p['kernel'] + p['bias']
  heads = lambda x: x.reshape(B, 9, 4, 4).transpose(0, 2, 1, 3)

  def normed(h, shift, scale):
    h = h - h.mean(-1, keepdims=True)
    h = h / np.sqrt(np.mean(h**2, -1, keepdims=True) + 1e-6)
    return h * (1 + scale[:, None]) + shift[:, None]

  silu = c / (1 + np.exp(-c))
  modulation = np.split(linear(wide['modulation'], silu), 6, axis=-1)
  shift1, scale1, gate1, shift2, scale2, gate2 = modulation
  p = wide['attention']
  y = normed(h, shift1, scale1)
  q, k, v = (heads(linear(p[name], y)) for name in 'qkv')
  scores = np.exp(q @ k.swapaxes(-1, -2) / 2)
  y = scores / scores.sum(-1, keepdims=True) @ v
  y = linear(p['o'], y.transpose(0, 2, 1, 3).reshape(B, 9, 16))
  h = h + gate1[:, None] * y
  y = linear(wide['mlp']['up'], normed(h, shift2, scale2))
  y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
  expected = h + gate2[:, None] * linear(wide['mlp']['down'], y)
  assert_close(found, expected, _ROUNDINGS)


def test_positions_are_sines_of_rows_and_columns():
  found = lib.sincos_positions(3, 8).reshape(3, 3, 8)
  waves = lambda i: np.r_[np.sin([i, i / 100]), np.cos([i, i / 100])]
  for row in range(3):
    for column in range(3):
      expected = np.r_[waves(column), waves(row)]
      np.testing.assert_allclose(found[row, column], expected, rtol=1e-12)


def test_patches_are_squares_of_the_image():
  x = jnp.arange(2 * 6 * 6 * 2.0).reshape(2, 6, 6, 2)
  patches = lib.to_patches(x, 2)
  assert patches.shape == (2, 9, 8)
  np.testing.assert_array_equal(patches[1, 5], x[1, 2:4, 4:6].reshape(-1))
  np.testing.assert_array_equal(lib.from_patches(patches, 2), x)


@pytest.mark.parametrize(
  'remat', [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_the_pieces_are_the_model(remat):
  config = _config(remat=remat)
  model, batch = config.layers(), _batch()

  params = _params(config)
  found = loss_of_pieces(model, params, batch)
  assert_close(found, _loss(config)(params, batch), _ROUNDINGS)


def test_stored_layers_are_read_one_at_a_time():
  config = _config()
  params, batch = _params(config), _batch()
  stored = params | {'blocks': jax.tree.map(lambda w: 2 * w, params['blocks'])}
  shapes = []

  def read(layer):
    shapes.append(layer['params']['mlp']['up']['kernel'].shape)
    return jax.tree.map(lambda w: w / 2, layer)

  found = jax.jit(config.layers(read=read))(stored, batch)
  assert_close(found, _loss(config)(params, batch), _ROUNDINGS)
  assert {*shapes} == {(16, 24)}
  # The parameters are initialized as arrays.
  shapes.clear()
  jax.eval_shape(config.layers(read=read).init, jax.random.key(0))
  assert not shapes


@pytest.mark.slow
def test_layer_wise_is_whole_tree():
  config = _config()
  model, batch = config.layers(), _batch()
  params = jax.tree.map(jnp.asarray, _params(config))
  step = layerwise(model, optax.sgd(0.1), microbatches=2)
  found, _, metrics = jax.jit(step)(params, step.init(params), batch)
  value_and_grad = jax.jit(jax.value_and_grad(model, has_aux=True))
  (loss, _), grads = value_and_grad(params, batch)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
  assert_close(metrics['loss'], loss, _ROUNDINGS)
  # The roundings count twice, forward and backward.
  assert_close(found, expected, 2 * _ROUNDINGS)


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
  params, batch = _params(_config()), _batch()
  plain, again = (
    jax.jit(jax.grad(_config(remat=remat).layers(), has_aux=True))(
      params, batch
    )[0]
    for remat in (False, True)
  )
  # The gradient of the key biases is zero up to rounding, so that errors are
  # compared with the norm of the whole gradient.
  assert distance(again, plain) < units(2 * _ROUNDINGS)


def test_an_image_depends_only_on_itself():
  config = _config()
  params = _params(config)
  whole = _predict(config, params)
  assert_close(_predict(config, params, slice(2, 3)), whole[2:3], _ROUNDINGS)


def test_time_and_label_condition_the_output():
  config = _config()
  predict = _network(config)
  params, x = _params(config), np.ones((1, 6, 6, 2), np.float32)
  outputs = [
    predict(params, x, np.int32([time]), np.int32([label]))
    for time, label in ((5, 0), (6, 0), (5, 1), (5, 3))
  ]
  for one in range(4):
    for other in range(one):
      assert np.abs(outputs[one] - outputs[other]).max() > 1e-4
  # Without a label, the class is 'none', which is the last row of the table.
  none = predict(params, x, np.int32([5]))
  np.testing.assert_array_equal(none, outputs[3])
  unknown = predict(params, x, np.int32([5]), np.int32([4]))
  assert np.isnan(unknown).all()


def test_a_model_without_classes():
  config = _config(num_classes=None)
  params, batch = _params(config), _batch()
  del batch['labels']
  assert 'labels' not in params['embed']
  assert np.isfinite(_loss(config)(params, batch)[0])


@pytest.mark.slow
def test_factors_are_hooked_in():
  """LoRA's first factors change nothing; a factor of its own does."""
  config, batch = _config(), _batch()
  params = jax.tree.map(jnp.asarray, _params(config))
  adapter = lowrank.Lora(rank=2, dropout=0.1)
  adapted = lowrank.adapt(params, adapter, jax.random.key(0))
  model = jax.jit(config.layers(intercept=lowrank.hook(adapter)))
  expected = _loss(config)(params, batch)
  assert_close(model(adapted, batch), expected, _ROUNDINGS)
  adapted['blocks']['modulation']['lora_b'] += 0.1
  assert abs(model(adapted, batch)[0] - expected[0]) > 1e-4


def test_types_are_those_of_the_config():
  config = _config(dtype='bfloat16', param_dtype='bfloat16')
  layers, batch = config.layers(), _batch()
  params = jax.eval_shape(layers.init, jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  x = jax.eval_shape(layers.embed, params, batch)
  assert {y.dtype for y in jax.tree.leaves(x)} == {jnp.dtype('bfloat16')}
  loss, sums = jax.eval_shape(layers, params, batch)
  assert {loss.dtype, *(y.dtype for y in sums.values())} == {
    jnp.dtype('float32')
  }


@pytest.mark.slow
def test_half_precision_is_close():
  params, batch = _params(_config()), _batch()
  mixed = _config(dtype='bfloat16')
  loss, _ = _loss(mixed)(params, batch)
  exact, _ = _loss(_config())(params, batch)
  np.testing.assert_allclose(loss, exact, rtol=0.02)


def test_flops_are_those_of_the_products():
  config = _config()
  layers = config.layers()
  params = jax.eval_shape(layers.init, jax.random.key(0))
  forward = jaxpr_flops.count(
    layers.predict, params, jnp.zeros((B, 6, 6, 2)), jnp.zeros(B, int)
  )
  everything = jax.tree.map(lambda w: True, params)
  assert config.flops(params, everything, _batch()) == 3 * forward
  # Frozen weights need no gradient, but their inputs do.
  nothing = jax.tree.map(lambda w: False, params)
  attention = 4 * B * 3 * 9**2 * 16
  expected = 2 * forward + attention
  assert config.flops(params, nothing, _batch()) == expected


def test_kept_bytes_are_the_inputs_of_the_layers():
  config = _config(dtype='bfloat16')
  x = jax.eval_shape(config.layers().embed, _params(config), _batch())
  size = sum(y.size * y.dtype.itemsize for y in jax.tree.leaves(x))
  assert config.kept_bytes(_batch()) == 3 * size


def test_attention_is_resolved_for_a_gpu(monkeypatch):
  config = _config()
  monkeypatch.setattr('models.attention.refusal', lambda *args: 'too small')
  assert config.on_gpu(_batch()).attention_kind == 'blockwise'
  seen = []
  monkeypatch.setattr(
    'models.attention.refusal', lambda q, *args: seen.append(q.shape)
  )
  assert config.on_gpu(_batch()).attention_kind == 'cudnn'
  assert seen == [(1, 9, 4, 4)]
  fixed = dataclasses.replace(config, attention='blockwise')
  assert fixed.on_gpu(_batch()) is fixed


@pytest.mark.parametrize(
  ('size', 'millions'), [('s/2', 33), ('b/4', 130), ('l/2', 458), ('xl/2', 675)]
)
def test_sizes_are_those_of_the_paper(size, millions):
  config = dit(size, num_channels=4)
  params = jax.eval_shape(config.layers().init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(params))
  assert round(count / 1e6) == pytest.approx(millions, abs=1)
  assert config.is_stacked and config.task == 'diffusion'


@pytest.mark.slow
@pytest.mark.parametrize(
  ('prediction', 'share'),
  # Errors of epsilon are divided by alpha, which is small at late times.
  [('epsilon', 0.7), ('v', 0.95)],
)
def test_it_learns_a_toy_distribution(prediction, share):
  """GaLore trains it on two images, one of each class, and it draws them."""
  diffusion = Diffusion(steps=50, prediction=prediction)
  config = dataclasses.replace(_config(num_classes=2), diffusion=diffusion)
  params, losses, images = trained_on_two_images(config, 32)
  assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])
  draw_images = make_sampler(
    config.layers(), Sampler(steps=20, guidance=2.0), 8
  )
  labels = np.int32([0, 1] * 4)
  found = draw_images(params, jax.random.key(1), labels)
  # The signs of most pixels are those of the image of the class.
  assert np.mean(np.sign(found) == images[labels]) > share


def test_samples_are_finite_and_repeat():
  config = _config()
  draw_images = make_sampler(config.layers(), Sampler(steps=3, eta=1.0), 2)
  params, labels = _params(config), np.int32([0, 1])
  found = draw_images(params, jax.random.key(0), labels)
  assert found.shape == (2, 6, 6, 2) and np.isfinite(found).all()
  again = draw_images(params, jax.random.key(0), labels)
  np.testing.assert_array_equal(found, again)
  other = draw_images(params, jax.random.key(1), labels)
  assert np.abs(other - found).max() > 0.1


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'patch_size': 4}, 'image_size must be a multiple of patch_size.*=4'),
    ({'num_heads': 3}, 'width must be a multiple of num_heads.*num_heads=3'),
    ({'width': 18, 'num_heads': 2}, 'width must be a multiple of 4.*got 18'),
    ({'num_layers': 0}, 'num_layers must be at least 1, got 0'),
    ({'mlp_width': 0}, 'mlp_width must be at least 1, got 0'),
  ],
)
def test_what_is_impossible_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(_config(), **changes)


@pytest.mark.parametrize('size', ['xs/2', 'xl', 'xl/two', 'xl/0'])
def test_unknown_sizes_are_named(size):
  with pytest.raises(ValueError, match=r"got 'x|patch_size must .*got 0"):
    dit(size)
