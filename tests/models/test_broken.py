"""Tests the error messages for broken and unsupported checkpoints.

`_BROKEN` lists ways to break a checkpoint directory, each with the expected
message. A message is one line that names the file, tensor or field, the rule
that it violates, and the remedy.
"""

import json
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest

from models import huggingface
from models.llama import Layers, LlamaConfig

safetensors = pytest.importorskip('safetensors.numpy')

_CONFIG = LlamaConfig(
  vocab_size=31,
  width=12,
  mlp_width=20,
  num_heads=2,
  num_kv_heads=1,
  num_layers=2,
)
_WHOLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_UP = 'model.layers.1.mlp.up_proj.weight'
_POINTER = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 4999819336
"""


def _save(directory):
  """Writes a small checkpoint of random weights, in several files."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(Layers(_CONFIG).init, jax.random.key(0))
  draw = lambda x: rng.standard_normal(x.shape).astype(x.dtype)
  huggingface.save(
    directory, _CONFIG, jax.tree.map(draw, shapes), max_shard_bytes=3000
  )


def _whole(change):
  """Returns a function that moves all tensors to one file and changes them."""

  def broken(directory):
    tensors = {}
    for file in directory.glob('*.safetensors'):
      tensors |= safetensors.load_file(file)
      file.unlink()
    (directory / _INDEX).unlink()
    change(tensors)
    safetensors.save_file(tensors, directory / _WHOLE)

  return broken


def _cast(name, dtype):
  """Returns a function that stores a tensor in another type."""
  return _whole(lambda x: x.update({name: x[name].astype(dtype)}))


def _set(**fields):
  """Returns a function that sets fields of config.json; `...` removes one."""

  def broken(directory):
    file = directory / 'config.json'
    found = json.loads(file.read_text()) | fields
    found = {name: value for name, value in found.items() if value is not ...}
    file.write_text(json.dumps(found))

  return broken


def _write(name, content):
  """Returns a function that overwrites a file."""
  return lambda directory: (directory / name).write_bytes(content)


def _only(*names):
  """Returns a function that replaces the weights by empty files.

  config.json is kept.
  """

  def broken(directory):
    for file in directory.glob('*.safetensors*'):
      file.unlink()
    for name in names:
      (directory / name).touch()

  return broken


def _empty(directory):
  shutil.rmtree(directory)
  directory.mkdir()


def _a_file(directory):
  shutil.rmtree(directory)
  directory.write_text('a model')


def _lacks_a_shard(directory):
  (directory / 'model-00002-of-00005.safetensors').unlink()


def _ends_early(directory):
  file = directory / 'model-00002-of-00005.safetensors'
  file.write_bytes(file.read_bytes()[:-100])


def _is_a_pointer(directory):
  file = directory / 'model-00002-of-00005.safetensors'
  file.write_text(_POINTER)


def _index_names(**tensors):
  """Returns a function that changes which files the index names for tensors."""

  def broken(directory):
    file = directory / _INDEX
    index = json.loads(file.read_text())
    index['weight_map'] |= tensors
    file.write_text(json.dumps(index))

  return broken


def _poison(tensors):
  tensors[_UP][3, 4] = np.nan


def _turn(tensors):
  tensors[_UP] = np.ascontiguousarray(tensors[_UP].T)


def _extra(tensors):
  tensors['model.layers.2.mlp.up_proj.weight'] = tensors[_UP]


# Functions that break a directory, and regexes for the error message. DIR is a
# placeholder for the directory.
_BROKEN = {
  'no directory': (
    shutil.rmtree,
    r'DIR/config\.json is missing: a checkpoint is a directory with',
  ),
  'an empty directory': (
    _empty,
    r'DIR/config\.json is missing: a checkpoint is',
  ),
  'a file': (
    _a_file,
    r'DIR/config\.json is missing: a checkpoint is a directory with',
  ),
  'config.json is missing': (
    lambda x: (x / 'config.json').unlink(),
    r'DIR/config\.json is missing: a checkpoint is',
  ),
  'config.json ends early': (
    _write('config.json', b'{"model_type": '),
    r'DIR/config\.json must be JSON \(Exp.*\): fetch it again',
  ),
  'config.json is a list': (
    _write('config.json', b'[]'),
    r"DIR/config\.json must be a JSON object, got '\[\]'",
  ),
  'config.json is no text': (
    _write('config.json', b'\xff\xfe{}'),
    r'DIR/config\.json must be JSON .*utf-8.*: fetch it',
  ),
  'config.json is UTF-16': (
    _write('config.json', '{}'.encode('utf-16')),
    r"DIR/config\.json must be JSON \('utf-8' codec .*: fetch it again",
  ),
  'config.json is nested deep': (
    _write('config.json', b'{"a":' * 100_000),
    r'DIR/config\.json must be JSON \(.*recursion.*: fetch it again',
  ),
  'the rope is text': (
    _set(rope_scaling='linear'),
    r"DIR/config\.json: a field has another form .*'str' .*: fetch it again",
  ),
  'the dtype is an object': (
    _set(torch_dtype={'': 'float16'}),
    r'DIR/config\.json: a field has another form .*dict.*: fetch it again',
  ),
  'the model_type is a list': (
    _set(model_type=['llama']),
    r'DIR/config\.json: a field has another form .*list.*: fetch it again',
  ),
  'another model_type': (
    _set(model_type='gpt2'),
    r"config\.json: model_type must be one of .*, got 'gpt2'",
  ),
  'a class without a head': (
    _set(architectures=['LlamaModel']),
    r"architectures must be .*, got \['LlamaModel'\]",
  ),
  'a field is missing': (
    _set(hidden_size=...),
    r"config\.json: hidden_size is missing from .* 'llama'",
  ),
  'a field is null': (
    _set(hidden_size=None),
    r'config\.json: hidden_size must be a whole .*, got None',
  ),
  'a field is text': (
    _set(num_hidden_layers='2'),
    r"num_hidden_layers must be a whole number, got '2'",
  ),
  'a field is no whole number': (
    _set(intermediate_size=20.5),
    r'intermediate_size must be a whole number, got 20\.5',
  ),
  'a field is not implemented': (
    _set(mlp_bias=True),
    r'mlp_bias must be False, got True: nothing else',
  ),
  'quantized': (
    _set(quantization_config={'bits': 4}),
    r"quantization_config is not implemented, got {'bits': 4}; take",
  ),
  'another rope': (
    _set(rope_scaling={'type': 'yarn', 'factor': 4.0}),
    r"rope_scaling must be of type llama3, or none, got 'yarn'",
  ),
  'heads do not divide': (
    _set(num_attention_heads=5, head_dim=...),
    r'multiple of 2 \* num_heads, got width=12, num_heads=5; ch',
  ),
  'key heads do not divide': (
    _set(num_key_value_heads=3),
    r'multiple of num_kv_heads, got .*num_kv_heads=3; choose',
  ),
  'another dtype': (
    _set(torch_dtype='float64'),
    r"dtype must be one of \['float32', .*\], got 'float64'",
  ),
  'no weights': (
    _only(),
    r'DIR must have model\.safetensors or model\.safe.*index\.json$',
  ),
  'pickles alone': (
    _only('pytorch_model.bin'),
    r'\*\.bin is not read\. To convert it, if you trust it: python',
  ),
  'a GGUF file alone': (
    _only('model.Q4_K_M.gguf'),
    r'python -m models\.gguf DIR/model\.Q4_K_M\.gguf NEW$',
  ),
  'an adapter alone': (
    _only('adapter_model.safetensors'),
    r'an adapter is no model: merge it',
  ),
  'a shard is missing': (
    _lacks_a_shard,
    r'DIR/model-00002-of-00005\.saf.* is missing: fetch it',
  ),
  'a shard ends early': (
    _ends_early,
    r'DIR/model-00002-of-00005\.saf.* not fully.*: fetch it again',
  ),
  'a shard is a pointer of Git LFS': (
    _is_a_pointer,
    r'DIR/model-00002-of-0.* a pointer: git lfs pull',
  ),
  'the index is no JSON': (
    _write(_INDEX, b'{'),
    r'DIR/model\.safetensors\.index\.json must be JSON',
  ),
  'the index has no files': (
    _write(_INDEX, b'{"metadata": {}}'),
    r'index\.json must have a weight_map, .*: fetch it again',
  ),
  'the index names a file that is not there': (
    _index_names(**{_UP: 'model-00009-of-00005.safetensors'}),
    r'DIR/model-00009-of-00005.*fetch it',
  ),
  'the index names a tensor that no file has': (
    _index_names(**{'model.odd': 'model-00002-of-00005.safetensors'}),
    r'DIR/model-00002.* name model\.odd: fe',
  ),
  'a tensor is missing': (
    _whole(lambda x: x.pop(_UP)),
    r'DIR: .*missing \[.*layers\.1\.mlp\.up_proj.*; check num_hid',
  ),
  'a tensor too many': (
    _whole(_extra),
    r'DIR: .*surplus \[.*layers\.2\.mlp\.up_proj.*; check num_hid',
  ),
  'a tensor of another shape': (
    _whole(_turn),
    r'DIR: .*up_proj.* \(20, 12\) .*, got \(12, 20\); check',
  ),
  'weights in int8': (
    _cast(_UP, np.int8),
    r'DIR: .*up_proj\.weight must be of .*, got I8: quantized',
  ),
  'weights in float8': (
    _cast(_UP, ml_dtypes.float8_e4m3fn),
    r'DIR: .*up_proj\.weight must be of .*, got F8_E4M3: quant',
  ),
  'not a number': (
    _whole(_poison),
    r'DIR: .*up_proj\.weight must be finite, got nan .*: the checkp',
  ),
  'the head is missing': (
    _whole(lambda x: x.pop('lm_head.weight')),
    r"missing \['lm_head\.weight'\] .*tie_word_embeddings in",
  ),
  'tied, with a head of its own': (
    _set(tie_word_embeddings=True),
    r'DIR: lm_head\.weight must be .*; set it to false',
  ),
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Saves an intact checkpoint, and returns its directory."""
  directory = tmp_path_factory.mktemp('saved') / 'whole'
  _save(directory)
  huggingface.load(directory)
  return directory


@pytest.mark.parametrize('how', _BROKEN)
def test_a_broken_checkpoint_has_one_clear_line(saved, tmp_path, how):
  breaks, message = _BROKEN[how]
  directory = tmp_path / 'DIR'
  shutil.copytree(saved, directory)
  breaks(directory)
  with pytest.raises((ValueError, FileNotFoundError)) as caught:
    huggingface.load(directory)
  said = str(caught.value).replace(str(tmp_path) + '/', '')
  assert '\n' not in said and re.search(message, said), said
