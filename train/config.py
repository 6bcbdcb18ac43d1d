"""The configuration of an experiment, and how it is written to JSON.

`Config` is what a file of configs/ holds; `train.method` has the optimizers
that it can name, `train.data.corpus` the texts. `train.command` changes one
from a command line.
"""

import dataclasses
import math
import types
import typing
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import numpy as np
import optax
import tyro

from galore_optax import Group, grouped
from galore_optax.checks import is_integer
from galore_optax.clipping import check_norm, clip_by_global_norm
from galore_optax.layerwise.weights import ARRAYS, ROUNDED, Weights, quantized
from models import huggingface
from models.encoder import EncoderConfig
from models.llama import Dtype, LlamaConfig
from models.lowrank import Factored, Lora, Relora
from train import adapter as adapter_lib
from train import subspace
from train.data.chats import Chats, ChitchatAnswers
from train.data.corpus import Chitchat, TextFiles, Tfds
from train.data.labelled import LabelledFiles, LabelledTfds
from train.mesh import Mesh
from train.method import CLASSES, Optimizer, limit_growth

AnyText: TypeAlias = Chitchat | TextFiles | Tfds | Chats | ChitchatAnswers
AnyCorpus: TypeAlias = AnyText | LabelledFiles | LabelledTfds
"""What `Config.corpus` may be."""


@dataclasses.dataclass(frozen=True)
class Imported:
  """The model of `checkpoint`; what stands here is how it computes."""

  dtype: Dtype | None = None
  """Type of the activations and of the matmuls (None: the checkpoint's)."""
  param_dtype: Dtype | None = None
  """Type of the parameters (None: the checkpoint's)."""
  remat: bool = False
  """Whether the backward pass recomputes each block from its input."""
  loss_chunk: int = 512
  """Tokens whose logits exist at the same time."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """As of a LlamaConfig."""


@dataclasses.dataclass(frozen=True)
class Classifier:
  """The encoder of `checkpoint`, with a head for these labels."""

  num_labels: int = 2
  """Labels to choose from; 1 is a number to predict."""
  labels: tuple[str, ...] | None = None
  """Their names, in the data and in an export (None: numbers)."""
  dropout: float | None = None
  """As of an EncoderConfig (None: the checkpoint's)."""
  dtype: Dtype | None = None
  """Type of the activations and of the matmuls (None: the checkpoint's)."""
  param_dtype: Dtype | None = None
  """Type of the parameters (None: the checkpoint's)."""
  remat: bool = False
  """Whether the backward pass recomputes each block from its input."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """As of a LlamaConfig."""


AnyModel: TypeAlias = LlamaConfig | EncoderConfig | Imported | Classifier
"""What `Config.model` may be."""

# What says how a model of a checkpoint computes.
_READS = {LlamaConfig: Imported, EncoderConfig: Classifier}


@dataclasses.dataclass(frozen=True)
class WholeTree:
  """All gradients first, then all updates."""

  accumulate: ClassVar[int] = 1
  """The gradients of all microbatches are summed whole."""

  def stored(self, dtype: str) -> Weights:
    """Returns how weights are stored that compute in `dtype`."""
    del dtype
    return ARRAYS


@dataclasses.dataclass(frozen=True)
class Layerwise:
  """Each weight is updated as its gradient appears; no two gradients exist."""

  clip: Literal['exact', 'previous'] = 'exact'
  """Where the norm to clip by comes from: a second backward pass, or the step
  before. The second pass also tells, before a weight changes, whether all
  gradients are finite; clip_norm=inf has it and clips nothing."""
  slices: int = 1
  """Pieces in which the embedding and the head are updated."""
  weights: Literal['arrays', 'rounded', 'int8'] = 'arrays'
  """How weights are stored: as they are; with sums rounded stochastically,
  for bfloat16; or the layers' matrices in 8 bits."""
  accumulate: int = 1
  """Parts of a batch whose projected gradients are summed; a refresh sees the
  first. Each part is cut further by the config's microbatches."""
  sums: Literal['float32', 'bfloat16'] = 'float32'
  """Type of these sums; bfloat16 ones are rounded stochastically."""

  def __post_init__(self):
    """Checks the counts."""
    for name in ('slices', 'accumulate'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'update.{name} must be at least 1, got {getattr(self, name)}'
        )

  def stored(self, dtype: str) -> Weights:
    """Returns how weights are stored that compute in `dtype`."""
    if self.weights == 'int8':
      return quantized(bits=8, dtype=dtype)
    return {'arrays': ARRAYS, 'rounded': ROUNDED}[self.weights]


Update: TypeAlias = WholeTree | Layerwise
"""What `Config.update` may be."""


def group_of(text: str) -> Group:
  """Returns the group that a command line spells.

  >>> group_of('embed/.*=10'), group_of('.*norm/scale=1,0').decay
  (Group(pattern='embed/.*', rate=10.0, decay=1.0), 0.0)
  """
  pattern, _, factors = text.rpartition('=')
  try:
    rate, decay = map(float, (factors + ',1').split(',')[:2])
  except ValueError:
    pattern = ''
  if not pattern or factors.count(',') > 1:
    raise ValueError(
      f'a group is PATTERN=RATE or PATTERN=RATE,DECAY, got {text!r}: for '
      "example 'embed/.*=10,0'"
    )
  return Group(pattern, rate, decay)


def spelled(group: Group) -> str:
  """Returns the group as a command line spells it.

  >>> spelled(Group('embed/.*', 10))
  'embed/.*=10,1'
  """
  # The shortest digits that read as the same number.
  rate, decay = (
    np.format_float_positional(x, trim='-') for x in (group.rate, group.decay)
  )
  return f'{group.pattern}={rate},{decay}'


def check_groups(groups: Any) -> None:
  """Raises ValueError unless these are groups that JSON can represent."""
  is_groups = isinstance(groups, tuple) and all(
    isinstance(group, Group)
    and isinstance(group.rate, int | float)
    and isinstance(group.decay, int | float)
    for group in groups
  )
  if not is_groups:
    raise ValueError(
      'groups must be a tuple of Group with Python numbers, such as '
      f"(Group('embed/.*', rate=10.0),), got {groups!r}"
    )


Groups: TypeAlias = Annotated[
  tuple[Group, ...],
  tyro.constructors.PrimitiveConstructorSpec(
    nargs='*',
    metavar='[PATTERN=RATE[,DECAY] [...]]',
    instance_from_str=lambda args: tuple(map(group_of, args)),
    is_instance=lambda x: isinstance(x, tuple),
    str_from_instance=lambda groups: [*map(spelled, groups)],
  ),
]
"""Groups of parameters, a word each on a command line."""


@dataclasses.dataclass(frozen=True)
class Config:
  """One experiment, whole: a config file holds `config = Config(...)`."""

  OLDER_RUNS: ClassVar[dict[str, Any]] = {'window': 0}
  """Values in runs that were written before a field existed, where these differ
  from its default."""

  model: AnyModel
  """The model; its vocab_size is also the size of a tokenizer trained here.
  Where there is a checkpoint, that has the model, and this how it computes."""
  corpus: AnyCorpus
  """Where the text comes from."""
  optimizer: Optimizer
  """The optimizer and its options; the learning rate is the schedule's."""
  steps: int
  """Number of updates."""
  learning_rate: float
  """The highest learning rate, reached at the end of the warm-up."""
  batch_size: int
  """Sequences in an update."""
  sequence_length: int
  """Tokens in a sequence."""
  window: int = 2**20
  """Tokens of the window in which packed rows are shuffled, at most about an
  epoch; each takes 24 bytes of host memory, and a resume fills the window again
  (0: rows keep the order of packing)."""
  checkpoint: str | None = None
  """A directory of transformers: weights and tokenizer to start from; None
  starts from random weights."""
  update: Update = dataclasses.field(default_factory=WholeTree)
  """Whether gradients exist all at once or one at a time."""
  adapter: Lora | Relora | Factored | None = None
  """Factors of low rank beside the weights, or in their place."""
  microbatches: int = 1
  """Parts that a batch is computed in, one after another, to save memory."""
  warmup: float = 0.1
  """Share of the steps, or of a cycle, in which the learning rate rises."""
  final: float = 0.1
  """Share of the highest learning rate where the cosine ends."""
  cycles: int = 1
  """Times that warm-up and cosine begin anew, at 0, in equal parts of the
  steps, as in FRUGAL's pre-training."""
  groups: Groups = ()
  """Parameters with a learning rate and a weight decay of their own: a regex on
  whole paths, and a multiplier of each. A rate of 0 freezes them."""
  clip_norm: float | None = 1.0
  """Global norm that a gradient is scaled down to; None leaves it alone."""
  tokenizer: str | None = None
  """A sentencepiece .model file, or a directory of transformers; None is the
  checkpoint's or, where there is none, trains one on the corpus."""
  norm_growth: float | None = None
  """Largest growth of the norm of a weight's gradient from one step to the
  next, as Fira limits its own; it is scaled down to that. None has no limit."""
  max_skipped: int = 10
  """Steps in a row that may come to nothing, as loss or gradient are not
  finite, before the run ends."""
  eval_every: int = 100
  """Steps between two validations."""
  eval_batches: int | None = None
  """Batches in a validation; None is the whole split."""
  save_every: int = 500
  """Steps between two checkpoints."""
  save_minutes: float | None = None
  """Minutes after which a checkpoint is due even so; None has steps alone."""
  save_best: bool = False
  """Whether the best validation so far is saved and kept, too."""
  seed: int = 0
  """Seed of the initial weights and of the order of the documents."""
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  """The devices that share the work; nothing else depends on them."""

  def __post_init__(self):
    """Checks what can be checked without data."""
    for name in (
      *('steps', 'batch_size', 'sequence_length', 'microbatches'),
      *('eval_every', 'eval_batches', 'save_every', 'cycles'),
    ):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    if self.save_minutes is not None and not self.save_minutes > 0:
      raise ValueError(
        f'save_minutes must be positive, or None, got {self.save_minutes}'
      )
    if not 0 <= self.learning_rate < math.inf:
      raise ValueError(
        'learning_rate must be finite and not negative, got '
        f'{self.learning_rate}'
      )
    check_norm(self.clip_norm)
    if self.checkpoint is not None and isinstance(self.adapter, Factored):
      raise ValueError(
        'adapter Factored draws its factors in place of the weights of '
        f'{self.checkpoint}: leave out checkpoint, or take Lora'
      )
    for name in ('max_skipped', 'window'):
      value = getattr(self, name)
      if not is_integer(value) or value < 0:
        raise ValueError(f'{name} must be an integer >= 0, got {value!r}')
    check_groups(self.groups)
    self._check_growth()
    if self.batch_size % self.parts:
      raise ValueError(
        'batch_size must be a multiple of microbatches x update.accumulate = '
        f'{self.parts}, got {self.batch_size}; --microbatches sets the first'
      )
    self.mesh.check(self.model, self.batch_size, self.parts)
    if self.steps % self.cycles:
      raise ValueError(
        f'cycles must divide steps={self.steps}, got {self.cycles}'
      )
    if not 0 <= self.warmup < 1:
      raise ValueError(
        f'warmup is a share of the steps in [0, 1), got {self.warmup}'
      )
    if not 0 <= self.final <= 1:
      raise ValueError(
        f'final is a share of learning_rate in [0, 1], got {self.final}'
      )

  def _check_growth(self) -> None:
    """Raises ValueError for a limit that none can be, or that nothing keeps."""
    limit = self.norm_growth
    if limit is not None and not limit >= 1:
      raise ValueError(f'norm_growth must be at least 1, or None, got {limit}')
    layerwise = isinstance(self.update, Layerwise)
    one_layer = layerwise and isinstance(self.optimizer, CLASSES['Badam'])
    if limit is not None and (self.update.accumulate > 1 or one_layer):
      raise ValueError(
        f'norm_growth={limit} needs the gradient of each weight at each step: '
        'update must be WholeTree, or Layerwise without accumulate and with '
        'another optimizer than Badam'
      )

  @property
  def parts(self) -> int:
    """Number of parts that a batch is computed in."""
    return self.microbatches * self.update.accumulate

  def resolved(self) -> 'Config':
    """Returns the config with its model read from its checkpoint.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: the model needs one, or its own is not implemented.
    """
    if self.checkpoint is None:
      if isinstance(self.model, Imported | Classifier):
        raise ValueError(
          'the model is to be read from a checkpoint: name a directory of '
          'transformers with --checkpoint'
        )
      return self
    found = huggingface.read_config(self.checkpoint)
    reads = _READS[type(found)]
    if not isinstance(self.model, type(found) | reads):
      raise ValueError(
        f'the checkpoint {self.checkpoint} has a {type(found).__name__}, for '
        f'which model must be {reads.__name__}(...), got '
        f'{type(self.model).__name__}: take another checkpoint, or a config '
        'for such models'
      )
    kept = {
      field.name: getattr(self.model, field.name)
      for field in dataclasses.fields(reads)
    }
    given = {
      name: x
      for name, x in kept.items()
      # Names of other labels do not go with this number of them.
      if x is not None or name == 'labels'
    }
    return dataclasses.replace(self, model=dataclasses.replace(found, **given))

  def schedule(self) -> optax.Schedule:
    """Returns the learning rate by step: up from 0, then down a cosine.

    ReLoRA's begins again at 0 after each merge.
    """
    length = self.steps // self.cycles
    once = optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=self.learning_rate,
      warmup_steps=round(self.warmup * length),
      decay_steps=length,
      end_value=self.final * self.learning_rate,
    )
    cosine = optax.join_schedules(
      [once] * self.cycles, range(length, self.steps, length)
    )
    if isinstance(self.adapter, Relora):
      return adapter_lib.jagged(cosine, self.adapter)
    return cosine

  def weights(self) -> Weights:
    """Returns how weights are stored between steps."""
    return self.update.stored(self.model.param_dtype)

  def rule(self) -> optax.GradientTransformation:
    """Returns the optimizer of the trained weights, its subspaces watched."""
    # The frozen ones are not among the trained weights.
    groups = [group for group in self.groups if not group.frozen]
    return grouped(self._rule, groups)(self.schedule(), **vars(self.optimizer))

  def _rule(
    self, learning_rate: optax.Schedule, **options: Any
  ) -> optax.GradientTransformation:
    """Returns the optimizer with a learning rate and options."""
    optimizer = dataclasses.replace(self.optimizer, **options)
    rule = subspace.watched(optimizer.build(learning_rate))
    rule = adapter_lib.with_lomo(rule, self.adapter, learning_rate)
    if self.norm_growth is None:
      return rule
    return optax.chain(limit_growth(self.norm_growth), rule)

  def transformation(self) -> optax.GradientTransformation:
    """Returns the optimizer, behind the clipping that is asked for."""
    optimizer = self.rule()
    if self.clip_norm is None:
      return optimizer
    return optax.chain(clip_by_global_norm(self.clip_norm), optimizer)


def to_json(config: Any) -> dict[str, Any]:
  """Returns a dataclass as a dict; 'kind' names the class of a nested one.

  >>> to_json(Chitchat(holdout=0.1))
  {'kind': 'Chitchat', 'holdout': 0.1}
  """

  def as_json(value: Any) -> Any:
    if isinstance(value, tuple):
      return [*map(as_json, value)]
    return to_json(value) if dataclasses.is_dataclass(value) else value

  return {'kind': type(config).__name__} | {
    field.name: as_json(getattr(config, field.name))
    for field in dataclasses.fields(config)
  }


def from_json(cls: type, data: dict[str, Any]) -> Any:
  """Returns the dataclass that `to_json` took apart.

  A field that an older run did not write takes the value of `cls.OLDER_RUNS`,
  or else its default.

  Raises:
    KeyError, TypeError: a class or a field is of another version.
    ValueError: a value is refused.
  """
  hints = typing.get_type_hints(cls)
  values = dict(getattr(cls, 'OLDER_RUNS', {}))

  def value_of(name: str, value: Any, hint: Any) -> Any:
    if isinstance(value, dict):
      kinds = {kind.__name__: kind for kind in variants(hint)}
      if value['kind'] not in kinds:
        raise TypeError(
          f'{name} must be of {", ".join(kinds)}, got {value["kind"]!r}'
        )
      return from_json(kinds[value['kind']], value)
    if isinstance(value, list):
      items = next(iter(typing.get_args(hint)), None)
      return tuple(value_of(name, x, items) for x in value)
    return value

  for name, value in data.items():
    if name != 'kind':
      values[name] = value_of(name, value, hints.get(name))
  return cls(**values)


def variants(hint: Any) -> tuple[type, ...]:
  """Returns the members of a union, or the one type that is none.

  >>> [kind.__name__ for kind in variants(AnyText)]
  ['Chitchat', 'TextFiles', 'Tfds', 'Chats', 'ChitchatAnswers']
  """
  return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """Returns every value by its dotted name; a nested class by its field's.

  >>> flatten(Chitchat(holdout=0.1), 'corpus.')
  {'corpus.holdout': 0.1}
  """
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      flat[prefix + field.name] = type(value).__name__
      flat |= flatten(value, f'{prefix}{field.name}.')
    else:
      flat[prefix + field.name] = value
  return flat


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
  """Returns the fields whose values differ, and both values."""
  a, b = flatten(ours), flatten(theirs)
  missing = 'absent'
  return {
    name: (a.get(name, missing), b.get(name, missing))
    for name in a | b
    if a.get(name, missing) != b.get(name, missing)
  }
