"""FRUGAL: an inner on a share of each weight, a simple rule on the rest."""

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.checks import (
  check_learning_rate,
  check_not_negative,
  check_one_of,
  check_static,
  is_number,
)
from galore_optax.decay import add_decayed_weights, rate_at
from galore_optax.galore import galore
from galore_optax.paths import Targets
from galore_optax.plan import Planner
from galore_optax.precision import in_float32
from galore_optax.presets.inner import Inner, without_rate
from galore_optax.projection import Projection
from galore_optax.residual import Sgd, Sign
from galore_optax.subspace.finders import NAMES, Subspace

Where: TypeAlias = Literal[
  *('svd', 'gram', 'randomized', 'power', 'random', 'coordinates'),
  *('columns', 'rows', 'entries'),
]
"""How `frugal` splits a kernel [in, out]; 'coordinates' are of the shorter
side."""

COORDINATES: dict[str, dict[str, Any]] = {
  'columns': dict(side='left'),
  'rows': dict(side='right'),
  'entries': dict(side='left', axes={'.*': ((-2, -1), ())}),
}
"""The options of `galore` that split by coordinates."""

RESIDUALS = {'sign': Sign, 'sgd': Sgd}
"""What moves the rest."""


def frugal(
  learning_rate: optax.ScalarOrSchedule,
  *,
  density: float = 0.25,
  gap: int = 200,
  subspace: Where | Subspace = 'svd',
  inner: Inner = 'adam',
  residual: Literal['sign', 'sgd'] = 'sign',
  residual_scale: float = 1.0,
  weight_decay: float = 0.0,
  targets: Targets = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam (or another inner) on a share of a weight, sign descent elsewhere.

  The state of the inner starts anew with each subspace. Density 1 is the inner
  alone and density 0 the residual rule alone, by structure.

  State of a weight [i, o], i <= o: an inner on density of its elements (Adam:
  2 density i o, float32), and for 'svd' a basis of density i^2, for 'columns',
  'rows' and 'entries' an int32 index of each coordinate.

  Args:
    learning_rate: a number, or a schedule of the step, for both parts.
    density: share of each target that the inner works on, in [0, 1]; rounded
      to whole directions or coordinates, halves up, at least one (the reference
      rounds halves to even, and truncates coordinates, perhaps to none).
    gap: updates from one subspace to the next.
    subspace: 'svd', 'random' or another one of `galore` (directions), 'columns'
      or 'rows' (inputs or outputs), or 'entries'. For whole layers in turns
      there is `badam`.
    inner: 'adam', 'lion', 'sgdm', or a transformation without a learning rate.
    residual: 'sign' or 'sgd'.
    residual_scale: multiplies the learning rate of the residual.
    weight_decay: decoupled, times the learning rate, on every leaf.
    targets: as in `galore`; other leaves are the inner's in full.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = frugal(0.01, density=0.25, subspace='columns')
    >>> params = {'w': jnp.ones((8, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """
  check_static(density=density)
  if not (is_number(density) and 0 <= density <= 1):
    raise ValueError(f'density must be a number in [0, 1], got {density!r}')
  check_one_of(tuple(RESIDUALS), residual=residual)
  check_learning_rate(learning_rate=learning_rate)
  check_not_negative(residual_scale=residual_scale, weight_decay=weight_decay)
  rest_rate = lambda count: (
    residual_scale * jnp.asarray(rate_at(learning_rate, count), float)
  )
  tail = (
    add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  inside = optax.chain(without_rate(inner), *tail)
  # Made for all densities, as it checks the options.
  stage = galore(
    inside,
    rank=float(density) or 1.0,
    gap=gap,
    scale=1.0,
    residual=RESIDUALS[residual](rest_rate),
    moments='reset',
    targets=targets,
    **_where(subspace),
  )
  if density == 1:
    return in_float32(inside)
  if density > 0:
    return stage
  direction = optax.scale_by_sign() if residual == 'sign' else optax.identity()
  alone = optax.chain(direction, optax.scale(residual_scale), *tail)
  return partition(in_float32(alone), in_float32(inside), targets)


def _where(subspace: str | Subspace) -> dict[str, Any]:
  if not isinstance(subspace, str) or subspace in NAMES:
    return dict(subspace=subspace)
  check_one_of(get_args(Where), subspace=subspace)
  return dict(subspace='coordinates', **COORDINATES[subspace])


def partition(
  chosen: optax.GradientTransformation,
  rest: optax.GradientTransformation,
  targets: Targets,
) -> optax.GradientTransformationExtraArgs:
  """Returns `chosen` for the targets and `rest` for the other leaves.

  Args:
    chosen: the transformation of the targets.
    rest: the transformation of what `targets` leaves out.
    targets: as in `galore`.

  Example:
    >>> tx = partition(optax.sgd(1.0), optax.set_to_zero(), ['a'])
    >>> params = {'a': jax.numpy.ones(2), 'b': jax.numpy.ones(2)}
    >>> tx.update(params, tx.init(params))[0]['b']
    Array([0., 0.], dtype=float32)
  """

  def labels(params: optax.Params) -> Any:
    if targets is None or callable(targets):
      plans = Planner(1.0, targets=targets)(params)
      marks = [isinstance(p, Projection) for p in plans]
    else:
      marks = paths.chosen(targets, params)
    names = ['chosen' if mark else 'rest' for mark in marks]
    return jax.tree.unflatten(jax.tree.structure(params), names)

  return optax.partition({'chosen': chosen, 'rest': rest}, labels)
