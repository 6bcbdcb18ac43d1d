"""`galore`: project gradients, run an inner optimizer, project updates back.

The two spellings are one transformation::

  tx = optax.chain(galore(rank=512, gap=200), optax.adamw(lr))
  tx = galore(optax.adamw(lr), rank=512, gap=200)

The module `chain` implements the first one: importing `galore_optax` replaces
`optax.chain`. `LowRank` below is the update of both spellings; read
`LowRank._update` first. Then read `plan` (which leaves are projected),
`subspace` (how a basis is found and stored), `decay`, `moments` and `residual`.
The module `stages` defines the types `Galore` and `Stage`. The folder `presets`
has the methods that build on `galore`. The README of this folder has a table of
the inner optimizers that work and of those that raise.

Axes: i input, o output; m projected side, n other side, r rank; leading axes
are batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, decay, projection, sharding
from galore_optax import moments as moments_lib
from galore_optax import residual as residual_lib
from galore_optax.options import names_options
from galore_optax.paths import Targets, is_part
from galore_optax.plan import Plan, Planner
from galore_optax.precision import at_least_float32
from galore_optax.projection import (
  Axes,
  Basis,
  Projection,
  Side,
  Whole,
  map_plans,
)
from galore_optax.residual import Residual, Split
from galore_optax.stages import Galore, Stage, Stages, has_stages
from galore_optax.subspace import finders, refresh
from galore_optax.subspace import store as store_lib
from galore_optax.subspace.store import BasisStore


class Inners(NamedTuple):
  """Two inner optimizers: one for projected leaves, one for all others.

  Example:
    >>> inner = Inners(projected=optax.lion(1e-3), other=optax.adamw(1e-3))
    >>> tx = galore(inner, rank=2)
  """

  projected: optax.GradientTransformation
  """The inner optimizer of projected leaves."""
  other: optax.GradientTransformation
  """The inner optimizer of all other leaves."""

  def partition(
    self, is_projected: Callable[[Any], Any]
  ) -> optax.GradientTransformationExtraArgs:
    """Returns one transformation of the whole tree.

    Args:
      is_projected: a function that returns a tree with a bool for each leaf of
        the parameters. It is a function because the tree may be callable, as
        modules of Equinox are.
    """

    def labels(tree: Any) -> Any:
      return jax.tree.map(
        lambda x: 'projected' if x else 'other', is_projected(tree)
      )

    inners: Any = self._asdict()
    return optax.partition(inners, labels, mask_compatible_extra_args=True)


class GaloreState(NamedTuple):
  """The state of `galore`."""

  count: jax.Array
  """[], int32: number of updates so far."""
  basis: Any
  """A tree like the parameters: the stored value of each basis. By default
  these are orthonormal rows [..., r, m] in the weight's dtype, without the axes
  that share a basis. Other kinds of `BasisStore` store indices, a seed, or
  quantized rows. It is a pair of values if both sides are projected, and
  MaskedNode if the leaf is not projected."""
  inner: Any
  """State of the inner optimizer, for the low-rank shapes [..., r, n]."""
  skipped: jax.Array
  """[], int32: how often a matrix kept its previous basis at a refresh, because
  its gradient or the new basis was not finite. The sum over all matrices and
  refreshes."""
  residual: Any
  """A tree like the parameters: state of the residual rule. It is MaskedNode
  if there is no rule or the leaf is not projected."""
  phase: Any
  """A tree like the parameters with the numbers that determine the refresh
  steps of each matrix, if the gap is `Staggered`; otherwise `()`."""


OF_INNER = ('learning_rate', 'b1', 'b2', 'eps', 'momentum', 'weight_decay')
"""Options of inner optimizers. If `galore` is called with one of them, the
error message states that it is an option of the inner."""


@names_options(of_inner=OF_INNER)
def galore(
  inner: optax.GradientTransformation | Inners | None = None,
  *,
  rank: int | float = 128,
  gap: int | refresh.Staggered = 200,
  scale: float = 0.25,
  side: Side = 'std',
  subspace: finders.Name | finders.Subspace | BasisStore = 'svd',
  residual: Residual | None = None,
  moments: moments_lib.Moments = 'keep',
  targets: Targets = None,
  axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on gradients projected to a low-rank subspace.

  The gradient of each selected weight is projected onto a subspace: by default
  the leading singular vectors of a recent gradient. The inner optimizer
  computes an update from the projected gradient, so its moments have the
  low-rank shape. The update is then projected back. Weight decay of the inner
  acts on the whole weight, exactly and unscaled. The inner also updates the
  other leaves, at full rank. The inner receives gradients in float32 at least,
  and its moments have this dtype unless it sets another one.

  State of a weight whose side m is projected and whose other side is n: a basis
  of r m elements in the weight's dtype, and the inner's state for [r, n] (Adam:
  2 r n elements, float32).

  Args:
    inner: any transformation that reads `params` only for decoupled weight
      decay (the README has a table), or two of them, `Inners`. Default: the
      stages that follow in `optax.chain`.
    rank: number r of basis vectors; a float in (0, 1] is a share of the
      projected side.
    gap: number of updates between two refreshes of the basis; the first update
      refreshes. `Staggered(updates)` gives each matrix refresh steps of its
      own.
    scale: multiplies the update that is projected back, and nothing else.
    side: 'std' projects the shorter side (the input if both are equal),
      'reverse_std' the longer (the output if both are equal), 'left' the input,
      'right' the output, 'both' both sides. 'full' is another name of 'both'.
    subspace: how a basis is found, in float32 at least: 'svd', 'gram',
      'randomized', 'power', 'random', 'coordinates', or an object of
      `galore_optax.subspace`: a finder with its own options, or a store such as
      `Lazy`. The default 'svd' is exact, as in the paper's code. Measured by
      the squared norm of the projected gradient, 'power' captures at least
      99.7% of what 'svd' captures and is about 8 to 20 times cheaper. 'gram' is
      2 to 6 times cheaper and as exact, except for singular values below 3e-4
      of the largest one (measured by tests.bench.subspace).
    residual: a rule that adds an update made from the gradient outside the
      subspace. None drops that part of the gradient; `galore_optax.residual`
      has rules such as `Sign(learning_rate)`.
    moments: the effect of a refresh on the inner state of projected leaves:
      'keep' leaves it unchanged, 'reset' sets it to zero and restarts its
      counters, 'rotate' maps it to the new basis (`galore_optax.Rotate(b1=,
      b2=)` if the decay rates of the inner are not Adam's).
    targets: regexes that match whole paths ('blocks/attention/q/kernel'), or
      a predicate `(path, leaf) -> bool`. Default: leaves whose input and output
      sizes are both larger than the rank (for a share: larger than 1), except
      embeddings, heads, norms, scales, biases and depthwise convolutions, by
      the table in `galore_optax.names`. A selection without any leaf is an
      error, unless it is a `galore_optax.Optional`.
    axes: input and output axes by a regex on the path, for kernels that are
      not [..., in, out]: `{'.*/proj/kernel': (0, (1, 2))}` for [d, heads,
      head_dim]. The other axes are batch: each index has a basis of its own.
      A `galore_optax.SharedBasis` names batch axes that share their bases, such
      as the taps of a convolution: `{'.*': SharedBasis(side='both')}` is the
      Tucker-2 decomposition of all convolutions. Default: the last two axes.
      For attention kernels with a heads axis, for convolutions and for layers
      on axis 1, `galore_optax.names` states the axes, by the names that
      libraries for JAX use. A convolution [kh, kw, in, out] is one matrix [kh
      kw in, out]. `describe` prints the result.

  Returns:
    The transformation, a `Galore`. Without `inner`, a `Stage`: `optax.chain`
    makes the transformations after it the inner. `update` passes extra
    arguments to the inner.

  Raises:
    ValueError: an option is out of range. At `init`: a target or a regex of
      `axes` matches nothing, a target does not fit the rank, no leaf is
      selected, the inner has a moment that 'reset' or 'rotate' does not
      support, or it reads `params` for something else than decoupled decay
      (LAMB's trust ratio).

  Example:
    >>> tx = optax.chain(galore(rank=2, gap=10), optax.adamw(0.1))
    >>> tx.init({'w': jnp.ones((4, 6))})[0].inner[0][0].mu['w'].shape
    (2, 6)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
  """
  checks.check_static(rank=rank, gap=getattr(gap, 'gap', gap))
  checks.check_not_negative(scale=scale)
  gap, store = refresh.checked_gap(gap), store_lib.as_store(subspace)
  planner = Planner(rank, side, targets, axes, store_lib.by_coordinates(store))
  if not residual_lib.is_rule_or_none(residual):
    raise ValueError(
      'residual must be None or a rule of galore_optax.residual, such as'
      f' Sign(1e-3), got {residual!r}'
    )
  moments = moments_lib.checked(moments, staggered=not isinstance(gap, int))

  def around(inner: optax.GradientTransformation | Inners) -> Galore:
    inner = _checked_inner(inner, moments)
    update = LowRank(inner, planner, store, gap, scale, residual, moments)
    return Galore.of(update.stages())

  return Stage.of(around) if inner is None else around(inner)


@dataclasses.dataclass(frozen=True)
class LowRank:
  """The update of one `galore`, which documents and checks the options."""

  inner: Any
  """The inner optimizer, which accepts extra arguments, or `Inners`."""
  planner: Planner
  """Makes the plan of each leaf."""
  store: Any
  """The `BasisStore`."""
  gap: refresh.Gap
  """Number of updates between refreshes."""
  scale: float
  """Multiplies the update that is projected back."""
  rule: Any
  """The residual rule, or None."""
  moments: Any
  """'keep', 'reset' or a `Rotate`; 'rotate' has been replaced by `Rotate()`."""
  checked: set[Hashable] = dataclasses.field(
    default_factory=set, compare=False, repr=False
  )
  """Cache: the kinds of trees that `decay.check` has accepted."""

  def init(self, params: Any) -> GaloreState:
    """Returns the state before the first update."""
    plans = self.planner(params)
    projection.record_plans(plans)
    inner = self._inner(plans, params)
    # Skip this check for a part of a model, as a layer-wise step passes it: the
    # check ran on the whole model before.
    kinds = decay.kinds(plans, params)
    if kinds not in self.checked and not is_part(params):
      decay.check(inner, plans, params)
      self.checked.add(kinds)
    inner_state = inner.init(
      map_plans(lambda p, w: p.inner_params(w), plans, params)
    )
    moments_lib.check(self.moments, inner_state)
    return GaloreState(
      count=jnp.zeros([], jnp.int32),
      basis=map_plans(
        lambda p, w: refresh.first_stored(self.store, p, w.dtype), plans, params
      ),
      inner=inner_state,
      skipped=jnp.zeros([], jnp.int32),
      residual=self._first_residual(plans, params),
      phase=refresh.phases(plans, params, self.gap),
    )

  def _check_state(
    self, plans: Sequence[Plan], like: Any, state: GaloreState
  ) -> None:
    """Raises ValueError if the state does not belong to `like` and the options.

    Only structures and shapes are compared, so a compiled step does not pay.
    """
    if not isinstance(state, GaloreState):
      raise ValueError(
        'the state must be a GaloreState, got a'
        f' {type(state).__name__}; start with tx.init(params), also if another'
        ' optimizer trained these weights before'
      )
    leaves, treedef = jax.tree.flatten(like)
    try:
      stored = treedef.flatten_up_to(state.basis)
    except ValueError as error:
      raise ValueError(
        'the state belongs to parameters of another structure; restore the'
        ' state of this model, or start with tx.init(params). A parameter that'
        f' tx.init received needs a gradient, zero instead of None: {error}'
      ) from error
    dtypes = [x.dtype for x in leaves]
    refresh.check_stored(self.store, plans, stored, dtypes)
    moments_lib.check_shapes(plans, like, state.inner)

  def _update(
    self, grads: Any, state: GaloreState, params: Any, layer: Any, extra: Any
  ) -> tuple[Any, GaloreState]:
    """Refreshes, projects, runs the inner optimizer and projects back."""
    plans = self.planner(grads)
    self._check_state(plans, grads, state)
    _check_params(plans, params)
    state = self._refresh(plans, grads, state, layer)
    bases = self._bases(plans, grads, state)
    low = self._project(plans, grads, bases)
    return self._apply(plans, grads, bases, low, state, params, layer, extra)

  def _refresh(
    self, plans: Sequence[Plan], grads: Any, state: GaloreState, layer: Any
  ) -> GaloreState:
    """Returns the state with new bases and adapted moments, if any is due."""
    if not any(isinstance(p, Projection) for p in plans):
      return state
    # Other fields do not go through the cond, because it copies its results.
    others = () if self.moments == 'keep' else ('inner', 'residual')
    names = ('basis', 'skipped', *others)

    def fields(state: GaloreState) -> dict[str, Any]:
      return {name: getattr(state, name) for name in names}

    # The condition is a scalar. A batched condition would turn the cond into a
    # select, and every step would find the bases.
    new = jax.lax.cond(
      self.due(state, layer=layer),
      lambda: fields(self._refreshed(plans, grads, state, layer)),
      lambda: fields(state),
    )
    return state._replace(**new)

  def _refreshed(
    self, plans: Sequence[Plan], grads: Any, state: GaloreState, layer: Any
  ) -> GaloreState:
    """Returns the state after a refresh."""
    leaves, treedef = jax.tree.flatten(grads)
    phase = [None] * len(leaves)
    if not isinstance(self.gap, int):
      phase = treedef.flatten_up_to(state.phase)
    basis, skips = refresh.find_bases(
      self.store,
      plans,
      leaves,
      treedef.flatten_up_to(state.basis),
      phase,
      gap=self.gap,
      count=state.count,
      layer=layer,
    )
    basis, skipped = treedef.unflatten(basis), state.skipped + skips
    new = state._replace(basis=basis, skipped=skipped)
    if self.moments == 'keep':
      return new
    if self.moments == 'reset':
      # The residual rule restarts as well. `Scaled` stores a norm in its state,
      # and a norm from before the reset must not limit the norm after it.
      residual = self._first_residual(plans, grads)
      inner = moments_lib.reset_projected(state.inner)
      return new._replace(inner=inner, residual=residual)

    def rotation(p: Plan, new: Basis, old: Basis, phase: Any) -> Any:
      if isinstance(p, Whole):
        return None
      changed = refresh.changed(self.gap, p, phase, state.count, layer)
      return functools.partial(_rotate, p, new, old, changed)

    new_bases = treedef.flatten_up_to(self._bases(plans, grads, new))
    old_bases = treedef.flatten_up_to(self._bases(plans, grads, state))
    rotations = list(map(rotation, plans, new_bases, old_bases, phase))
    return new._replace(inner=self.moments(state.inner, treedef, rotations))

  def _bases(self, plans: Sequence[Plan], like: Any, state: GaloreState) -> Any:
    """Returns a tree with the basis of each leaf, a tuple over projected sides.

    The tuple has rows [..., r, m] or indices [..., r] for each side. It is
    empty for a leaf that is not projected.
    """
    leaves, treedef = jax.tree.flatten(like)
    dtypes = [x.dtype for x in leaves]
    stored = treedef.flatten_up_to(state.basis)
    return treedef.unflatten(
      refresh.bases_of(self.store, plans, stored, dtypes)
    )

  def _project(self, plans: Sequence[Plan], grads: Any, bases: Any) -> Any:
    """Returns the projected gradients [..., r, n], in float32 at least.

    A leaf that is not projected has its whole gradient.
    """
    return map_plans(
      lambda p, g, basis: p.project(g, basis), plans, grads, bases
    )

  def _apply(
    self,
    plans: Sequence[Plan],
    like: Any,
    bases: Any,
    low: Any,
    state: GaloreState,
    params: Any,
    layer: Any,
    extra: dict[str, Any],
  ) -> tuple[Any, GaloreState]:
    """Runs the inner optimizer on `low` and maps its updates to the weights."""
    # `layer` is not zero, or it is a tracer, only in a layer-wise step. Some
    # inners need the index of the layer.
    if not checks.is_zero(layer):
      extra = {**extra, 'layer': layer}
    inner = self._inner(plans, like)
    steps, slopes, inner_state = decay.run_inner(
      inner, plans, low, state.inner, params, extra
    )
    trees = [bases, low, steps, state.residual]
    if slopes is not None:
      trees += [slopes, params]
    of_leaf = functools.partial(self._back_to_weight, state.count)
    pairs = map_plans(of_leaf, plans, like, *trees)
    updates = jax.tree.map(lambda _, pair: pair[0], like, pairs)
    residual = jax.tree.map(lambda _, pair: pair[1], like, pairs)
    count = jnp.asarray(optax.safe_increment(state.count))
    state = state._replace(count=count, inner=inner_state, residual=residual)
    return updates, state

  def _back_to_weight(
    self,
    count: jax.Array,
    p: Plan,
    x: jax.Array,
    basis: Basis,
    low: jax.Array,
    step: jax.Array,
    rule_state: Any,
    slope: Any = 0,
    w: Any = None,
  ) -> tuple[jax.Array, Any]:
    """Returns one leaf's update in its own shape, and its residual state.

    Args:
      count: number of earlier updates.
      p: plan of the leaf.
      x: the gradient, in the weight's shape. Without a residual rule, `apply`
        may pass the weight instead; then only shape and dtype matter.
      basis: basis of each projected side.
      low: the projected gradient.
      step: the inner's update for `low`.
      rule_state: state of the residual rule.
      slope: [], the derivative of the inner's update with respect to the
        weight: minus learning rate times weight decay.
      w: the weight, or None.
    """
    if isinstance(p, Whole):
      return step.astype(x.dtype), rule_state
    update = jnp.zeros(x.shape, x.dtype)
    if not checks.is_zero(self.scale):
      # Cast at once: a float32 update of the largest weight would be the
      # largest temporary array of a layer-wise step.
      update = p.unproject(self.scale * step, basis).astype(x.dtype)
    if self.rule is not None:
      g_io = projection.to_matrix(p, at_least_float32(x))
      split = Split(g_io, basis, low, step, count)
      added_io, rule_state = self.rule(p, split, rule_state)
      update = update + projection.from_matrix(p, added_io)
    if w is not None:
      # If the slope is a constant zero, XLA removes the sum. Without `where`
      # it would compute `0 * w` and store another array of the weight's size.
      update = jnp.where(slope == 0, update, update + slope * w)
    return update.astype(x.dtype), rule_state

  def _first_residual(self, plans: Sequence[Plan], like: Any) -> Any:
    """Returns the first state of the residual rule for each leaf."""

    def of_leaf(p: Plan, _: Any) -> Any:
      if self.rule is None or isinstance(p, Whole):
        return optax.MaskedNode()
      return self.rule.init(p)

    return map_plans(of_leaf, plans, like)

  def _inner(self, plans: Sequence[Plan], like: Any) -> Any:
    """Returns one inner optimizer for the whole tree."""
    if not isinstance(self.inner, Inners):
      return self.inner

    def is_projected(_: Any) -> Any:
      return map_plans(lambda p, _: isinstance(p, Projection), plans, like)

    return self.inner.partition(is_projected)

  def due(self, state: GaloreState, *, layer: Any = 0) -> jax.Array:
    """Returns whether a refresh is due: a scalar; see `Stages`."""
    return refresh.is_due(self.gap, state.phase, state.count, layer)

  def stages(self) -> Stages:
    """Returns the functions of the transformation."""
    return Stages(
      init=self.init,
      update=self.update,
      plan=self.planner,
      due=self.due,
      refresh=self.refresh,
      project=self.project,
      apply=self.apply,
      linear=self.rule is None,
      with_keeper=lambda f: Galore.of(
        dataclasses.replace(self, store=f(self.store)).stages()
      ),
    )

  # Under explicit mesh axes the functions below set the shardings of their
  # results, and the compiler chooses those of all arrays inside.

  def update(
    self,
    updates: Any,
    state: GaloreState,
    params: Any = None,
    *,
    layer: Any = 0,
    **extra_args: Any,
  ) -> tuple[Any, GaloreState]:
    """Returns the updates and the next state; see `Stages`."""
    run = sharding.on_any_mesh(self._update, like=lambda: (updates, state))
    return run(updates, state, params, layer, extra_args)

  def refresh(
    self, grads: Any, state: GaloreState, *, layer: Any = 0
  ) -> GaloreState:
    """Returns the state with new bases; see `Stages`."""
    plans = self.planner(grads)
    self._check_state(plans, grads, state)
    run = sharding.on_any_mesh(
      functools.partial(self._refresh, plans), like=lambda: state
    )
    return run(grads, state, layer)

  def project(self, grads: Any, state: GaloreState) -> Any:
    """Returns the projected gradients; see `Stages`."""
    plans = self.planner(grads)
    self._check_state(plans, grads, state)

    def project(grads: Any, state: GaloreState) -> Any:
      return self._project(plans, grads, self._bases(plans, grads, state))

    run = sharding.on_any_mesh(
      project, like=lambda: map_plans(sharding.low_sharding, plans, grads)
    )
    return run(grads, state)

  def apply(
    self,
    low: Any,
    state: GaloreState,
    params: Any = None,
    grads: Any = None,
    *,
    layer: Any = 0,
    **extra_args: Any,
  ) -> tuple[Any, GaloreState]:
    """Returns the updates and the next state; see `Stages`."""
    assert grads is not None or self.rule is None, 'a rule reads the gradient'
    if grads is None:
      checks.check_params(params, 'apply without grads')

    like = params if grads is None else grads
    plans = self.planner(like)
    self._check_state(plans, like, state)
    _check_params(plans, params)

    def apply(
      low: Any,
      state: GaloreState,
      params: Any,
      like: Any,
      layer: Any,
      extra: Any,
    ) -> tuple[Any, GaloreState]:
      bases = self._bases(plans, like, state)
      return self._apply(plans, like, bases, low, state, params, layer, extra)

    run = sharding.on_any_mesh(apply, like=lambda: (like, state))
    return run(low, state, params, like, layer, extra_args)


def _check_params(plans: Sequence[Plan], params: Any) -> None:
  """Raises ValueError unless weights have the shapes of their gradients."""
  if params is None:
    return
  for p, w in zip(plans, jax.tree.leaves(params), strict=True):
    if tuple(w.shape) != p.shape:
      raise ValueError(
        f'a gradient must have the shape of its weight, got {p.shape} for'
        f' {p.path} of shape {tuple(w.shape)}'
      )


def _rotate(
  p: Projection,
  new: Basis,
  old: Basis,
  changed: jax.Array,
  low: jax.Array,
  power: int,
) -> jax.Array:
  """Returns the product of `low` with C = P_new P_old^T, a matrix per side.

  C is the identity for matrices without an earlier basis and for matrices whose
  basis did not change.

  Args:
    p: plan of the leaf.
    new: basis of each side after the refresh.
    old: basis of each side before the refresh.
    changed: [..., 1, 1], bool: which bases replace an earlier one.
    low: a low-rank array [..., r, n].
    power: exponent of the entries of C: 1 for first moments, 2 for second.
  """
  eyes = {r: jnp.broadcast_to(jnp.eye(r), (*p.bases, r, r)) for r in {*p.ranks}}
  # By default a GPU would round the factors to 11 bits, and moments with them.
  with jax.default_matmul_precision('highest'):
    rotations = [
      jnp.where(changed, projection.overlap(a, b), eyes[r]) ** power
      for a, b, r in zip(new, old, p.ranks, strict=True)
    ]
    return p.project_sides(low, rotations)


def _checked_inner(inner: Any, moments: Any) -> Any:
  """Returns an inner that accepts extra arguments, or `Inners`.

  Raises:
    ValueError: the inner is not a transformation.
  """
  for one in inner if isinstance(inner, Inners) else (inner,):
    if not isinstance(one, optax.GradientTransformation):
      raise ValueError(
        f'inner must be a transformation, e.g. optax.adamw(1e-3), got {one!r}'
      )
  if isinstance(inner, Inners):
    return inner
  inner = optax.with_extra_args_support(inner)
  # Adam has one counter for all leaves. A reset restarts the counter of the
  # projected leaves only, so the other leaves need an inner state of their own.
  return Inners(inner, inner) if moments == 'reset' else inner


def quantize_bases(
  tx: Any, *, bits: Literal[4, 8] = 4, group: int = 256
) -> Galore:
  """Returns a `galore` that stores its bases in 4 or 8 bits; see `Packed`.

  Args:
    tx: a `galore`, or an `optax.chain` that begins with one.
    bits: bits of an element, 8 or 4.
    group: number of elements that share a float32 scale.

  Raises:
    ValueError: `tx` is another transformation, or `bits` or `group` is out of
      range.

  Example:
    >>> tx = quantize_bases(galore(optax.sgd(0.1), rank=2))
    >>> tx.init({'w': jnp.ones((512, 512))}).basis['w'].nbytes
    528
  """
  if not has_stages(tx):
    raise ValueError(
      'tx must be a galore, or an optax.chain that begins with one; apply other'
      f' wrappers afterwards, got {tx!r}'
    )
  return tx.with_keeper(
    lambda store: store_lib.packed(store, bits=bits, group=group)
  )
