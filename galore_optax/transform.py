"""This module holds the transformation itself: what `init` and `update` do."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import decay, observation, residual
from galore_optax import moments as moments_lib
from galore_optax import paths as selection
from galore_optax import projection as projection_lib
from galore_optax.accumulation import Projected, accumulating
from galore_optax.options import Options
from galore_optax.precision import full
from galore_optax.projection import Basis, Projection
from galore_optax.subspace import refresh
from galore_optax.subspace.refresh import Units


class GaloreState(NamedTuple):
  """The state of `galore`."""

  count: jax.Array
  """[], int32: updates done so far."""
  basis: Any
  """Tree like the parameters: orthonormal rows [..., r, m] in the weight's
  dtype (a pair of them for side 'full'); MaskedNode where not projected."""
  inner: Any
  """State of the inner transformation, for the low-rank shapes."""
  skipped: jax.Array
  """[], int32: bases kept at a refresh as the gradient was not finite."""
  residual: Any
  """Tree like the parameters: state of the residual rule; MaskedNode where
  there is none."""


def projected(
  inner: optax.GradientTransformation, options: Options
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` run on projected gradients; see `galore`."""
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> GaloreState:
    return _init(inner, options, params)

  def units(updates: Any, layer: jax.Array | int) -> list[Units | None]:
    projections = options.projections(updates)
    return refresh.units(updates, projections, options.gap, layer)

  def begin_fn(
    updates: optax.Updates,
    state: Any,
    *,
    layer: jax.Array | int = 0,
    **extra_args: Any,
  ) -> GaloreState:
    extra_args['layer'] = layer
    leaves = units(updates, layer)
    return _maybe_refresh(inner, options, leaves, updates, state, extra_args)

  def compress_fn(
    updates: optax.Updates,
    state: Any,
    *,
    layer: jax.Array | int = 0,
    **extra_args: Any,
  ) -> Any:
    del extra_args
    return _compressed(options, units(updates, layer), updates, state)

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    layer: jax.Array | int = 0,
    **extra_args: Any,
  ) -> tuple[optax.Updates, GaloreState]:
    extra_args['layer'] = layer
    leaves = units(updates, layer)
    # A sum of projected gradients comes after its `begin`.
    if not any(isinstance(g, Projected) for g in jax.tree.leaves(updates)):
      state = _maybe_refresh(inner, options, leaves, updates, state, extra_args)
    return _update(inner, options, leaves, updates, state, params, extra_args)

  tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  # A residual rule reads the gradient itself.
  return tx if options.rule else accumulating(tx, begin_fn, compress_fn)


def _init(
  inner: optax.GradientTransformationExtraArgs,
  options: Options,
  params: optax.Params,
) -> GaloreState:
  """Returns the state before the first update, of an inner that was checked."""
  projections = options.projections(params)
  observation.show(projections)
  leaves, treedef = jax.tree.flatten(params)
  view = _views(projections, leaves, treedef)
  # The parts of a tree are seen after the whole, one by one.
  if any(projections) and not selection.is_part(params):
    decay.check_decoupled(inner, view, [p is not None for p in projections])
    if options.moments == 'rotate':
      moments_lib.check_rotates(inner, view)
  none = optax.MaskedNode()
  basis = [
    none if p is None else refresh.first_basis(options.finder, p, x.dtype)
    for p, x in zip(projections, leaves, strict=True)
  ]
  return GaloreState(
    count=jnp.zeros([], jnp.int32),
    basis=treedef.unflatten(basis),
    inner=_per_group(inner, options, projections, treedef).init(view),
    skipped=jnp.zeros([], jnp.int32),
    residual=_first_residual(options, projections, treedef),
  )


def _compressed(
  options: Options,
  leaves: list[Units | None],
  updates: optax.Updates,
  state: GaloreState,
) -> Any:
  """Returns the gradients, those of projected leaves in their subspaces."""
  grads, treedef = jax.tree.flatten(updates)
  bases = _bases(options, leaves, treedef, state.basis, state.count)
  low = [
    g if leaf is None else Projected(_projected(leaf.projection, g, b), g)
    for leaf, g, b in zip(leaves, grads, bases, strict=True)
  ]
  return treedef.unflatten(low)


def _update(
  inner: optax.GradientTransformationExtraArgs,
  options: Options,
  leaves: list[Units | None],
  updates: optax.Updates,
  state: GaloreState,
  params: optax.Params | None,
  extra_args: dict[str, Any],
) -> tuple[optax.Updates, GaloreState]:
  """Returns the updates and the next state; `state` has the step's bases."""
  projections = [leaf and leaf.projection for leaf in leaves]
  grads, treedef = jax.tree.flatten(updates)
  bases = _bases(options, leaves, treedef, state.basis, state.count)
  low_grads = [
    full(g) if p is None else _projected(p, g, b)
    for p, g, b in zip(projections, grads, bases, strict=True)
  ]
  weights = None if params is None else treedef.flatten_up_to(params)
  view = None if weights is None else _views(projections, weights, treedef)
  per_group = _per_group(inner, options, projections, treedef)
  low, inner_state = per_group.update(
    treedef.unflatten(low_grads), state.inner, view, **extra_args
  )
  low = treedef.flatten_up_to(low)
  whole = _unprojected(options, projections, low, bases, grads)
  # Each reads what the inner does to one number off the state before.
  ask = (per_group, state.inner, treedef.unflatten(low_grads), extra_args)
  rests = state.residual
  if options.rule is not None:
    splits = zip(
      *(projections, grads, bases, low_grads, low),
      treedef.flatten_up_to(decay.responses(*ask)),
      treedef.flatten_up_to(decay.gains(*ask)),
      strict=True,
    )
    whole, rests = _with_residual(options, splits, whole, treedef, rests)
  if weights is not None:
    factors = treedef.flatten_up_to(decay.decay_factors(*ask))
    whole = _decayed(projections, whole, factors, weights)
  whole = [u.astype(g.dtype) for u, g in zip(whole, grads, strict=True)]
  return treedef.unflatten(whole), GaloreState(
    count=jnp.asarray(optax.safe_increment(state.count)),
    basis=state.basis,
    inner=inner_state,
    skipped=state.skipped,
    residual=rests,
  )


def _projected(p: Projection, g: Any, basis: Basis) -> jax.Array:
  return (
    g.low if isinstance(g, Projected) else projection_lib.project(p, g, basis)
  )


def _unprojected(
  options: Options,
  projections: list[Projection | None],
  low: list[jax.Array],
  bases: list[Basis],
  grads: list[jax.Array],
) -> list[jax.Array]:
  """Returns the scaled updates in the weights' shapes.

  At once in the gradient's dtype: in float32 the update of one large weight
  would be the largest temporary of a layer-wise step.
  """
  return [
    u
    if p is None
    else jnp.zeros(g.shape, g.dtype)
    if isinstance(options.scale, int | float) and options.scale == 0
    else projection_lib.unproject(p, options.scale * u, b).astype(g.dtype)
    for p, u, b, g in zip(projections, low, bases, grads, strict=True)
  ]


def _with_residual(
  options: Options, splits: Any, whole: list[Any], treedef: Any, states: Any
) -> tuple[list[jax.Array], Any]:
  """Returns the updates with what the residual rule adds, and its states."""
  rule = options.rule
  assert rule is not None
  out, new = [], []
  pairs = zip(splits, whole, treedef.flatten_up_to(states), strict=True)
  for (p, g, *rest), update, state in pairs:
    if p is not None:
      split = residual.Split(projection_lib.to_matrix(p, full(g)), *rest)
      added_io, state = rule(p, split, state)
      update = update + projection_lib.from_matrix(p, added_io)
    out.append(update)
    new.append(state)
  return out, treedef.unflatten(new)


def _first_residual(
  options: Options, projections: list[Projection | None], treedef: Any
) -> Any:
  """Returns the states of the residual rule before anything went through."""
  rule = options.rule
  return treedef.unflatten(
    [
      optax.MaskedNode() if p is None or rule is None else rule.init(p)
      for p in projections
    ]
  )


def _decayed(
  projections: list[Projection | None],
  updates: list[jax.Array],
  factors: list[jax.Array],
  weights: list[jax.Array],
) -> list[jax.Array]:
  """Returns the updates with decay that acts on the whole weight."""
  return [
    u if p is None else u + factor * w
    for p, u, factor, w in zip(
      projections, updates, factors, weights, strict=True
    )
  ]


def _per_group(
  inner: optax.GradientTransformationExtraArgs,
  options: Options,
  projections: list[Projection | None],
  treedef: Any,
) -> optax.GradientTransformationExtraArgs:
  """Returns the inner, with a state for each group where one restarts."""
  if options.moments != 'reset':
    return inner
  labels = ['rest' if p is None else 'low' for p in projections]
  return moments_lib.grouped(inner, treedef.unflatten(labels))


def _bases(
  options: Options,
  leaves: list[Units | None],
  treedef: Any,
  kept: Any,
  count: jax.Array,
) -> list[Basis]:
  """Returns the basis of each leaf, stored or made anew; () for the others."""
  if refresh.is_stored(options.finder):
    flat = treedef.flatten_up_to(kept)
    pairs = zip(leaves, flat, strict=True)
    return [() if leaf is None else refresh.as_basis(b) for leaf, b in pairs]
  return [
    () if leaf is None else refresh.remade(options.finder, leaf, count)
    for leaf in leaves
  ]


def _maybe_refresh(
  inner: optax.GradientTransformationExtraArgs,
  options: Options,
  leaves: list[Units | None],
  updates: optax.Updates,
  state: GaloreState,
  extra_args: dict[str, Any],
) -> GaloreState:
  """Returns the state with new bases, and moments to match, if some are due."""
  carries_moments = options.moments != 'keep'
  if not (carries_moments or refresh.is_stored(options.finder)):
    return state
  # What no refresh changes stays outside the cond, where it is not copied.
  changing = state if carries_moments else state._replace(inner=None)
  changed = jax.lax.cond(
    # A scalar: a batched predicate would turn the cond into a select, and a
    # basis would be found at every step.
    refresh.is_due(leaves, options.gap, state.count),
    lambda state: _refreshed(
      inner, options, leaves, updates, state, extra_args
    ),
    lambda state: state,
    changing,
  )
  return changed if carries_moments else changed._replace(inner=state.inner)


def _refreshed(inner, options, leaves, updates, state, extra_args):
  grads, treedef = jax.tree.flatten(updates)
  projections = [leaf and leaf.projection for leaf in leaves]
  old = _bases(options, leaves, treedef, state.basis, state.count - 1)
  if refresh.is_stored(options.finder):
    kept = treedef.flatten_up_to(state.basis)
    pairs = [
      (basis, 0)
      if leaf is None
      else refresh.refresh(options.finder, leaf, g, basis, state.count)
      for leaf, g, basis in zip(leaves, grads, kept, strict=True)
    ]
    skips = jnp.array([count for _, count in pairs], jnp.int32)
    state = state._replace(
      basis=treedef.unflatten([basis for basis, _ in pairs]),
      skipped=state.skipped + jnp.sum(skips, dtype=jnp.int32),
    )
  new = _bases(options, leaves, treedef, state.basis, state.count)
  if options.moments == 'keep':
    return state
  views = [_view(p, g) for p, g in zip(projections, grads, strict=True)]
  if options.moments == 'reset':
    low = [
      x if p else optax.MaskedNode()
      for p, x in zip(projections, views, strict=True)
    ]
    carried = moments_lib.restart_low(
      inner, state.inner, treedef.unflatten(low)
    )
    # A norm that followed the old moments would bound that of the new ones.
    state = state._replace(
      residual=_first_residual(options, projections, treedef)
    )
  else:
    turns = [
      leaf and refresh.turn(leaf, new_basis, old_basis, state.count)
      for leaf, new_basis, old_basis in zip(leaves, new, old, strict=True)
    ]
    carried = moments_lib.rotate(
      inner, state.inner, treedef.unflatten(views), turns, extra_args
    )
  return state._replace(inner=carried)


def _views(
  projections: list[Projection | None], leaves: list[Any], treedef: Any
) -> Any:
  """Returns the parameters that the inner sees."""
  return treedef.unflatten(
    [_view(p, x) for p, x in zip(projections, leaves, strict=True)]
  )


def _view(projection: Projection | None, x: Any) -> Any:
  if projection is None:
    return full(x)
  return jnp.zeros(
    projection.low_shape, jnp.promote_types(x.dtype, jnp.float32)
  )
