"""Tests names, layouts and files of checkpoints, without transformers."""

import codecs
import dataclasses
import json
import operator
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models import encoder, huggingface, huggingface_config
from models.architecture import Architecture
from models.llama import Layers, Llama3Scaling, LlamaConfig
from models.model import Dtype, ModelConfig

safetensors = pytest.importorskip('safetensors.numpy')

# Options that the model of each architecture can have. A Mistral always has a
# window.
_ARCHITECTURES = {
  'llama': {'tied': True, 'rope_scaling': Llama3Scaling(8.0, 1.0, 4.0, 64)},
  'mistral': {'window': 5, 'head_dim': 4},
  'qwen2': {'qkv_bias': True, 'window': 3},
  'qwen3': {'qk_norm': True, 'head_dim': 8, 'tied': True},
}


def _config(**changes):
  changes = {'num_layers': 3} | changes
  return LlamaConfig(
    vocab_size=31,
    width=12,
    mlp_width=20,
    num_heads=2,
    num_kv_heads=1,
    **changes,
  )


def _params(config):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(Layers(config).init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype), shapes
  )


@pytest.fixture
def saved(tmp_path):
  """Saves a small checkpoint; returns its directory, config and parameters."""
  config = _config()
  params = _params(config)
  huggingface.save(tmp_path / 'saved', config, params)
  return tmp_path / 'saved', config, params


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  dtypes = lambda tree: jax.tree.map(lambda leaf: np.dtype(leaf.dtype), tree)
  assert dtypes(actual) == dtypes(expected)


def _change(directory, change):
  """Rewrites model.safetensors after `change` has modified its tensors."""
  tensors = safetensors.load_file(directory / 'model.safetensors')
  change(tensors)
  safetensors.save_file(tensors, directory / 'model.safetensors')


def _set(directory, **fields):
  """Sets fields of config.json."""
  file = directory / 'config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_kernel_goes_to_its_layer_transposed():
  config = _config(qkv_bias=True)
  params = _params(config)
  tensors = huggingface.tensors_of(params, config)
  assert len(tensors) == 3 * 12 + 3
  np.testing.assert_array_equal(
    tensors['model.layers.1.mlp.up_proj.weight'],
    params['blocks']['mlp']['up']['kernel'][1].T,
  )
  np.testing.assert_array_equal(
    tensors['model.layers.2.self_attn.v_proj.bias'],
    params['blocks']['attention']['v']['bias'][2],
  )
  np.testing.assert_array_equal(
    tensors['model.embed_tokens.weight'], params['embed']['embedding']
  )
  assert all(tensor.flags.c_contiguous for tensor in tensors.values())


@pytest.mark.parametrize(
  'param_dtype',
  [pytest.param('float32', marks=pytest.mark.slow), 'bfloat16'],
)
@pytest.mark.parametrize('kind', _ARCHITECTURES)
def test_a_round_trip_changes_no_byte(tmp_path, kind, param_dtype):
  formats = {'dtype': param_dtype, 'param_dtype': param_dtype}
  config = _config(**_ARCHITECTURES[kind], **formats)
  params = _params(config)
  huggingface.save(tmp_path / 'a', config, params)
  found, loaded = huggingface.load(tmp_path / 'a')
  assert found == config
  _assert_same(loaded, params)
  huggingface.save(tmp_path / 'b', found, loaded)
  for name in ('config.json', 'model.safetensors'):
    a, b = (tmp_path / x / name for x in 'ab')
    assert a.read_bytes() == b.read_bytes()
  assert (
    json.loads(a.with_name('config.json').read_text())['model_type'] == kind
  )


def test_files_have_an_index_and_at_most_so_many_bytes(tmp_path):
  config = _config()
  params = _params(config)
  limit = 31 * 12 * 4  # This is the size of the embedding in bytes.
  huggingface.save(tmp_path, config, params, max_shard_bytes=limit)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  files = sorted(tmp_path.glob('*.safetensors'))
  count = len(files)
  assert [file.name for file in files] == [
    f'model-{number:05}-of-{count:05}.safetensors'
    for number in range(1, count + 1)
  ]
  placed, total = {}, 0
  for file in files:
    tensors = safetensors.load_file(file)
    placed |= dict.fromkeys(tensors, file.name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= limit
    total += size
  assert index == {'metadata': {'total_size': total}, 'weight_map': placed}
  # Two consecutive files together exceed the limit.
  assert count <= 2 * -(-total // limit)
  _assert_same(huggingface.load(tmp_path)[1], params)


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path):
  huggingface.save(tmp_path, _config(), _params(_config()), max_shard_bytes=1)
  assert len([*tmp_path.glob('*.safetensors')]) == 3 * 9 + 3


def test_tensors_are_read_in_pieces(saved, monkeypatch):
  directory, _, params = saved
  # A piece has 4 rows of the embedding.
  monkeypatch.setattr(huggingface, '_PIECE', 50)
  _assert_same(huggingface.load(directory)[1], params)


def test_parameters_go_where_they_shall(saved):
  directory, _, params = saved
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Auto,))
  whole = NamedSharding(mesh, PartitionSpec())
  found = huggingface.load(directory, shardings=whole)[1]
  assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {whole}
  places = jax.tree.map(lambda leaf: whole, params)
  halved = NamedSharding(mesh, PartitionSpec(None, None, 'x'))
  places['blocks']['mlp']['up']['kernel'] = halved
  found = huggingface.load(directory, shardings=places)[1]
  assert found['blocks']['mlp']['up']['kernel'].sharding == halved
  assert found['norm']['scale'].sharding == whole
  _assert_same(found, params)


def test_tensors_are_cast_to_the_parameters_type(saved):
  directory, _, params = saved
  halve = lambda tensors: tensors.update(
    {name: x.astype(np.float16) for name, x in tensors.items()}
  )
  _change(directory, halve)
  _set(directory, torch_dtype='float16')
  rounded = jax.tree.map(lambda x: x.astype(np.float16), params)
  for name in ('float32', 'bfloat16'):
    overrides = {} if name == 'float32' else {'param_dtype': name}
    config, found = huggingface.load(directory, **overrides)
    assert config.param_dtype == name
    cast = operator.methodcaller('astype', name)
    _assert_same(found, jax.tree.map(cast, rounded))


def test_names_without_meaning_are_ignored():
  config = _config(tied=True)
  params = _params(config)
  tensors = huggingface.tensors_of(params, config)
  tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
  frequencies = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  tensors[frequencies] = np.ones(3, np.float32)
  _assert_same(huggingface.params_of(tensors, config), params)


def test_other_files_are_ignored(saved):
  directory, _, params = saved
  for name in ('consolidated.safetensors', 'consolidated.00.pth'):
    (directory / name).write_bytes(b'not to be read')
  (directory / 'pytorch_model.bin').write_bytes(b'nor this')
  _assert_same(huggingface.load(directory)[1], params)


def test_a_missing_tensor_is_named(saved):
  directory, *_ = saved
  _change(directory, lambda tensors: tensors.pop('model.norm.weight'))
  with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
    huggingface.load(directory)


def test_a_tensor_too_many_is_named(saved):
  directory, *_ = saved
  name = 'model.layers.0.self_attn.q_proj.bias'
  _change(directory, lambda tensors: tensors.update({name: np.zeros(12)}))
  with pytest.raises(ValueError, match=r"surplus \['.*q_proj.bias'\]"):
    huggingface.load(directory)


def test_a_shape_that_does_not_fit_is_named(saved):
  directory, *_ = saved
  name = 'model.layers.2.mlp.down_proj.weight'
  turn = lambda x: x.update({name: np.ascontiguousarray(x[name].T)})
  _change(directory, turn)
  message = r'layers.2.mlp.down.*\(12, 20\) of .*, got \(20, 12\)'
  with pytest.raises(ValueError, match=message):
    huggingface.load(directory)


def test_a_directory_without_a_checkpoint_is_an_error(saved):
  directory, *_ = saved
  (directory / 'model.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match=r'must have model.safetensors'):
    huggingface.load(directory)
  (directory / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match=r'config\.json'):
    huggingface.load(directory)


def test_a_pickle_is_refused_with_the_command_that_converts_it(saved):
  directory, *_ = saved
  (directory / 'model.safetensors').unlink()
  (directory / 'pytorch_model.bin').touch()
  message = r"\*\.bin is not read.*from_pretrained\('.*save_pretrained\('NEW'"
  with pytest.raises(FileNotFoundError, match=message):
    huggingface.load(directory)


def test_a_file_that_only_the_index_has_is_named(tmp_path):
  huggingface.save(tmp_path, _config(), _params(_config()), max_shard_bytes=999)
  next(tmp_path.glob('model-00002*')).unlink()
  with pytest.raises(FileNotFoundError, match=r'model-00002-of-.* is missing'):
    huggingface.load(tmp_path)


def test_the_field_that_is_not_implemented_is_named_with_its_file(saved):
  directory, *_ = saved
  _set(directory, mlp_bias=True)
  with pytest.raises(ValueError, match=r'saved/config\.json: mlp_bias must be'):
    huggingface.load(directory)


def test_the_tokenizer_and_what_is_for_others_come_from_the_source(
  saved, tmp_path
):
  source, config, params = saved
  _set(source, eos_token_id=7, max_position_embeddings=99, rope_theta=5.0)
  (source / 'tokenizer.json').write_text('{}')
  (source / 'notes.txt').write_text('mine')
  huggingface.save(tmp_path / 'b', config, params, source=source)
  assert sorted(file.name for file in (tmp_path / 'b').iterdir()) == [
    *('config.json', 'model.safetensors', 'tokenizer.json')
  ]
  fields = json.loads((tmp_path / 'b/config.json').read_text())
  assert fields['eos_token_id'] == 7
  assert fields['max_position_embeddings'] == 99
  assert fields['rope_theta'] == config.rope_theta


def test_a_byte_order_mark_is_read_and_not_copied(tmp_path):
  config, params = _config(), _params(_config())
  source = tmp_path / 'a'
  huggingface.save(source, config, params, max_shard_bytes=999)
  names = ('config.json', 'model.safetensors.index.json')
  words = '{"eos_token": "\u00e9"}'
  (source / 'tokenizer_config.json').write_text(words, 'utf-8')
  for name in (*names, 'tokenizer_config.json'):
    text = (source / name).read_text('utf-8')
    (source / name).write_text(text, 'utf-8-sig')
  # Other files are not text, so that their first bytes are not a mark.
  (source / 'tokenizer.model').write_bytes(codecs.BOM_UTF8)
  found, loaded = huggingface.load(source)
  assert found == config
  chex.assert_trees_all_equal(loaded, params)
  huggingface.save(tmp_path / 'b', config, params, source=source)
  text = (tmp_path / 'b/tokenizer_config.json').read_bytes()
  assert text == words.encode()
  assert (tmp_path / 'b/tokenizer.model').read_bytes() == codecs.BOM_UTF8
  huggingface.copy(source, tmp_path / 'c')
  for name in ('config.json', 'tokenizer_config.json'):
    json.loads((tmp_path / 'c' / name).read_text())


def test_a_checkpoint_is_not_written_over_another(saved):
  directory, config, params = saved
  with pytest.raises(FileExistsError, match=r'config\.json exists'):
    huggingface.save(directory, config, params)
  (directory / 'config.json').unlink()
  with pytest.raises(FileExistsError, match=r'model\.safetensors exists'):
    huggingface.save(directory, config, params)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'tied': True}, r"check \['lm_head/kernel'\]"),
    ({'vocab_size': 32}, r'embedding must be float32\[32, 12\] .*\[31, 12\]'),
    ({'param_dtype': 'bfloat16'}, r'must be bfloat16\[.*got float32\['),
    ({'qkv_bias': True, 'qk_norm': True}, 'q/bias'),
  ],
)
def test_parameters_of_another_config_are_refused(tmp_path, change, message):
  config = dataclasses.replace(_config(), **change)
  with pytest.raises(ValueError, match=message):
    huggingface.save(tmp_path / 'a', config, _params(_config()))
  assert not (tmp_path / 'a').exists()


_LOAD = """
import json, pathlib, sys, jax
from models import huggingface
jax.block_until_ready(huggingface.load(sys.argv[1])[1])
# getrusage would also count the memory of the process that starts this one.
print(pathlib.Path('/proc/self/status').read_text())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_loading_takes_the_checkpoint_and_little_more(tmp_path):
  # A model with one layer of LLaMA-3 8B has 2.5 GB. Its embedding and its head
  # have 1.05 GB each.
  config = LlamaConfig(
    vocab_size=128_256,
    width=4096,
    mlp_width=14_336,
    num_heads=32,
    num_kv_heads=8,
    num_layers=1,
    dtype='bfloat16',
    param_dtype='bfloat16',
  )
  shapes = jax.eval_shape(Layers(config).init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  huggingface.save(tmp_path, config, params)
  size = sum(file.stat().st_size for file in tmp_path.glob('*.safetensors'))
  assert size == pytest.approx(2.54e9, rel=0.01)
  run = subprocess.run(
    [sys.executable, '-c', _LOAD, tmp_path],
    capture_output=True,
    check=True,
    cwd=pathlib.Path(__file__).parents[2],
    text=True,
  )
  peak = next(x for x in run.stdout.splitlines() if x.startswith('VmHWM'))
  peak = int(peak.split()[1]) * 1024
  print(f'peak {peak / 1e9:.2f} GB of a checkpoint of {size / 1e9:.2f} GB')
  assert size < peak < size + 2e9


_ENCODERS = {
  'bert': {'labels': ('no', 'yes', 'perhaps'), 'num_labels': 3, 'dropout': 0.1},
  'roberta': {'pad_id': 1, 'num_types': 1, 'num_labels': 1},
}


def _encoder(kind, **changes):
  """Returns the configuration of a small encoder, and random parameters."""
  config = encoder.EncoderConfig(
    vocab_size=31,
    width=12,
    mlp_width=20,
    num_heads=2,
    num_layers=3,
    num_positions=9,
    family=kind,
    **_ENCODERS[kind] | changes,
  )
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(encoder.Layers(config).init, jax.random.key(0))
  draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)
  return config, jax.tree.map(draw, shapes)


@pytest.mark.parametrize(
  'param_dtype',
  [pytest.param('float32', marks=pytest.mark.slow), 'bfloat16'],
)
@pytest.mark.parametrize('kind', _ENCODERS)
def test_a_round_trip_of_an_encoder_changes_no_byte(
  tmp_path, kind, param_dtype
):
  formats = {'dtype': param_dtype, 'param_dtype': param_dtype}
  config, params = _encoder(kind, **formats)
  huggingface.save(tmp_path / 'a', config, params)
  found, loaded = huggingface.load(tmp_path / 'a')
  assert found == config
  _assert_same(loaded, params)
  # The labels of the source's config.json must not replace those of the model.
  _set(tmp_path / 'a', label2id={'x': 0}, bos_token_id=5)
  huggingface.save(tmp_path / 'b', found, loaded, source=tmp_path / 'a')
  a, b = (tmp_path / x / 'model.safetensors' for x in 'ab')
  assert a.read_bytes() == b.read_bytes()
  fields = json.loads((tmp_path / 'b/config.json').read_text())
  assert fields['bos_token_id'] == 5
  assert len(fields['label2id']) == config.num_labels


@pytest.mark.parametrize(
  'kind', ['bert', pytest.param('roberta', marks=pytest.mark.slow)]
)
def test_an_encoder_without_a_head(tmp_path, kind):
  config, params = _encoder(kind)
  huggingface.save(tmp_path, config, params)

  def behead(tensors):
    for name in list(tensors):
      tensor = tensors.pop(name)
      if not name.startswith('classifier'):
        # Use the names of `BertModel`, and the old names of LayerNorm's scales.
        name = name.removeprefix(f'{kind}.')
        tensors[name.replace('Norm.weight', 'Norm.gamma')] = tensor
    tensors['embeddings.position_ids'] = np.arange(9)

  _change(tmp_path, behead)
  with pytest.raises(ValueError, match=r'has no .*head/out/bias.* give a key'):
    huggingface.load(tmp_path)
  key = jax.random.key(3)
  found = huggingface.load(tmp_path, key=key)[1]
  fresh = jax.jit(encoder.Layers(config).init)(key)
  # BERT's dense layer is the pooler of the body, and is therefore kept. In
  # RoBERTa, it is part of the removed head.
  drawn = {'bert': ('out',), 'roberta': ('dense', 'out')}[kind]
  head = params['head'] | {name: fresh['head'][name] for name in drawn}
  _assert_same(found, params | {'head': head})
  _change(
    tmp_path, lambda x: x.update({'classifier.bias': np.zeros(3, np.float32)})
  )
  with pytest.raises(ValueError, match=r"(missing|surplus) \['classifier\."):
    huggingface.load(tmp_path, key=key)


class _ToyLayers:
  """Two linear maps, the second of which is a stack."""

  def init(self, key):
    del key
    return {
      'scores': {'kernel': np.zeros((2, 3, 5, 7), np.float32)},
      'blocks': {'up': {'kernel': np.zeros((2, 4, 5), np.float32)}},
    }


@dataclasses.dataclass(frozen=True)
class _Toy(ModelConfig):
  size: int
  shape: str = 'round'
  dtype: Dtype = 'float32'
  param_dtype: Dtype = 'float32'

  def layers(self, *, read=None, intercept=None):
    return _ToyLayers()

  @classmethod
  def architectures(cls):
    toy = Architecture(
      classes=('ToyModel',),
      fixed={'shape': 'round'},
      needed={'size': 'hidden_size'},
      optional={},
      read=lambda fields, kind: {},
      write=lambda config, kind: {'kind': kind},
      others=frozenset({'kind'}),
      neutral={},
      names={
        'scores/kernel': 'conv.weight',
        'blocks/up/kernel': 'up.{}.weight',
      },
    )
    square = toy._replace(fixed={'shape': 'square'})
    return {'toy': toy, 'square_toy': square}


def test_a_model_brings_its_own_format(tmp_path, monkeypatch):
  """A new model needs no edit but its entry in the registry."""
  params = jax.tree.map(
    lambda x: np.arange(x.size, dtype='f4').reshape(x.shape),
    _ToyLayers().init(None),
  )
  config = _Toy(6, shape='square')
  huggingface.save(tmp_path, config, params)
  tensors = safetensors.load_file(tmp_path / 'model.safetensors')
  shapes = {name: x.shape for name, x in tensors.items()}
  assert shapes == {
    'conv.weight': (7, 5, 2, 3),
    'up.0.weight': (5, 4),
    'up.1.weight': (5, 4),
  }
  _assert_same(huggingface.params_of(tensors, config), params)
  with pytest.raises(ValueError, match=r"model_type must .*got 'square_toy'"):
    huggingface.read_config(tmp_path)
  for kind, architecture in _Toy.architectures().items():
    monkeypatch.setitem(huggingface_config.ARCHITECTURES, kind, architecture)
    monkeypatch.setitem(huggingface_config._MODELS, kind, _Toy)
  found, loaded = huggingface.load(tmp_path)
  assert found == config
  _assert_same(loaded, params)
  message = r"have shape='round' \(toy\) or .*, got shape='flat': change"
  with pytest.raises(ValueError, match=message):
    huggingface.save(tmp_path / 'b', _Toy(6, shape='flat'), params)
