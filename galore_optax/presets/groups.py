"""Learning rates and weight decay by group of parameters.

A group is a regex on the paths of parameters, a multiplier of the learning rate
and one of the weight decay, as in PyTorch's `param_groups`. `grouped` builds a
preset once for each group, with the group's rate and decay. Both multipliers
therefore act where the preset applies rate and decay: in the inner optimizer,
in the residual rule, and in a decay of updated weights.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, edge, paths
from galore_optax.clipping import ClippedTransformation, clipped
from galore_optax.one_layer import OneLayerRule
from galore_optax.plan import Plan
from galore_optax.presets.badam import one_layer_rule
from galore_optax.projection import (
  Whole,
  record_multipliers,
  record_plans,
  recording_plans,
)
from galore_optax.stages import Galore, Stages, has_stages

Preset: TypeAlias = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Group:
  """Parameters that share a learning rate and a weight decay.

  Example:
    >>> Group('embed/.*', rate=10.0, decay=0.0)
    Group(pattern='embed/.*', rate=10.0, decay=0.0)
  """

  pattern: str
  """Regex that matches whole paths, such as 'embed/.*'."""
  rate: float = 1.0
  """Multiplier of the learning rate; 0 freezes the parameters."""
  decay: float = 1.0
  """Multiplier of the weight decay."""

  def __post_init__(self) -> None:
    """Raises ValueError unless all fields are valid."""
    if not isinstance(self.pattern, str):
      rule = "a regex on whole paths, such as 'embed/.*'"
      raise ValueError(f'pattern must be {rule}, got {self.pattern!r}')
    checks.check_not_negative(rate=self.rate, decay=self.decay)

  @property
  def frozen(self) -> bool:
    """Whether the parameters of the group are not updated."""
    return checks.is_zero(self.rate)


class GroupedState(NamedTuple):
  """The state of a grouped transformation."""

  parts: tuple[Any, ...]
  """State of each group, then that of all other parameters. It is an EmptyState
  if a group is frozen or has no parameter in this tree."""


def assigned(
  groups: Sequence[Group], tree: Any, *, strict: bool = True
) -> list[int]:
  """Returns the index of each leaf's group; `len(groups)` for no group.

  Args:
    groups: groups of parameters.
    tree: parameters; only paths are read.
    strict: whether a pattern that matches no path raises. It never raises if
      `tree` is a part of a model.

  Raises:
    ValueError: a pattern is malformed or matches no path, or a leaf belongs to
      two groups.

  >>> assigned([Group('.*/bias')], {'up': {'bias': 0, 'kernel': 1}})
  [0, 1]
  """
  names = paths.paths(tree)
  for group in groups if strict else ():
    paths.matched([group.pattern], tree, option='groups')
  rows = [
    [i for i, group in enumerate(groups) if re.fullmatch(group.pattern, name)]
    for name in names
  ]
  twice = [at for at, row in enumerate(rows) if len(row) > 1]
  if twice:
    several = ' and '.join(repr(groups[i].pattern) for i in rows[twice[0]])
    raise ValueError(
      f'groups {several} have parameters in common, which belong to one group'
      f' only: {", ".join(names[at] for at in twice)}. Narrow a pattern'
    )
  return [row[0] if row else len(groups) for row in rows]


def grouped(preset: Preset, groups: Sequence[Group]) -> Preset:
  """Returns a preset with a learning rate and a weight decay for each group.

  The result has the signature of `preset`, and works with
  `optax.inject_hyperparams` if `preset` does. It calls `preset` once for each
  group and once for all other parameters. In the call for a group, `rate`
  multiplies `learning_rate`, every option whose name ends in `_learning_rate`,
  and the learning rate of a residual rule. `decay` multiplies `weight_decay`
  and every option whose name ends in `_weight_decay`. Defaults of `preset` are
  multiplied as well, and so is the result of a schedule. The option `scale` is
  the same for all groups.

  If both multipliers are 1, an update equals that of `preset` up to rounding.
  `lomo` and `adalomo` still clip by the global norm of the whole gradient. To
  clip with another preset, clip before the groups:
  `optax.chain(optax.clip_by_global_norm(1.0), grouped(...)(...))`.

  The parameters of a frozen group (`rate` 0) have no state: neither moments nor
  bases. The state of all other parameters is that of `preset`, in a
  `GroupedState`.

  Args:
    preset: a function `(learning_rate, ...) -> transformation`.
    groups: groups of parameters; at most one group may match a parameter.
      Without groups the result is `preset`.

  Raises:
    ValueError: an item of `groups` is not a `Group`, or `preset` has no
      argument that a multiplier changes; at `init`, a pattern matches no
      parameter, or a parameter matches two patterns.

  Example:
    >>> from galore_optax import galore_adamw
    >>> groups = [Group('embed', rate=10.0, decay=0.0), Group('norm', rate=0.0)]
    >>> tx = grouped(galore_adamw, groups)(1e-3, rank=2, weight_decay=0.1)
    >>> ones = jnp.ones
    >>> params = {'embed': ones((9, 4)), 'norm': ones(4), 'up': ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> updates['norm'], state.parts[1]
    (Array([0., 0., 0., 0.], dtype=float32), EmptyState())

  References:
    `torch.optim, per-parameter options
    <https://pytorch.org/docs/stable/optim.html#per-parameter-options>`_.
  """
  groups = _checked(groups)
  if not groups:
    return preset
  signature = inspect.signature(preset)
  kinds = {parameter.kind for parameter in signature.parameters.values()}
  # The names of `**options` are known when the preset is called.
  named_at_call = inspect.Parameter.VAR_KEYWORD in kinds
  if not named_at_call:
    _check_arguments(signature.parameters, groups)

  @functools.wraps(preset)
  def make(*args: Any, **options: Any) -> Any:
    rest = preset(*args, **options)
    if named_at_call:
      _check_arguments([*signature.parameters, *options], groups)
    parts = []
    for group in groups:
      mine = _multiplied(signature.bind(*args, **options), group)
      parts.append(None if group.frozen else preset(*mine.args, **mine.kwargs))
    return _joined(groups, (*parts, rest))

  vars(make)['__signature__'] = signature
  return make


def _checked(groups: Any) -> tuple[Group, ...]:
  """Returns the groups; raises ValueError for a value of another type."""
  is_sequence = isinstance(groups, Sequence) and not isinstance(groups, str)
  if not is_sequence or not all(isinstance(x, Group) for x in groups):
    raise ValueError(
      f"groups must be a list of Group, such as [Group('embed/.*', rate=10.0)],"
      f' got {groups!r}'
    )
  return tuple(groups)


def _check_arguments(names: Collection[str], groups: Sequence[Group]) -> None:
  """Raises ValueError if a multiplier other than 1 changes no argument."""
  needs = {'learning_rate': 'rate', 'weight_decay': 'decay'}
  for name, field in needs.items():
    acts = any(not _is_one(getattr(group, field)) for group in groups)
    if acts and name not in names:
      raise ValueError(
        f'groups multiply {name} by {field}, but the preset takes'
        f' {", ".join(names)}: leave {field} at 1, or pass a function of {name}'
      )


def _is_one(factor: Any) -> bool:
  return checks.is_number(factor) and factor == 1


def _multiplied(
  given: inspect.BoundArguments, group: Group
) -> inspect.BoundArguments:
  """Returns the arguments for the call of a preset for one group.

  They include the defaults, which are multiplied too.
  """
  given.apply_defaults()
  parameters = given.signature.parameters
  for name, value in given.arguments.items():
    kind = parameters[name].kind
    if kind is inspect.Parameter.VAR_KEYWORD:
      new = {x: _argument(x, one, group) for x, one in value.items()}
    elif kind is inspect.Parameter.VAR_POSITIONAL:
      new = value
    else:
      new = _argument(name, value, group)
    given.arguments[name] = new
  return given


def _argument(name: str, value: Any, group: Group) -> Any:
  """Returns the value of one argument of a preset for a group."""
  if name == 'learning_rate' or name.endswith('_learning_rate'):
    if value is None and name == 'learning_rate' and not _is_one(group.rate):
      raise ValueError(
        f'groups multiply learning_rate by rate, got learning_rate=None: pass a'
        f' number or a schedule, or leave the rate of {group.pattern!r} at 1'
      )
    return times(value, group.rate)
  if name == 'weight_decay' or name.endswith('_weight_decay'):
    return times(value, group.decay)
  if _is_rule_with_rate(value):
    rate = times(value.learning_rate, group.rate)
    return dataclasses.replace(value, learning_rate=rate)
  return value


def _is_rule_with_rate(value: Any) -> bool:
  """Whether a value is a residual rule, such as `Sgd`, with a rate."""
  if not dataclasses.is_dataclass(value) or isinstance(value, type):
    return False
  names = [field.name for field in dataclasses.fields(value)]
  return 'learning_rate' in names


def times(value: Any, factor: Any) -> Any:
  """Returns a number or a schedule times a factor; None stays None.

  >>> times(0.5, 3), times(lambda count: 2 * count, 3)(4)
  (1.5, 24)
  """
  if value is None or _is_one(factor):
    return value
  if callable(value):
    return lambda count: factor * value(count)
  return factor * value


def _joined(
  groups: Sequence[Group], parts: Sequence[Any], *, strict: bool = True
) -> Any:
  """Joins the transformations of all groups to one of the same type.

  Args:
    groups: the groups of parameters.
    parts: a transformation for each group, None if the group is frozen, and
      last the transformation of all other parameters.
    strict: whether a pattern must match a parameter of the tree.
  """
  together = _Together(tuple(groups), tuple(parts), strict)
  rest = parts[-1]

  def of_each(name: str) -> list[Any]:
    return [part if part is None else getattr(part, name) for part in parts]

  if has_stages(rest):
    return Galore.of(together.stages())
  if isinstance(rest, ClippedTransformation):
    # Clip by the norm of the gradient of all groups together.
    return clipped(_joined(groups, of_each('rule')), rest.clip_norm)
  if isinstance(rest, OneLayerRule):
    join = functools.partial(_joined, groups, strict=False)
    others = None if rest.rest is None else join(of_each('rest'))
    return one_layer_rule(
      join(of_each('rule')), others, rest.active, rest.blocks, together.check
    )
  return edge.at_edge(
    optax.GradientTransformationExtraArgs(together.init, together.update)
  )


@dataclasses.dataclass(frozen=True)
class _Together:
  """The parts of a grouped transformation, each on the leaves of its group.

  In the tree that a part receives, `paths.Elsewhere` replaces the leaves of
  other groups. A part therefore treats its leaves as it would in the whole
  tree.
  """

  groups: tuple[Group, ...]
  """The groups of parameters."""
  parts: tuple[Any, ...]
  """A transformation for each group, None if the group is frozen, and last the
  transformation of all other parameters."""
  strict: bool
  """Whether a pattern must match a parameter of the tree."""

  def stages(self) -> Stages:
    """Returns the functions of a `Galore`; all parts are `Galore`s too."""
    return Stages(
      init=self.init,
      update=self.update,
      plan=self.plan,
      due=self.due,
      refresh=self.refresh,
      project=self.project,
      apply=self.apply,
      linear=all(part.linear for part in self._moving()),
      with_keeper=self.with_keeper,
    )

  def with_keeper(self, f: Callable[[Any], Any]) -> Galore:
    """Returns this transformation with f(store) as each part's basis store."""
    parts = [
      part if part is None else part.with_keeper(f) for part in self.parts
    ]
    return Galore.of(dataclasses.replace(self, parts=tuple(parts)).stages())

  def check(self, params: Any) -> None:
    """Raises ValueError if a group or an option does not fit the tree."""
    assigned(self.groups, params)
    if not paths.is_part(params):
      # `init` of a part checks less, because its tree has `Elsewhere` nodes.
      # Plans are not recorded here, because a frozen group must have none.
      with recording_plans():
        jax.eval_shape(self.parts[-1].init, params)

  def init(self, params: Any) -> GroupedState:
    """Returns the state of each group."""
    if self.strict:
      self.check(params)
    mine = self._indices(params)
    with recording_plans() as recorded:
      state = GroupedState(
        tuple(
          part.init(_share(params, mine, i))
          if part is not None and i in mine
          else optax.EmptyState()
          for i, part in enumerate(self.parts)
        )
      )
    frozen = [
      Whole(name, tuple(x.shape), 'frozen: rate 0')
      for name, x, index in zip(
        paths.paths(params), jax.tree.leaves(params), mine, strict=True
      )
      if self.parts[index] is None
    ]
    record_plans([*recorded.plans.values(), *frozen])
    factors = [(g.rate, g.decay) for g in self.groups] + [(1.0, 1.0)]
    multipliers = {}
    for name, index in zip(paths.paths(params), mine, strict=True):
      # A part that is grouped too has multipliers of its own.
      rate, decay = recorded.multipliers.get(name, (1.0, 1.0))
      by_rate, by_decay = factors[index]
      multipliers[name] = times(rate, by_rate), times(decay, by_decay)
    record_multipliers(multipliers)
    return state

  def update(
    self, updates: Any, state: Any, params: Any = None, **extra: Any
  ) -> tuple[Any, GroupedState]:
    """Returns the updates of all groups, zero where frozen, and the state."""

    def of_part(i: int, part: Any, share: Callable) -> tuple[Any, Any]:
      weights = None if params is None else share(params)
      return part.update(share(updates), state.parts[i], weights, **extra)

    return self._run(of_part, updates, state, frozen=jnp.zeros_like)

  def plan(self, tree: Any) -> list[Plan]:
    """Returns how each leaf is projected; a frozen leaf is a `Whole`."""
    mine = self._indices(tree)
    pairs = zip(paths.paths(tree), jax.tree.leaves(tree), strict=True)
    plans: list[Plan] = [Whole(path, tuple(x.shape)) for path, x in pairs]
    for i, part in enumerate(self.parts):
      if part is not None and i in mine:
        places = [at for at, index in enumerate(mine) if index == i]
        found = part.plan(_share(tree, mine, i))
        for at, plan in zip(places, found, strict=True):
          plans[at] = plan
    return plans

  def due(self, state: GroupedState, *, layer: Any = 0) -> jax.Array:
    """Returns whether a refresh computes a new basis: a scalar, bool."""
    found = [
      part.due(one, layer=layer)
      for part, one in zip(self.parts, state.parts, strict=True)
      if not isinstance(one, optax.EmptyState)
    ]
    return functools.reduce(jnp.logical_or, found, jnp.array(False))

  def refresh(self, grads: Any, state: GroupedState, *, layer: Any = 0) -> Any:
    """Returns the state with new bases for each group whose refresh is due."""
    mine = self._indices(grads)
    new = list(state.parts)
    for i, part in enumerate(self.parts):
      if part is not None and i in mine:
        new[i] = part.refresh(_share(grads, mine, i), new[i], layer=layer)
    return GroupedState(tuple(new))

  def project(self, grads: Any, state: GroupedState) -> Any:
    """Returns the projected gradients; zero for a frozen leaf."""

    def of_part(i: int, part: Any, share: Callable) -> tuple[Any, Any]:
      return part.project(share(grads), state.parts[i]), state.parts[i]

    def nothing(g: jax.Array) -> jax.Array:
      return jnp.zeros([], jnp.float32)

    return self._run(of_part, grads, state, frozen=nothing)[0]

  def apply(
    self,
    low: Any,
    state: GroupedState,
    params: Any = None,
    grads: Any = None,
    **extra: Any,
  ) -> tuple[Any, GroupedState]:
    """Returns the updates and the next state.

    `state` must already have the bases of this step.
    """

    def of_part(i: int, part: Any, share: Callable) -> tuple[Any, Any]:
      weights = None if params is None else share(params)
      gradients = None if grads is None else share(grads)
      return part.apply(share(low), state.parts[i], weights, gradients, **extra)

    like = params if grads is None else grads
    return self._run(of_part, like, state, frozen=jnp.zeros_like)

  def _moving(self) -> list[Any]:
    return [part for part in self.parts if part is not None]

  def _indices(self, tree: Any) -> list[int]:
    """Returns the index in `groups` of each leaf of a model or its part."""
    return assigned(self.groups, tree, strict=False)

  def _run(
    self,
    of_part: Callable[..., tuple[Any, Any]],
    like: Any,
    state: GroupedState,
    *,
    frozen: Callable[[jax.Array], jax.Array],
  ) -> tuple[Any, GroupedState]:
    """Runs each part on its leaves; returns one tree, and the next state.

    Args:
      of_part: `(index, part, share) -> (tree, state)`; `share(tree)` is the
        part's share of a tree.
      like: a tree that has the leaves of all groups.
      state: of all parts.
      frozen: makes the result for a leaf of a frozen group.
    """
    mine = self._indices(like)
    leaves, treedef = jax.tree.flatten(like)
    new = list(state.parts)
    found = {i: iter(()) for i in range(len(self.parts))}
    for i, part in enumerate(self.parts):
      if part is not None and i in mine:
        share = functools.partial(_share, mine=mine, index=i)
        tree, new[i] = of_part(i, part, share)
        found[i] = iter(jax.tree.leaves(tree))
    answers = [
      frozen(x) if self.parts[i] is None else next(found[i])
      for i, x in zip(mine, leaves, strict=True)
    ]
    return treedef.unflatten(answers), GroupedState(tuple(new))


def _share(tree: Any, mine: Sequence[int], index: int) -> Any:
  """Returns a tree with `Elsewhere` for the leaves of other groups."""
  leaves, treedef = jax.tree.flatten(tree)
  parts = [
    x if i == index else paths.Elsewhere()
    for x, i in zip(leaves, mine, strict=True)
  ]
  return treedef.unflatten(parts)
