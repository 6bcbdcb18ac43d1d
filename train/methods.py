"""This module holds the methods beside GaLore that a config can name."""

import dataclasses
from typing import Literal

import optax

import galore_optax

SUBSPACES = Literal[
  *('svd', 'gram', 'randomized', 'power', 'random'),
  *('columns', 'rows', 'entries', 'blocks'),
]


@dataclasses.dataclass(frozen=True)
class GaloreAdafactor:
  """Adafactor in a low-rank subspace of the gradient."""

  rank: int | float = 128
  """Directions kept of each projected weight: a number, or a share <= 1.0."""
  gap: int = 200
  """Steps between two computations of the subspace."""
  scale: float = 0.25
  """Factor of the projected weights' updates."""
  subspace: Literal['svd', 'gram', 'randomized', 'power'] = 'svd'
  """How the subspace is found."""
  b1: float | None = None
  """Decay of the first moment; None keeps none."""
  scale_parameter: bool = False
  """Multiply the learning rate by the root mean square of each weight."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    return galore_optax.galore_adafactor(
      learning_rate, **dataclasses.asdict(self)
    )


@dataclasses.dataclass(frozen=True)
class Frugal:
  """FRUGAL: an optimizer on a share of each weight, sign descent elsewhere."""

  density: float = 0.25
  """Share of each weight that the optimizer works on, in [0, 1]."""
  gap: int = 200
  """Steps from one choice of that share to the next."""
  subspace: SUBSPACES = 'svd'
  """How the share is chosen: directions; columns, rows or entries at random;
  or whole layers in turns (blocks)."""
  inner: Literal['adam', 'lion', 'sgdm'] = 'adam'
  """The optimizer on that share, and on embedding, head and norms in full."""
  residual: Literal['sign', 'sgd'] = 'sign'
  """What moves the rest."""
  residual_scale: float = 1.0
  """Factor of the learning rate of the rest."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    return galore_optax.frugal(learning_rate, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Badam:
  """BAdam: Adam on one layer at a time, the others frozen."""

  switch_every: int = 100
  """Steps of a layer before the next one's turn."""
  order: Literal['random', 'ascending', 'descending', 'fixed'] = 'random'
  """Which layer is next; random is a new permutation in each cycle."""
  start: int | None = None
  """The first layer; None is the last for descending, else layer 0."""
  train_rest: bool = False
  """Train embedding, head and norm too, at every step."""
  master_weights: bool = False
  """Keep a float32 copy of the layer whose turn it is, for bfloat16 weights."""
  weight_decay: float = 0.0
  """Decoupled weight decay of what is trained."""
  seed: int = 0
  """Seed of the random order."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    return galore_optax.badam(learning_rate, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Fira:
  """Fira: GaLore, and the rest of the gradient scaled as Adam would."""

  rank: int | float = 128
  """Directions kept of each projected weight: a number, or a share <= 1.0."""
  gap: int = 200
  """Steps between two computations of the subspace."""
  scale: float = 0.25
  """Factor of the update in the subspace."""
  subspace: Literal['svd', 'gram', 'randomized', 'power'] = 'svd'
  """How the subspace is found."""
  moments: Literal['keep', 'reset', 'rotate'] = 'keep'
  """What becomes of Adam's moments when the subspace changes."""
  limit: float = 1.01
  """Largest growth of the rest's norm from one step to the next."""
  bits: Literal[8, 32] = 32
  """Bits of Adam's moments."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    options = dataclasses.asdict(self)
    inner = adam(options.pop('bits'))
    return galore_optax.fira(learning_rate, inner=inner, **options)


@dataclasses.dataclass(frozen=True)
class Apollo:
  """APOLLO: the gradient, scaled by channel as Adam scales a sketch of it."""

  rank: int | float = 256
  """Rows of the sketch of each weight: a number, or a share <= 1.0."""
  gap: int = 200
  """Steps from one sketch to the next."""
  scale: float = 1.0
  """The update is multiplied by its root."""
  limit: float = 1.01
  """Largest growth of an update's norm from one step to the next."""
  bits: Literal[8, 32] = 32
  """Bits of Adam's moments."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""
  seed: int = 0
  """Seed of the sketches."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    options = dataclasses.asdict(self)
    inner = adam(options.pop('bits'))
    return galore_optax.apollo(learning_rate, inner=inner, **options)


@dataclasses.dataclass(frozen=True)
class ApolloMini:
  """APOLLO with a sketch of one row, and one factor for each weight."""

  gap: int = 200
  """Steps from one sketch to the next."""
  scale: float = 128.0
  """The update is multiplied by its root."""
  limit: float = 1.01
  """Largest growth of an update's norm from one step to the next."""
  weight_decay: float = 0.0
  """Decoupled weight decay, multiplied by the learning rate."""
  seed: int = 0
  """Seed of the sketches."""

  def build(
    self, learning_rate: optax.Schedule
  ) -> optax.GradientTransformation:
    """Returns the transformation."""
    return galore_optax.apollo_mini(learning_rate, **dataclasses.asdict(self))


def adam(bits: int) -> optax.GradientTransformation:
  """Returns GaLore's Adam with moments of 8 or of 32 bits."""
  tx = galore_optax.scale_by_galore_adam()
  return galore_optax.quantize_state(tx) if bits == 8 else tx
