"""`galore`: project, an inner transformation, unproject.

The two spellings are one transformation::

  tx = optax.chain(galore(rank=512, gap=200), optax.adamw(lr))
  tx = galore(optax.adamw(lr), rank=512, gap=200)

`optax.chain` hands every stage the same params, so a stage cannot shrink the
state of the next one. Hence `galore()` without an inner is a `Stage`, and
`chain` here, which importing `galore_optax` makes `optax.chain`, gives the
stage everything after it as its inner.

An update is three stages: `refresh` finds the bases that are due, `project` is
linear in the gradient, `apply` runs the inner and goes back to the weight. Who
sums or reduces gradients calls them one by one. Read on in `plan` (what is
projected), `subspace` (how a basis is found), `decay`, `moments`, `residual`,
then in `presets`.

What works, each proved by a test:

| as | works | raises |
| --- | --- | --- |
| inner | sgd, momentum, nesterov, sign_sgd, lion | lbfgs, line searches |
| | adam, adamw, amsgrad, radam, nadam, adabelief | lamb, lars (trust ratio) |
| | rmsprop, adagrad, adan, factored rms | adafactor scaled by parameters |
| | adafactor without parameter scale | decay that enters a momentum |
| | polyak_sgd (with `value`) | momo, prodigy, dog, sophia |
| inside it | masks, partition, schedules, clipping | adaptive_grad_clip |
| | inject_hyperparams, MultiSteps, apply_if_finite | keep_params_nonnegative |
| | snapshot, monitor (of low-rank updates) | |
| around | masked, partition, MultiSteps, named_chain | flatten (no matrix) |
| | inject_hyperparams, apply_if_finite | |
| | lookahead, contrib.schedule_free | |
| users | flax TrainState, nnx.Optimizer, equinox modules | |
| | FrozenDict, Haiku's dicts with '/' in keys | |
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, decay, projection
from galore_optax import moments as moments_lib
from galore_optax.options import THEIRS as THEIRS
from galore_optax.options import names_options
from galore_optax.paths import Targets, is_part
from galore_optax.plan import Plan, Planner
from galore_optax.precision import full
from galore_optax.projection import Axes, Projection, Side, Whole, each, show
from galore_optax.residual import Residual, Split
from galore_optax.sharding import low_sharding, on_any_mesh, placed
from galore_optax.subspace import finders, kept, refresh


def _below_ours(found: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the `optax.chain` that our `chain` calls.

  A wrapper of another library is kept. A `chain` of this module as it was
  before a reload is replaced by the function that it called.

  Args:
    found: the `optax.chain` of this moment.
  """
  # functools.wraps copies attributes, so a wrapper of ours has this mark too.
  mark: Any = getattr(found, '_galore_optax', (None, None))
  ours, below = mark
  return below if ours is found else found


_optax_chain = _below_ours(optax.chain)


class Apart(NamedTuple):
  """Two inners, where the leaves that are not projected have one of their own.

  Example:
    >>> inner = Apart(low=optax.lion(1e-3), rest=optax.adamw(1e-3))
    >>> tx = galore(inner, rank=2)
  """

  low: optax.GradientTransformation  # of the projected leaves
  rest: optax.GradientTransformation  # of all others


class GaloreState(NamedTuple):
  """The state of `galore`."""

  count: jax.Array  # [], int32: updates done so far
  # Tree like the parameters: orthonormal rows [..., r, m] in the weight's
  # dtype, or what a keeper keeps of them (a pair for side 'full'); MaskedNode
  # where not projected.
  basis: Any
  # State of the inner transformation, for the low-rank shapes [..., r, n].
  inner: Any
  # [], int32: bases kept at a refresh as the gradient was not finite.
  skipped: jax.Array
  # Tree like the parameters: state of the residual rule; MaskedNode where there
  # is none.
  residual: Any
  # Tree like the parameters: where matrices that take turns stand in their
  # order; () where all are due at once.
  phase: Any


class Galore(optax.GradientTransformationExtraArgs):
  """A `galore`, or a chain that begins with one: an update in three stages.

  `update(g, s, w)` is `apply(project(g, refresh(g, s)), refresh(g, s), w, g)`.
  `layer` is the index of the layer where one layer of a stack is shown.
  """

  # `(tree) -> plans`: how each leaf is projected.
  plan: Callable[[Any], list[Plan]]
  # `(state, *, layer=0) -> []`, bool: whether a refresh finds any basis.
  due: Callable[..., jax.Array]
  # `(grads, state, *, layer=0) -> state`: bases that are due, moments to match;
  # one `lax.cond` on a scalar.
  refresh: Callable[..., Any]
  # `(grads, state) -> low`, linear in grads: [..., r, n] of a projected leaf,
  # the leaf of another, in float32.
  project: Callable[..., Any]
  # `(low, state, params, grads, *, layer=0, **extra_args) -> (updates, state)`;
  # grads may be None where `linear`.
  apply: Callable[..., tuple[optax.Updates, Any]]
  # Whether `apply` reads no more of the gradient than its projection, so that
  # sums of projections do for sums of gradients.
  linear: bool
  # `(f) -> Galore`, the same one with f(keeper) for its keeper of bases.
  with_keeper: Callable[[Callable[[Any], Any]], 'Galore']


class Stage(optax.GradientTransformationExtraArgs):
  """A `galore` that still lacks its inner: `chain` gives it what follows."""

  around: Callable[[optax.GradientTransformation], Galore]


# Options that belong to the inner of a `galore`.
OF_INNER = ('learning_rate', 'b1', 'b2', 'eps', 'momentum', 'weight_decay')


@names_options(of_inner=OF_INNER)
def galore(
  inner: optax.GradientTransformation | Apart | None = None,
  *,
  rank: int | float = 128,
  gap: int | refresh.Staggered = 200,
  scale: float = 0.25,
  side: Side = 'std',
  subspace: finders.Name | finders.Subspace | kept.Keeper = 'svd',
  residual: Residual | None = None,
  moments: moments_lib.Moments = 'keep',
  targets: Targets = None,
  axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on gradients projected to a low-rank subspace.

  The gradient of each selected weight is projected onto the leading singular
  vectors of a recent one, the inner makes an update of it (its moments have
  the low-rank shape), and the update is projected back. Weight decay of the
  inner acts on the whole weight, exactly and unscaled. Leaves that are not
  selected go through the inner at full rank. Moments are float32 at least.

  State of a weight of sides m <= n: a basis of r m elements in the weight's
  dtype, and what the inner keeps for [r, n] (Adam: 2 r n, float32).

  Args:
    inner: any transformation that reads `params` for decoupled weight decay
      alone (the module has a table), or two of them, `Apart`. Default: what
      follows in `optax.chain`.
    rank: number r of basis vectors; a float in (0, 1] is a share of the
      projected side.
    gap: updates from one refresh of the basis to the next, the first at 0; or
      `Staggered(updates)`, where matrices take turns.
    scale: multiplies the update that is projected back, nothing else.
    side: 'std' projects the shorter side (ties: input), 'reverse_std' the
      longer (ties: output), 'left' the input, 'right' the output, 'full' both.
    subspace: how a basis is found, in float32 at least: 'svd', 'gram',
      'randomized', 'power', 'random', 'coordinates', or a finder with its own
      options, of `galore_optax.subspace`. The default is exact and reads no
      basis but this gradient's, as the paper's code; 'power' is 10 to 20 times
      cheaper at 99.8% or more of the energy, 'gram' 3 to 5 times at all of it
      (tests.bench.subspace).
    residual: what becomes of the gradient outside the subspace: None drops it,
      or a rule of `galore_optax.residual`, such as `Sign(learning_rate)`.
    moments: what a refresh does to the inner state of projected leaves:
      'keep' leaves it, 'reset' zeroes it and restarts its counters, 'rotate'
      carries it to the new basis (`Rotate(b1=, b2=)` where the inner's decays
      are not Adam's).
    targets: regexes that match whole paths ('blocks/attention/q/kernel'), or
      a predicate `(path, leaf) -> bool`. Default: leaves whose last two axes
      are larger than rank, but for embeddings, heads, norms, scales, biases.
    axes: input and output axes by a regex on the path for kernels that are
      not [..., in, out]: `{'.*/proj/kernel': (0, (1, 2))}` for [d, heads,
      head_dim]. Other axes are batch: each index has a basis of its own.
      Default: the last two, and all three of query, key, value and out kernels
      that keep their heads apart, as flax's attention does.

  Returns:
    The transformation, a `Galore`; without `inner`, a stage for `optax.chain`.
    Extra args of `update` go to the inner.

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
  checks.check_static(rank=rank, gap=getattr(gap, 'gap', gap))
  checks.check_not_negative(scale=scale)
  gap, keeper = refresh.checked_gap(gap), kept.keeping(subspace)
  planner = Planner(rank, side, targets, axes, kept.by_coordinates(keeper))
  rule = 'None or a rule of galore_optax.residual, such as Sign(1e-3)'
  checks.require(rule, _is_rule_or_none, residual=residual)
  moments = moments_lib.checked(moments, in_turns=not isinstance(gap, int))
  options = planner, keeper, gap, scale, residual, moments
  of = lambda inner: _staged(_Core(_checked_inner(inner, moments), *options))
  if inner is not None:
    return of(inner)
  stage = Stage(_no_inner, _no_inner)
  stage.around = of
  return stage


@functools.wraps(_optax_chain)
def chain(
  *args: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, in which what follows a `galore` stage is its inner."""
  for position, stage in enumerate(args):
    before, after = args[:position], args[position + 1 :]
    if isinstance(stage, Stage) and after:
      if any(isinstance(other, Stage) for other in after):
        several = 'for several ranks use optax.partition with a chain for each'
        raise ValueError(f'a chain takes one galore stage, got two; {several}')
      return chain(*before, stage.around(_optax_chain(*after)))
  if args and isinstance(args[0], Galore):
    rest = _optax_chain(*args[1:]) if args[1:] else optax.identity()
    return _followed(args[0], optax.with_extra_args_support(rest))
  return _optax_chain(*args)


vars(chain)['_galore_optax'] = chain, _optax_chain


def install_chain() -> None:
  """Makes our `chain` `optax.chain`, unless something wraps it already.

  >>> install_chain()
  >>> optax.chain is chain
  True
  """
  if _below_ours(optax.chain) is _optax_chain:
    optax.chain = chain


def quantize_bases(
  tx: Any, *, bits: Literal[4, 8] = 4, group: int = 256
) -> Galore:
  """Stores the bases of a `galore` in few bits; see `Packed`.

  Args:
    tx: a `galore`, or an `optax.chain` that begins with one.
    bits: of an element, 8 or 4.
    group: elements that share a float32 scale.

  Example:
    >>> tx = quantize_bases(galore(optax.sgd(0.1), rank=2))
    >>> tx.init({'w': jnp.ones((512, 512))}).basis['w'].nbytes
    528
  """
  rule = 'a galore, or an optax.chain that begins with one, others around it'
  checks.require(rule, lambda x: isinstance(x, Galore), tx=tx)
  return tx.with_keeper(lambda k: kept.packed(k, bits=bits, group=group))


def from_stages(stages: Any) -> Galore:
  """Returns the transformation of an object that has the stages of `Galore`.

  Args:
    stages: an object with `init` and the attributes of `Galore`.
  """
  return _staged(stages)


def with_apply(tx: Galore, wrap: Callable[[Callable], Callable]) -> Galore:
  """Returns `tx` with `wrap(tx.apply)` for its last stage."""
  with_keeper = lambda f: with_apply(tx.with_keeper(f), wrap)
  return _staged(tx, apply=wrap(tx.apply), with_keeper=with_keeper)


def _followed(first, rest) -> Galore:
  """Returns `optax.chain(first, *rest)` with the stages of the first."""

  def apply_fn(low, state, params=None, grads=None, **extra_args):
    updates, head = first.apply(low, state[0], params, grads, **extra_args)
    extra_args.pop('layer', None)
    updates, tail = rest.update(updates, state[1:], params, **extra_args)
    return updates, (head, *tail)

  return _staged(
    first,
    init=lambda params: (first.init(params), *rest.init(params)),
    due=lambda state, **layer: first.due(state[0], **layer),
    refresh=lambda g, s, **layer: (first.refresh(g, s[0], **layer), *s[1:]),
    project=lambda grads, state: first.project(grads, state[0]),
    apply=apply_fn,
    with_keeper=lambda f: _followed(first.with_keeper(f), rest),
  )


def _staged(first: Any, **other: Any) -> Galore:
  """Returns the stages of one, but for `other`, as a transformation."""

  def update_fn(updates, state, params=None, *, layer=0, **extra_args):
    state = tx.refresh(updates, state, layer=layer)
    low = tx.project(updates, state)
    return tx.apply(low, state, params, updates, layer=layer, **extra_args)

  tx = Galore(other.pop('init', first.init), update_fn)
  names = Galore.__annotations__.keys() - other
  vars(tx).update(other | {name: getattr(first, name) for name in names})
  return tx


@dataclasses.dataclass(frozen=True)
class _Core:
  """The checked options of one `galore`, which documents them, and its stages.

  `layer` is the index of the layer where one layer of a stack is shown.
  """

  inner: Any  # takes extra args, or it is an `Apart`
  plan: Planner
  keeper: Any
  gap: refresh.Gap
  scale: float
  rule: Any  # of the residual, or None
  moments: Any  # 'keep', 'reset' or a `Rotate`

  @property
  def linear(self) -> bool:
    """Whether no residual rule reads the gradient."""
    return self.rule is None

  def with_keeper(self, f: Callable[[Any], Any]) -> Galore:
    """Returns the same with f(keeper)."""
    return _staged(dataclasses.replace(self, keeper=f(self.keeper)))

  @placed
  def init(self, params: Any) -> GaloreState:
    """Returns the state before the first update."""
    plans = self.plan(params)
    show(plans)
    inner = self._joined(plans, params)
    # The parts of a tree are seen after the whole, one by one.
    if any(isinstance(p, Projection) for p in plans) and not is_part(params):
      decay.check(inner, plans, params)
    inner_state = inner.init(each(lambda p, w: p.view(w), plans, params))
    moments_lib.check(self.moments, inner_state)
    basis = lambda p, w: refresh.first_kept(self.keeper, p, w.dtype)
    return GaloreState(
      count=jnp.zeros([], jnp.int32),
      basis=each(basis, plans, params),
      inner=inner_state,
      skipped=jnp.zeros([], jnp.int32),
      residual=self._first_residual(plans, params),
      phase=refresh.phases(plans, params, self.gap),
    )

  def due(self, state: GaloreState, *, layer: Any = 0) -> jax.Array:
    """Returns whether a refresh finds any basis: a scalar."""
    return refresh.is_due(self.gap, state.phase, state.count, layer)

  @on_any_mesh(lambda self, grads, state: state)
  def refresh(self, grads: Any, state: GaloreState, *, layer: Any = 0) -> Any:
    """Returns the state with new bases, and moments to match, if due."""
    plans = self.plan(grads)
    if not any(isinstance(p, Projection) for p in plans):
      return state
    # What no refresh changes stays outside the cond, where it is not copied.
    others = () if self.moments == 'keep' else ('inner', 'residual')
    names = 'basis', 'skipped', *others
    pick = lambda state: {name: getattr(state, name) for name in names}
    new = lambda: pick(self._refreshed(plans, grads, state, layer))
    # A scalar: a batched predicate would turn the cond into a select, and a
    # basis would be found at every step.
    due = self.due(state, layer=layer)
    return state._replace(**jax.lax.cond(due, new, lambda: pick(state)))

  def _refreshed(self, plans, grads, state, layer) -> GaloreState:
    leaves, treedef = jax.tree.flatten(grads)
    up = treedef.flatten_up_to
    when = {'gap': self.gap, 'count': state.count, 'layer': layer}
    in_turns = not isinstance(self.gap, int)
    phase = up(state.phase) if in_turns else [None] * len(leaves)
    rows = plans, leaves, up(state.basis), phase
    basis, skips = refresh.refreshed(self.keeper, *rows, **when)
    basis, skipped = treedef.unflatten(basis), state.skipped + skips
    new = state._replace(basis=basis, skipped=skipped)
    if self.moments == 'keep':
      return new
    if self.moments == 'reset':
      # A norm that followed the old moments would bound that of the new ones.
      residual = self._first_residual(plans, grads)
      inner = moments_lib.reset_low(state.inner)
      return new._replace(inner=inner, residual=residual)

    def turn(p, new, old, at):
      if isinstance(p, Whole):
        return None
      changed = refresh.changed(self.gap, p, at, state.count, layer)
      return functools.partial(_turned, p, new, old, changed)

    bases = [up(self._bases(plans, grads, s)) for s in (new, state)]
    turns = list(map(turn, plans, *bases, phase))
    return new._replace(inner=self.moments(state.inner, treedef, turns))

  @on_any_mesh(lambda self, g, _: each(low_sharding, self.plan(g), g))
  def project(self, grads: Any, state: GaloreState) -> Any:
    """Returns the gradients, those of projected leaves in their subspaces."""
    plans = self.plan(grads)
    bases = self._bases(plans, grads, state)
    return each(lambda p, g, basis: p.project(g, basis), plans, grads, bases)

  @on_any_mesh(lambda _, low, s, w=None, g=None: (w if g is None else g, s))
  def apply(self, low, state, params=None, grads=None, *, layer=0, **extra):
    """Returns the updates and the next state; `state` has the step's bases."""
    assert grads is not None or self.rule is None, 'a rule reads the gradient'
    like = params if grads is None else grads
    plans = self.plan(like)
    if not checks.is_zero(layer):
      extra['layer'] = layer
    answer, slopes, inner_state = decay.through(
      self._joined(plans, like), plans, low, state.inner, params, extra
    )
    trees = self._bases(plans, like, state), low, answer, state.residual
    if slopes is not None:
      trees += slopes, params
    of_leaf = functools.partial(self._updated, state.count)
    pairs = each(of_leaf, plans, like, *trees)
    pick = lambda i: jax.tree.map(lambda _, pair: pair[i], like, pairs)
    count = jnp.asarray(optax.safe_increment(state.count))
    new = {'count': count, 'inner': inner_state, 'residual': pick(1)}
    return pick(0), state._replace(**new)

  def _updated(self, count, p, x, basis, low, answer, rest, slope=0, w=None):
    """Returns one leaf's update in its own shape, its residual rule's state."""
    if isinstance(p, Whole):
      return answer.astype(x.dtype), rest
    update = jnp.zeros(x.shape, x.dtype)
    if not checks.is_zero(self.scale):
      # At once in the gradient's dtype: in float32 the update of one large
      # weight would be the largest temporary of a layer-wise step.
      update = p.unproject(self.scale * answer, basis).astype(x.dtype)
    if self.rule is not None:
      g_io = projection.to_matrix(p, full(x))
      split = Split(g_io, basis, low, answer, count)
      added_io, rest = self.rule(p, split, rest)
      update = update + projection.from_matrix(p, added_io)
    if w is not None:
      # Where the slope is known to be zero XLA drops the term: w * 0 it keeps,
      # and beside it a whole update in memory.
      update = jnp.where(slope == 0, update, update + slope * w)
    return update.astype(x.dtype), rest

  def _bases(self, plans, like, state) -> Any:
    """Returns the basis of each leaf; () for one that is whole."""
    basis = lambda p, x, of: refresh.basis_of(self.keeper, p, of, x.dtype)
    return each(basis, plans, like, state.basis)

  def _first_residual(self, plans, like) -> Any:
    """Returns the states of the residual rule before anything went through."""
    masked = lambda p: self.rule is None or isinstance(p, Whole)
    first = lambda p, _: optax.MaskedNode() if masked(p) else self.rule.init(p)
    return each(first, plans, like)

  def _joined(self, plans, like) -> Any:
    """Returns one inner of the whole tree."""
    if not isinstance(self.inner, Apart):
      return self.inner
    label = lambda p, _: 'rest' if isinstance(p, Whole) else 'low'
    inners: Any = self.inner._asdict()
    labels = each(label, plans, like)
    return optax.partition(inners, labels, mask_compatible_extra_args=True)


def _turned(p, new, old, changed, low: jax.Array, power: int) -> jax.Array:
  """Returns the product with C = P_new P_old^T, its entries to a power.

  Before the first refresh there is nothing to carry: C is the identity. So it
  is for a matrix that was not due.
  """
  eye_rr = jnp.broadcast_to(jnp.eye(p.rank), (*p.batch, p.rank, p.rank))
  # A card would round the factors to 11 bits, and moments with them.
  with jax.default_matmul_precision('highest'):
    found = map(projection.overlap, new, old)
    return p.turn(low, [jnp.where(changed, x, eye_rr) ** power for x in found])


def _checked_inner(inner: Any, moments: Any) -> Any:
  """Returns an inner that takes extra args, or two of them."""
  for one in inner if isinstance(inner, Apart) else (inner,):
    is_tx = lambda x: isinstance(x, optax.GradientTransformation)
    checks.require('a transformation, e.g. optax.adamw(1e-3)', is_tx, inner=one)
  if isinstance(inner, Apart):
    return inner
  inner = optax.with_extra_args_support(inner)
  # Adam's counter serves all its leaves: were it one state, a restart of the
  # projected leaves would correct the bias of the others anew.
  return Apart(inner, inner) if moments == 'reset' else inner


def _is_rule_or_none(residual: Any) -> bool:
  """Whether a value is None, or an object with the methods of `Residual`."""
  if residual is None:
    return True
  methods = residual, getattr(residual, 'init', None)
  return all(map(callable, methods)) and not isinstance(residual, type)


def _no_inner(*_: Any, **__: Any) -> Any:
  raise TypeError(
    'galore(...) has no inner transformation. Write'
    ' optax.chain(galore(rank=512), optax.adamw(lr)), with optax.chain looked'
    ' up after `import galore_optax` (or galore_optax.chain), or'
    ' galore(optax.adamw(lr), rank=512)'
  )
