"""Converts a checkpoint's config.json to and from our configurations.

A field of config.json is used, ignored because it does not change the model's
output, or rejected by name. Each configuration describes its own architectures;
`MODELS` lists the configurations.
"""

from collections.abc import Mapping
from typing import get_type_hints

from models.architecture import Architecture, Fields
from models.encoder import EncoderConfig
from models.llama import LlamaConfig
from models.model import ModelConfig
from models.vit import VitConfig

MODELS: tuple[type[ModelConfig], ...] = (LlamaConfig, EncoderConfig, VitConfig)
"""Configurations whose checkpoints can be read."""

_MODELS: Mapping[str, type[ModelConfig]] = {
  kind: model for model in MODELS for kind in model.architectures()
}

ARCHITECTURES: Mapping[str, Architecture] = {
  kind: architecture
  for model in MODELS
  for kind, architecture in model.architectures().items()
}
"""Supported architectures by model_type."""

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


# Our type for each type of a checkpoint. The models do not support float16;
# float32 can represent all of its values.
_DTYPES = {
  None: 'float32',
  'float32': 'float32',
  'float16': 'float32',
  'bfloat16': 'bfloat16',
}


def parse(fields: Fields) -> ModelConfig:
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
  _check_types(values, kind)
  name = fields.get('dtype') or fields.get('torch_dtype')
  if name not in _DTYPES:
    raise ValueError(f'dtype must be one of {[*_DTYPES][1:]}, got {name!r}')
  values |= {'dtype': _DTYPES[name], 'param_dtype': _DTYPES[name]}
  values |= architecture.read(fields, kind)
  return _MODELS[kind](**values)


def fields_of(config: ModelConfig) -> Fields:
  """Converts our configuration to the fields of a config.json.

  Args:
    config: Configuration of the model.

  Returns:
    Fields that `parse` converts to the same configuration, apart from options
    that config.json does not have, such as `remat`.

  Raises:
    ValueError: transformers has no architecture for the model.
  """
  kind, architecture = model_type(config), architecture_of(config)
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
  architecture = ARCHITECTURES[kind]
  return {
    path: name.format(layer).removesuffix('.weight')
    for path, name in architecture.names.items()
    if path.endswith('/kernel') and path not in architecture.convolutions
  }


def model_type(config: ModelConfig) -> str:
  """Returns the first model_type of a model's architectures that expresses it.

  Args:
    config: Configuration of the model.

  Raises:
    ValueError: No model_type can express it.
  """
  architectures = config.architectures()
  for kind, architecture in architectures.items():
    if _fixed(config, architecture) == architecture.fixed:
      return kind
  name = type(config).__name__
  if not architectures:
    raise ValueError(
      f'a {name} has no checkpoints of transformers; define its architectures()'
    )
  got: Fields = {}
  for architecture in architectures.values():
    got |= _fixed(config, architecture)
  rules = (f'{_shown(x.fixed)} ({kind})' for kind, x in architectures.items())
  raise ValueError(
    f'a checkpoint of a {name} must have {" or ".join(rules)}, got '
    f'{_shown(got)}: change the model'
  )


def architecture_of(config: ModelConfig) -> Architecture:
  """Returns the architecture of a model's `model_type`.

  Args:
    config: Configuration of the model.

  Raises:
    ValueError: No model_type can express the model.
  """
  return config.architectures()[model_type(config)]


def _fixed(config: ModelConfig, architecture: Architecture) -> Fields:
  """Returns a model's fields whose values follow from the model_type."""
  return {name: getattr(config, name) for name in architecture.fixed}


def _shown(fields: Fields) -> str:
  return ', '.join(f'{name}={value!r}' for name, value in fields.items())


def for_others(fields: Fields, architecture: Architecture) -> Fields:
  """Returns the fields of a config.json that a new checkpoint copies.

  These are fields that only other programs use, such as ids of special tokens.

  Args:
    fields: Fields of the source's config.json.
    architecture: The architecture of the new checkpoint.
  """
  inherited = HARMLESS - _OF_THE_SOURCE - _known(architecture)
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
  accepted |= {'dtype', 'torch_dtype'} | architecture.harmless
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


def _check_types(values: Fields, kind: str) -> None:
  """Raises ValueError if a copied value does not have the type of our field."""
  architecture, hints = ARCHITECTURES[kind], get_type_hints(_MODELS[kind])
  names = architecture.needed | architecture.optional
  rules = {bool: 'true or false', float: 'a number'}
  for ours, theirs in names.items():
    hint = hints[ours]
    rule = rules.get(hint, 'a whole number')
    hint = hint | int if hint is float else hint
    if ours in values and not isinstance(values[ours], hint):
      raise ValueError(f'{theirs} must be {rule}, got {values[ours]!r}')
