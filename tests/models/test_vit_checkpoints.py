"""Tests checkpoints of vision transformers, without transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from models import huggingface, huggingface_config
from models.model import ModelConfig
from models.vit import VitConfig
from tests.models.program import drawn

safetensors = pytest.importorskip('safetensors.numpy')


def _config(**changes):
  sizes = {'image_size': 15, 'patch_size': 5, 'width': 12, 'mlp_width': 20}
  counts = {'num_heads': 3, 'num_layers': 3, 'num_labels': 7}
  images = {'num_channels': 2, 'mean': (0.3, 0.6), 'std': (0.2, 0.4)}
  return VitConfig(**sizes, **counts, **images | {'pool': 'cls'} | changes)


@pytest.fixture
def saved(tmp_path):
  """Saves a small checkpoint; returns its directory, config and parameters."""
  config = _config()
  params = drawn(config.layers(), 0.4)
  huggingface.save(tmp_path / 'saved', config, params)
  return tmp_path / 'saved', config, params


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def _set(file, **fields):
  before = json.loads(file.read_text()) if file.exists() else {}
  file.write_text(json.dumps(before | fields))


def test_a_kernel_of_a_convolution_goes_to_the_layout_of_torch():
  config = _config()
  params = drawn(config.layers(), 0.4)
  tensors = huggingface.tensors_of(params, config)
  embed = params['embed']
  kernel = tensors['vit.embeddings.patch_embeddings.projection.weight']
  assert kernel.shape == (12, 2, 5, 5)
  found = np.asarray(embed['patch_embedding']['kernel'])
  assert kernel[7, 1, 2, 4] == found[2, 4, 1, 7]
  assert tensors['vit.embeddings.cls_token'].shape == (1, 1, 12)
  np.testing.assert_array_equal(
    tensors['vit.embeddings.position_embeddings'],
    embed['positions']['embedding'][None],
  )
  assert tensors['classifier.weight'].shape == (7, 12)
  assert all(tensor.flags.c_contiguous for tensor in tensors.values())


@pytest.mark.parametrize('param_dtype', ['float32', 'bfloat16'])
def test_a_round_trip_changes_no_byte(tmp_path, param_dtype):
  config = _config(
    dtype=param_dtype,
    param_dtype=param_dtype,
    qkv_bias=param_dtype == 'float32',
    labels=('a', 'b', 'c', 'd', 'e', 'f', 'g'),
  )
  params = drawn(config.layers(), 0.4)
  huggingface.save(tmp_path / 'a', config, params, max_shard_bytes=5000)
  found, loaded = huggingface.load(tmp_path / 'a')
  assert found == config
  _assert_same(loaded, params)
  huggingface.save(tmp_path / 'b', found, loaded, max_shard_bytes=5000)
  names = sorted(file.name for file in (tmp_path / 'a').iterdir())
  assert 'preprocessor_config.json' in names and len(names) > 4
  for name in names:
    a, b = (tmp_path / x / name for x in 'ab')
    assert a.read_bytes() == b.read_bytes()


def test_pieces_of_a_kernel_are_put_in_their_place(saved, monkeypatch):
  directory, _, params = saved
  monkeypatch.setattr(huggingface, '_PIECE', 120)
  _assert_same(huggingface.load(directory)[1], params)


def test_a_model_without_a_head(saved, tmp_path):
  directory, config, params = saved
  file = directory / 'model.safetensors'
  tensors = {
    name.removeprefix('vit.'): x
    for name, x in safetensors.load_file(file).items()
    if not name.startswith('classifier')
  }
  tensors['pooler.dense.weight'] = np.zeros((12, 12), np.float32)
  tensors['embeddings.mask_token'] = np.zeros((1, 1, 12), np.float32)
  safetensors.save_file(tensors, file)
  with pytest.raises(ValueError, match=r'has no head/bias, head/kernel: give'):
    huggingface.load(directory)
  key = jax.random.key(3)
  found, loaded = huggingface.load(directory, key=key, num_labels=5)
  fresh = jax.jit(found.layers().init)(key)
  _assert_same(loaded, params | {'head': fresh['head']})
  del config


def test_names_of_transformers_5_are_read(saved):
  directory, _, params = saved
  file = directory / 'model.safetensors'
  names = (
    ('encoder.layer.', 'layers.'),
    ('attention.attention.query', 'attention.q_proj'),
    ('attention.attention.key', 'attention.k_proj'),
    ('attention.attention.value', 'attention.v_proj'),
    ('attention.output.dense', 'attention.o_proj'),
    ('intermediate.dense', 'mlp.fc1'),
    ('output.dense', 'mlp.fc2'),
  )
  tensors = {}
  for name, tensor in safetensors.load_file(file).items():
    for old, new in names:
      name = name.replace(old, new)
    tensors[name] = tensor
  assert 'vit.layers.2.attention.o_proj.bias' in tensors
  safetensors.save_file(tensors, file)
  _assert_same(huggingface.load(directory)[1], params)


_VALUES = {'image_mean': [0.25, 0.5], 'image_std': [0.5, 0.125]}


@pytest.mark.parametrize(
  ('fields', 'mean', 'std'),
  [
    ({}, (0.5, 0.5), (0.5, 0.5)),
    (_VALUES, (0.25, 0.5), (0.5, 0.125)),
    (_VALUES | {'do_normalize': False}, (0, 0), (1, 1)),
    (
      _VALUES | {'rescale_factor': 2 / 255},
      (0.125, 0.25),
      (0.25, 0.0625),
    ),
    (
      {'image_mean': 51.0, 'image_std': 102, 'do_rescale': False},
      (0.2, 0.2),
      (0.4, 0.4),
    ),
    ({'size': 15, 'do_pad': False, 'device': None}, (0.5, 0.5), (0.5, 0.5)),
    (
      {
        'size': {'shortest_edge': 20},
        'do_center_crop': True,
        'crop_size': {'height': 15, 'width': 15},
      },
      (0.5, 0.5),
      (0.5, 0.5),
    ),
  ],
)
def test_the_normalization_of_a_preprocessor(fields, mean, std, saved):
  directory, config, _ = saved
  file = directory / 'preprocessor_config.json'
  file.write_text(json.dumps(fields))
  found = huggingface.read_config(directory)
  np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
  np.testing.assert_allclose(found.std, std, rtol=1e-12)
  assert dataclasses.replace(found, mean=config.mean, std=config.std) == config


def test_without_a_preprocessor_the_defaults_are_those_of_transformers(saved):
  directory, *_ = saved
  (directory / 'preprocessor_config.json').unlink()
  found = huggingface.read_config(directory)
  assert (found.mean, found.std) == ((0.5, 0.5), (0.5, 0.5))


def test_how_images_are_resized_is_copied_from_the_source(saved, tmp_path):
  directory, config, params = saved
  file = directory / 'preprocessor_config.json'
  _set(file, resample=3, image_processor_type='ViTFeatureExtractor')
  huggingface.save(tmp_path / 'b', config, params, source=directory)
  fields = json.loads((tmp_path / 'b/preprocessor_config.json').read_text())
  assert fields['resample'] == 3
  assert fields['image_processor_type'] == 'ViTImageProcessor'
  assert fields['image_mean'] == [0.3, 0.6]
  huggingface.copy(directory, tmp_path / 'c')
  assert (tmp_path / 'c/preprocessor_config.json').is_file()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'do_pad': True}, 'do_pad is not implemented, got True; take it out'),
    ({'size': {'height': 15, 'width': 9}}, r'size must be .* got \[15, 9\]'),
    (
      {'size': {'height': 9, 'width': 9}},
      r'size must be .* 15 .*, got 9; corr',
    ),
    ({'image_mean': [0.5]}, r'image_mean must have 2 numbers.* got \[0.5\]'),
    ({'image_std': [0.5, 0]}, 'std must be positive'),
    ({'size': {'longest_edge': 9}}, 'a field has another form .*height'),
  ],
)
def test_what_a_preprocessor_cannot_have_is_named(fields, message, saved):
  directory, *_ = saved
  file = directory / 'preprocessor_config.json'
  _set(file, **fields)
  with pytest.raises(ValueError, match=message) as error:
    huggingface.read_config(directory)
  assert str(file) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'hidden_act': 'relu'}, "hidden_act must be 'gelu', got 'relu'"),
    ({'image_size': [15, 10]}, r'image_size must be .*, got \[15, 10\]: only'),
    ({'patch_size': 4}, 'image_size must be a multiple of patch_size'),
    ({'image_size': None, 'patch_size': 'x'}, 'image_size must be a whole'),
    ({'qkv_bias': 1}, 'qkv_bias must be true or false, got 1'),
    ({'use_mask_token': True}, 'use_mask_token is not implemented'),
    ({'architectures': ['ViTMSNModel']}, r"one of \(.* got \['ViTMSNModel'\]"),
    ({'problem_type': 'multi_label_classification'}, "must be 'single_label"),
    ({'id2label': {'0': 'a'}}, 'problem_type must be .*regression'),
    ({'id2label': {'0': 'a'}, 'problem_type': None}, 'num_labels must be at l'),
  ],
)
def test_what_is_not_implemented_is_named(fields, message, saved):
  directory, *_ = saved
  _set(directory / 'config.json', **fields)
  with pytest.raises(ValueError, match=message):
    huggingface.read_config(directory)


@pytest.mark.parametrize('name', ['image_size', 'patch_size', 'layer_norm_eps'])
def test_a_missing_field_is_named(name):
  fields = huggingface_config.fields_of(_config())
  assert huggingface_config.parse(fields).image_size == 15
  del fields[name]
  with pytest.raises(ValueError, match=f"{name} is missing .*'vit'"):
    huggingface_config.parse(fields)


def test_a_model_that_no_architecture_has_is_refused(tmp_path):
  config = _config(pool='mean')
  params = drawn(config.layers(), 0.4)
  with pytest.raises(
    ValueError, match=r"have pool='cls' \(vit\), got pool='me"
  ):
    huggingface.save(tmp_path, config, params)
  assert not any(tmp_path.iterdir())


def test_a_model_without_architectures_is_refused(tmp_path):
  class Toy(ModelConfig):
    def layers(self, *, read=None, intercept=None):
      raise NotImplementedError

  with pytest.raises(ValueError, match='a Toy has no checkpoints of transf'):
    huggingface_config.model_type(Toy())


def test_a_convolution_is_not_a_linear_module():
  modules = huggingface_config.linear_modules('vit', 2)
  assert modules['blocks/mlp/up/kernel'] == (
    'vit.encoder.layer.2.intermediate.dense'
  )
  assert 'embed/patch_embedding/kernel' not in modules
