"""Compares `Layers.extend`, piece by piece, with `logits` of whole rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.layerwise.weights import quantized
from galore_optax.quantized.array import is_quantized
from models import cross_entropy, lowrank
from models.llama import Layers, Llama3Scaling, LlamaConfig
from tests.galore_optax.program import each
from tests.models.program import adapt, drawn
from tests.rounding import units

_SMALL = LlamaConfig(
  vocab_size=61,
  width=24,
  mlp_width=40,
  num_heads=4,
  num_layers=3,
)
_VARIANTS = {
  'plain': {},
  'grouped': {'num_kv_heads': 2},
  'one key head': {'num_kv_heads': 1, 'tied': True},
  'biases': {'qkv_bias': True, 'num_kv_heads': 2},
  'norms of heads': {'qk_norm': True, 'head_dim': 8, 'num_kv_heads': 2},
  'biases and norms of heads': {
    'qkv_bias': True,
    'qk_norm': True,
    'head_dim': 8,
    'num_kv_heads': 2,
  },
  'window': {'window': 5, 'num_kv_heads': 2},
  'scaled waves': {'rope_scaling': Llama3Scaling(8.0, 1.0, 4.0, 64)},
  'remat': {'remat': True},
}
# The tolerances allow for float32 sums in another order, in three layers.
_FLOAT32 = {'rtol': 1e-4, 'atol': 2e-5}


# The model is cached, so that tests of one model share its compiled programs.
# For the same reason, most tests read pieces of four tokens into two rows with
# room for eight.
@functools.cache
def _model(**changes):
  """Returns a model and its random parameters, also norm scales and biases."""
  model = Layers(dataclasses.replace(_SMALL, **changes))
  return model, drawn(model, 0.3)


@functools.cache
def _extend(model):
  return jax.jit(model.extend, donate_argnums=1)


@functools.cache
def _logits(model):
  return jax.jit(model.logits)


def _whole(model, params, tokens_BT):
  """Returns the logits [B, T, V] of whole rows, without a cache."""
  times_BT = np.tile(np.arange(tokens_BT.shape[1]), (len(tokens_BT), 1))
  batch = {
    'inputs': tokens_BT,
    'positions': np.int32(times_BT),
    'segments': np.zeros_like(tokens_BT),
  }
  return np.asarray(_logits(model)(params, batch))


def _check(model, params, prompts_B, pieces, cache, tolerance):
  """Reads prompts and further pieces, and compares the logits after each.

  Args:
    model: The model, as pure functions.
    params: Its parameters.
    prompts_B: Number of tokens of each row's prompt.
    pieces: Numbers of tokens that are read in each row after the prompts.
    cache: An empty cache with enough room.
    tolerance: Arguments `rtol` and `atol` of the comparison.

  Returns:
    The cache after the last piece.
  """
  rng = np.random.default_rng(3)
  num_rows, longest = len(prompts_B), max(prompts_B)
  vocab = model.config.vocab_size
  shape = (num_rows, longest + sum(pieces))
  tokens_BT = rng.integers(vocab, size=shape, dtype=np.int32)
  expected_BTV = _whole(model, params, tokens_BT)
  read_B = np.zeros(num_rows, np.int32)
  for step, size in enumerate([longest, *pieces]):
    # Pieces of equal size share a compiled program.
    lengths_B = np.full(num_rows, size, np.int32) if step else prompts_B
    lengths_B = np.int32(lengths_B)
    # The padding after a row's tokens is random, because it must not matter.
    piece_BT = rng.integers(vocab, size=(num_rows, size), dtype=np.int32)
    for row, (start, length) in enumerate(zip(read_B, lengths_B, strict=True)):
      piece_BT[row, :length] = tokens_BT[row, start : start + length]
    logits_BV, cache = _extend(model)(params, cache, piece_BT, lengths_B)
    read_B = read_B + lengths_B
    np.testing.assert_array_equal(cache.lengths, read_B)
    expected_BV = expected_BTV[np.arange(num_rows), read_B - 1]
    np.testing.assert_allclose(logits_BV, expected_BV, **tolerance)
  return cache


@each('variant', _VARIANTS, quick=['biases and norms of heads'])
def test_pieces_give_the_logits_of_the_whole(variant):
  model, params = _model(**_VARIANTS[variant])
  cache = model.cache(3, 16)
  # Read prompts of 6, 1 and 4 tokens, then 1, 1 and 6 tokens in each row.
  _check(model, params, (6, 1, 4), (1, 1, 6), cache, _FLOAT32)


def test_room_that_is_just_enough():
  model, params = _model()
  _check(model, params, (4, 4), (4,), model.cache(2, 8), _FLOAT32)


def test_bfloat16_is_close_and_keeps_its_type():
  model, params = _model(dtype='bfloat16')
  cache = model.cache(2, 12)
  assert cache.keys.dtype == jnp.bfloat16
  # Logits have a standard deviation of 2, and both sides round them to bfloat16
  # about fifty times.
  rough = {'rtol': 0, 'atol': 0.3}
  cache = _check(model, params, (4, 2), (4,), cache, rough)
  assert cache.values.dtype == jnp.bfloat16
  exact, _ = _model()
  half = exact.cache(2, 12, 'bfloat16')
  _check(exact, params, (4, 2), (4,), half, rough)


def test_a_row_of_no_tokens_stays_as_it_was():
  model, params = _model(num_kv_heads=2)
  tokens_BT = np.arange(16, dtype=np.int32).reshape(2, 8)
  extend = _extend(model)
  read = tokens_BT[:, :4], np.int32([3, 3])
  _, cache = extend(params, model.cache(2, 8), *read)
  junk_BT = tokens_BT[:, :1] + 40
  _, cache = extend(params, cache, junk_BT, np.int32([1, 0]))
  np.testing.assert_array_equal(cache.lengths, [4, 3])
  logits_BV, _ = extend(params, cache, tokens_BT[:, 3:4], np.int32([1, 1]))
  expected_BTV = _whole(model, params, tokens_BT)
  np.testing.assert_allclose(logits_BV[1], expected_BTV[1, 3], **_FLOAT32)
  assert np.max(np.abs(logits_BV[0] - expected_BTV[0, 3])) > 1e-2


def test_a_row_can_go_back():
  model, params = _model()
  tokens_BT = np.arange(16, dtype=np.int32).reshape(2, 8)
  extend, lengths_B = _extend(model), np.int32([4, 4])
  other_BT = tokens_BT[:, :4] + 30
  _, cache = extend(params, model.cache(2, 8), other_BT, lengths_B)
  cache = cache._replace(lengths=jnp.int32([0, 4]))
  read = tokens_BT[:, :4], lengths_B
  logits_BV, _ = extend(params, cache, *read)
  expected_BTV = _whole(model, params, tokens_BT)
  np.testing.assert_allclose(logits_BV[0], expected_BTV[0, 3], **_FLOAT32)
  assert np.max(np.abs(logits_BV[1] - expected_BTV[1, 3])) > 1e-2


def test_the_cache_is_changed_in_place():
  model, params = _model(num_kv_heads=2)
  cache = jax.eval_shape(lambda: model.cache(2, 4096))
  tokens_BT = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  lengths_B = jax.ShapeDtypeStruct((2,), jnp.int32)
  lowered = _extend(model).lower(params, cache, tokens_BT, lengths_B)
  memory = lowered.compile().memory_analysis()
  size = 4 * cache.keys.size
  # Keys and values are aliased, and temporary buffers are smaller than one of
  # the two.
  assert memory.alias_size_in_bytes >= 2 * size
  assert memory.temp_size_in_bytes < size


def test_stored_weights_are_read_layer_by_layer():
  plain, params = _model(num_kv_heads=2)
  weights = quantized(bits=8, dtype='float32')
  store = lambda w: weights.store(w) if w.ndim > 2 else w
  stored = jax.jit(lambda tree: jax.tree.map(store, tree))(params['blocks'])
  read = lambda tree: jax.tree.map(weights.read, tree, is_leaf=is_quantized)
  arrays = params | {'blocks': jax.jit(read)(stored)}
  model = Layers(plain.config, read)
  tokens_BT = np.arange(8, dtype=np.int32).reshape(2, 4)
  args = tokens_BT, np.int32([4, 2])
  found, _ = _extend(model)(
    params | {'blocks': stored}, model.cache(2, 8), *args
  )
  expected, _ = _extend(plain)(arrays, plain.cache(2, 8), *args)
  np.testing.assert_allclose(found, expected, **_FLOAT32)


@each(
  'adapter',
  [lowrank.Lora(rank=2, alpha=8.0), lowrank.Factored(rank=3)],
  quick=[lowrank.Lora(rank=2, alpha=8.0)],
)
def test_factors_take_part(adapter):
  plain, params = _model(num_kv_heads=2)
  params = adapt(params, adapter, jax.random.key(1))
  rng = np.random.default_rng(2)
  draw = lambda path, w: (
    np.float32(rng.normal(size=w.shape)) if path[-1].key == 'lora_b' else w
  )
  params = jax.tree_util.tree_map_with_path(draw, params)
  model = Layers(plain.config, intercept=lowrank.hook(adapter))
  _check(model, params, (4, 2), (4,), model.cache(2, 8), _FLOAT32)


def test_losses_of_tokens_sum_to_the_loss():
  model, params = _model(loss_chunk=6)
  rng = np.random.default_rng(5)
  draw = lambda: rng.integers(61, size=(2, 8), dtype=np.int32)
  batch = {
    'inputs': draw(),
    'targets': draw(),
    'positions': np.tile(np.arange(8, dtype=np.int32), (2, 1)),
    'segments': np.zeros((2, 8), np.int32),
    'weights': rng.random((2, 8), np.float32),
  }
  both = lambda *args: (model.nll(*args), model(*args)[1])
  nll_BT, sums = jax.jit(both)(params, batch)
  # The tolerance allows for sums of up to 40 terms, four per layer.
  total = np.sum(batch['weights'] * nll_BT)
  np.testing.assert_allclose(total, sums['nll'], rtol=units(3 * 4 * 40))
  logits_BTV = _whole(*_model(), batch['inputs'])
  log_p_BTV = logits_BTV - np.logaddexp.reduce(logits_BTV, -1, keepdims=True)
  picked = np.take_along_axis(log_p_BTV, batch['targets'][..., None], -1)
  np.testing.assert_allclose(nll_BT, -picked[..., 0], **_FLOAT32)
  h_BTD, kernel_DV = rng.random((2, 8, 3)), rng.random((3, 61))
  inputs = np.float32(h_BTD), np.float32(kernel_DV), batch['targets']
  one = lambda n: jax.jit(cross_entropy.in_chunks, static_argnums=3)(*inputs, n)
  # Each token's result has a sum of 61 terms, whose order may differ.
  np.testing.assert_allclose(one(2), one(100), rtol=units(61))
