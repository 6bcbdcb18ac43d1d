"""Tests config.json of published checkpoints, and messages for other ones."""

import dataclasses
import math

import jax
import pytest

from models import encoder, huggingface_config
from models.encoder import EncoderConfig
from models.llama import Layers, Llama3Scaling, LlamaConfig


def _fields(kind, sizes, **others):
  names = ('vocab_size', 'hidden_size', 'intermediate_size')
  names += ('num_hidden_layers', 'num_attention_heads', 'num_key_value_heads')
  architecture = huggingface_config.ARCHITECTURES[kind].classes[0]
  return {
    'model_type': kind,
    'architectures': [architecture],
    'hidden_act': 'silu',
    'torch_dtype': 'bfloat16',
    **dict(zip(names, sizes, strict=True)),
    **others,
  }


_SCALING = {
  'factor': 32.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}
_LLAMA = _fields(
  'llama',
  (128_256, 2048, 8192, 16, 32, 8),
  attention_bias=False,
  attention_dropout=0.0,
  bos_token_id=128_000,
  eos_token_id=[128_001, 128_008],
  head_dim=64,
  initializer_range=0.02,
  max_position_embeddings=131_072,
  mlp_bias=False,
  pretraining_tp=1,
  rms_norm_eps=1e-5,
  rope_scaling={'rope_type': 'llama3', **_SCALING},
  rope_theta=500_000.0,
  tie_word_embeddings=True,
  transformers_version='4.45.0',
  use_cache=True,
)
_MISTRAL = _fields(
  'mistral',
  (32_000, 4096, 14_336, 32, 32, 8),
  rms_norm_eps=1e-5,
  rope_theta=10_000.0,
  sliding_window=4096,
  tie_word_embeddings=False,
)
_QWEN2 = _fields(
  'qwen2',
  (151_936, 896, 4864, 24, 14, 2),
  max_window_layers=21,
  rms_norm_eps=1e-6,
  rope_theta=1_000_000.0,
  sliding_window=32_768,
  tie_word_embeddings=True,
  use_mrope=False,
  use_sliding_window=False,
)
_QWEN3 = _fields(
  'qwen3',
  (151_936, 1024, 3072, 28, 16, 8),
  attention_bias=False,
  head_dim=128,
  max_window_layers=28,
  rope_scaling=None,
  rope_theta=1_000_000,
  sliding_window=None,
  tie_word_embeddings=True,
  use_sliding_window=False,
)
_SMOL = _fields(
  'llama',
  (49_152, 576, 1536, 30, 9, 3),
  is_llama_config=True,
  rope_interleaved=False,
  rope_theta=100_000,
  tie_word_embeddings=True,
  **{'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}}},
)
_TINY = _fields('llama', (32_000, 2048, 5632, 22, 32, 4), rms_norm_eps=1e-5)


@pytest.mark.parametrize(
  ('fields', 'count'),
  [
    (_LLAMA, 1_235_814_400),
    (_MISTRAL, 7_241_732_096),
    (_QWEN2, 494_032_768),
    (_QWEN3, 596_049_920),
    (_SMOL, 134_515_008),
    (_TINY, 1_100_048_384),
  ],
  ids=['Llama-3.2-1B', 'Mistral', 'Qwen2.5', 'Qwen3', 'SmolLM2', 'TinyLlama'],
)
def test_published_configs_have_the_published_parameter_counts(fields, count):
  config = huggingface_config.parse(fields)
  shapes = jax.eval_shape(Layers(config).init, jax.random.key(0))
  found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert found == count
  assert (
    huggingface_config.parse(huggingface_config.fields_of(config)) == config
  )


def test_every_value_arrives():
  assert huggingface_config.parse(_LLAMA) == LlamaConfig(
    vocab_size=128_256,
    width=2048,
    mlp_width=8192,
    num_heads=32,
    num_layers=16,
    num_kv_heads=8,
    rope_theta=500_000.0,
    rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192),
    norm_eps=1e-5,
    tied=True,
    dtype='bfloat16',
    param_dtype='bfloat16',
  )


def test_both_places_of_the_waves_mean_the_same():
  fields = {**_LLAMA, 'dtype': 'bfloat16'}
  for name in ('rope_scaling', 'rope_theta', 'torch_dtype'):
    del fields[name]
  fields['rope_parameters'] = {
    **{'rope_type': 'llama3', 'rope_theta': 500_000.0},
    **_SCALING,
  }
  expected = huggingface_config.parse(_LLAMA)
  assert huggingface_config.parse(fields) == expected
  older = {**_LLAMA, 'rope_scaling': {'type': 'llama3', **_SCALING}}
  assert huggingface_config.parse(older) == expected
  plain = fields | {
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 500_000.0}
  }
  assert huggingface_config.parse(plain) == dataclasses.replace(
    expected, rope_scaling=None
  )


@pytest.mark.parametrize(
  ('fields', 'window'),
  [
    (_MISTRAL, 4096),
    ({**_MISTRAL, 'sliding_window': None}, None),
    (_QWEN2, None),
    ({**_QWEN2, 'use_sliding_window': True, 'max_window_layers': 0}, 32_768),
    ({**_QWEN2, 'use_sliding_window': True, 'max_window_layers': 24}, None),
    (
      {
        **_QWEN2,
        'use_sliding_window': True,
        'layer_types': ['sliding_attention'] * 24,
      },
      32_768,
    ),
    ({**_QWEN2, 'layer_types': ['full_attention'] * 24}, None),
  ],
)
def test_windows(fields, window):
  assert huggingface_config.parse(fields).window == window


# Fields that transformers 4 writes about itself, a repository or generation.
_OF_OTHERS = {
  '_attn_implementation_autoset': True,
  '_commit_hash': 'c1899de289a04d12100db370d81485cdf75e47ca',
  '_flash_attn_2_enabled': True,
  '_name_or_path': 'somebody/model',
  'attn_implementation': 'sdpa',
  'auto_map': {'AutoConfig': 'configuration_mine.MyConfig'},
  'bad_words_ids': [[1]],
  'begin_suppress_tokens': [1],
  'custom_pipelines': {'mine': {}},
  'decoder_start_token_id': 0,
  'do_sample': True,
  'finetuning_task': 'mnli',
  'gradient_checkpointing': True,
  'is_decoder': True,
  'max_length': 4096,
  'num_beams': 4,
  'num_labels': 3,
  'output_past': True,
  'prefix': 'a',
  'repetition_penalty': 1.1,
  'sep_token_id': 3,
  'task_specific_params': {'text-generation': {'max_length': 50}},
  'temperature': 0.6,
  'tf_legacy_loss': True,
  'tokenizer_class': 'LlamaTokenizer',
  'top_k': 20,
  'torchscript': True,
}
# Fields of transformers 4 that can change the model, with their neutral values.
_UNSET = {
  'cross_attention_hidden_size': None,
  'pruned_heads': {},
  'tie_encoder_decoder': False,
  'use_bfloat16': False,
  'per_layer_config': {},
}


@pytest.mark.parametrize('name', _OF_OTHERS | _UNSET)
def test_a_field_of_other_programs_is_ignored(name):
  fields = {**_LLAMA, name: (_OF_OTHERS | _UNSET)[name]}
  assert huggingface_config.parse(fields) == huggingface_config.parse(_LLAMA)
  if name != 'is_decoder':
    fields = {**_BERT, name: (_OF_OTHERS | _UNSET)[name]}
    expected = 3 if name == 'num_labels' else 2
    assert huggingface_config.parse(fields) == dataclasses.replace(
      huggingface_config.parse(_BERT), num_labels=expected
    )


def test_a_copy_does_not_inherit_what_holds_for_the_source():
  llama = huggingface_config.ARCHITECTURES['llama']
  found = huggingface_config.for_others(_LLAMA | _OF_OTHERS, llama)
  assert {'eos_token_id', 'temperature', 'tokenizer_class'} <= set(found)
  assert found.keys().isdisjoint(
    {'auto_map', '_commit_hash', '_flash_attn_2_enabled', 'hidden_size'}
    | {'_attn_implementation_autoset', 'custom_pipelines'}
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'pruned_heads': {'0': [1]}},
      r"pruned_heads must be {}, got {'0': \[1\]}",
    ),
    ({'tie_encoder_decoder': True}, 'tie_encoder_decoder must be False, got T'),
    ({'use_bfloat16': True}, 'use_bfloat16 must be False, got True'),
    ({'cross_attention_hidden_size': 8}, 'hidden_size must be None, got 8'),
    ({'per_layer_config': {'1': {}}}, "per_layer_config must be {}, got {'1'"),
    ({'_sliding_window_pattern': 6}, '_sliding_window_pattern is not impl'),
    ({'model_type': 'gemma'}, "one of llama, mistral, .* got 'gemma'"),
    ({'architectures': ['LlamaForX']}, r"architectures .*got \['LlamaForX'\]"),
    ({'hidden_act': 'gelu'}, "hidden_act must be 'silu', got 'gelu'"),
    ({'attention_bias': True}, 'attention_bias must be False, got True'),
    ({'mlp_bias': True}, 'mlp_bias must be False, got True'),
    ({'attention_dropout': 0.1}, 'attention_dropout must be 0, got 0.1'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor .* got 0.5'),
    ({'quantization_config': {'bits': 4}}, r"quantization_config .*'bits': 4"),
    ({'logit_scale': 0.1}, 'logit_scale is not implemented, got 0.1'),
    ({'torch_dtype': 'float64'}, "dtype must be .* got 'float64'"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 4}}, "llama3, .* got 'yarn'"),
    (
      {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
      "llama3 must have .*'low_freq_factor'.* got {'factor': 8.0}",
    ),
    ({'rope_scaling': {'mrope_section': [1]}}, r"default .*'mrope_section'"),
    ({'sliding_window': 7}, 'sliding_window is not .* llama, got 7'),
    ({'hidden_size': 0}, 'width must be at least 1, got 0'),
  ],
)
def test_what_is_not_implemented_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    huggingface_config.parse({**_LLAMA, **fields})


@pytest.mark.parametrize(
  ('fields', 'name'),
  [
    (_LLAMA, 'model_type'),
    (_LLAMA, 'vocab_size'),
    (_MISTRAL, 'sliding_window'),
    (_QWEN2, 'num_key_value_heads'),
    (_QWEN3, 'head_dim'),
  ],
)
def test_a_missing_field_is_named(fields, name):
  rest = {key: value for key, value in fields.items() if key != name}
  with pytest.raises(ValueError, match=name):
    huggingface_config.parse(rest)


def test_a_window_of_some_layers_is_refused():
  fields = {**_QWEN2, 'use_sliding_window': True}
  with pytest.raises(ValueError, match='max_window_layers=21'):
    huggingface_config.parse(fields)


def test_a_model_that_no_architecture_has_is_refused():
  config = dataclasses.replace(huggingface_config.parse(_QWEN2), qk_norm=True)
  with pytest.raises(ValueError, match=r'got qkv_bias=True, qk_norm=True, w'):
    huggingface_config.fields_of(config)


_BERT = {
  'model_type': 'bert',
  'architectures': ['BertForMaskedLM'],
  'attention_probs_dropout_prob': 0.1,
  'gradient_checkpointing': False,
  'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.1,
  'hidden_size': 768,
  'initializer_range': 0.02,
  'intermediate_size': 3072,
  'layer_norm_eps': 1e-12,
  'max_position_embeddings': 512,
  'num_attention_heads': 12,
  'num_hidden_layers': 12,
  'pad_token_id': 0,
  'position_embedding_type': 'absolute',
  'type_vocab_size': 2,
  'vocab_size': 30_522,
}
_ROBERTA = _BERT | {
  'model_type': 'roberta',
  'architectures': ['RobertaForMaskedLM'],
  'bos_token_id': 0,
  'eos_token_id': 2,
  'layer_norm_eps': 1e-5,
  'max_position_embeddings': 514,
  'pad_token_id': 1,
  'type_vocab_size': 1,
  'vocab_size': 50_265,
}


@pytest.mark.parametrize(
  ('fields', 'count'), [(_BERT, 109_483_778), (_ROBERTA, 124_647_170)]
)
def test_published_encoders_have_the_published_parameter_counts(fields, count):
  config = huggingface_config.parse(fields)
  shapes = jax.eval_shape(encoder.Layers(config).init, jax.random.key(0))
  found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  assert found == count
  assert (config.max_length, config.dropout) == (512, 0.1)
  assert (
    huggingface_config.parse(huggingface_config.fields_of(config)) == config
  )


def test_labels_arrive():
  names = {'id2label': {'1': 'yes', '0': 'no', '2': 'perhaps'}}
  found = huggingface_config.parse(_BERT | names)
  assert (found.num_labels, found.labels) == (3, ('no', 'yes', 'perhaps'))
  unnamed = {'id2label': {'0': 'LABEL_0'}, 'problem_type': 'regression'}
  found = huggingface_config.parse(_BERT | unnamed)
  assert (found.num_labels, found.labels) == (1, None)
  assert isinstance(found, EncoderConfig)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'hidden_act': 'relu'}, "hidden_act must be 'gelu', got 'relu'"),
    ({'is_decoder': True}, 'is_decoder must be False, got True'),
    ({'rope_theta': 1e4}, 'rope_theta is not implemented'),
    ({'architectures': ['BertForQA']}, r"one of \(.* got \['BertForQA'\]"),
    ({'problem_type': 'multi_label_classification'}, "must be 'single_label"),
    ({'id2label': {'0': 'a'}, 'num_labels': 2}, 'must name 2 labels, got 1'),
    ({'max_position_embeddings': 0}, 'max_length must be at least 1'),
  ],
)
def test_what_is_not_implemented_of_an_encoder_is_named(fields, message):
  with pytest.raises(ValueError, match=message):
    huggingface_config.parse(_BERT | fields)


def test_the_padding_of_a_roberta_must_be_known():
  rest = {key: x for key, x in _ROBERTA.items() if key != 'pad_token_id'}
  with pytest.raises(ValueError, match='pad_token_id is missing'):
    huggingface_config.parse(rest)
