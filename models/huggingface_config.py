"""A checkpoint's config.json, to and from a `LlamaConfig`.

Every field is one that the model implements, one that changes nothing that it
computes, or refused by name.
"""

from typing import Any, NamedTuple, TypeAlias

from models.llama import Llama3Scaling, LlamaConfig

Fields: TypeAlias = dict[str, Any]


class Architecture(NamedTuple):
  """What a model_type means."""

  name: str
  """transformers' class."""
  required: tuple[str, ...] = ()
  """Fields that have a default of their own there, none of ours."""


ARCHITECTURES = {
  'llama': Architecture('LlamaForCausalLM'),
  'mistral': Architecture(
    'MistralForCausalLM', ('num_key_value_heads', 'sliding_window')
  ),
  'qwen2': Architecture('Qwen2ForCausalLM', ('num_key_value_heads',)),
  'qwen3': Architecture(
    'Qwen3ForCausalLM', ('num_key_value_heads', 'head_dim')
  ),
}

# Fields of a LlamaConfig to those of config.json, with the same values.
_REQUIRED = {
  'vocab_size': 'vocab_size',
  'width': 'hidden_size',
  'mlp_width': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
}
_OPTIONAL = {
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'norm_eps': 'rms_norm_eps',
  'init_std': 'initializer_range',
  'tied': 'tie_word_embeddings',
}
_SCALING = {
  'factor': 'factor',
  'low_freq_factor': 'low_freq_factor',
  'high_freq_factor': 'high_freq_factor',
  'original_length': 'original_max_position_embeddings',
}
_READ = {
  *('model_type', 'architectures', 'dtype', 'torch_dtype'),
  *('rope_theta', 'rope_scaling', 'rope_parameters'),
  *('sliding_window', 'use_sliding_window', 'max_window_layers', 'layer_types'),
  *_REQUIRED.values(),
  *_OPTIONAL.values(),
}

# The only values under which these fields change nothing.
_NEUTRAL = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
  'attention_dropout': 0,
  'partial_rotary_factor': 1,
  'rope_interleaved': False,
  'use_mrope': False,
  'is_encoder_decoder': False,
  'add_cross_attention': False,
  'chunk_size_feed_forward': 0,
}

HARMLESS = {
  *('bos_token_id', 'eos_token_id', 'pad_token_id', 'unk_token_id'),
  *('max_position_embeddings', 'max_sequence_length', 'use_cache'),
  *('transformers_version', 'transformers.js_config', 'is_llama_config'),
  *('_name_or_path', 'name_or_path', '_attn_implementation', 'pretraining_tp'),
  *('output_attentions', 'output_hidden_states', 'return_dict', 'id2label'),
  *('label2id', 'problem_type', 'unsloth_fixed', 'unsloth_version'),
}
"""Fields for other programs: no number of the model depends on them."""

# float16 has a range of its own: float32 holds all of it.
_DTYPES = {
  **{None: 'float32', 'float32': 'float32'},
  **{'float16': 'float32', 'bfloat16': 'bfloat16'},
}


def parse(fields: Fields) -> LlamaConfig:
  """Returns the model that a config.json describes.

  Raises:
    ValueError: it describes another one, or not all of it; the message names
      the field.
  """
  kind = _model_type(fields)
  _check(fields, kind)
  values = {ours: fields[theirs] for ours, theirs in _REQUIRED.items()}
  values |= {
    ours: fields[theirs]
    for ours, theirs in _OPTIONAL.items()
    if fields.get(theirs) is not None
  }
  if values.get('head_dim') == values['width'] / values['num_heads']:
    del values['head_dim']
  name = fields.get('dtype') or fields.get('torch_dtype')
  if name not in _DTYPES:
    raise ValueError(f'dtype must be one of {[*_DTYPES][1:]}, got {name!r}')
  theta, scaling = _rope(fields)
  return LlamaConfig(
    **values,
    qkv_bias=kind == 'qwen2',
    qk_norm=kind == 'qwen3',
    window=_window(fields, kind),
    rope_theta=theta,
    rope_scaling=scaling,
    dtype=_DTYPES[name],
    param_dtype=_DTYPES[name],
  )


def fields_of(config: LlamaConfig) -> Fields:
  """Returns the config.json that `parse` reads as this model.

  Raises:
    ValueError: no architecture has such a model.
  """
  kind = _kind(config)
  fields = {
    'model_type': kind,
    'architectures': [ARCHITECTURES[kind].name],
    'hidden_act': 'silu',
    'rope_theta': config.rope_theta,
    'torch_dtype': config.param_dtype,
  }
  names = _REQUIRED | _OPTIONAL
  fields |= {theirs: getattr(config, ours) for ours, theirs in names.items()}
  fields['num_key_value_heads'] = config.kv_heads
  fields['head_dim'] = config.head_width
  scaling = config.rope_scaling
  if scaling is not None:
    fields['rope_scaling'] = {'rope_type': 'llama3'} | {
      theirs: getattr(scaling, ours) for ours, theirs in _SCALING.items()
    }
    length = int(scaling.factor * scaling.original_length)
    fields['max_position_embeddings'] = length
  if config.window is not None:
    fields['sliding_window'] = config.window
    if kind != 'mistral':
      # Layers from this one on have the window.
      fields |= {'use_sliding_window': True, 'max_window_layers': 0}
  return fields


def _kind(config):
  """The model_type that has what a config has."""
  if config.qkv_bias and config.qk_norm:
    raise ValueError(
      'no architecture has both qkv_bias and qk_norm; those that can be '
      f'written are {", ".join(ARCHITECTURES)}'
    )
  if config.qkv_bias:
    return 'qwen2'
  if config.qk_norm:
    return 'qwen3'
  return 'llama' if config.window is None else 'mistral'


def _model_type(fields):
  kind = fields.get('model_type')
  if kind not in ARCHITECTURES:
    raise ValueError(
      f'model_type must be one of {", ".join(ARCHITECTURES)}, got {kind!r}'
    )
  name = ARCHITECTURES[kind].name
  if (fields.get('architectures') or [name]) != [name]:
    raise ValueError(
      f'architectures must be {[name]}, got {fields["architectures"]!r}'
    )
  return kind


def _check(fields, kind):
  """Raises ValueError for a field that is missing, or not implemented."""
  required = {*_REQUIRED.values(), *ARCHITECTURES[kind].required}
  if missing := sorted(required - set(fields)):
    raise ValueError(f'{missing[0]} is missing from a model_type {kind!r}')
  for name, value in fields.items():
    if name in _NEUTRAL and value not in (None, _NEUTRAL[name]):
      raise ValueError(
        f'{name} must be {_NEUTRAL[name]!r}, got {value!r}: nothing else is '
        'implemented'
      )
    if value is not None and name not in _READ | _NEUTRAL.keys() | HARMLESS:
      raise ValueError(
        f'{name} is not implemented, got {value!r}; take it out of '
        'config.json if the model does not depend on it'
      )


def _rope(fields):
  """The base of the rotary embedding's wavelengths, and their scaling."""
  rope = fields.get('rope_parameters') or fields.get('rope_scaling') or {}
  rope = {name: value for name, value in rope.items() if value is not None}
  # transformers has called it both, and put the base in either place.
  kind = rope.pop('rope_type', rope.pop('type', 'default'))
  theta = rope.pop('rope_theta', fields.get('rope_theta') or 10_000.0)
  expected = {'default': [], 'llama3': [*_SCALING.values()]}
  if kind not in expected:
    raise ValueError(
      f'rope_scaling must be of type llama3, or none, got {kind!r}'
    )
  if sorted(rope) != sorted(expected[kind]):
    raise ValueError(
      f'rope_scaling of type {kind} must have {expected[kind]}, got {rope}'
    )
  if kind == 'default':
    return float(theta), None
  values = {ours: rope[theirs] for ours, theirs in _SCALING.items()}
  return float(theta), Llama3Scaling(**values)


def _window(fields, kind):
  """Time steps that a query sees, the same in every layer; None is all."""
  size = fields.get('sliding_window')
  if kind == 'llama' and size is not None:
    raise ValueError(
      f'sliding_window is not implemented for a model_type llama, got {size!r}'
    )
  if kind == 'llama' or kind == 'mistral':
    return size
  if not fields.get('use_sliding_window', False):
    return None
  num_layers = fields['num_hidden_layers']
  first = fields.get('max_window_layers', 28)  # transformers' default
  split = ['full_attention'] * first + ['sliding_attention'] * num_layers
  layers = fields.get('layer_types') or split[:num_layers]
  if len(set(layers)) > 1:
    raise ValueError(
      'sliding_window must be of all layers or of none, got '
      f'max_window_layers={first}, layer_types={layers}'
    )
  return size if layers[0] == 'sliding_attention' else None
