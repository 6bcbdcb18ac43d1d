"""This module holds the split of weights between an inner and a simple rule."""

from typing import Any

import jax
import optax

from galore_optax import paths as selection
from galore_optax.galore import galore, projections_of
from galore_optax.paths import Targets
from galore_optax.residual import Sgd, Sign
from galore_optax.static import check_static
from galore_optax.subspace.finders import SUBSPACES, Subspace
from galore_optax.subspace.turns import Turns

WHERE: dict[str, dict[str, Any]] = {
  **{name: dict(subspace=name) for name in SUBSPACES},
  'columns': dict(subspace='coordinates', side='left'),
  'rows': dict(subspace='coordinates', side='right'),
  'entries': dict(
    subspace='coordinates', side='left', axes={'.*': ((-2, -1), ())}
  ),
  'blocks': dict(
    subspace=Turns('descending'), side='left', axes={'.*': (0, ...)}
  ),
}
"""How `frugal` splits a kernel [in, out]: the options of `galore`.

'coordinates' are of the shorter side."""


def split(
  inner: optax.GradientTransformation,
  *,
  density: float,
  gap: int,
  subspace: str | Subspace,
  residual: str,
  residual_scale: float,
  targets: Targets,
) -> optax.GradientTransformation:
  """Returns the part of `frugal` before decay and learning rate."""
  check_static(density=density)
  if not 0 <= density <= 1:
    raise ValueError(f'density must be in [0, 1], got {density!r}')
  where = _where(subspace)
  # The response of a `scale_by_...` to ones is no learning rate: that of
  # optax.scale_by_rms is 3.16, that of Adam off one by a rounding.
  rules = {
    'sign': Sign(residual_scale, follow=False),
    'sgd': Sgd(residual_scale, follow=False),
  }
  if residual not in rules:
    raise ValueError(f"residual must be 'sign' or 'sgd', got {residual!r}")
  options: dict[str, Any] = dict(
    rank=float(density) or 1.0,
    gap=gap,
    scale=1.0,
    residual=rules[residual],
    moments='reset',
    targets=targets,
    **where,
  )
  # Made for all densities, as it checks the options.
  stage = galore(inner, **options)
  if density == 1:
    return inner
  if density > 0:
    return _of_stacks(stage, options) if subspace == 'blocks' else stage
  alone = optax.chain(
    optax.scale_by_sign() if residual == 'sign' else optax.identity(),
    optax.scale(residual_scale),
  )
  return partition(alone, inner, targets)


def _where(subspace: str | Subspace) -> dict[str, Any]:
  if not isinstance(subspace, str):
    return dict(subspace=subspace)
  if subspace not in WHERE:
    raise ValueError(
      f'subspace must be one of {", ".join(WHERE)} or a finder of'
      f' galore_optax.subspace, got {subspace!r}'
    )
  return WHERE[subspace]


def _of_stacks(
  stage: optax.GradientTransformation, options: dict[str, Any]
) -> optax.GradientTransformation:
  """Returns the stage; its `init` raises for a target that is no stack."""

  def init_fn(params: optax.Params) -> Any:
    if selection.is_part(params):
      raise ValueError(
        "subspace='blocks' picks whole layers, and a layer-wise step shows one"
        ' at a time: use badam, or another subspace'
      )
    for p in projections_of(params, **options):
      if p and len(p.shape) == len(selection.own_axes(p.path, len(p.shape))):
        raise ValueError(
          "subspace='blocks' picks layers of stacks [L, in, out], got"
          f' {p.path} of shape {p.shape}, whose first axis is no layer; stack'
          ' the layers, leave it out of targets, or split it by columns'
        )
    return stage.init(params)

  return optax.GradientTransformationExtraArgs(
    init_fn, optax.with_extra_args_support(stage).update
  )


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
      whole = projections_of(params, rank=1.0, targets=targets)
      marks = [projection is not None for projection in whole]
    else:
      patterns = [targets] if isinstance(targets, str) else list(targets)
      marks = selection.matched(patterns, params)
    names = ['chosen' if mark else 'rest' for mark in marks]
    return jax.tree.unflatten(jax.tree.structure(params), names)

  return optax.partition({'chosen': chosen, 'rest': rest}, labels)
