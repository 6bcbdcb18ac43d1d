"""The names of `train.method`.

`python -m train.optimizers.stub` writes this file. Do not edit it.
"""

import dataclasses
from typing import Literal, TypeAlias

import optax

from train.optimizers.baselines import adam_8bit as adam_8bit
from train.optimizers.baselines import adamw as adamw
from train.optimizers.baselines import optax_galore as optax_galore
from train.optimizers.growth import limit_growth as limit_growth
from train.optimizers.registry import CLASSES as CLASSES
from train.optimizers.registry import METHODS as METHODS
from train.optimizers.registry import VARIANTS as VARIANTS

@dataclasses.dataclass(frozen=True)
class Galore:
  """Options of `galore_adamw`."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-06
  weight_decay: float = 0.0
  rank: int | float = 128
  gap: int = 200
  scale: float = 0.25
  side: Literal['std', 'reverse_std', 'left', 'right', 'both', 'full'] = 'std'
  subspace: Literal[
    'svd', 'gram', 'randomized', 'power', 'random', 'coordinates'
  ] = 'svd'
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class Galore8bit:
  """Options of `galore_adamw_8bit`."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-06
  weight_decay: float = 0.0
  block_size: int = 256
  min_size: int = 4096
  basis_bits: Literal[4, 8] | None = None
  rank: int | float = 128
  gap: int = 200
  scale: float = 0.25
  side: Literal['std', 'reverse_std', 'left', 'right', 'both', 'full'] = 'std'
  subspace: Literal[
    'svd', 'gram', 'randomized', 'power', 'random', 'coordinates'
  ] = 'svd'
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class GaloreAdafactor:
  """Options of `galore_adafactor`."""

  b1: float | None = None
  scale_parameter: bool = False
  clip_threshold: float = 1.0
  decay_rate: float = 0.8
  weight_decay: float = 0.0
  rank: int | float = 128
  gap: int = 200
  scale: float = 0.25
  side: Literal['std', 'reverse_std', 'left', 'right', 'both', 'full'] = 'std'
  subspace: Literal[
    'svd', 'gram', 'randomized', 'power', 'random', 'coordinates'
  ] = 'svd'
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class GaloreMuon:
  """Options of `galore_muon`."""

  beta: float = 0.95
  consistent_rms: float = 0.2
  weight_decay: float = 0.0
  adam_learning_rate: float | None = None
  rank: int | float = 128
  gap: int = 200
  scale: float = 0.25
  side: Literal['std', 'reverse_std', 'left', 'right', 'both', 'full'] = 'std'
  subspace: Literal[
    'svd', 'gram', 'randomized', 'power', 'random', 'coordinates'
  ] = 'svd'
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class Frugal:
  """Options of `frugal`."""

  density: float = 0.25
  gap: int = 200
  subspace: Literal[
    'svd',
    'gram',
    'randomized',
    'power',
    'random',
    'coordinates',
    'columns',
    'rows',
    'entries',
  ] = 'svd'
  inner: Literal['adam', 'lion', 'sgdm'] = 'adam'
  residual: Literal['sign', 'sgd'] = 'sign'
  residual_scale: float = 1.0
  weight_decay: float = 0.0
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class Fira:
  """Options of `fira`."""

  scale: float = 0.25
  complement: Literal['exact', 'reference'] = 'exact'
  gap: int = 200
  limit: float = 1.01
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-06
  weight_decay: float = 0.0
  bits: Literal[8] | None = None
  inner: Literal['adam', 'lion', 'sgdm'] | None = None
  rank: int | float = 128
  side: Literal['std', 'reverse_std', 'left', 'right', 'both', 'full'] = 'std'
  subspace: Literal[
    'svd', 'gram', 'randomized', 'power', 'random', 'coordinates'
  ] = 'svd'
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class Apollo:
  """Options of `apollo`."""

  rank: int | float = 256
  scale: float = 1.0
  channels: bool = True
  seed: int = 0
  gap: int = 200
  limit: float = 1.01
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-06
  weight_decay: float = 0.0
  bits: Literal[8] | None = None
  inner: Literal['adam', 'lion', 'sgdm'] | None = None
  side: Literal['std', 'reverse_std', 'left', 'right', 'both', 'full'] = 'std'
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class ApolloMini:
  """Options of `apollo_mini`."""

  scale: float = 128.0
  seed: int = 0
  gap: int = 200
  limit: float = 1.01
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-06
  weight_decay: float = 0.0
  bits: Literal[8] | None = None
  inner: Literal['adam', 'lion', 'sgdm'] | None = None
  side: Literal['std', 'reverse_std', 'left', 'right', 'both', 'full'] = 'std'
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  targets: tuple[str, ...] | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class Badam:
  """Options of `badam`."""

  switch_every: int = 100
  order: Literal['random', 'ascending', 'descending', 'fixed'] = 'random'
  inner: Literal['adam', 'lion', 'sgdm'] = 'adam'
  weight_decay: float = 0.0
  blocks: str = 'blocks/.*'
  train_rest: bool = False
  master_weights: bool = False
  start: int | None = None
  seed: int = 0
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class AdaLomo:
  """Options of `adalomo`."""

  weight_decay: float = 0.0
  decay_rate: float = 0.8
  clip_threshold: float = 1.0
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class Lomo:
  """Options of `lomo`."""

  weight_decay: float = 0.0
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class ScaleSgd:
  """Options of `scale_sgd`."""

  momentum: float = 0.9
  weight_decay: float = 0.0
  vector_learning_rate: float | None = None
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class AdamW:
  """Options of `adamw`."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-08
  weight_decay: float = 0.0
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class Adam8bit:
  """Options of `adam_8bit`."""

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-08
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

@dataclasses.dataclass(frozen=True)
class OptaxGalore:
  """Options of `optax_galore`."""

  rank: int = 128
  update_proj_gap: int = 200
  scale: float = 1.0
  weight_decay: float = 0.0
  def build(
    self, learning_rate: optax.ScalarOrSchedule
  ) -> optax.GradientTransformation: ...

Optimizer: TypeAlias = (
  Galore
  | Galore8bit
  | GaloreAdafactor
  | GaloreMuon
  | Frugal
  | Fira
  | Apollo
  | ApolloMini
  | Badam
  | AdaLomo
  | Lomo
  | ScaleSgd
  | AdamW
  | Adam8bit
  | OptaxGalore
)
