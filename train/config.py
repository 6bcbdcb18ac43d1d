"""The configuration of an experiment, and its JSON form.

A file of configs/ holds one `Config`. `train.method` defines the optimizers
that a config can name, `train.data.corpus` the texts, and
`train.engine.command` changes a config from a command line.
"""

import dataclasses
import math
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeAlias

import numpy as np
import optax
import tyro

from galore_optax import Group, grouped
from galore_optax.checks import is_integer
from galore_optax.clipping import check_norm, clip_by_global_norm
from galore_optax.layerwise.weights import ARRAYS, ROUNDED, Weights, quantized
from models import huggingface
from models.dit import DitConfig
from models.encoder import EncoderConfig
from models.llama import LlamaConfig
from models.lowrank import Factored, Lora, Relora
from models.model import Dtype, Intercept, ModelConfig, Read
from models.unet import UnetConfig
from models.vit import VitConfig
from train.data.chats import Chats, ChitchatAnswers
from train.data.corpus import Chitchat, Corpus, TextFiles, Tfds
from train.data.images.corpora import IdxImages, ImageFolders, ImageTfds
from train.data.labelled import LabelledFiles, LabelledTfds
from train.engine.mesh import Mesh
from train.method import Badam, Optimizer
from train.optimizers import adapter as adapter_lib
from train.optimizers import subspace_metrics
from train.optimizers.growth import limit_growth


class FromCheckpoint(ModelConfig):
  """A model whose sizes are read from `Config.checkpoint`.

  The fields of a subclass, a frozen dataclass, replace those of the
  checkpoint's model unless they are None. `Config.resolved` returns a config
  with the checkpoint's model.
  """

  tasks: ClassVar[tuple[str, ...]]
  """Tasks of the models that it stands for; see `ModelConfig.task`."""

  def layers(
    self, *, read: Read | None = None, intercept: Intercept | None = None
  ) -> NoReturn:
    """Raises TypeError: the sizes are not known."""
    del read, intercept
    raise unknown_sizes(self)


def unknown_sizes(model: ModelConfig) -> TypeError:
  """Returns the error for a model whose sizes are those of a checkpoint."""
  return TypeError(
    f'the sizes of a {type(model).__name__} are those of its checkpoint: call '
    'config.resolved() first'
  )


@dataclasses.dataclass(frozen=True)
class Imported(FromCheckpoint):
  """A language model read from `checkpoint`; the fields set how it computes."""

  tasks: ClassVar[tuple[str, ...]] = ('language',)
  """It stands for language models."""

  dtype: Dtype | None = None
  """Data type of activations and matmuls; None takes the checkpoint's."""
  param_dtype: Dtype | None = None
  """Data type of the parameters; None takes the checkpoint's."""
  remat: bool = False
  """Whether the backward pass recomputes each layer from its input."""
  loss_chunk: int = 512
  """Number of tokens whose logits are in memory at the same time."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """Implementation of attention, as in LlamaConfig."""


@dataclasses.dataclass(frozen=True)
class Classifier(FromCheckpoint):
  """A model read from `checkpoint`, with a classification head."""

  tasks: ClassVar[tuple[str, ...]] = (
    'text_classification',
    'image_classification',
  )
  """It stands for encoders of texts and of images."""

  num_labels: int = 2
  """Number of labels; 1 means that the model predicts a number."""
  labels: tuple[str, ...] | None = None
  """Names of the labels, in the data and in an export; None uses numbers."""
  dropout: float | None = None
  """Dropout rate; None takes the checkpoint's."""
  dtype: Dtype | None = None
  """Data type of activations and matmuls; None takes the checkpoint's."""
  param_dtype: Dtype | None = None
  """Data type of the parameters; None takes the checkpoint's."""
  remat: bool = False
  """Whether the backward pass recomputes each layer from its input."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """Implementation of attention, as in LlamaConfig."""


READERS = (Imported, Classifier)
"""The classes for models that are read from a checkpoint."""

MODELS = (
  LlamaConfig,
  EncoderConfig,
  VitConfig,
  UnetConfig,
  DitConfig,
  Imported,
  Classifier,
)
CORPORA = (
  Chitchat,
  TextFiles,
  Tfds,
  Chats,
  ChitchatAnswers,
  LabelledFiles,
  LabelledTfds,
  IdxImages,
  ImageFolders,
  ImageTfds,
)
"""Models and corpora that a command line can select by the names of their
classes. A config can also have others, which any module may define."""


@dataclasses.dataclass(frozen=True)
class WholeTree:
  """Computes all gradients, then applies all updates."""

  accumulate: ClassVar[int] = 1
  """Always 1: `microbatches` sums gradients before the update."""

  def stored(self, dtype: str) -> Weights:
    """Returns how weights are stored between steps; always as plain arrays."""
    del dtype
    return ARRAYS


@dataclasses.dataclass(frozen=True)
class Layerwise:
  """Updates each layer in the backward pass, then frees its gradients."""

  clip: Literal['exact', 'previous'] = 'exact'
  """How the global norm for clipping is found: 'exact' runs a second backward
  pass, 'previous' uses the norm of the step before. The second pass also checks
  that all gradients are finite before any weight changes; clip_norm=inf keeps
  this check without clipping."""
  slices: int = 1
  """Number of pieces in which the embedding and the head are updated."""
  weights: Literal['arrays', 'rounded', 'int8'] = 'arrays'
  """How weights are stored: 'arrays' stores plain arrays, 'rounded' rounds each
  update stochastically (for bfloat16), 'int8' quantizes the layers' matrices to
  8 bits."""
  accumulate: int = 1
  """Number of parts of a batch whose projected gradients are accumulated. A
  refresh uses the gradient of the first part only. Each part is divided again
  into the config's microbatches."""
  sums: Literal['float32', 'bfloat16'] = 'float32'
  """Data type of the accumulated gradients; bfloat16 rounds stochastically."""

  def __post_init__(self) -> None:
    """Raises ValueError unless `slices` and `accumulate` are at least 1."""
    for name in ('slices', 'accumulate'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'update.{name} must be at least 1, got {getattr(self, name)}'
        )

  def stored(self, dtype: str) -> Weights:
    """Returns how weights are stored between steps.

    Args:
      dtype: data type of the arrays that the model computes with.
    """
    if self.weights == 'int8':
      return quantized(bits=8, dtype=dtype)
    return {'arrays': ARRAYS, 'rounded': ROUNDED}[self.weights]


Update: TypeAlias = WholeTree | Layerwise
"""The types that `Config.update` accepts."""


def group_of(text: str) -> Group:
  """Parses a group of parameters from a command line.

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
  """Formats a group as `group_of` parses it.

  >>> spelled(Group('embed/.*', 10))
  'embed/.*=10,1'
  """
  # The shortest decimal digits that parse to the same number.
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
"""Groups of parameters; on a command line each group is one word."""


@dataclasses.dataclass(frozen=True)
class Config:
  """The configuration of one experiment, as a config file defines it."""

  OLDER_RUNS: ClassVar[dict[str, Any]] = {'window': 0}
  """Values of fields that an older run's config.json lacks, if they differ from
  the field's default."""

  model: ModelConfig
  """The model. A tokenizer that is trained here gets its vocab_size. With a
  checkpoint, the weights and sizes come from the checkpoint, and this field
  sets only how the model computes."""
  corpus: Corpus
  """The training and validation data."""
  optimizer: Optimizer
  """The optimizer and its options; `schedule` sets its learning rate."""
  steps: int
  """Number of updates."""
  learning_rate: float
  """Peak learning rate, reached at the end of the warm-up."""
  batch_size: int
  """Number of sequences in an update."""
  sequence_length: int | None = None
  """Number of tokens in a sequence, which tasks on texts need."""
  window: int = 2**20
  """Size in tokens of the window in which packed rows are shuffled, at most
  about an epoch. Each token takes 24 bytes of host memory, and a resumed run
  fills the window again. 0 keeps the rows in the order in which they were
  packed."""
  checkpoint: str | None = None
  """Directory in the format of transformers with the initial weights and the
  tokenizer; None starts from random weights."""
  update: Update = dataclasses.field(default_factory=WholeTree)
  """Whether all gradients are in memory at once, or one layer's at a time."""
  adapter: Lora | Relora | Factored | None = None
  """Low-rank factors that are added to the weights, or that replace them."""
  microbatches: int = 1
  """Parts that a batch is computed in, one after another, to save memory."""
  warmup: float = 0.1
  """Fraction of the steps, or of a cycle, in which the learning rate rises."""
  final: float = 0.1
  """Learning rate at the end of the cosine, as a fraction of the peak."""
  cycles: int = 1
  """Number of equal parts of the steps, each with a warm-up from 0 and a
  cosine, as in FRUGAL's pre-training."""
  groups: Groups = ()
  """Groups of parameters with multipliers of the learning rate and the weight
  decay. A regex that must match a whole path selects each group. A rate of 0
  freezes the parameters."""
  clip_norm: float | None = 1.0
  """Largest global norm of a gradient; a larger one is scaled down. None does
  not clip."""
  tokenizer: str | None = None
  """A sentencepiece .model file, or a directory in the format of transformers.
  None takes the checkpoint's tokenizer; without a checkpoint, it trains one on
  the corpus."""
  average: float | None = None
  """Decay rate of a moving average of the weights, such as 0.999. Validations,
  samples and exports use the average, which is stored in float32 in addition to
  the weights. None stores no average."""
  norm_growth: float | None = None
  """Largest growth of the gradient norm of a weight from one step to the next,
  as in Fira; a gradient that grows more is scaled down. None sets no limit."""
  max_skipped: int = 10
  """Number of successive steps that may be skipped because loss or gradient are
  non-finite; one more ends the run."""
  eval_every: int = 100
  """Number of steps between two validations."""
  eval_batches: int | None = None
  """Number of batches in a validation; None takes the whole split."""
  save_every: int = 500
  """Number of steps between two checkpoints."""
  save_minutes: float | None = None
  """Largest number of minutes between two checkpoints; None sets no limit."""
  save_best: bool = False
  """Whether to save and keep the checkpoint with the best validation, too."""
  seed: int = 0
  """Seed of the initial weights and of the order of the documents."""
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  """The grid of devices that share the work; it does not change the result."""

  def __post_init__(self) -> None:
    """Raises ValueError for values that are wrong whatever the data are."""
    for name in (
      'steps',
      'batch_size',
      'sequence_length',
      'microbatches',
      'eval_every',
      'eval_batches',
      'save_every',
      'cycles',
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
    self._check_average()
    self._check_growth()
    if self.batch_size % self.parts:
      raise ValueError(
        'batch_size must be a multiple of microbatches x update.accumulate = '
        f'{self.parts}, got {self.batch_size}; --microbatches sets the first'
      )
    self.mesh.check(self.model.tensor_sizes(), self.batch_size, self.parts)
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

  def _check_average(self) -> None:
    """Raises ValueError unless `average` is a rate, for weights in arrays."""
    rate = self.average
    if rate is None:
      return
    if not 0 < rate < 1:
      raise ValueError(f'average must be between 0 and 1, or None, got {rate}')
    if isinstance(self.update, Layerwise) and self.update.weights == 'int8':
      raise ValueError(
        f'average={rate} needs weights in arrays, got update.weights=int8: '
        'leave out one of the two'
      )

  def _check_growth(self) -> None:
    """Checks `norm_growth`.

    Raises:
      ValueError: the limit is below 1, or the update does not compute the whole
        gradient of each weight in each step.
    """
    limit = self.norm_growth
    if limit is not None and not limit >= 1:
      raise ValueError(f'norm_growth must be at least 1, or None, got {limit}')
    layerwise = isinstance(self.update, Layerwise)
    one_layer = layerwise and isinstance(self.optimizer, Badam)
    if limit is not None and (self.update.accumulate > 1 or one_layer):
      raise ValueError(
        f'norm_growth={limit} needs the gradient of each weight at each step: '
        'update must be WholeTree, or Layerwise without accumulate and with '
        'another optimizer than Badam'
      )

  @property
  def parts(self) -> int:
    """Number of parts that a batch is computed in, one after another."""
    return self.microbatches * self.update.accumulate

  @property
  def resolved_model(self) -> ModelConfig:
    """The model, whose sizes are known once the config is `resolved`.

    Raises:
      TypeError: its sizes are those of a checkpoint, which must be read first.
    """
    if isinstance(self.model, FromCheckpoint):
      raise unknown_sizes(self.model)
    return self.model

  def resolved(self) -> 'Config':
    """Returns a copy whose model has the sizes of its checkpoint's model.

    A config without a checkpoint is returned unchanged.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ValueError: the config needs a checkpoint and has none, or the
        checkpoint's model has another type or is not implemented.
    """
    if self.checkpoint is None:
      if isinstance(self.model, FromCheckpoint):
        raise ValueError(
          'the model is to be read from a checkpoint: name a directory of '
          'transformers with --checkpoint'
        )
      return self
    found = huggingface.read_config(self.checkpoint)
    (reads,) = [kind for kind in READERS if found.task in kind.tasks]
    if not isinstance(self.model, type(found) | reads):
      raise ValueError(
        f'the checkpoint {self.checkpoint} has a {type(found).__name__}, for '
        f'which model must be {reads.__name__}(...), got '
        f'{type(self.model).__name__}: take another checkpoint, or a config '
        'for such models'
      )
    known = {field.name for field in dataclasses.fields(found)}
    given = {
      field.name: getattr(self.model, field.name)
      for field in dataclasses.fields(reads)
      if field.name in known
    }
    given = {
      name: x
      for name, x in given.items()
      # The number of labels may have changed, so the checkpoint's names for
      # them would be wrong.
      if x is not None or name == 'labels'
    }
    return dataclasses.replace(self, model=dataclasses.replace(found, **given))

  def schedule(self) -> optax.Schedule:
    """Returns the learning-rate schedule: linear warm-up, then a cosine.

    With ReLoRA, the learning rate also rises again from 0 after each merge.
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
    return self.update.stored(self.resolved_model.param_dtype)

  def rule(self) -> optax.GradientTransformation:
    """Returns the optimizer of the trained weights, without clipping.

    GaLore's state also records the statistics of
    `train.optimizers.subspace_metrics`.
    """
    # `train.engine.task` leaves frozen weights out of the trained weights.
    groups = [group for group in self.groups if not group.frozen]
    return grouped(self._rule, groups)(self.schedule(), **vars(self.optimizer))

  def _rule(
    self, learning_rate: optax.Schedule, **options: Any
  ) -> optax.GradientTransformation:
    """Returns the optimizer with some options replaced.

    `grouped` calls it with the options of `Config.optimizer`, whose weight
    decay it may have changed for a group.
    """
    optimizer = dataclasses.replace(self.optimizer, **options)
    rule = subspace_metrics.watched(optimizer.build(learning_rate))
    rule = adapter_lib.with_lomo(rule, self.adapter, learning_rate)
    if self.norm_growth is None:
      return rule
    return optax.chain(limit_growth(self.norm_growth), rule)

  def transformation(self) -> optax.GradientTransformation:
    """Returns the optimizer of the trained weights, after clipping."""
    optimizer = self.rule()
    if self.clip_norm is None:
      return optimizer
    return optax.chain(clip_by_global_norm(self.clip_norm), optimizer)
