"""Checkpoints of LLaMA and its relatives, as transformers writes them."""

from collections.abc import Mapping

from models.architecture import ONE_STACK, TRANSFORMER, Architecture, Fields
from models.llama import Llama3Scaling, LlamaConfig

_NAMES = {
  'embed/embedding': 'model.embed_tokens.weight',
  'blocks/attention_norm/scale': 'model.layers.{}.input_layernorm.weight',
  'blocks/attention/q/kernel': 'model.layers.{}.self_attn.q_proj.weight',
  'blocks/attention/k/kernel': 'model.layers.{}.self_attn.k_proj.weight',
  'blocks/attention/v/kernel': 'model.layers.{}.self_attn.v_proj.weight',
  'blocks/attention/o/kernel': 'model.layers.{}.self_attn.o_proj.weight',
  'blocks/attention/q/bias': 'model.layers.{}.self_attn.q_proj.bias',
  'blocks/attention/k/bias': 'model.layers.{}.self_attn.k_proj.bias',
  'blocks/attention/v/bias': 'model.layers.{}.self_attn.v_proj.bias',
  'blocks/attention/q_norm/scale': 'model.layers.{}.self_attn.q_norm.weight',
  'blocks/attention/k_norm/scale': 'model.layers.{}.self_attn.k_norm.weight',
  'blocks/mlp_norm/scale': 'model.layers.{}.post_attention_layernorm.weight',
  'blocks/mlp/gate/kernel': 'model.layers.{}.mlp.gate_proj.weight',
  'blocks/mlp/up/kernel': 'model.layers.{}.mlp.up_proj.weight',
  'blocks/mlp/down/kernel': 'model.layers.{}.mlp.down_proj.weight',
  'norm/scale': 'model.norm.weight',
  'lm_head/kernel': 'lm_head.weight',
}


_SCALING = {
  'factor': 'factor',
  'low_freq_factor': 'low_freq_factor',
  'high_freq_factor': 'high_freq_factor',
  'original_length': 'original_max_position_embeddings',
}


def _read(fields: Fields, kind: str) -> Fields:
  theta, scaling = _rope(fields)
  values: Fields = {'rope_theta': theta, 'rope_scaling': scaling}
  values['window'] = _window(fields, kind)
  if fields.get('head_dim') == (
    fields['hidden_size'] / fields['num_attention_heads']
  ):
    values['head_dim'] = None
  return values


def _write(config: LlamaConfig, kind: str) -> Fields:
  fields: Fields = {
    'hidden_act': 'silu',
    'rope_theta': config.rope_theta,
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_width,
  }
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


def _rope(fields: Fields) -> tuple[float, Llama3Scaling | None]:
  """Returns the rotary embedding's `rope_theta` and `rope_scaling`."""
  rope = fields.get('rope_parameters') or fields.get('rope_scaling') or {}
  rope = {name: value for name, value in rope.items() if value is not None}
  # Depending on its version, transformers writes 'rope_type' or 'type', and
  # puts 'rope_theta' inside this dict or outside of it.
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


def _window(fields: Fields, kind: str) -> int | None:
  """Returns the attention window, which all layers must share, or None."""
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
  kinds = ['full_attention'] * first + ['sliding_attention'] * num_layers
  layers = fields.get('layer_types') or kinds[:num_layers]
  if len(set(layers)) > 1:
    raise ValueError(
      'sliding_window must be of all layers or of none, got '
      f'max_window_layers={first}, layer_types={layers}'
    )
  return size if layers[0] == 'sliding_attention' else None


_LLAMA = Architecture(
  classes=('LlamaForCausalLM',),
  fixed={'qkv_bias': False, 'qk_norm': False, 'window': None},
  needed={'vocab_size': 'vocab_size'} | TRANSFORMER,
  optional={
    'num_kv_heads': 'num_key_value_heads',
    'head_dim': 'head_dim',
    'norm_eps': 'rms_norm_eps',
    'init_std': 'initializer_range',
    'tied': 'tie_word_embeddings',
  },
  read=_read,
  write=_write,
  others=frozenset(
    {
      'rope_theta',
      'rope_scaling',
      'rope_parameters',
      'sliding_window',
      'use_sliding_window',
      'max_window_layers',
      'layer_types',
    }
  ),
  neutral=ONE_STACK
  | {
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'attention_dropout': 0,
    'partial_rotary_factor': 1,
    'rope_interleaved': False,
    'use_mrope': False,
  },
  names=_NAMES,
  tied=('lm_head/kernel', 'embed/embedding'),
  ignored=r'lm_head\.weight|.*rotary_emb\.inv_freq',
)


_QWEN2 = _LLAMA._replace(
  classes=('Qwen2ForCausalLM',),
  fixed={'qkv_bias': True, 'qk_norm': False},
  required=('num_key_value_heads',),
)

ARCHITECTURES: Mapping[str, Architecture] = {
  'llama': _LLAMA,
  'mistral': _LLAMA._replace(
    classes=('MistralForCausalLM',),
    fixed={'qkv_bias': False, 'qk_norm': False},
    required=('num_key_value_heads', 'sliding_window'),
  ),
  'qwen2': _QWEN2,
  'qwen3': _QWEN2._replace(
    classes=('Qwen3ForCausalLM',),
    fixed={'qkv_bias': False, 'qk_norm': True},
    required=('num_key_value_heads', 'head_dim'),
  ),
}
"""The architectures by model_type. If a model fits several of them, it is
written as the first one that it fits."""
