"""FRUGAL: an inner optimizer in a subspace, and sign descent outside it."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, paths
from galore_optax.decay import rate_at
from galore_optax.edge import at_edge
from galore_optax.galore import Inners, galore
from galore_optax.options import names_options
from galore_optax.plan import Planner
from galore_optax.precision import in_float32
from galore_optax.presets.inner import (
  Inner,
  require_no_learning_rate,
  with_decay_and_rate,
)
from galore_optax.projection import Axes, Projection, Side
from galore_optax.residual import Sgd, Sign
from galore_optax.subspace.finders import NAMES, Name, Subspace

# The names of subspaces of a kernel [in, out]. 'coordinates' selects indices of
# its shorter axis.
SubspaceName: TypeAlias = Literal[Name, 'columns', 'rows', 'entries']


class SplitOptions(TypedDict, total=False):
  """Options of `galore` that select the part of the inner optimizer."""

  subspace: Name | Subspace
  side: Side
  axes: Mapping[str, Axes]


# The options of `galore` for each split by coordinates.
COORDINATES: dict[str, SplitOptions] = {
  'columns': {'subspace': 'coordinates', 'side': 'left'},
  'rows': {'subspace': 'coordinates', 'side': 'right'},
  'entries': {
    'subspace': 'coordinates',
    'side': 'left',
    'axes': {'.*': ((-2, -1), ())},
  },
}

# The rules for the gradient outside the subspace.
RESIDUALS: dict[str, type[Sgd]] = {'sign': Sign, 'sgd': Sgd}


@names_options(of=galore)
def frugal(
  learning_rate: optax.ScalarOrSchedule,
  *,
  density: float = 0.25,
  gap: int = 200,
  subspace: SubspaceName | Subspace = 'svd',
  inner: Inner = 'adam',
  residual: Literal['sign', 'sgd'] = 'sign',
  residual_scale: float = 1.0,
  weight_decay: float = 0.0,
  targets: paths.Targets = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam, or another inner optimizer, in a subspace; sign descent outside it.

  The inner optimizer's state of projected weights is reset at each refresh of
  the subspace. With density 1 the inner optimizer updates whole weights, and
  with density 0 the residual rule does. Both cases have no projection.

  State of a weight [i, o], i <= o, at density d: the inner optimizer's state
  for d i o elements (Adam: 2 d i o, float32), and the basis. The basis of 'svd'
  has d i^2 elements; that of 'columns', 'rows' and 'entries' has an int32 index
  for each coordinate.

  Args:
    learning_rate: a number, or a schedule of the step, for both parts.
    density: share of each target that the inner optimizer updates, in [0, 1].
      The number of directions or coordinates is rounded, halves up, and is at
      least one. The reference rounds halves to even, and rounds coordinates
      down, possibly to zero.
    gap: number of updates between two refreshes of the subspace.
    subspace: 'svd', 'random' or another subspace of `galore` (directions),
      'columns' or 'rows' (inputs or outputs), or 'entries'. `badam` trains
      whole layers in turns.
    inner: 'adam', 'lion', 'sgdm', or a transformation without a learning rate.
    residual: rule for the gradient outside the subspace, 'sign' or 'sgd'.
    residual_scale: multiplies the learning rate of that rule.
    weight_decay: decoupled, times the learning rate, on every leaf.
    targets: as in `galore`; the inner optimizer updates all other leaves.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = frugal(0.01, density=0.25, subspace='columns')
    >>> params = {'w': jnp.ones((8, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """
  checks.check_static(density=density)
  if not checks.is_number(density) or not 0 <= density <= 1:
    raise ValueError(f'density must be a number in [0, 1], got {density!r}')
  checks.check_one_of(tuple(RESIDUALS), residual=residual)
  checks.check_not_negative(residual_scale=residual_scale)
  inner_rule = with_decay_and_rate(
    learning_rate, weight_decay, require_no_learning_rate(inner)
  )

  def residual_rate(count: Any) -> Any:
    rate = jnp.asarray(rate_at(learning_rate, count), float)
    return residual_scale * rate

  # `galore` is called for all densities because it checks the options.
  projected = galore(
    inner_rule,
    rank=float(density) or 1.0,
    gap=gap,
    scale=1.0,
    residual=RESIDUALS[residual](residual_rate),
    moments='reset',
    targets=targets,
    **_split_options(subspace),
  )
  if density == 1:
    return at_edge(in_float32(inner_rule))
  if density > 0:
    return projected
  residual_rule = with_decay_and_rate(
    learning_rate,
    weight_decay,
    optax.scale_by_sign() if residual == 'sign' else optax.identity(),
    optax.scale(residual_scale),
  )
  inners = Inners(
    projected=in_float32(residual_rule), other=in_float32(inner_rule)
  )
  return at_edge(inners.partition(functools.partial(_is_target, targets)))


def _split_options(subspace: SubspaceName | Subspace) -> SplitOptions:
  """Returns the options of `galore` for the option `subspace` of `frugal`."""
  if isinstance(subspace, str) and subspace not in NAMES:
    checks.check_one_of(get_args(SubspaceName), subspace=subspace)
    return COORDINATES[subspace]
  name_or_finder: Any = subspace
  return {'subspace': name_or_finder}


def _is_target(targets: paths.Targets, params: optax.Params) -> Any:
  """Returns a tree with a bool for each leaf: whether `targets` selects it.

  A regex may select any leaf, also a vector, because no basis is needed.
  """
  chosen_by = paths.required(targets)
  if chosen_by is None or callable(chosen_by):
    plans = Planner(1.0, targets=targets)(params)
    marks = [isinstance(p, Projection) for p in plans]
  else:
    marks = paths.chosen(targets, params)
  return jax.tree.structure(params).unflatten(marks)
