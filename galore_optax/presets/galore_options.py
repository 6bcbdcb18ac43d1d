"""Types of the options that presets forward to `galore`.

A preset that forwards options is declared as

  @names_options(of=galore)
  def preset(learning_rate, *, ..., **options: Unpack[GaloreOptions]): ...

Type checkers read the names and types of the options from the TypedDict.
`names_options` adds the options to the signature of the preset at run time,
with the defaults that `galore` has. A preset that sets some options of `galore`
itself uses a TypedDict without them. The docstring of `galore` describes all
options.
"""

from collections.abc import Mapping
from typing import Literal, TypedDict, TypeVar

from galore_optax.moments import Moments, Rotate
from galore_optax.paths import Targets
from galore_optax.presets.inner import Inner
from galore_optax.projection import Axes, Side
from galore_optax.residual import Residual
from galore_optax.subspace import finders
from galore_optax.subspace.refresh import Staggered
from galore_optax.subspace.store import BasisStore


class LeafOptions(TypedDict, total=False):
  """Options of `galore` that all presets with `**options` have."""

  side: Side
  moments: Moments
  targets: Targets
  axes: Mapping[str, Axes] | None


class GaloreOptions(LeafOptions, total=False):
  """All options of `galore`, except for the inner optimizer."""

  rank: int | float
  gap: int | Staggered
  scale: float
  subspace: finders.Name | finders.Subspace | BasisStore
  residual: Residual | None


class ScaledOptions(LeafOptions, total=False):
  """Options that Fira, APOLLO and APOLLO-Mini have in common."""

  gap: int | Staggered
  limit: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  bits: Literal[8] | None
  inner: Inner | None


class FiraOptions(ScaledOptions, total=False):
  """Options that `fira` forwards."""

  rank: int | float
  subspace: finders.Name | finders.Subspace | BasisStore


class ApolloMiniOptions(ScaledOptions, total=False):
  """Options that `apollo_mini` forwards to `apollo`."""

  seed: int


class ScaledGaloreOptions(LeafOptions, total=False):
  """Options that Fira and APOLLO forward to `galore` without reading them."""

  rank: int | float
  scale: float
  subspace: finders.Name | finders.Subspace | BasisStore


Options = TypeVar('Options', bound=LeafOptions)


def with_rotate_decays(
  options: Options, b1: float, b2: float = 0.999
) -> Options:
  """Returns the options with 'rotate' replaced by a `Rotate` of decay rates.

  `moments='rotate'` means the default decay rates of Adam, and the inner
  optimizer of a preset may have others.

  Args:
    options: options of `galore`; they are not changed.
    b1: decay rate of the inner optimizer's first moment.
    b2: decay rate of its second moment.

  >>> with_rotate_decays({'moments': 'rotate'}, 0.8)
  {'moments': Rotate(b1=0.8, b2=0.999)}
  """
  if options.get('moments') != 'rotate':
    return options
  rotated = options.copy()
  rotated['moments'] = Rotate(b1, b2)
  return rotated
