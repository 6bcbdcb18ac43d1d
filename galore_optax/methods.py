"""This module holds the table of methods: which cell of the algebra each is."""

from collections.abc import Callable
from typing import NamedTuple

import optax

from galore_optax.galore import galore
from galore_optax.presets import adamw as presets
from galore_optax.presets.adam import scale_by_galore_adam
from galore_optax.quantized.state import quantize_state


class Method(NamedTuple):
  """One row: a method in the terms of `galore`."""

  name: str
  """The preset."""
  subspace: str
  """How the subspace is found."""
  inner: str
  """What works inside it."""
  residual: str
  """What works outside it."""
  moments: str
  """What a new subspace does to the inner's state."""
  state: str
  """Elements of state for a weight [m, n], m <= n, rank r or density d."""
  num_bytes: Callable[[int, int, int], int]
  """The same in bytes for float32 weights, of m, n, r; the density is r / m."""
  make: Callable[[int, int], optax.GradientTransformation]
  """Makes the transformation for m and r, learning rate 1."""


def _codes(size: int) -> int:
  """Returns the bytes of a moment of so many elements in 8 bits."""
  return size + 4 * -(-size // 256)


def _adam_8bit() -> optax.GradientTransformation:
  return quantize_state(scale_by_galore_adam())


METHODS = (
  Method(
    *('galore_adamw', 'svd', 'Adam', 'none', 'keep', 'r m + 2 r n'),
    lambda m, n, r: 4 * (r * m + 2 * r * n),
    lambda m, r: presets.galore_adamw(1.0, rank=r),
  ),
  Method(
    *("galore_adamw(moments='rotate')", 'svd', 'Adam', 'none', 'rotate'),
    'r m + 2 r n',
    lambda m, n, r: 4 * (r * m + 2 * r * n),
    lambda m, r: presets.galore_adamw(1.0, rank=r, moments='rotate'),
  ),
  Method(
    *('galore_adamw_8bit', 'svd', 'Adam, 8 bits', 'none', 'keep'),
    'r m + 2 r n of 1 byte',
    lambda m, n, r: 4 * r * m + 2 * _codes(r * n),
    lambda m, r: presets.galore_adamw_8bit(1.0, rank=r),
  ),
  Method(
    *('galore_adafactor', 'svd', 'Adafactor', 'none', 'keep', 'r m + r + n'),
    lambda m, n, r: 4 * (r * m + r + n),
    lambda m, r: presets.galore_adafactor(1.0, rank=r),
  ),
  Method(
    *('galore_muon', 'svd', 'Muon', 'none', 'keep', 'r m + r n'),
    lambda m, n, r: 4 * (r * m + r * n),
    lambda m, r: presets.galore_muon(1.0, rank=r),
  ),
  Method(
    *("galore(side='full')", 'svd, both sides', 'any', 'none', 'keep'),
    'r (m + n) + 2 r^2 (Adam)',
    lambda m, n, r: 4 * (r * (m + n) + 2 * r * r),
    lambda m, r: galore(optax.adam(1.0), rank=r, side='full'),
  ),
  Method(
    *('frugal', 'svd', 'any', 'sign or SGD', 'reset', 'd m^2 + 2 d m n (Adam)'),
    lambda m, n, r: 4 * (r * m + 2 * r * n),
    lambda m, r: presets.frugal(1.0, density=r / m),
  ),
  Method(
    *("frugal(subspace='power')", 'power iteration', 'any', 'sign or SGD'),
    *('reset', 'd m^2 + 2 d m n (Adam)'),
    lambda m, n, r: 4 * (r * m + 2 * r * n),
    lambda m, r: presets.frugal(1.0, density=r / m, subspace='power'),
  ),
  Method(
    *("frugal(subspace='random')", 'random, a seed', 'any', 'sign or SGD'),
    *('reset', '2 d m n (Adam)'),
    lambda m, n, r: 4 * 2 * r * n,
    lambda m, r: presets.frugal(1.0, density=r / m, subspace='random'),
  ),
  Method(
    *("frugal(subspace='columns')", 'coordinates', 'any', 'sign or SGD'),
    *('reset', 'd m + 2 d m n (Adam)'),
    lambda m, n, r: 4 * (r + 2 * r * n),
    lambda m, r: presets.frugal(1.0, density=r / m, subspace='columns'),
  ),
  Method(
    *("frugal(subspace='entries')", 'coordinates', 'any', 'sign or SGD'),
    *('reset', '3 d m n (Adam)'),
    lambda m, n, r: 4 * 3 * r * n,
    lambda m, r: presets.frugal(1.0, density=r / m, subspace='entries'),
  ),
  Method(
    *('fira', 'svd', 'Adam', 'scaled by channel', 'keep', 'r m + 2 r n + 1'),
    lambda m, n, r: 4 * (r * m + 2 * r * n + 1),
    lambda m, r: presets.fira(1.0, rank=r),
  ),
  Method(
    *('fira(inner=quantize_state(...))', 'svd', 'Adam, 8 bits'),
    *('scaled by channel', 'keep', 'r m + 2 r n of 1 byte + 1'),
    lambda m, n, r: 4 * r * m + 2 * _codes(r * n) + 4,
    lambda m, r: presets.fira(1.0, rank=r, inner=_adam_8bit()),
  ),
  Method(
    *('apollo', 'Gaussian, a seed', 'Adam', 'whole, by channel', 'keep'),
    '2 r n + 1',
    lambda m, n, r: 4 * (2 * r * n + 1),
    lambda m, r: presets.apollo(1.0, rank=r),
  ),
  Method(
    *('apollo(inner=quantize_state(...))', 'Gaussian, a seed', 'Adam, 8 bits'),
    *('whole, by channel', 'keep', '2 r n of 1 byte + 1'),
    lambda m, n, r: 2 * _codes(r * n) + 4,
    lambda m, r: presets.apollo(1.0, rank=r, inner=_adam_8bit()),
  ),
  Method(
    *('apollo_mini', 'Gaussian, a seed', 'Adam', 'whole, by matrix', 'keep'),
    '2 n + 1',
    lambda m, n, r: 4 * (2 * n + 1),
    lambda m, r: presets.apollo_mini(1.0),
  ),
  Method(
    *('badam', 'one layer of L, in turns', 'any', 'none', 'reset'),
    '2 m n / L (Adam)',
    lambda m, n, r: 4 * 2 * n,
    lambda m, r: presets.badam(1.0, blocks='.*'),
  ),
  Method(
    *('adalomo', 'whole', 'factored RMS', '-', '-', 'm + n'),
    lambda m, n, r: 4 * (m + n),
    lambda m, r: presets.adalomo(1.0),
  ),
  Method(
    *('scale_sgd', 'whole', 'SGD by column', '-', '-', '0 (head: m n)'),
    lambda m, n, r: 0,
    lambda m, r: presets.scale_sgd(1.0),
  ),
  Method(
    *('lomo', 'whole', 'SGD', '-', '-', '0'),
    lambda m, n, r: 0,
    lambda m, r: presets.lomo(1.0),
  ),
)
"""Every method that is a cell of the algebra."""


def table() -> str:
  """Returns the methods as a Markdown table.

  >>> print(table().splitlines()[0])
  | method | subspace | inner | residual | moments | elements of state |
  """
  head = ('method', 'subspace', 'inner', 'residual', 'moments')
  rows = [(*head, 'elements of state'), ('---',) * 6]
  rows += [(f'`{method.name}`', *method[1:6]) for method in METHODS]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)
