"""The methods that studies compare: `METHODS`.

Each method of `train.method` has a row, and so have variants of these methods,
Muon and low-rank adapters. A study may select some of the rows.

The GaLore paper has one learning rate, which its scale of 0.25 reduces for the
matrices. Studies tune the rate of the matrices separately, so the scale is 1.
The rows "AdamW, one rate" and "GaLore, one rate" have one rate as in the paper.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from configs.studies.comparison.study import Around, Method
from galore_optax import Staggered, names
from galore_optax.paths import is_matrix, paths
from models.lowrank import Factored, Lora, Relora
from train import method
from train.optimizers import registry

GRIDS = {
  'AdamW': (3e-4, 3e-3),
  'Adam8bit': (3e-4, 3e-3),
  'OptaxGalore': (1e-3, 3e-3),
  'GaloreMuon': (1e-3, 3e-3),
  'Frugal': (3e-4, 3e-3),
  'ApolloMini': (1e-3, 3e-3),
  'Badam': (3e-4, 3e-3),
  'AdaLomo': (0.01, 0.01),
  'Lomo': (0.1, 0.1),
  'ScaleSgd': (3e-4, 3e-3),
}
"""The lowest learning rates of a method's grid, for matrices and for the rest,
by its name in `train.method`."""

GRID = (3e-3, 3e-3)
"""The lowest learning rates of other methods."""

GALORE_SCALE = 0.25
"""The default scale of GaLore, which derives a second learning rate."""


def make(
  name: str, **given: Any
) -> Callable[[Around, Any], optax.GradientTransformation]:
  """Returns a `Method.make` for a method of `train.method`.

  Rank and gap are those of the run, and GaLore's scale is 1.

  Args:
    name: name of the method in `train.method`.
    **given: options that differ.
  """
  preset = method.METHODS[name].preset
  defaults = {x.name: x.default for x in registry.options(preset)}

  def build(around: Around, rate: Any) -> optax.GradientTransformation:
    options = {
      'rank': around.rank,
      'gap': around.gap,
      'update_proj_gap': around.gap,
      'switch_every': around.gap // 5,
      'train_rest': True,
    }
    if defaults.get('scale') == GALORE_SCALE:
      options['scale'] = 1.0
    known = {key: x for key, x in options.items() if key in defaults}
    return preset(rate, **known | given)

  return build


def staggered(around: Around, rate: Any) -> optax.GradientTransformation:
  """GaLore that spreads the refreshes of its bases over the gap."""
  return make('Galore', gap=Staggered(around.gap))(around, rate)


def longer_side(around: Around, rate: Any) -> optax.GradientTransformation:
  """GaLore on the longer side, with state of the same size.

  Moments have the size of the side that is not projected, here the shorter one.
  State of rank 38 takes as many bytes as rank 32 on the other side.
  """
  rank = around.rank * 6 // 5
  return make('Galore', rank=rank, side='reverse_std')(around, rate)


def muon(around: Around, rate: Any) -> optax.GradientTransformation:
  """Muon for the matrices of the layers, with updates as large as Adam's.

  The kernel of a convolution is one matrix [kh kw in, out]. First and last
  convolutions with one channel are trained with Adam.
  """
  del around

  def sides(tree: Any) -> Any:
    leaves = zip(paths(tree), jax.tree.leaves(tree), strict=True)
    found = [dimensions(path, leaf.shape) for path, leaf in leaves]
    return jax.tree.structure(tree).unflatten(found)

  return optax.contrib.muon(
    rate, consistent_rms=0.2, muon_weight_dimension_numbers=sides
  )


def dimensions(
  path: str, shape: tuple[int, ...]
) -> optax.contrib.MuonDimensionNumbers | None:
  """Returns the axes of a matrix of the layers, None for other weights."""
  leaf = names.of(path, shape)
  if not is_matrix(path) or leaf.kind == 'depthwise':
    return None
  if leaf.kind != 'convolution':
    return optax.contrib.MuonDimensionNumbers(-2, -1)
  inputs, outputs = leaf.axes
  if math.prod(shape[axis] for axis in outputs) == 1:
    return None
  return optax.contrib.MuonDimensionNumbers(inputs, outputs)


def _factored(around: Around) -> Factored:
  return Factored(around.rank)


def _lora(around: Around) -> Lora:
  return Lora(rank=around.rank, alpha=float(around.rank), rest='trained')


def _relora(around: Around) -> Relora:
  return Relora(
    rank=around.rank,
    alpha=float(around.rank),
    rest='trained',
    every=4 * around.gap,
    restart_warmup=around.gap // 5,
  )


_REFERENCE = make('Fira', scale=GALORE_SCALE, complement='reference')

METHODS = {
  **{
    row.title: Method(make(name), *GRIDS.get(name, GRID))
    for name, row in method.METHODS.items()
  },
  'Muon': Method(muon, matrix=1e-3),
  'GaLore, power': Method(make('Galore', subspace='power')),
  'GaLore, rotate': Method(make('Galore', moments='rotate')),
  'GaLore, staggered': Method(staggered),
  'GaLore, longer side': Method(longer_side),
  'FRUGAL, density 0': Method(make('Frugal', density=0), matrix=1e-4),
  "Fira, the reference's complement": Method(_REFERENCE),
  'Low-Rank': Method(make('AdamW'), adapter=_factored),
  'LoRA': Method(make('AdamW'), adapter=_lora),
  'ReLoRA': Method(make('AdamW'), adapter=_relora),
  # As in the GaLore paper: one rate, a quarter of which is for the matrices.
  'AdamW, one rate': Method(make('AdamW'), rest=3e-4, tied=1.0),
  'GaLore, one rate': Method(make('Galore'), tied=GALORE_SCALE),
}
"""All methods, by their names in tables."""
