"""The names and layouts of checkpoints, without the other framework."""

import jax
import ml_dtypes
import numpy as np
import pytest

from models import huggingface
from models.llama import Layers, LlamaConfig


def _config(**changes):
  return LlamaConfig(
    vocab_size=31,
    width=12,
    mlp_width=20,
    num_heads=2,
    num_kv_heads=1,
    num_layers=3,
    **changes,
  )


def _params(config):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(Layers(config).init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes
  )


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_round_trip_is_exact(tied, param_dtype):
  config = _config(tied=tied, param_dtype=param_dtype)
  params = _params(config)
  tensors = huggingface.llama_tensors(params)
  _assert_same(huggingface.llama_params(tensors, config), params)


def test_a_kernel_goes_to_its_layer_transposed():
  params = _params(_config())
  tensors = huggingface.llama_tensors(params)
  assert len(tensors) == 3 * 9 + 3
  np.testing.assert_array_equal(
    tensors['model.layers.1.mlp.up_proj.weight'],
    params['blocks']['mlp']['up']['kernel'][1].T,
  )
  np.testing.assert_array_equal(
    tensors['model.embed_tokens.weight'], params['embed']['embedding']
  )
  assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_tensors_are_cast_to_the_parameters_type():
  tensors = huggingface.llama_tensors(_params(_config()))
  tensors = {name: x.astype(np.float16) for name, x in tensors.items()}
  config = _config(param_dtype='bfloat16')
  params = huggingface.llama_params(tensors, config)
  leaves = jax.tree.leaves(params)
  assert {leaf.dtype for leaf in leaves} == {np.dtype(ml_dtypes.bfloat16)}


def test_names_without_meaning_are_ignored():
  config = _config(tied=True)
  params = _params(config)
  tensors = huggingface.llama_tensors(params)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  frequencies = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  tensors[frequencies] = np.ones(3, np.float32)
  _assert_same(huggingface.llama_params(tensors, config), params)


def test_a_missing_name_is_listed():
  tensors = huggingface.llama_tensors(_params(_config()))
  del tensors['model.norm.weight']
  with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
    huggingface.llama_params(tensors, _config())


def test_a_surplus_name_is_listed():
  tensors = huggingface.llama_tensors(_params(_config()))
  tensors['model.layers.0.self_attn.q_proj.bias'] = np.zeros(12)
  with pytest.raises(ValueError, match=r"surplus \['.*q_proj.bias'\]"):
    huggingface.llama_params(tensors, _config())


def test_a_shape_that_does_not_fit_is_named():
  tensors = huggingface.llama_tensors(_params(_config()))
  name = 'model.layers.2.mlp.down_proj.weight'
  tensors[name] = tensors[name].T
  with pytest.raises(ValueError, match=r'layers.2.mlp.down.*\(20, 12\)'):
    huggingface.llama_params(tensors, _config())


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_files_round_trip(tmp_path, param_dtype):
  pytest.importorskip('safetensors')
  config = _config(param_dtype=param_dtype)
  params = _params(config)
  tensors = huggingface.llama_tensors(params)
  names = sorted(tensors)
  # Large checkpoints come in several files.
  for index, part in enumerate((names[:11], names[11:])):
    huggingface.write_safetensors(
      tmp_path / f'model-{index}.safetensors',
      {name: tensors[name] for name in part},
    )
  read = huggingface.read_safetensors(tmp_path)
  _assert_same(huggingface.llama_params(read, config), params)
  one = huggingface.read_safetensors(tmp_path / 'model-0.safetensors')
  assert sorted(one) == names[:11]


def test_a_directory_without_weights_is_an_error(tmp_path):
  pytest.importorskip('safetensors')
  with pytest.raises(ValueError, match=r'expected a \.safetensors file'):
    huggingface.read_safetensors(tmp_path)
