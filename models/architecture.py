"""Describes the checkpoints of an architecture of transformers.

A model config lists its architectures in `ModelConfig.architectures`.
`models.huggingface_config` converts config.json by such a description, and
`models.huggingface` converts the tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

Fields: TypeAlias = dict[str, Any]
"""Fields of a JSON file, or of one of our configurations."""


class Companion(NamedTuple):
  """A second JSON file of a checkpoint, in addition to config.json."""

  name: str
  """Name of the file. A checkpoint may lack it."""
  read: Callable[[Any, Fields], Any]
  """`(our configuration, the file's fields) -> our configuration`."""
  write: Callable[[Any, Fields], Fields]
  """`(our configuration, fields of the source's file) -> the file's fields`.
  Without a source, the fields are {}."""


class Architecture(NamedTuple):
  """Description of one model_type of transformers."""

  classes: tuple[str, ...]
  """Classes of transformers that can be read. The first one is written."""
  fixed: Fields
  """Our fields whose value follows from the model_type. All model types that
  share a configuration fix the fields in which they differ, so that a model is
  not written as another type."""
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
  names: Mapping[str, str]
  """Paths of our parameters to names of tensors; {} is the layer's number."""
  required: tuple[str, ...] = ()
  """Fields that config.json must have although our field has a default, because
  transformers has another default."""
  harmless: frozenset[str] = frozenset()
  """Fields of config.json that do not change the output of these models."""
  prefix: str = ''
  """Prefix of tensor names that is absent from a checkpoint without a head."""
  head: str = ''
  """Prefix of the paths of the head, which is initialized if a checkpoint does
  not have it."""
  ignored: str = ''
  """Regular expression for names of tensors that the model does not use."""
  renamed: Mapping[str, str] = {}
  """Regular expressions for parts of tensor names in other versions of
  transformers, to today's."""
  tied: tuple[str, str] | None = None
  """Paths of the head and of the embedding, if a model without the head uses
  the embedding instead."""
  convolutions: frozenset[str] = frozenset()
  """Paths of the kernels of convolutions. All other kernels are linear maps."""
  leading: Mapping[str, int] = {}
  """Paths of our parameters to the number of axes of size 1 that their tensors
  have in front."""
  companion: Companion | None = None
  """The second JSON file of a checkpoint, if the model depends on one."""


TRANSFORMER = {
  'width': 'hidden_size',
  'mlp_width': 'intermediate_size',
  'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads',
}
"""Sizes that every transformer needs: our fields to those of config.json."""

ONE_STACK = {
  'is_encoder_decoder': False,
  'add_cross_attention': False,
  'chunk_size_feed_forward': 0,
  'cross_attention_hidden_size': None,
  'tie_encoder_decoder': False,
  'pruned_heads': {},
  'per_layer_config': {},
  'use_bfloat16': False,
}
"""Neutral fields of a model that is one stack of equal layers."""


def names_of(modules: Mapping[str, str]) -> dict[str, str]:
  """Returns the names of the tensors of some modules, by our paths.

  Each module has a weight and a bias, except embedding tables.

  Args:
    modules: Paths of our modules, or of an embedding table, to names of
      modules, or of a tensor.

  Example:
    >>> names_of({'table/embedding': 'words', 'norm': 'ln', 'up': 'fc1'})
    {'table/embedding': 'words', 'norm/scale': 'ln.weight',
     'norm/bias': 'ln.bias', 'up/kernel': 'fc1.weight', 'up/bias': 'fc1.bias'}
  """
  names = {}
  for path, name in modules.items():
    if path.endswith('/embedding'):
      names[path] = name
    else:
      weight = 'scale' if path.endswith('norm') else 'kernel'
      names[f'{path}/{weight}'] = f'{name}.weight'
      names[f'{path}/bias'] = f'{name}.bias'
  return names


LABELS = frozenset({'num_labels', 'id2label', 'label2id', 'problem_type'})
"""Fields of config.json about the labels of a classifier."""


class Labelled(Protocol):
  """The fields of a configuration that describe the labels."""

  @property
  def num_labels(self) -> int:
    """Number of labels to choose from; 1 means regression to a number."""
    ...

  @property
  def labels(self) -> tuple[str, ...] | None:
    """Names of the labels, if they have names."""
    ...


def read_labels(fields: Fields) -> Fields:
  """Returns our fields `num_labels` and `labels`.

  `labels` is None if config.json has only transformers' default names, or none.

  Args:
    fields: The fields of config.json.

  Raises:
    ValueError: The labels contradict each other, or the problem is not
      implemented.
  """
  named = fields.get('id2label') or {}
  num_labels = fields.get('num_labels') or len(named) or 2
  labels = tuple(named[key] for key in sorted(named, key=int))
  if named and len(named) != num_labels:
    raise ValueError(
      f'id2label must name {num_labels} labels, got {len(named)}'
    )
  problem = _problem(num_labels)
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


def write_labels(config: Labelled) -> Fields:
  """Returns the fields of config.json about the labels."""
  labels = config.labels or _unnamed(config.num_labels)
  return {
    'id2label': {str(i): label for i, label in enumerate(labels)},
    'label2id': {label: i for i, label in enumerate(labels)},
    'problem_type': _problem(config.num_labels),
  }


def _problem(num_labels: int) -> str:
  return 'regression' if num_labels == 1 else 'single_label_classification'


def _unnamed(num_labels: int) -> tuple[str, ...]:
  return tuple(f'LABEL_{i}' for i in range(num_labels))
