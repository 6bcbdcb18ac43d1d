"""Tests models with low-rank factors, merging, and adapter files of PEFT."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import lowrank, peft
from models import noise as noise_lib
from models.llama import Layers, LlamaConfig
from models.lowrank import Factored, Lora, Relora
from tests.models.program import adapt, merge
from tests.rounding import assert_close

CONFIG = LlamaConfig(
  vocab_size=23,
  width=12,
  mlp_width=20,
  num_heads=3,
  num_kv_heads=1,
  num_layers=2,
  qkv_bias=True,
  init_std=0.3,
)
B, T = 3, 7


def example(noise=False):
  rng = np.random.default_rng(0)
  tokens = rng.integers(CONFIG.vocab_size, size=(B, T + 1), dtype=np.int32)
  batch = {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones((B, T), np.float32),
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    'segments': np.ones((B, T), np.int32),
  }
  keys = jax.random.split(jax.random.key(5), B)
  return batch | ({'noise': jax.random.key_data(keys)} if noise else {})


def model(adapter, **overrides):
  config = dataclasses.replace(CONFIG, **overrides)
  return Layers(config, intercept=lowrank.hook(adapter))


@functools.cache
def logits(adapter=None):
  """Returns the compiled logits function of a model, which may have factors."""
  return jax.jit((model(adapter) if adapter else Layers(CONFIG)).logits)


@functools.cache
def base():
  return jax.jit(Layers(CONFIG).init)(jax.random.key(0))


def weights(adapter, *, moved=False):
  """Returns parameters with factors.

  Args:
    adapter: The adapter.
    moved: Whether to add noise to all parameters, as if they had been trained.
  """
  params = adapt(base(), adapter, jax.random.key(1))
  if not moved:
    return params
  rng = np.random.default_rng(2)
  draw = lambda w: w + np.float32(0.2 * rng.normal(size=w.shape))
  return jax.tree.map(draw, jax.device_get(params))


@pytest.mark.slow
def test_at_start_the_function_is_the_same():
  params = weights(Lora(rank=3))
  for name, adapted in params['blocks']['attention'].items():
    assert adapted['lora_a'].shape == (2, 12, 3), name
    chex.assert_trees_all_equal(
      adapted['kernel'], base()['blocks']['attention'][name]['kernel']
    )
  found = logits(Lora(rank=3))(params, example())
  # B is 0, so that any change of A leaves the logits bitwise unchanged.
  grown = jax.tree_util.tree_map_with_path(
    lambda path, w: 5 * w if path[-1].key == 'lora_a' else w, params
  )
  np.testing.assert_array_equal(found, logits(Lora(rank=3))(grown, example()))
  # The two programs may order sums differently: four sums of up to 20 terms in
  # each of two layers.
  expected = logits()(base(), example())
  assert_close(found, expected, operations=2 * 4 * 20)


@pytest.mark.parametrize(
  'adapter',
  [
    Lora(rank=3, alpha=7.0),
    pytest.param(Relora(rank=2), marks=pytest.mark.slow),
    pytest.param(Factored(rank=4), marks=pytest.mark.slow),
  ],
)
def test_merged_weights_are_the_same_function(adapter):
  params = weights(adapter, moved=True)
  found = logits(adapter)(params, example())
  merged = merge(params, adapter)
  shapes = jax.eval_shape(Layers(CONFIG).init, jax.random.key(0))
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, shapes)
  expected = logits()(merged, example())
  assert expected.std() > 0.5
  # x (W + A B) and x W + (x A) B differ by roundings of sums of tens of float32
  # numbers, in two layers.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  unscaled = merge(params, dataclasses.replace(adapter, rank=adapter.rank + 1))
  other = logits()(unscaled, example())
  if not isinstance(adapter, Factored):
    assert np.abs(other - expected).max() > 1e-2


def test_a_sum_in_bfloat16_is_rounded_once():
  kernel = jnp.ones((1, 1), jnp.bfloat16)
  one = lambda x: jnp.full((1, 1), x, jnp.float32)
  # In bfloat16, 1 + 2**-9 rounds to 1, but 1 + 3 * 2**-9 rounds to 1 + 2**-7.
  params = {'kernel': kernel, 'lora_a': one(2**-9), 'lora_b': one(3.0)}
  merged = lowrank.merge({'up': params}, Lora(rank=1, alpha=1.0))
  assert merged['up']['kernel'].dtype == jnp.bfloat16
  assert float(merged['up']['kernel'][0, 0]) == 1 + 2**-7


def test_gradients_of_the_factors_follow_from_that_of_the_weight():
  # The rank is the width: the factors can express any change of a kernel.
  names = {'attention': 'qo', 'mlp': ('gate', 'up', 'down')}
  targets = ('.*/[qo]/kernel', '.*/mlp/.*')
  adapter = Lora(rank=12, alpha=6.0, targets=targets)
  params = weights(adapter, moved=True)
  grad = lambda layers: jax.jit(jax.grad(lambda p: layers(p, example())[0]))
  ours = grad(model(adapter))(params)
  whole = grad(Layers(CONFIG))(merge(params, adapter))
  for part in names:
    for name in names[part]:
      leaf, got = params['blocks'][part][name], ours['blocks'][part][name]
      g = np.asarray(whole['blocks'][part][name]['kernel'], np.float64)
      a, b = (np.asarray(leaf[x], np.float64) for x in lowrank.FACTORS)
      expected = {
        'kernel': g,
        'lora_a': 0.5 * g @ b.swapaxes(1, 2),
        'lora_b': 0.5 * a.swapaxes(1, 2) @ g,
      }
      for x, value in expected.items():
        # As above, the sums of float32 numbers have another order.
        scale = np.abs(value).max()
        np.testing.assert_allclose(got[x], value, rtol=0, atol=1e-4 * scale)


def test_factored_has_no_kernel_and_starts_as_wide():
  params = weights(Factored(rank=4, targets=('blocks/mlp/.*',)))
  assert set(params['blocks']['mlp']['up']) == {'lora_a', 'lora_b'}
  assert set(params['blocks']['attention']['q']) == {'bias', 'kernel'}
  kernel = jax.random.normal(jax.random.key(3), (2, 90, 110), jnp.bfloat16)
  params = {'blocks': {'up': {'kernel': 0.02 * kernel}}}
  adapter = Factored(rank=40)
  params = adapt(params, adapter, jax.random.key(4))
  assert params['blocks']['up']['lora_a'].dtype == jnp.bfloat16
  merged = merge(params, adapter)['blocks']['up']['kernel']
  # The sample has about 20,000 entries, each a sum of 40 products.
  assert float(jnp.std(merged.astype(jnp.float32))) == pytest.approx(
    0.02, rel=0.05
  )


@pytest.mark.slow
@pytest.mark.parametrize('remat', [False, True])
def test_dropout_is_the_same_layer_by_layer(remat):
  adapter = Lora(rank=3, dropout=0.4)
  params, batch = weights(adapter, moved=True), example(noise=True)
  layers = model(adapter, remat=remat)
  grad = lambda f: jax.jit(jax.value_and_grad(f))(params)
  value, grads = grad(lambda params: layers(params, batch)[0])

  def by_layer(params):
    x = layers.embed(params, batch)
    for i in range(CONFIG.num_layers):
      layer = jax.tree.map(lambda w, i=i: w[i], params['blocks'])
      noise, x = x['noise'], layers.block(layer, x)
      assert x['noise'] is not noise  # Each layer has its own dropout.
    return layers.loss(params, x, batch)[0]

  expected, gradient = grad(by_layer)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  # The operations are the same, but compiled with and without a scan. Gradients
  # have entries up to 1.
  chex.assert_trees_all_close(grads, gradient, rtol=0, atol=1e-5)
  without = layers(params, example())[0]
  assert abs(without - value) > 1e-3


@pytest.mark.slow
def test_dropout_depends_on_the_example_alone():
  adapter = Lora(rank=3, dropout=0.4)
  params, batch = weights(adapter, moved=True), example(noise=True)
  whole = logits(adapter)(params, batch)
  last = logits(adapter)(params, {k: x[2:] for k, x in batch.items()})
  # Matrix products of other shapes sum in another order.
  np.testing.assert_allclose(whole[2:], last, rtol=0, atol=1e-5)


def test_dropout_keeps_the_mean_and_differs_from_layer_to_layer():
  noise = jax.random.key_data(jax.random.split(jax.random.key(0), 4))
  x = jnp.ones((4, 50, 60))
  found = noise_lib.drop(x, noise, 0.25)
  chex.assert_trees_all_equal(jnp.unique(found), jnp.array([0.0, 1 / 0.75]))
  # With 12,000 draws, the standard deviation of the mean is 0.005.
  assert float(found.mean()) == pytest.approx(1, abs=0.03)
  again = noise_lib.drop(x, noise_lib.folded(noise, 0), 0.25)
  assert float((found != again).mean()) > 0.3
  assert float((found[0] != found[1]).mean()) > 0.3


@pytest.mark.parametrize(
  'adapter, match',
  [
    (Lora(rank=13), r'rank must be in 1\.\.12 for blocks/attention/k/kernel|'),
    (Lora(targets=('.*/query',)), r"\['.\*/query'\] match no kernel .*up/ker"),
    (Lora(rank=2, targets=('embed/embedding',)), 'match no kernel'),
    (Lora(targets=()), 'match no kernel'),
    (Lora(targets=('(',)), 'is no regular expression'),
  ],
)
def test_what_does_not_fit_is_told(adapter, match):
  with pytest.raises(ValueError, match=match):
    weights(adapter)


@pytest.mark.parametrize(
  'kind, options, match',
  [
    (Lora, {'rank': 0}, 'adapter.rank must be at least 1, got 0'),
    (Factored, {'rank': -1}, 'adapter.rank must be at least 1'),
    (Lora, {'alpha': 0.0}, 'adapter.alpha must be positive'),
    (Lora, {'alpha': float('nan')}, 'adapter.alpha must be positive'),
    (Lora, {'dropout': 1.0}, r'adapter.dropout is a share in \[0, 1\)'),
    (Lora, {'lomo': -1.0}, 'adapter.lomo must be finite'),
    (Relora, {'every': 0}, 'adapter.every must be at least 1'),
    (Relora, {'reset': 1.5}, r'adapter.reset is a share in \[0, 1\]'),
    (Relora, {'every': 9, 'restart_warmup': 9}, 'below adapter.every = 9'),
  ],
)
def test_bad_options(kind, options, match):
  with pytest.raises(ValueError, match=match):
    kind(**options)


def test_an_adapter_is_saved_and_read(tmp_path):
  adapter = Lora(rank=3, alpha=5.0, dropout=0.1, targets=('.*/[qv]/kernel',))
  params = weights(adapter, moved=True)
  peft.save_adapter(tmp_path / 'new', params, adapter, base='here')
  plain = lowrank.unflatten(
    {
      path: leaf
      for path, leaf in lowrank.flatten(params).items()
      if not path.endswith(lowrank.FACTORS)
    }
  )
  found, again = peft.load_adapter(tmp_path / 'new', plain)
  chex.assert_trees_all_equal(found, params)
  assert (again.rank, again.alpha, again.dropout) == (3, 5.0, 0.1)
  refitted = lowrank.adapt(plain, again, jax.random.key(0))
  chex.assert_trees_all_equal_shapes(refitted, params)
  with pytest.raises(FileExistsError, match=r'adapter_config\.json exists'):
    peft.save_adapter(tmp_path / 'new', params, adapter)
  for other in (Relora(), Lora(rest='trained'), Lora(lomo=1.0), Factored()):
    with pytest.raises(ValueError, match='nothing else is trained'):
      peft.save_adapter(tmp_path / 'other', params, other)
  assert not (tmp_path / 'other').exists()


def _broken(directory, change):
  from safetensors import numpy as safetensors

  adapter = Lora(rank=3, targets=('.*/[qv]/kernel',))
  peft.save_adapter(directory, weights(adapter), adapter)
  config, file = (directory / name for name in peft._FILES)
  fields, tensors = json.loads(config.read_text()), safetensors.load_file(file)
  change(fields, tensors)
  config.write_text(json.dumps(fields))
  safetensors.save_file(tensors, file)


NAME = 'base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight'


@pytest.mark.parametrize(
  'change, match',
  [
    (lambda f, t: f.update(use_dora=True), "none of {'use_dora': True}"),
    (lambda f, t: f.update(init_lora_weights='pissa'), "'pissa'}; merge"),
    (lambda f, t: f.pop('r'), r"must have \['r'\]"),
    (lambda f, t: f.update(peft_type='IA3'), "peft_type must be 'LORA'"),
    (lambda f, t: f.update(rank_pattern={'q': 4}), "'rank_pattern': {'q': 4}"),
    (lambda f, t: t.pop(NAME), f'{NAME} is missing'),
    (lambda f, t: f.update(r=4), r'must have the shape \(4, 12\), got \(3, 12'),
    (
      lambda f, t: t.update({'lm_head.lora_A': np.zeros(2, 'f4')}),
      r"has no place for: \['lm_head.lora_A'\]",
    ),
  ],
)
def test_an_adapter_that_is_another_is_told(change, match, tmp_path):
  _broken(tmp_path, change)
  with pytest.raises(ValueError, match=match):
    peft.load_adapter(tmp_path, base())


def test_a_missing_file_is_told(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'config\.json is missing'):
    peft.load_adapter(tmp_path, {})
