"""Tests properties of the vision transformer."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore
from galore_optax.layerwise.step import layerwise
from galore_optax.projection import Projection
from models import lowrank
from models.lowrank import Lora
from models.vit import VitConfig
from tests.galore_optax.every import build
from tests.models.program import adapt, drawn, loss_of_pieces, merge
from tests.rounding import assert_close, distance, units

B = 4
# Number of roundings if sums have another order: four sums of up to 20 terms in
# each of three layers.
_ROUNDINGS = 3 * 4 * 20
# Channels, labels, sides and widths are distinct, so that no swap is hidden.
_SIZES = {
  'image_size': 15,
  'patch_size': 5,
  'width': 12,
  'mlp_width': 20,
  'num_heads': 3,
  'num_layers': 3,
  'num_labels': 7,
  'num_channels': 2,
  'mean': (0.3, 0.6),
  'std': (0.2, 0.4),
}


def _config(**changes):
  return VitConfig(**_SIZES | {'init_std': 0.3} | changes)


def _batch(config, rows=B):
  rng = np.random.default_rng(0)
  return {
    'inputs': rng.integers(0, 256, (rows, *config.image_shape), np.uint8),
    'targets': rng.integers(0, config.num_labels, rows, np.int32),
    'weights': np.ones(rows, np.float32),
  }


@functools.cache
def _params(config):
  return drawn(config.layers(), 0.4)


@functools.cache
def _logits(config):
  return jax.jit(config.layers().logits)


@functools.cache
def _loss(config):
  return jax.jit(config.layers())


def _with_noise(batch):
  noise = np.arange(2 * len(batch['inputs']), dtype=np.uint32).reshape(-1, 2)
  return batch | {'noise': noise}


_POOLS = pytest.mark.parametrize('pool', ['mean', 'cls'])


def test_the_shapes_of_the_parameters():
  shapes = jax.eval_shape(_config(pool='cls').layers().init, jax.random.key(0))
  embed, blocks = shapes['embed'], shapes['blocks']
  assert embed['patch_embedding']['kernel'].shape == (5, 5, 2, 12)
  assert embed['class_token'].shape == (12,)
  assert embed['positions']['embedding'].shape == (10, 12)
  assert blocks['attention']['q']['kernel'].shape == (3, 12, 12)
  assert blocks['mlp']['up']['bias'].shape == (3, 20)
  assert shapes['head']['kernel'].shape == (12, 7)
  shapes = jax.eval_shape(_config().layers().init, jax.random.key(0))
  assert shapes['embed']['positions']['embedding'].shape == (9, 12)
  assert 'class_token' not in shapes['embed']
  plain = _config(qkv_bias=False).layers()
  shapes = jax.eval_shape(plain.init, jax.random.key(0))
  attention = shapes['blocks']['attention']
  assert [name for name in attention if 'bias' in attention[name]] == ['o']


def _oracle(config, params, images):
  """Returns the logits of one-layer models in float64, image by image."""
  params = jax.tree.map(np.float64, params)
  erf = np.vectorize(math.erf)

  def norm(h_TD, name, tree):
    h_TD = h_TD - h_TD.mean(-1, keepdims=True)
    h_TD /= np.sqrt((h_TD**2).mean(-1, keepdims=True) + config.norm_eps)
    return h_TD * tree[name]['scale'] + tree[name]['bias']

  def linear(x, tree):
    return x @ tree['kernel'] + tree['bias']

  def layer(h_TD, tree):
    x_TD, mixed = norm(h_TD, 'attention_norm', tree), []
    q, k, v = (linear(x_TD, tree['attention'][name]) for name in 'qkv')
    size = config.width // config.num_heads
    for head in range(config.num_heads):
      part = slice(head * size, (head + 1) * size)
      scores = np.exp(q[:, part] @ k[:, part].T / size**0.5)
      mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
    h_TD = h_TD + linear(np.concatenate(mixed, 1), tree['attention']['o'])
    up = linear(norm(h_TD, 'mlp_norm', tree), tree['mlp']['up'])
    return h_TD + linear(up * (1 + erf(up / 2**0.5)) / 2, tree['mlp']['down'])

  def logits(image):
    x = (image / 255 - np.array(config.mean)) / np.array(config.std)
    P, embed, tokens = config.patch_size, params['embed'], []
    kernel = embed['patch_embedding']['kernel']
    for i in range(0, config.image_size, P):
      for j in range(0, config.image_size, P):
        patch = x[i : i + P, j : j + P]
        tokens.append(np.einsum('hwi,hwid->d', patch, kernel))
    h_TD = np.stack(tokens) + embed['patch_embedding']['bias']
    if config.pool == 'cls':
      h_TD = np.concatenate([embed['class_token'][None], h_TD])
    h_TD = h_TD + embed['positions']['embedding']
    h_TD = layer(h_TD, jax.tree.map(operator.itemgetter(0), params['blocks']))
    h_TD = norm(h_TD, 'norm', params)
    pooled_D = h_TD[0] if config.pool == 'cls' else h_TD.mean(0)
    return linear(pooled_D, params['head'])

  return np.stack([logits(image) for image in images])


@_POOLS
def test_one_layer_equals_the_formula_in_float64(pool):
  config = _config(pool=pool, num_layers=1)
  params, batch = _params(config), _batch(config)
  found = _logits(config)(params, batch)
  expected = _oracle(config, params, batch['inputs'])
  assert found.dtype == jnp.float32 and expected.std() > 0.1
  # A logit is a sum over 50 pixels and three sums of up to 20 terms in a row.
  assert_close(found, expected, 50 + _ROUNDINGS)


def test_uint8_images_are_normalized():
  config = _config()
  params, batch = _params(config), _batch(config)
  images = np.float32(batch['inputs']) / np.float32(255)
  floats = (images - np.float32(config.mean)) / np.float32(config.std)
  found = _logits(config)(params, batch)
  expected = _logits(config)(params, batch | {'inputs': floats})
  assert_close(found, expected, _ROUNDINGS)


@pytest.mark.parametrize(
  'pool', [pytest.param('mean', marks=pytest.mark.slow), 'cls']
)
def test_the_pieces_are_the_model(pool):
  config = _config(pool=pool, remat=True)
  model, batch = config.layers(), _batch(config)

  params = _params(config)
  found = loss_of_pieces(model, params, batch)
  assert_close(found, _loss(config)(params, batch), _ROUNDINGS)


def test_the_layers_are_read_one_by_one():
  config = _config()
  params, batch = _params(config), _batch(config)
  halves = params | {'blocks': jax.tree.map(lambda w: w / 2, params['blocks'])}
  twice = config.layers(read=lambda layer: jax.tree.map(lambda w: 2 * w, layer))
  found = jax.jit(twice)(halves, batch)
  assert_close(found, _loss(config)(params, batch), _ROUNDINGS)


def test_a_permutation_of_the_rows_permutes_the_logits():
  config = _config()
  params, batch = _params(config), _batch(config)
  order = np.array([2, 0, 3, 1])
  found = _logits(config)(params, batch | {'inputs': batch['inputs'][order]})
  expected = _logits(config)(params, batch)[order]
  assert_close(found, expected, _ROUNDINGS)


def test_each_patch_and_its_position_count():
  config = _config()
  params, batch = _params(config), _batch(config)
  before = _logits(config)(params, batch)
  for i, j in ((0, 0), (7, 14), (14, 7)):
    images = batch['inputs'].copy()
    images[:, i, j] ^= 128
    after = _logits(config)(params, batch | {'inputs': images})
    assert np.abs(after - before).max() > 1e-3
  # Two patches that change places change the result, since positions differ.
  images = batch['inputs'].copy()
  images[:, :5, :5], images[:, 5:10, :5] = (
    images[:, 5:10, :5],
    images[:, :5, :5],
  )
  after = _logits(config)(params, batch | {'inputs': images})
  assert np.abs(after - before).max() > 1e-3


def test_the_loss_is_of_the_rows_that_count():
  config = _config()
  params, batch = _params(config), _batch(config)
  weights = np.float32([1, 0, 3, 0])
  logits = _logits(config)(params, batch)
  nll = -jax.nn.log_softmax(logits)[np.arange(B), batch['targets']]
  loss, sums = _loss(config)(params, batch | {'weights': weights})
  assert_close(sums['cost'], weights @ nll, _ROUNDINGS)
  assert_close(loss, weights @ nll / B, _ROUNDINGS)
  assert sums['weight'] == 4
  # Rows that do not count may hold anything.
  others = batch['inputs'].copy()
  others[[1, 3]] = 255 - others[[1, 3]]
  again, _ = _loss(config)(
    params, batch | {'weights': weights, 'inputs': others}
  )
  assert again == loss


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
  config = _config(dropout=0.2)
  params, batch = _params(config), _with_noise(_batch(config))

  def gradient(config):
    model = config.layers()
    return jax.jit(jax.grad(model, has_aux=True))(params, batch)

  plain, metrics = gradient(config)
  again, expected = gradient(dataclasses.replace(config, remat=True))
  assert_close(metrics, expected, _ROUNDINGS)
  # The roundings count twice, forward and backward.
  assert distance(again, plain) < units(2 * _ROUNDINGS)


def test_dropout_is_applied_only_with_noise():
  config = _config(dropout=0.5)
  params, batch = _params(config), _batch(config)
  plain = _logits(config)(params, batch)
  assert_close(plain, _logits(_config())(params, batch), _ROUNDINGS)
  found = _logits(config)(params, _with_noise(batch))
  assert np.abs(found - plain).max() > 1e-3
  # The zeros of a row depend only on its own noise, not on its place or on the
  # other rows.
  order = np.array([2, 1, 1, 0])
  moved = {name: x[order] for name, x in _with_noise(batch).items()}
  assert_close(_logits(config)(params, moved), found[order], _ROUNDINGS)


def test_layers_draw_differently():
  """Each layer must return new noise, or all layers would drop the same."""
  config = _config(dropout=0.5)
  x = {'h': np.ones((1, 9, 12), np.float32), 'noise': np.uint32([[3, 4]])}
  params = jax.tree.map(operator.itemgetter(0), _params(config)['blocks'])
  found = jax.jit(config.layers().block)(params, x)
  again = jax.jit(config.layers().block)(params, found)
  noises = {tuple(np.ravel(y['noise'])) for y in (x, found, again)}
  assert len(noises) == 3


@pytest.mark.slow
@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_layer_wise_is_whole_tree(dropout):
  config = _config(dropout=dropout, pool='cls')
  model, params, batch = config.layers(), _params(config), _batch(config)
  if dropout:
    batch = _with_noise(batch)
  step = layerwise(model, optax.sgd(0.1), microbatches=2)
  found, _, metrics = jax.jit(step)(params, step.init(params), batch)
  value_and_grad = jax.jit(jax.value_and_grad(model, has_aux=True))
  (loss, _), grads = value_and_grad(params, batch)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
  assert_close(metrics['loss'], loss, _ROUNDINGS)
  # The roundings count twice, forward and backward.
  assert_close(found, expected, 2 * _ROUNDINGS)


def test_lora_computes_with_its_factors():
  config = _config()
  adapter = Lora(rank=2, targets=('.*/(q|up)/kernel',))
  params, batch = _params(config), _batch(config)
  with_factors = adapt(params, adapter, jax.random.key(0))
  up = with_factors['blocks']['mlp']['up']
  assert up['lora_a'].shape == (3, 12, 2)
  up['lora_b'] = jnp.full_like(up['lora_b'], 0.2)
  hooked = config.layers(intercept=lowrank.hook(adapter))
  found = jax.jit(hooked.logits)(with_factors, batch)
  merged = merge(with_factors, adapter)
  assert_close(found, _logits(config)(merged, batch), 2 * _ROUNDINGS)
  assert np.abs(found - _logits(config)(params, batch)).max() > 1e-3


def test_which_weights_have_a_low_rank_state():
  config = _config(pool='cls')
  shapes = jax.eval_shape(config.layers().init, jax.random.key(0))
  plans = galore(optax.sgd(1.0), rank=2).plan(shapes)
  projected = {plan.path for plan in plans if isinstance(plan, Projection)}
  blocks = {f'attention/{name}' for name in 'qkvo'} | {'mlp/up', 'mlp/down'}
  expected = {f'blocks/{name}/kernel' for name in blocks}
  assert projected == expected | {'embed/patch_embedding/kernel'}


@pytest.mark.slow
def test_galore_trains_it():
  """Classifies images by the one patch that is bright."""
  config = _config(num_labels=9, init_std=0.1, num_layers=2)
  rng = np.random.default_rng(3)
  targets = rng.integers(0, 9, 32, np.int32)
  images = rng.integers(0, 60, (32, 15, 15, 2), np.uint8)
  for image, target in zip(images, targets, strict=True):
    i, j = 5 * (target // 3), 5 * (target % 3)
    image[i : i + 5, j : j + 5] += 150
  batch = {'inputs': images, 'targets': targets, 'weights': np.ones(32, 'f4')}
  model, tx = config.layers(), build('Galore', 0.03, rank=4, gap=20)
  params = jax.jit(model.init)(jax.random.key(0))
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    (loss, _), grads = jax.value_and_grad(model, has_aux=True)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  losses = []
  for _ in range(60):
    params, state, loss = step(params, state)
    losses.append(float(loss))
  assert losses[0] > 0.8 * math.log(9)
  assert losses[-1] < 0.2 * losses[0]


def test_flops_and_bytes():
  config = _config(pool='cls', dtype='bfloat16')
  shapes = jax.eval_shape(config.layers().init, jax.random.key(0))
  batch = jax.eval_shape(lambda: _batch(config))
  weights = 3 * (4 * 12 * 12 + 2 * 12 * 20) + 5 * 5 * 2 * 12
  everything = jax.tree.map(lambda _: True, shapes)
  found = config.flops(shapes, everything, batch)
  assert found == B * 10 * (6 * weights + 12 * 3 * 10 * 12)
  nothing = jax.tree.map(lambda _: False, shapes)
  found = config.flops(shapes, nothing, batch)
  assert found == B * 10 * (4 * weights + 12 * 3 * 10 * 12)
  assert config.kept_bytes(batch) == 3 * B * 10 * 12 * 2
  assert config.tensor_sizes() == {'num_heads': 3, 'mlp_width': 20}
  assert config.on_gpu(batch).attention_kind in ('cudnn', 'blockwise')
  assert config.task == 'image_classification' and config.is_stacked


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'patch_size': 4}, 'image_size must be a multiple of patch_size, .*=15, '),
    ({'num_heads': 5}, 'width must be a multiple of num_heads, got width=12, '),
    ({'patch_size': 0}, 'patch_size must be at least 1, got 0'),
    ({'num_labels': 1}, 'num_labels must be at least 2, got 1: count'),
    ({'labels': ('a',)}, 'labels must be 7 names'),
    (
      {'mean': (0.5,)},
      r'mean must have one number .* 2 channels, got \(0.5,\)',
    ),
    ({'std': (1.0, 0.0)}, 'std must be positive'),
    ({'pool': 'max'}, "pool must be 'mean' or 'cls', got 'max'"),
    ({'dropout': 1.0}, r'dropout is a share .*\[0, 1\), got 1.0'),
  ],
)
def test_what_is_impossible_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _config(**changes)


def test_images_of_another_kind_are_refused():
  config = _config()
  batch = _batch(config)
  for inputs, message in (
    (
      batch['inputs'][:, :10],
      r'shape \(15, 15, 2\), got \(10, 15, 2\); resize',
    ),
    (batch['inputs'][..., :1], r'shape \(15, 15, 2\), got \(15, 15, 1\)'),
    (np.int32(batch['inputs']), 'uint8 or floating-point, got int32'),
  ):
    with pytest.raises(ValueError, match=message):
      config.layers().logits(_params(config), {'inputs': inputs})
