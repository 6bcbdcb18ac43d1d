"""This module holds the two kinds of update a config can name."""

import dataclasses
from typing import ClassVar, Literal, TypeAlias

from galore_optax.layerwise.weights import ARRAYS, ROUNDED, Weights, quantized


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
  before."""
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

  def stored(self, dtype: str) -> Weights:
    """Returns how weights are stored that compute in `dtype`."""
    if self.weights == 'int8':
      return quantized(bits=8, dtype=dtype)
    return {'arrays': ARRAYS, 'rounded': ROUNDED}[self.weights]


Update: TypeAlias = WholeTree | Layerwise
"""What `Config.update` may be."""
