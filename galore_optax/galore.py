"""This module holds `galore`: project, an inner transformation, unproject.

The two spellings are one transformation::

  tx = optax.chain(galore(rank=512, gap=200), optax.adamw(lr))
  tx = galore(optax.adamw(lr), rank=512, gap=200)

`optax.chain` hands every stage the same params, so a stage cannot shrink the
state of the next one. Hence `galore()` without an inner is a `Stage`, and
`chain` here, which importing `galore_optax` makes `optax.chain`, gives the
stage everything after it as its inner.
"""

import contextlib
import contextvars
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import decay, refresh
from galore_optax import moments as moments_lib
from galore_optax import projection as projection_lib
from galore_optax.options import Options
from galore_optax.projection import Axes, Basis, Projection
from galore_optax.refresh import Staggered, Units
from galore_optax.selection import Targets
from galore_optax.subspace import Subspace

_optax_chain = getattr(optax.chain, '__wrapped__', optax.chain)

_seen: contextvars.ContextVar[list[Projection | None] | None]
_seen = contextvars.ContextVar('seen', default=None)


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


class Stage(optax.GradientTransformationExtraArgs):
  """A `galore` that still lacks its inner: `chain` gives it what follows."""

  options: Options

  def __new__(cls, options: Options) -> 'Stage':
    """Returns a stage; called directly, it raises TypeError."""
    stage = super().__new__(cls, _no_inner, _no_inner)
    stage.options = options
    return stage


def galore(
  inner: optax.GradientTransformation | None = None,
  *,
  rank: int | float = 128,
  gap: int | Staggered = 200,
  scale: float = 0.25,
  side: str = 'std',
  subspace: str | Subspace = 'svd',
  moments: str = 'keep',
  targets: Targets = None,
  axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on gradients projected to a low-rank subspace.

  The gradient of each selected weight is projected onto the leading singular
  vectors of a recent one, the inner makes an update of it (its moments have
  the low-rank shape), and the update is projected back. Weight decay of the
  inner acts on the whole weight, exactly and unscaled. Leaves that are not
  selected go through the inner at full rank. Moments are float32 at least.

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, and what the inner keeps for r o elements (Adam: 2 r o, float32).

  Args:
    inner: any transformation that reads `params` for decoupled weight decay
      alone. Default: what follows in `optax.chain`.
    rank: number r of basis vectors; a float in (0, 1] is a share of the
      projected side.
    gap: updates from one refresh of the basis to the next, the first at 0; or
      `Staggered(updates)`, where matrices take turns.
    scale: multiplies the update that is projected back, nothing else.
    side: 'std' projects the shorter side (ties: input), 'reverse_std' the
      longer (ties: output), 'left' the input, 'right' the output, 'full' both.
    subspace: how a basis is found, in float32 at least: 'svd', 'gram',
      'randomized', 'power', 'random', 'coordinates', or a finder with its own
      options, of `galore_optax.subspace`.
    moments: what a refresh does to the inner state of projected leaves:
      'keep' leaves it, 'reset' zeroes it and restarts its counters, 'rotate'
      carries it to the new basis.
    targets: regexes that match whole paths ('blocks/attention/q/kernel'), or
      a predicate `(path, leaf) -> bool`. Default: leaves whose last two axes
      are larger than rank, but for embeddings, heads, norms, scales, biases.
    axes: input and output axes by a regex on the path for kernels that are
      not [..., in, out]: `{'.*/query/kernel': (0, (1, 2))}` for [d, heads,
      head_dim]. Other axes are batch: each index has a basis of its own.

  Returns:
    The transformation; without `inner`, a stage for `optax.chain`. Extra args
    of `update` go to the inner.

  Raises:
    ValueError: an option out of range; at `init`, a target that matches
      nothing or does not fit the rank, no leaf selected, or an inner that
      reads `params` in another way (LAMB's trust ratio).

  Example:
    >>> tx = optax.chain(galore(rank=2, gap=10), optax.adamw(0.1))
    >>> tx.init({'w': jnp.ones((4, 6))})[0].inner[0][0].mu['w'].shape
    (2, 6)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
  """
  options = Options(rank, gap, scale, side, subspace, moments, targets, axes)
  return Stage(options) if inner is None else _projected(inner, options)


@functools.wraps(_optax_chain)
def chain(
  *args: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, in which what follows a `galore` stage is its inner."""
  for position, stage in enumerate(args):
    before, after = args[:position], args[position + 1 :]
    if isinstance(stage, Stage) and after:
      if any(isinstance(other, Stage) for other in after):
        raise ValueError(
          'a chain takes one galore stage, got another after it; for several'
          ' ranks use optax.partition with a chain for each'
        )
      return _optax_chain(
        *before, _projected(_optax_chain(*after), stage.options)
      )
  return _optax_chain(*args)


@contextlib.contextmanager
def observe():
  """Yields a list to which each `galore` adds its projections at `init`.

  So a description finds them behind any wrapper.
  """
  seen: list[Projection | None] = []
  token = _seen.set(seen)
  try:
    yield seen
  finally:
    _seen.reset(token)


def _no_inner(*args: Any, **kwargs: Any) -> Any:
  del args, kwargs
  raise TypeError(
    'galore(...) has no inner transformation. Write'
    ' optax.chain(galore(rank=512), optax.adamw(lr)), with optax.chain looked'
    ' up after `import galore_optax` (or galore_optax.chain), or'
    ' galore(optax.adamw(lr), rank=512)'
  )


def _projected(
  inner: optax.GradientTransformation, options: Options
) -> optax.GradientTransformationExtraArgs:
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> GaloreState:
    projections = options.projections(params)
    seen = _seen.get()
    if seen is not None:
      seen.extend(projections)
    leaves, treedef = jax.tree.flatten(params)
    view = _views(projections, leaves, treedef)
    if any(projections):
      decay.check_decoupled(inner, view, [p is not None for p in projections])
      if options.moments == 'rotate':
        moments_lib.check_rotates(inner, view)
    basis = [
      optax.MaskedNode()
      if p is None
      else refresh.first_basis(options.finder, p, x.dtype)
      for p, x in zip(projections, leaves, strict=True)
    ]
    inner_state = _per_group(inner, options, projections, treedef).init(view)
    return GaloreState(
      count=jnp.zeros([], jnp.int32),
      basis=treedef.unflatten(basis),
      inner=inner_state,
      skipped=jnp.zeros([], jnp.int32),
    )

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    layer: jax.Array | int = 0,
    **extra_args: Any,
  ) -> tuple[optax.Updates, GaloreState]:
    extra_args['layer'] = layer
    projections = options.projections(updates)
    grads, treedef = jax.tree.flatten(updates)
    leaves = refresh.units(projections, options.gap, layer)
    state = _maybe_refresh(inner, options, leaves, updates, state, extra_args)
    bases = _bases(options, leaves, treedef, state.basis, state.count)
    per_group = _per_group(inner, options, projections, treedef)
    low = [
      _full(g) if p is None else projection_lib.project(p, g, b)
      for p, g, b in zip(projections, grads, bases, strict=True)
    ]
    view = factors = None
    if params is not None:
      weights = treedef.flatten_up_to(params)
      view = _views(projections, weights, treedef)
      factors = decay.decay_factors(per_group, state.inner, view, extra_args)
    low, inner_state = per_group.update(
      treedef.unflatten(low), state.inner, view, **extra_args
    )
    low = treedef.flatten_up_to(low)
    # At once in the gradient's dtype: in float32 the update of one large
    # weight would be the largest temporary of a layer-wise step.
    whole = [
      u
      if p is None
      else projection_lib.unproject(p, options.scale * u, b).astype(g.dtype)
      for p, u, b, g in zip(projections, low, bases, grads, strict=True)
    ]
    if params is not None:
      factors = treedef.flatten_up_to(factors)
      whole = [
        u if p is None else u + f * w
        for p, u, f, w in zip(projections, whole, factors, weights, strict=True)
      ]
    whole = [u.astype(g.dtype) for u, g in zip(whole, grads, strict=True)]
    return treedef.unflatten(whole), state._replace(
      count=optax.safe_increment(state.count), inner=inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    pairs = [
      ((), 0)
      if leaf is None
      else refresh.refresh(options.finder, leaf, g, basis, state.count)
      for leaf, g, basis in zip(leaves, grads, old, strict=True)
    ]
    new = [basis for basis, _ in pairs]
    kept = jnp.array([count for _, count in pairs], jnp.int32)
    state = state._replace(
      basis=treedef.unflatten(
        [refresh.as_kept(b) if b else optax.MaskedNode() for b in new]
      ),
      skipped=state.skipped + jnp.sum(kept, dtype=jnp.int32),
    )
  else:
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
    return _full(x)
  return jnp.zeros(
    projection.low_shape, jnp.promote_types(x.dtype, jnp.float32)
  )


def _full(x: Any) -> Any:
  """Returns an array, abstract or not, in float32 at least."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype)
  return x.astype(dtype)
