"""Converts a checkpoint's config.json to and from our configurations.

A field of config.json is used, ignored because it does not change the model's
output, or rejected by name. `ARCHITECTURES` has one description per supported
architecture, with its fields and its names of tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, get_type_hints

from models.encoder import EncoderConfig
from models.llama import Llama3Scaling, LlamaConfig

Fields: TypeAlias = dict[str, Any]
AnyConfig: TypeAlias = LlamaConfig | EncoderConfig


class Architecture(NamedTuple):
  """Description of one model_type of transformers."""

  classes: tuple[str, ...]
  """Classes of transformers that can be read. The first one is written."""
  config: type
  """Class of our configuration."""
  fixed: Fields
  """Our fields whose value follows from the model_type."""
  needed: dict[str, str]
  """Our fields that are copied from a field of config.json, to its name."""
  optional: dict[str, str]
  """As `needed`, for fields that may be missing from config.json."""
  read: Callable[[Fields, str], Fields]
  """`(config.json, model_type) -> our fields` that are not mere copies."""
  write: Callable[[Any, str], Fields]
  """`(our configuration, model_type) -> fields of config.json` that are not
  mere copies."""
  others: frozenset[str]
  """Fields of config.json that `read` uses."""
  neutral: Fields
  """Fields of config.json that must have this value, or be absent or null."""
  names: dict[str, str]
  """Paths of our parameters to names of tensors; {} is the layer's number."""
  required: tuple[str, ...] = ()
  """Fields that config.json must have although our field has a default, because
  transformers' default is another."""
  prefix: str = ''
  """Prefix of tensor names that is absent from a checkpoint without a head."""
  head: str = ''
  """Prefix of the paths of the head, which is initialized if a checkpoint does
  not have it."""
  ignored: str = ''
  """Regular expression for names of tensors that the model does not use."""


_LLAMA_NAMES = {
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
_ENCODER_NAMES = {
  'embed/tokens/embedding': 'embeddings.word_embeddings.weight',
  'embed/types/embedding': 'embeddings.token_type_embeddings.weight',
  'embed/positions/embedding': 'embeddings.position_embeddings.weight',
  'embed/norm': 'embeddings.LayerNorm',
  'blocks/attention/q': 'encoder.layer.{}.attention.self.query',
  'blocks/attention/k': 'encoder.layer.{}.attention.self.key',
  'blocks/attention/v': 'encoder.layer.{}.attention.self.value',
  'blocks/attention/o': 'encoder.layer.{}.attention.output.dense',
  'blocks/attention_norm': 'encoder.layer.{}.attention.output.LayerNorm',
  'blocks/mlp/up': 'encoder.layer.{}.intermediate.dense',
  'blocks/mlp/down': 'encoder.layer.{}.output.dense',
  'blocks/mlp_norm': 'encoder.layer.{}.output.LayerNorm',
}


def _encoder_names(prefix: str, dense: str, out: str) -> dict[str, str]:
  """Returns the names of the tensors of an encoder and its head, by our paths.

  Each module but the embedding tables has a weight and a bias.

  Args:
    prefix: Prefix of the encoder's names.
    dense: Name of the head's first linear map.
    out: Name of the head's last linear map.
  """
  modules = {path: prefix + name for path, name in _ENCODER_NAMES.items()} | {
    'head/dense': dense,
    'head/out': out,
  }
  names = {}
  for path, name in modules.items():
    if path.endswith('embedding'):
      names[path] = name
    else:
      weight = 'scale' if path.endswith('norm') else 'kernel'
      names[f'{path}/{weight}'] = f'{name}.weight'
      names[f'{path}/bias'] = f'{name}.bias'
  return names


_NEEDED = {
  'vocab_size': 'vocab_size',
  'width': 'hidden_size',
  'mlp_width': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
}
_SCALING = {
  'factor': 'factor',
  'low_freq_factor': 'low_freq_factor',
  'high_freq_factor': 'high_freq_factor',
  'original_length': 'original_max_position_embeddings',
}
_DECODES = {
  'is_encoder_decoder': False,
  'add_cross_attention': False,
  'chunk_size_feed_forward': 0,
  'cross_attention_hidden_size': None,
  'tie_encoder_decoder': False,
  'pruned_heads': {},
  'per_layer_config': {},
  'use_bfloat16': False,
}

_GENERATION = {
  'assistant_confidence_threshold',
  'assistant_lookbehind',
  'bad_words_ids',
  'begin_suppress_tokens',
  'decoder_start_token_id',
  'diversity_penalty',
  'do_sample',
  'early_stopping',
  'encoder_no_repeat_ngram_size',
  'encoder_repetition_penalty',
  'epsilon_cutoff',
  'eta_cutoff',
  'exponential_decay_length_penalty',
  'forced_bos_token_id',
  'forced_eos_token_id',
  'length_penalty',
  'max_length',
  'max_new_tokens',
  'min_length',
  'no_repeat_ngram_size',
  'num_assistant_tokens',
  'num_assistant_tokens_schedule',
  'num_beam_groups',
  'num_beams',
  'num_return_sequences',
  'output_scores',
  'prefix',
  'remove_invalid_values',
  'repetition_penalty',
  'return_dict_in_generate',
  'suppress_tokens',
  'target_lookbehind',
  'task_specific_params',
  'temperature',
  'top_k',
  'top_p',
  'typical_p',
  'use_cache',
}
"""Fields that transformers moves to its generation config."""

_OF_THE_SOURCE = {
  '_attn_implementation',
  '_attn_implementation_autoset',
  '_attn_implementation_internal',
  '_commit_hash',
  '_experts_implementation',
  '_flash_attn_2_enabled',
  '_experts_implementation_internal',
  '_output_attentions',
  'auto_map',
  'attn_implementation',
  'custom_pipelines',
  'experts_implementation',
  'output_past',
  'tf_legacy_loss',
  'torchscript',
  'use_return_dict',
  'xla_device',
}
"""Fields about the program or repository that wrote a config.json.

They are not copied to a new checkpoint. For example, `auto_map` names Python
files that the new checkpoint does not have.
"""

HARMLESS = (
  _GENERATION
  | _OF_THE_SOURCE
  | {
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
    'unk_token_id',
    'sep_token_id',
    'tokenizer_class',
    'finetuning_task',
    'is_decoder',
    'max_position_embeddings',
    'max_sequence_length',
    'pretraining_tp',
    'transformers_version',
    'transformers.js_config',
    'is_llama_config',
    '_name_or_path',
    'name_or_path',
    'gradient_checkpointing',
    'id2label',
    'output_attentions',
    'output_hidden_states',
    'return_dict',
    'label2id',
    'num_labels',
    'problem_type',
    'tie_last_hidden_states',
    'unsloth_fixed',
    'unsloth_version',
  }
)
"""Fields for other programs, which do not change the model's output."""

_HARMLESS_IN_ENCODERS = {
  # Options of the training, and options of the first BERT's pooler that
  # transformers does not use.
  'attention_probs_dropout_prob',
  'classifier_dropout',
  'tie_word_embeddings',
  'directionality',
  'pooler_fc_size',
  'pooler_num_attention_heads',
  'pooler_num_fc_layers',
  'pooler_size_per_head',
  'pooler_type',
}

# Our type for each type of a checkpoint. The models do not support float16;
# float32 can represent all of its values.
_DTYPES = {
  None: 'float32',
  'float32': 'float32',
  'float16': 'float32',
  'bfloat16': 'bfloat16',
}


def parse(fields: Fields) -> AnyConfig:
  """Converts the fields of a config.json to our configuration.

  Args:
    fields: The fields of config.json.

  Raises:
    ValueError: A field is missing, invalid or not implemented. The message
      names it.
  """
  kind = _model_type(fields)
  architecture = ARCHITECTURES[kind]
  _check(fields, kind)
  values = architecture.fixed | {
    ours: fields[theirs] for ours, theirs in architecture.needed.items()
  }
  values |= {
    ours: fields[theirs]
    for ours, theirs in architecture.optional.items()
    if fields.get(theirs) is not None
  }
  _check_types(values, architecture)
  name = fields.get('dtype') or fields.get('torch_dtype')
  if name not in _DTYPES:
    raise ValueError(f'dtype must be one of {[*_DTYPES][1:]}, got {name!r}')
  values |= {'dtype': _DTYPES[name], 'param_dtype': _DTYPES[name]}
  values |= architecture.read(fields, kind)
  return architecture.config(**values)


def fields_of(config: AnyConfig) -> Fields:
  """Converts our configuration to the fields of a config.json.

  Args:
    config: Configuration of the model.

  Returns:
    Fields that `parse` converts to the same configuration, apart from options
    that config.json does not have, such as `remat`.

  Raises:
    ValueError: transformers has no architecture for the model.
  """
  kind = model_type(config)
  architecture = ARCHITECTURES[kind]
  fields = {
    'model_type': kind,
    'architectures': [architecture.classes[0]],
    'torch_dtype': config.param_dtype,
  }
  names = architecture.needed | architecture.optional
  fields |= {theirs: getattr(config, ours) for ours, theirs in names.items()}
  return fields | architecture.write(config, kind)


def linear_modules(kind: str, layer: int = 0) -> dict[str, str]:
  """Returns transformers' names of linear modules, by the paths of our kernels.

  Args:
    kind: The model_type.
    layer: The layer's number, for kernels of the transformer layers.

  Example:
    >>> linear_modules('llama', 3)['blocks/attention/q/kernel']
    'model.layers.3.self_attn.q_proj'
  """
  return {
    path: name.format(layer).removesuffix('.weight')
    for path, name in ARCHITECTURES[kind].names.items()
    if path.endswith('/kernel')
  }


def model_type(config: AnyConfig) -> str:
  """Returns the first model_type of `ARCHITECTURES` that can express a config.

  Args:
    config: Configuration of the model.

  Raises:
    ValueError: No model_type can express it.
  """
  for kind, architecture in ARCHITECTURES.items():
    if isinstance(config, architecture.config) and all(
      getattr(config, name) == value
      for name, value in architecture.fixed.items()
    ):
      return kind
  raise ValueError(
    'no architecture has both qkv_bias and qk_norm; those that can be '
    f'written are {", ".join(ARCHITECTURES)}'
  )


def for_others(fields: Fields, kind: str) -> Fields:
  """Returns the fields of a config.json that a new checkpoint copies.

  These are fields that only other programs use, such as ids of special tokens.

  Args:
    fields: Fields of the source's config.json.
    kind: The model_type of the new checkpoint.
  """
  inherited = HARMLESS - _OF_THE_SOURCE - _known(ARCHITECTURES[kind])
  return {name: x for name, x in fields.items() if name in inherited}


def _known(architecture: Architecture) -> set[str]:
  """Returns the fields of config.json from which our configuration is made."""
  needed, optional = architecture.needed, architecture.optional
  copied = {*needed.values(), *optional.values()}
  return copied | architecture.others | {'model_type', 'architectures'}


def _model_type(fields: Fields) -> str:
  kind = fields.get('model_type')
  if kind is None or kind not in ARCHITECTURES:
    raise ValueError(
      f'model_type must be one of {", ".join(ARCHITECTURES)}, got {kind!r}'
    )
  classes = ARCHITECTURES[kind].classes
  names = fields.get('architectures') or classes[:1]
  if len(names) != 1 or names[0] not in classes:
    expected = [classes[0]] if len(classes) == 1 else f'one of {classes}'
    raise ValueError(f'architectures must be {expected}, got {names!r}')
  return kind


def _check(fields: Fields, kind: str) -> None:
  """Raises ValueError if a field is missing or not implemented."""
  architecture = ARCHITECTURES[kind]
  required = {*architecture.needed.values(), *architecture.required}
  if missing := sorted(required - set(fields)):
    raise ValueError(f'{missing[0]} is missing from a model_type {kind!r}')
  neutral = architecture.neutral
  accepted = _known(architecture) | neutral.keys() | HARMLESS
  accepted |= {'dtype', 'torch_dtype'}
  if architecture.config is EncoderConfig:
    accepted |= _HARMLESS_IN_ENCODERS
  for name, value in fields.items():
    if name in neutral and value not in (None, neutral[name]):
      raise ValueError(
        f'{name} must be {neutral[name]!r}, got {value!r}: nothing else '
        'is implemented'
      )
    if value is not None and name not in accepted:
      raise ValueError(
        f'{name} is not implemented, got {value!r}; take it out of '
        'config.json if the model does not depend on it'
      )


def _check_types(values: Fields, architecture: Architecture) -> None:
  """Raises ValueError if a copied value does not have the type of our field."""
  hints = get_type_hints(architecture.config)
  names = architecture.needed | architecture.optional
  rules = {bool: 'true or false', float: 'a number'}
  for ours, theirs in names.items():
    kind = hints[ours]
    rule = rules.get(kind, 'a whole number')
    kind = kind | int if kind is float else kind
    if ours in values and not isinstance(values[ours], kind):
      raise ValueError(f'{theirs} must be {rule}, got {values[ours]!r}')


def _read_llama(fields: Fields, kind: str) -> Fields:
  theta, scaling = _rope(fields)
  values: Fields = {'rope_theta': theta, 'rope_scaling': scaling}
  values['window'] = _window(fields, kind)
  if fields.get('head_dim') == (
    fields['hidden_size'] / fields['num_attention_heads']
  ):
    values['head_dim'] = None
  return values


def _write_llama(config: LlamaConfig, kind: str) -> Fields:
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


def _read_encoder(fields: Fields, kind: str) -> Fields:
  """Returns `num_labels` and the labels' names.

  `labels` is None if config.json has only transformers' default names, or none.
  """
  del kind
  named = fields.get('id2label') or {}
  num_labels = fields.get('num_labels') or len(named) or 2
  labels = tuple(named[key] for key in sorted(named, key=int))
  if named and len(named) != num_labels:
    raise ValueError(
      f'id2label must name {num_labels} labels, got {len(named)}'
    )
  problem = 'regression' if num_labels == 1 else 'single_label_classification'
  if fields.get('problem_type') not in (None, problem):
    raise ValueError(
      f'problem_type must be {problem!r} with {num_labels} labels, got '
      f'{fields["problem_type"]!r}: nothing else is implemented'
    )
  unnamed = labels == _unnamed(num_labels)
  return {
    'num_labels': num_labels,
    'labels': None if unnamed else labels or None,
  }


def _write_encoder(config: EncoderConfig, kind: str) -> Fields:
  del kind
  is_regression = config.num_labels == 1
  labels = config.labels or _unnamed(config.num_labels)
  return {
    'hidden_act': 'gelu',
    'attention_probs_dropout_prob': 0.0,
    'id2label': {str(i): label for i, label in enumerate(labels)},
    'label2id': {label: i for i, label in enumerate(labels)},
    'problem_type': (
      'regression' if is_regression else 'single_label_classification'
    ),
  }


def _unnamed(num_labels: int) -> tuple[str, ...]:
  return tuple(f'LABEL_{i}' for i in range(num_labels))


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
  config=LlamaConfig,
  fixed={'qkv_bias': False, 'qk_norm': False, 'window': None},
  needed=_NEEDED,
  optional={
    'num_kv_heads': 'num_key_value_heads',
    'head_dim': 'head_dim',
    'norm_eps': 'rms_norm_eps',
    'init_std': 'initializer_range',
    'tied': 'tie_word_embeddings',
  },
  read=_read_llama,
  write=_write_llama,
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
  neutral=_DECODES
  | {
    'hidden_act': 'silu',
    'attention_bias': False,
    'mlp_bias': False,
    'attention_dropout': 0,
    'partial_rotary_factor': 1,
    'rope_interleaved': False,
    'use_mrope': False,
  },
  names=_LLAMA_NAMES,
  ignored=r'lm_head\.weight|.*rotary_emb\.inv_freq',
)
_BERT = Architecture(
  classes=(
    'BertForSequenceClassification',
    'BertModel',
    'BertForMaskedLM',
    'BertForPreTraining',
  ),
  config=EncoderConfig,
  fixed={'family': 'bert'},
  needed=_NEEDED | {'num_positions': 'max_position_embeddings'},
  optional={
    'num_types': 'type_vocab_size',
    'pad_id': 'pad_token_id',
    'norm_eps': 'layer_norm_eps',
    'init_std': 'initializer_range',
    'dropout': 'hidden_dropout_prob',
  },
  read=_read_encoder,
  write=_write_encoder,
  others=frozenset({'num_labels', 'id2label', 'label2id', 'problem_type'}),
  neutral=_DECODES
  | {
    'hidden_act': 'gelu',
    'position_embedding_type': 'absolute',
    'is_decoder': False,
  },
  names=_encoder_names('bert.', 'bert.pooler.dense', 'classifier'),
  prefix='bert.',
  head='head/',
  ignored=r'(bert\.)?embeddings\.position_ids|cls\..*',
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
  'bert': _BERT,
  'roberta': _BERT._replace(
    classes=(
      'RobertaForSequenceClassification',
      'RobertaModel',
      'RobertaForMaskedLM',
    ),
    fixed={'family': 'roberta'},
    required=('pad_token_id',),
    names=_encoder_names('roberta.', 'classifier.dense', 'classifier.out_proj'),
    prefix='roberta.',
    ignored=r'(roberta\.)?(embeddings\.position_ids|pooler\..*)|lm_head\..*',
  ),
}
"""Supported architectures by model_type. If several can express a model, it is
written as the first of them."""
