"""Tests properties of the LLaMA model."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax
from models.llama import (
  Attention,
  Layers,
  Llama3Scaling,
  LlamaConfig,
  RMSNorm,
  frequencies,
  llama,
)
from tests.galore_optax.every import build
from tests.models.program import drawn
from tests.rounding import assert_close, units

_SMALL = LlamaConfig(
  vocab_size=61,
  width=24,
  mlp_width=40,
  num_heads=4,
  num_kv_heads=2,
  num_layers=3,
  loss_chunk=10,
)
# Number of roundings if sums have another order: four sums of up to 40 terms in
# each of three layers.
_ROUNDINGS = 3 * 4 * 40


# The model is cached, so that tests of one model share its compiled programs.
@functools.cache
def _model(**changes):
  """Returns a model and its random parameters, also norm scales."""
  model = Layers(dataclasses.replace(_SMALL, **changes))
  return model, drawn(model, 0.2)


@functools.cache
def _jit(function):
  return jax.jit(function)


def _batch(lengths=(4, 7), *, num_rows=2):
  """Returns random tokens; each row packs documents of the given lengths."""
  rng = np.random.default_rng(3)
  shape = (num_rows, sum(lengths))
  segments = np.repeat(np.arange(len(lengths)), lengths)
  positions = np.concatenate([np.arange(length) for length in lengths])
  return {
    'inputs': rng.integers(_SMALL.vocab_size, size=shape, dtype=np.int32),
    'targets': rng.integers(_SMALL.vocab_size, size=shape, dtype=np.int32),
    'weights': rng.integers(3, size=shape).astype(np.float32),
    'positions': np.tile(positions.astype(np.int32), (num_rows, 1)),
    'segments': np.tile(segments.astype(np.int32), (num_rows, 1)),
  }


# The compiled function is cached: compiling takes most of these tests' time.
@functools.cache
def _value_and_grad(model):
  return jax.jit(jax.value_and_grad(model, has_aux=True))


def _layer(params, index):
  return jax.tree.map(lambda leaf: leaf[index], params['blocks'])


@pytest.mark.parametrize(
  ('size', 'millions', 'linear_millions'),
  [
    ('60m', 58.1, 25.3),
    ('130m', 134.1, 84.9),
    ('350m', 368.0, 302.4),
    ('1b', 1339.1, 1207.9),
    ('7b', 6738.4, 6476.0),
  ],
)
def test_published_sizes_have_the_published_parameter_counts(
  size, millions, linear_millions
):
  model = Layers(llama(size))
  params = jax.eval_shape(model.init, jax.random.key(0))
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
  assert round(count(params), 1) == millions
  kernels = [params['blocks']['attention'], params['blocks']['mlp']]
  assert round(count(kernels), 1) == linear_millions


def test_initialises_with_64_bits_enabled():
  jax.config.update('jax_enable_x64', True)
  try:
    params = jax.eval_shape(Layers(_SMALL).init, jax.random.key(0))
  finally:
    jax.config.update('jax_enable_x64', False)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype('float32')
  }


@pytest.mark.parametrize('size', '9m 20m 35m 40m 71m 100m 250m 3b'.split())
def test_other_sizes_are_consistent(size):
  assert llama(size, remat=True).remat


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: llama('8b'), "one of 9m, .*, got '8b'"),
    (lambda: dataclasses.replace(_SMALL, width=26), 'width=26, num_heads=4'),
    (lambda: dataclasses.replace(_SMALL, width=12), 'width=12, num_heads=4'),
    (lambda: dataclasses.replace(_SMALL, num_kv_heads=3), 'num_kv_heads=3'),
    (lambda: dataclasses.replace(_SMALL, loss_chunk=0), 'got 0'),
    (lambda: dataclasses.replace(_SMALL, width=0), 'width must .* got 0'),
    (lambda: dataclasses.replace(_SMALL, num_heads=0), 'num_heads .* got 0'),
    (lambda: dataclasses.replace(_SMALL, num_layers=0), 'num_layers .* got 0'),
    (lambda: dataclasses.replace(_SMALL, num_kv_heads=0), 'heads .* got 0'),
    (lambda: dataclasses.replace(_SMALL, window=0), 'window .* got 0'),
    (lambda: dataclasses.replace(_SMALL, head_dim=0), 'head_dim .* got 0'),
    (lambda: dataclasses.replace(_SMALL, head_dim=5), 'be even, got 5'),
    (lambda: Llama3Scaling(0.5, 1.0, 4.0, 64), 'factor .* got 0.5'),
    (lambda: Llama3Scaling(8.0, 4.0, 4.0, 64), 'below .* got 4.0 and 4.0'),
  ],
)
def test_bad_dimensions_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.parametrize('tied', [False, True])
def test_parameters_are_a_plain_dict_of_stacks(tied):
  model = Layers(dataclasses.replace(_SMALL, tied=tied, param_dtype='bfloat16'))
  params = jax.eval_shape(model.init, jax.random.key(0))
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  L, D, F, V = 3, 24, 40, 61
  expected = {
    'embed/embedding': (V, D),
    'blocks/attention_norm/scale': (L, D),
    'blocks/attention/q/kernel': (L, D, D),
    'blocks/attention/k/kernel': (L, D, 12),
    'blocks/attention/v/kernel': (L, D, 12),
    'blocks/attention/o/kernel': (L, D, D),
    'blocks/mlp_norm/scale': (L, D),
    'blocks/mlp/gate/kernel': (L, D, F),
    'blocks/mlp/up/kernel': (L, D, F),
    'blocks/mlp/down/kernel': (L, F, D),
    'norm/scale': (D,),
  }
  if not tied:
    expected['lm_head/kernel'] = (D, V)
  assert shapes == expected
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
    jnp.dtype('bfloat16')
  }


def _published(**changes):
  """Returns a model with the options of newer checkpoints, and parameters."""
  return _model(head_dim=8, qkv_bias=True, qk_norm=True, **changes)


def test_biases_and_norms_of_heads_are_vectors_beside_the_kernels():
  _, params = _published()
  shapes = jax.tree.map(lambda leaf: leaf.shape, params['blocks']['attention'])
  assert shapes == {
    'q': {'kernel': (3, 24, 32), 'bias': (3, 32)},
    'k': {'kernel': (3, 24, 16), 'bias': (3, 16)},
    'v': {'kernel': (3, 24, 16), 'bias': (3, 16)},
    'o': {'kernel': (3, 32, 24)},
    'q_norm': {'scale': (3, 8)},
    'k_norm': {'scale': (3, 8)},
  }
  rows = galore_optax.describe(build('Galore', rank=2), params)
  projected = {row.path for row in rows if row.projected_shape}
  kernels = ('attention/q', 'attention/k', 'attention/v', 'attention/o')
  names = (*kernels, 'mlp/gate', 'mlp/up', 'mlp/down')
  assert projected == {f'blocks/{name}/kernel' for name in names}


def test_initial_weights_are_normal_and_differ_between_layers():
  model = Layers(llama('9m', num_layers=2, vocab_size=61))

  @jax.jit
  def init(key):
    # The program draws only these weights.
    params = model.init(key)
    return params['blocks']['mlp']['up']['kernel'], params['norm']['scale']

  kernel, scale = init(jax.random.key(0))
  # With 45,056 draws, the standard error of the deviation is 0.02 / 300.
  np.testing.assert_allclose(kernel.std(axis=(1, 2)), 0.02, rtol=0.02)
  assert not np.allclose(kernel[0], kernel[1], atol=1e-3)
  np.testing.assert_array_equal(scale, 1.0)


def test_a_logit_depends_on_no_later_token():
  model, params = _model()
  batch = _batch([11])
  x = _jit(model.embed)(params, batch)

  def last_h(h_BTD, time):
    body = lambda y, layer: (model.block(layer, y), None)
    y = jax.lax.scan(body, {**x, 'h': h_BTD}, params['blocks'])[0]
    return jnp.sum(y['h'][:, time] ** 2)

  grad = jax.jit(jax.grad(last_h))
  for time in (0, 4, 10):
    reach_BT = jnp.max(jnp.abs(grad(x['h'], time)), axis=-1)
    np.testing.assert_array_equal(reach_BT[:, time + 1 :], 0.0)
    assert jnp.all(reach_BT[:, : time + 1] > 0)


def test_a_block_looks_back_a_window():
  model, params = _model(window=3)
  x = _jit(model.embed)(params, _batch([11]))
  last = lambda h, time: jnp.sum(
    model.block(_layer(params, 0), {**x, 'h': h})['h'][:, time] ** 2
  )
  grad = jax.jit(jax.grad(last))
  for time in (0, 1, 6, 10):
    reach_BT = jnp.max(jnp.abs(grad(x['h'], time)), axis=-1)
    seen_T = (np.arange(11) > time - 3) & (np.arange(11) <= time)
    np.testing.assert_array_equal(reach_BT > 0, np.stack([seen_T] * 2))


@functools.partial(jax.jit, static_argnums=0)
def _mixed(config, params):
  """Applies attention to rows of the unit matrix.

  Queries and keys are therefore rows of their kernels.
  """
  h_BTD = jnp.eye(config.width)[None, :11]
  times_BT = jnp.arange(11)[None]
  none_BT = jnp.zeros_like(times_BT)
  return Attention(config).apply({'params': params}, h_BTD, times_BT, none_BT)


def _signs(params):
  """Returns parameters whose queries and keys have a mean square of 1."""
  sign = lambda name: {'kernel': jnp.sign(params[name]['kernel'])}
  return {**params, 'q': sign('q'), 'k': sign('k')}


def test_the_norm_of_heads_leaves_unit_vectors_and_takes_any_length():
  model, params = _model(norm_eps=1e-30)
  plain = _signs(_layer(params, 0)['attention'])
  ones = {'scale': jnp.ones(6)}
  normed = dataclasses.replace(model.config, qk_norm=True)
  expected = _mixed(model.config, plain)
  for factor in (1.0, 4.0):
    scaled = {
      **plain,
      'q': {'kernel': factor * plain['q']['kernel']},
      'q_norm': ones,
      'k_norm': ones,
    }
    # The norm has a few roundings, as has each of up to 11 scores of order 1.
    assert_close(_mixed(normed, scaled), expected, operations=30)
  # A scale of queries multiplies the scores, because it is applied after the
  # norm.
  doubled = {**plain, 'q_norm': {'scale': 2 * ones['scale']}, 'k_norm': ones}
  longer = {**plain, 'q': {'kernel': 2 * plain['q']['kernel']}}
  assert_close(
    _mixed(normed, doubled), _mixed(model.config, longer), operations=30
  )


def test_a_bias_of_values_is_added_to_what_is_mixed():
  model, params = _model()
  plain = _layer(params, 0)['attention']
  biased = dataclasses.replace(model.config, qkv_bias=True)
  rng = np.random.default_rng(4)
  bias_KH = rng.standard_normal((2, 6)).astype(np.float32)
  given = {'q': np.zeros(24), 'k': np.zeros(12), 'v': bias_KH.reshape(-1)}
  full = plain | {
    name: {**plain[name], 'bias': jnp.float32(given[name])} for name in given
  }
  # The weights of a softmax sum to 1, so that the bias is added unchanged. Two
  # query heads share a value head.
  moved_D = np.repeat(bias_KH, 2, axis=0).reshape(-1) @ plain['o']['kernel']
  found = _mixed(biased, full)
  expected = _mixed(model.config, plain) + moved_D[None, None]
  assert_close(found, expected, _ROUNDINGS)


@pytest.mark.parametrize('factor', [1.0, 3.0, 8.0])
def test_llama3_scaling_divides_the_low_frequencies(factor):
  plain = dataclasses.replace(_SMALL, head_dim=64)
  scaling = Llama3Scaling(factor, 1.0, 4.0, 64)
  scaled = dataclasses.replace(plain, rope_scaling=scaling)
  turns = frequencies(plain)
  if factor == 1:
    np.testing.assert_array_equal(frequencies(scaled), turns)
  expected = []
  for turn in np.float64(turns):
    fits = 64 * turn / (2 * np.pi)
    share = (fits - 1) / 3
    between = (1 - share) * turn / factor + share * turn
    expected.append(
      turn / factor if fits < 1 else turn if fits > 4 else between
    )
  # A frequency has the roundings of a power and five products.
  np.testing.assert_allclose(frequencies(scaled), expected, rtol=units(10))
  assert expected[0] == turns[0] and expected[-1] == turns[-1] / factor


def test_documents_do_not_see_each_other():
  model, params = _model()
  batch = _batch()
  logits = _jit(model.logits)
  before = logits(params, batch)
  other = {**batch, 'inputs': batch['inputs'].copy()}
  other['inputs'][:, :4] = (other['inputs'][:, :4] + 7) % 61
  after = logits(params, other)
  np.testing.assert_array_equal(before[:, 4:], after[:, 4:])
  assert np.all(np.abs(before[:, :4] - after[:, :4]).max(axis=-1) > 1e-3)


def test_packed_documents_equal_the_documents_alone():
  model, params = _model()
  packed = _batch()
  logits = _jit(model.logits)(params, packed)
  for start, stop in ((0, 4), (4, 11)):
    alone = {name: array[:, start:stop] for name, array in packed.items()}
    alone['segments'] = np.zeros_like(alone['segments'])
    expected = _jit(model.logits)(params, alone)
    assert_close(logits[:, start:stop], expected, _ROUNDINGS)


def test_rotation_depends_on_distance_alone():
  model, params = _model()
  batch = _batch()
  moved = {**batch, 'positions': batch['positions'] + 5}
  # Angles of up to about 14, and all other numbers, are rounded to 2^-24 of
  # their size.
  np.testing.assert_allclose(
    _jit(model.logits)(params, moved),
    _jit(model.logits)(params, batch),
    rtol=1e-4,
    atol=1e-4,
  )
  stretched = {**batch, 'positions': batch['positions'] * 2}
  difference = _jit(model.logits)(params, stretched) - _jit(model.logits)(
    params, batch
  )
  assert jnp.max(jnp.abs(difference)) > 1e-2


def test_loss_is_the_weighted_mean_over_all_positions():
  model, params = _model()
  batch = _batch()
  (loss, aux), _ = _value_and_grad(model)(params, batch)
  logits_BTV = np.asarray(_jit(model.logits)(params, batch), np.float64)
  log_p_BTV = logits_BTV - np.logaddexp.reduce(logits_BTV, -1, keepdims=True)
  nll_BT = -np.take_along_axis(log_p_BTV, batch['targets'][..., None], -1)
  nll = np.sum(batch['weights'] * nll_BT[..., 0])
  assert_close(aux['nll'], nll, _ROUNDINGS)
  assert_close(loss, nll / 22, _ROUNDINGS)
  assert aux['weight'] == batch['weights'].sum()


def test_microbatches_average_to_the_batch():
  model, params = _model()
  batch = _batch(num_rows=4)
  batch['weights'] /= batch['weights'].mean()
  x = _jit(model.embed)(params, batch)
  rest = {name: params[name] for name in ('norm', 'lm_head')}
  value_and_grad = _jit(jax.value_and_grad(model.loss, has_aux=True))
  whole = value_and_grad(rest, {'h': x['h']}, batch)
  halves = [
    value_and_grad(
      rest,
      {'h': x['h'][rows]},
      {name: array[rows] for name, array in batch.items()},
    )
    for rows in (slice(0, 2), slice(2, 4))
  ]
  mean = jax.tree.map(lambda *parts: sum(parts) / 2, *halves)
  assert_close((mean[0][0], mean[1]), (whole[0][0], whole[1]), _ROUNDINGS)


@pytest.mark.slow
def test_three_functions_compose_to_the_model():
  model, params = _model()
  batch = _batch()

  def composed(params, batch):
    body = lambda x, layer: (model.block(layer, x), None)
    rest = {name: params[name] for name in params if name != 'blocks'}
    x = jax.lax.scan(body, model.embed(rest, batch), params['blocks'])[0]
    return model.loss(rest, x, batch)

  found = _value_and_grad(composed)(params, batch)
  assert_close(found, _value_and_grad(model)(params, batch), _ROUNDINGS)


def test_scan_equals_a_loop_over_blocks_forward_and_backward():
  model, params = _model()
  batch = _batch()
  x = _jit(model.embed)(params, batch)
  block = lambda layer, h: model.block(layer, {**x, 'h': h})['h']
  backward = jax.jit(lambda layer, h, dh: jax.vjp(block, layer, h)[1](dh))
  inputs = [x['h']]
  for index in range(3):
    inputs.append(
      _jit(model.block)(_layer(params, index), x | {'h': inputs[-1]})['h']
    )
  score = jax.value_and_grad(lambda h: model.loss(params, {'h': h}, batch)[0])
  loss, dh = jax.jit(score)(inputs.pop())

  layers = []
  for index in reversed(range(3)):
    dlayer, dh = backward(_layer(params, index), inputs[index], dh)
    layers.insert(0, dlayer)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

  (whole_loss, _), grads = _value_and_grad(model)(params, batch)
  assert_close((loss, stacked), (whole_loss, grads['blocks']), _ROUNDINGS)


@pytest.mark.slow
def test_recomputation_changes_memory_and_no_number():
  batch = _batch([64], num_rows=4)
  results, temps = [], []
  for remat in (False, True):
    model, params = _model(remat=remat)
    step = _value_and_grad(model).lower(params, batch).compile()
    results.append(step(params, batch))
    temps.append(step.memory_analysis().temp_size_in_bytes)
  assert_close(*results, _ROUNDINGS)
  assert temps[1] < 0.8 * temps[0]


def test_tied_head_is_the_transposed_embedding():
  tied, params = _model(tied=True)
  untied, _ = _model()
  split = {**params, 'lm_head': {'kernel': params['embed']['embedding'].T}}
  batch = _batch()
  (loss, _), grads = _value_and_grad(tied)(params, batch)
  (expected, _), parts = _value_and_grad(untied)(split, batch)
  whole = parts['embed']['embedding'] + parts['lm_head']['kernel'].T
  found = loss, grads['embed']['embedding']
  assert_close(found, (expected, whole), _ROUNDINGS)


@pytest.mark.parametrize(
  'num_kv_heads', [pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_grouped_heads_equal_repeated_heads(num_kv_heads):
  grouped, params = _model(num_kv_heads=num_kv_heads)
  full, _ = _model(num_kv_heads=4)
  attention = dict(params['blocks']['attention'])
  for name in 'kv':
    kernel = attention[name]['kernel'].reshape(3, 24, num_kv_heads, 6)
    repeated = jnp.repeat(kernel, 4 // num_kv_heads, axis=2)
    attention[name] = {'kernel': repeated.reshape(3, 24, 24)}
  repeated = {**params, 'blocks': {**params['blocks'], 'attention': attention}}
  batch = _batch()
  found = _jit(grouped.logits)(params, batch)
  assert_close(found, _jit(full.logits)(repeated, batch), _ROUNDINGS)


@pytest.mark.slow
def test_bfloat16_is_finite_and_close():
  exact, params = _model()
  rough, _ = _model(dtype='bfloat16', param_dtype='bfloat16')
  batch = _batch()
  cast = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), params)
  (loss, _), grads = _value_and_grad(rough)(cast, batch)
  (expected, _), exact_grads = _value_and_grad(exact)(params, batch)
  # There are about fifty roundings of at most 2^-9 each, from a weight to the
  # loss and back to the weight's gradient.
  np.testing.assert_allclose(loss, expected, rtol=1e-2)
  for grad, exact_grad in zip(
    jax.tree.leaves(grads), jax.tree.leaves(exact_grads), strict=True
  ):
    error = jnp.linalg.norm(grad.astype(jnp.float32) - exact_grad)
    assert error < 0.1 * jnp.linalg.norm(exact_grad)


def test_norm_rounds_once():
  norm = RMSNorm(_SMALL)
  rng = np.random.default_rng(5)
  h_BTD = jnp.asarray(rng.normal(size=(2, 5, 24)), jnp.bfloat16)
  variables = {'params': {'scale': rng.normal(size=24).astype(np.float32)}}
  apply = jax.jit(lambda h_BTD: norm.apply(variables, h_BTD))
  found, exact = apply(h_BTD), apply(h_BTD.astype(jnp.float32))
  # One rounding to bfloat16, and those of a float32 mean of 24 squares.
  rtol = units(0.5, jnp.bfloat16) + units(24)
  np.testing.assert_allclose(np.float32(found), exact, rtol=rtol)


@pytest.mark.parametrize(
  'param_dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)]
)
def test_each_number_has_its_type(param_dtype):
  model, params = _model(dtype='bfloat16', param_dtype=param_dtype)
  batch = _batch()
  x = jax.eval_shape(model.embed, params, batch)
  assert x['h'].dtype == jnp.bfloat16
  layer = jax.eval_shape(lambda params: _layer(params, 0), params)
  assert jax.eval_shape(model.block, layer, x)['h'].dtype == jnp.bfloat16
  assert jax.eval_shape(model.logits, params, batch).dtype == jnp.float32
  step = _value_and_grad(model)
  (loss, _), grads = jax.eval_shape(step, params, batch)
  assert loss.dtype == jnp.float32
  chex.assert_trees_all_equal_dtypes(grads, params)


def test_repeated_tokens_sum_their_gradient_in_float32():
  model, params = _model(dtype='bfloat16')
  batch = _batch([700], num_rows=1)
  batch['inputs'][:] = 5

  def total(params):
    return jnp.sum(model.embed(params, batch)['h'].astype(jnp.float32))

  # A bfloat16 sum of ones would stop at 256.
  grad = jax.jit(jax.grad(total))(params)['embed']['embedding']
  np.testing.assert_array_equal(grad[5], 700.0)


def test_a_token_outside_the_vocabulary_shows():
  model, params = _model()
  batch = _batch([4], num_rows=1)
  batch['inputs'][0, 2] = 61
  assert np.isnan(_jit(model.embed)(params, batch)['h'][0, 2]).all()


def test_program_size_does_not_grow_with_depth():
  def num_instructions(num_layers):
    model = Layers(dataclasses.replace(_SMALL, num_layers=num_layers))
    params = jax.eval_shape(model.init, jax.random.key(0))
    text = _value_and_grad(model).lower(params, _batch([9])).as_text()
    return len(re.findall(r'stablehlo\.\w+', text))

  assert num_instructions(2) == num_instructions(9)
