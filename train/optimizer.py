"""This module holds the optimizers a config can name, one dataclass each.

Each has `build(learning_rate)`, which returns an optax transformation. A new
method is a new dataclass in `Optimizer`.
"""

import dataclasses
from typing import Literal, TypeAlias

import jax
import optax

import galore_optax
from galore_optax.layerwise.weights import quantize_bases
from galore_optax.precision import in_float32
from galore_optax.presets.lomo import adalomo, lomo
from galore_optax.quantized.state import quantize_state
from train.methods import (
  Apollo,
  ApolloMini,
  Badam,
  Fira,
  Frugal,
  GaloreAdafactor,
)


@dataclasses.dataclass(frozen=True)
class AdamW:
  """AdamW on the whole gradient: the baseline."""

  b1: float = 0.9
  """Decay of the first moment."""
  b2: float = 0.999
  """Decay of the second moment."""
  eps: float = 1e-8
  """Added to the root of the second moment."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    return in_float32(optax.adamw(learning_rate, **dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Galore:
  """AdamW in a low-rank subspace of the gradient, as in the paper's code."""

  rank: int | float = 128
  """Directions kept of each projected weight: a number, or a share <= 1.0."""
  gap: int = 200
  """Steps between two computations of the subspace."""
  scale: float = 0.25
  """Factor of the projected weights' updates."""
  side: Literal['std', 'reverse_std', 'left', 'right', 'full'] = 'std'
  """Side of a weight to project; std is the shorter."""
  subspace: Literal['svd', 'gram', 'randomized', 'power'] = 'power'
  """How the subspace is found; power takes a tenth of svd's time, and no memory
  outside the plan."""
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  """What becomes of Adam's moments when the subspace changes."""
  targets: tuple[str, ...] | None = None
  """Regexes of weights to project, as '.*/mlp/.*'; None picks by shape."""
  b1: float = 0.9
  """Decay of the first moment."""
  b2: float = 0.999
  """Decay of the second moment."""
  eps: float = 1e-6
  """Added to the root of the second moment, before bias correction."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    options = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    return galore_optax.galore_adamw(learning_rate, **options)


@dataclasses.dataclass(frozen=True)
class Galore8bit(Galore):
  """Galore with Adam's moments in blocks of 8 bits."""

  basis_bits: Literal[4, 8] | None = None
  """Bits of a stored basis; None keeps it in the weights' type."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    options = dict(vars(self))
    basis_bits = options.pop('basis_bits')
    tx = galore_optax.galore_adamw_8bit(learning_rate, **options)
    if basis_bits is None:
      return tx
    return quantize_bases(tx, bits=basis_bits)


@dataclasses.dataclass(frozen=True)
class Adam8bit:
  """Adam on the whole gradient with moments in blocks of 8 bits."""

  b1: float = 0.9
  """Decay of the first moment."""
  b2: float = 0.999
  """Decay of the second moment."""
  eps: float = 1e-8
  """Added to the root of the second moment."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    return quantize_state(optax.adam(learning_rate, **dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Lomo:
  """SGD without state, for a layer-wise update."""

  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation; the config clips."""
    return lomo(learning_rate, clip_norm=None, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class AdaLomo:
  """LOMO with a factored second moment and grouped normalisation."""

  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the rate of the weight."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation; the config clips."""
    return adalomo(
      learning_rate, clip_norm=None, weight_decay=self.weight_decay
    )


@dataclasses.dataclass(frozen=True)
class OptaxGalore:
  """optax.contrib.galore as it comes, to compare with."""

  rank: int = 128
  """Directions kept of each weight with two axes."""
  update_proj_gap: int = 200
  """Steps between two computations of the subspace."""
  scale: float = 1.0
  """Factor of every update."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation.

    It is built twice because a leaf that it does not project leaves an array
    of size zero in its state, which Orbax refuses to save. Where no leaf has
    two axes it is Adam, with the same result for each leaf.
    """
    projected = optax.contrib.galore(learning_rate, **dataclasses.asdict(self))
    plain = optax.chain(
      optax.scale_by_adam(),
      optax.add_decayed_weights(self.weight_decay),
      optax.scale_by_learning_rate(learning_rate),
    )
    return optax.partition(
      {'projected': projected, 'plain': plain},
      lambda params: jax.tree.map(
        lambda x: 'projected' if x.ndim == 2 else 'plain', params
      ),
    )


Optimizer: TypeAlias = (
  Galore
  | Galore8bit
  | GaloreAdafactor
  | Frugal
  | Badam
  | Fira
  | Apollo
  | ApolloMini
  | AdamW
  | Adam8bit
  | Lomo
  | AdaLomo
  | OptaxGalore
)
"""What `Config.optimizer` may be."""
