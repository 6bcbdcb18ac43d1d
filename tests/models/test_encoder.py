"""Tests properties of the encoder, and that its layers compose to the model."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.layerwise.step import layerwise
from models.encoder import EncoderConfig, Layers
from models.modules import drop
from tests.models.program import loss_of_pieces
from tests.rounding import assert_close, distance, units

B, T = 4, 11
# Number of roundings if sums have another order: four sums of up to 20 terms in
# each of three layers.
_ROUNDINGS = 3 * 4 * 20


def _config(**changes):
  changes = {'num_labels': 3, 'init_std': 0.3, 'norm_eps': 1e-5} | changes
  return EncoderConfig(
    vocab_size=31,
    width=12,
    mlp_width=20,
    num_heads=3,
    num_layers=3,
    num_positions=16,
    **changes,
  )


def _batch(config, seed=0):
  """Returns rows of 11, 8, 5 and 2 tokens.

  The second half of each row has type 1, as a second sentence.
  """
  rng = np.random.default_rng(seed)
  lengths_B1 = np.array([11, 8, 5, 2])[:, None]
  segments_BT = np.int32(np.arange(T)[None] < lengths_B1)
  tokens_BT = rng.integers(3, 31, (B, T), dtype=np.int32)
  targets_B = rng.integers(0, 3, B, dtype=np.int32)
  return {
    'inputs': np.where(segments_BT, tokens_BT, np.int32(config.pad_id)),
    'types': np.int32(np.arange(T)[None] >= lengths_B1 // 2),
    'segments': segments_BT,
    'targets': targets_B if config.num_labels > 1 else np.float32(targets_B),
    'weights': np.ones(B, np.float32),
  }


def _params(config):
  """Returns random parameters, also random norm scales and biases."""
  shapes = jax.eval_shape(Layers(config).init, jax.random.key(0))
  rng = np.random.default_rng(1)
  draw = lambda path, x: np.float32(
    0.4 * rng.standard_normal(x.shape) + ('scale' in str(path[-1]))
  )
  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def _logits(config):
  return jax.jit(Layers(config).logits)


@functools.cache
def _loss(config):
  return jax.jit(Layers(config))


_KINDS = pytest.mark.parametrize(
  'changes',
  [
    {},
    pytest.param({'num_labels': 1}, marks=pytest.mark.slow),
    {'family': 'roberta', 'pad_id': 1, 'num_types': 1},
  ],
  ids=['bert', 'regression', 'roberta'],
)


# Padding also moves the positions of RoBERTa, so that it is the quick one.
@pytest.mark.parametrize(
  'changes',
  [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({'num_labels': 1}, marks=pytest.mark.slow),
    {'family': 'roberta', 'pad_id': 1, 'num_types': 1},
  ],
  ids=['bert', 'regression', 'roberta'],
)
def test_padding_changes_nothing(changes):
  config = _config(**changes)
  params, batch = _params(config), _batch(config)
  whole = _logits(config)(params, batch)
  for row, length in ((1, 8), (3, 2)):
    alone = {name: x[row : row + 1] for name, x in batch.items()}
    for name in ('inputs', 'types', 'segments'):
      alone[name] = alone[name][:, :length]
    found = _logits(config)(params, alone)
    # Without padding, sums have fewer terms, in another order.
    assert_close(found[0], whole[row], _ROUNDINGS)


def test_both_directions_are_seen():
  config = _config()
  params, batch = _params(config), _batch(config)
  before = _logits(config)(params, batch)
  batch['inputs'] = batch['inputs'].copy()
  batch['inputs'][0, -1] = 3 + (batch['inputs'][0, -1] + 1) % 28
  after = _logits(config)(params, batch)
  # The head reads only the first token, which must attend to the changed one.
  assert np.abs(after[0] - before[0]).max() > 1e-3
  np.testing.assert_array_equal(after[1:], before[1:])


@_KINDS
def test_the_pieces_are_the_model(changes):
  config = _config(**changes, remat=True)
  model, batch = Layers(config), _batch(config)

  params = _params(config)
  found = loss_of_pieces(model, params, batch)
  assert_close(found, _loss(config)(params, batch), _ROUNDINGS)


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


def test_one_label_is_a_squared_error():
  config = _config(num_labels=1)
  params, batch = _params(config), _batch(config)
  error = _logits(config)(params, batch)[:, 0] - batch['targets']
  loss, _ = _loss(config)(params, batch)
  assert_close(loss, np.mean(error**2), _ROUNDINGS)


@pytest.mark.slow
def test_recomputing_changes_no_gradient():
  config = _config(dropout=0.2)
  params, batch = _params(config), _batch(config)
  batch['noise'] = np.arange(2 * B, dtype=np.uint32).reshape(B, 2)

  def gradient(config: EncoderConfig) -> Any:
    return jax.jit(jax.grad(Layers(config), has_aux=True))(params, batch)

  plain, metrics = gradient(config)
  again, expected = gradient(dataclasses.replace(config, remat=True))
  assert_close(metrics, expected, _ROUNDINGS)
  # The roundings count twice, forward and backward. The gradient of the key
  # biases is zero up to rounding, so that errors are compared with the norm of
  # the whole gradient.
  assert distance(again, plain) < units(2 * _ROUNDINGS)


@pytest.mark.slow
@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_layer_wise_is_whole_tree(dropout):
  config = _config(dropout=dropout)
  model, params, batch = Layers(config), _params(config), _batch(config)
  if dropout:
    batch['noise'] = np.arange(2 * B, dtype=np.uint32).reshape(B, 2)
  params = jax.tree.map(jnp.asarray, params)
  step = layerwise(model, optax.sgd(0.1), microbatches=2)
  found, _, metrics = jax.jit(step)(params, step.init(params), batch)
  value_and_grad = jax.jit(jax.value_and_grad(model, has_aux=True))
  (loss, _), grads = value_and_grad(params, batch)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
  assert_close(metrics['loss'], loss, _ROUNDINGS)
  # The roundings count twice, forward and backward.
  assert_close(found, expected, 2 * _ROUNDINGS)


def test_dropout_drops_its_share_and_keeps_the_mean():
  noise = np.stack([np.arange(2, dtype=np.uint32)] * 2 + [np.uint32([5, 6])])
  x = jnp.ones((3, 2000))
  kept = drop(x, noise, 0, 0.25)
  assert {*np.unique(kept).tolist()} == {0.0, float(np.float32(1 / 0.75))}
  # With 2,000 draws, the standard error of the share is 0.01.
  np.testing.assert_allclose(np.mean(kept, axis=1), 1, atol=0.05)
  # Rows 0 and 1 have the same noise, row 2 has another.
  np.testing.assert_array_equal(kept[0], kept[1])
  assert np.mean(kept[0] != kept[2]) > 0.3
  assert np.mean(kept != drop(x, noise, 1, 0.25)) > 0.3
  np.testing.assert_array_equal(drop(x, noise, 0, 0.0), x)
  np.testing.assert_array_equal(drop(x, None, 0, 0.25), x)


def test_layers_draw_differently():
  """Each layer must return new noise, or all layers would drop the same."""
  config = _config(dropout=0.5)
  x = {
    'h': np.ones((1, T, 12), np.float32),
    'segments': np.ones((1, T), np.int32),
    'noise': np.uint32([[3, 4]]),
  }
  params = jax.tree.map(lambda w: w[0], _params(config)['blocks'])
  found = jax.jit(Layers(config).block)(params, x)
  assert np.any(found['noise'] != x['noise'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_labels': 0}, 'num_labels must be at least 1, got 0'),
    ({'dropout': 1.0}, r'dropout is a share .*\[0, 1\), got 1.0'),
    ({'pad_id': 31}, r'pad_id must be .*0\.\.30, got 31'),
    ({'family': 'roberta', 'pad_id': 15}, 'max_length must be at least 1'),
  ],
)
def test_what_is_impossible_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    _config(**changes)
  with pytest.raises(ValueError, match='width must be a multiple'):
    dataclasses.replace(_config(), num_heads=5)


def test_rows_without_positions_are_refused():
  config = _config(family='roberta', pad_id=1)
  long = {
    name: np.tile(x, (1, 2)) for name, x in _batch(config).items() if x.ndim > 1
  }
  with pytest.raises(ValueError, match=r'at most 14 tokens.*got 22'):
    jax.eval_shape(Layers(config).logits, _params(config), long)
