"""`Galore`: the transformation that `galore` returns, as separate stages.

A `Galore` is an optax transformation whose update can also be called in three
stages: `refresh`, `project` and `apply`. A `Stage` is a `galore` without an
inner optimizer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import optax

from galore_optax import containers, edge
from galore_optax.plan import Plan


@dataclasses.dataclass(frozen=True)
class Stages:
  """The functions of a `Galore`.

  `update(g, s, w)` equals `apply(project(g, s1), s1, w, g)`, where `s1` is
  `refresh(g, s)`. The keyword argument `layer` is the index of a layer; a
  layer-wise step passes it with the gradients of one layer.
  """

  init: optax.TransformInitFn
  """`(params) -> state`."""
  update: Callable[..., tuple[Any, Any]]
  """`(updates, state, params=None, *, layer=0, **extra_args)` returns
  `(updates, state)`. The first argument has the gradients."""
  plan: Callable[[Any], list[Plan]]
  """`(tree) -> plans`: one plan for each leaf of parameters or gradients that
  is trained: a floating array with at least one element."""
  due: Callable[..., jax.Array]
  """`(state, *, layer=0) -> []`, bool: whether a refresh is due."""
  refresh: Callable[..., Any]
  """`(grads, state, *, layer=0) -> state`: finds the bases that are due, and
  adapts the moments to them."""
  project: Callable[..., Any]
  """`(grads, state) -> low`: the projected gradients [..., r, n], and the whole
  gradients of other leaves, in float32 at least. A frozen group has a zero. The
  result has arrays instead of boxes, because a box may name the axes of its
  weight. The function is linear in the gradients."""
  apply: Callable[..., tuple[Any, Any]]
  """`(low, state, params=None, grads=None, *, layer=0, **extra_args) ->
  (updates, state)`. The gradients may be None if `linear` is true and params
  are given."""
  linear: bool
  """Whether `apply` reads only the projected gradients. Sums of projected
  gradients can then replace sums of gradients."""
  with_keeper: Callable[[Callable[[Any], Any]], 'Galore']
  """`(f) -> Galore`: the same transformation with f(store) as its store of
  bases."""


class Galore(optax.GradientTransformationExtraArgs):
  """A `galore`, or a chain that begins with one.

  Code that accumulates or all-reduces gradients calls the stages separately:
  `refresh`, `project`, then `apply`. See `Stages`.
  """

  _stages: Stages | None = None

  @classmethod
  def of(cls, stages: Stages) -> 'Galore':
    """Returns the transformation of the stages.

    Its functions accept trees in any containers; those of `stages` receive
    opened trees.

    The constructor takes `init` and `update`, as that of every transformation
    does: JAX rebuilds a NamedTuple from its fields. A rebuilt transformation
    does not have stages.
    """
    stages = _at_edge(stages)
    tx = cls(stages.init, stages.update)
    tx._stages = stages
    return tx

  @property
  def stages(self) -> Stages:
    """The functions of this transformation."""
    if self._stages is None:
      raise AttributeError(
        'this transformation was rebuilt from its `init` and `update` (by'
        ' `_replace` or jax.tree.map), so it has no stages; use the original'
      )
    return self._stages

  @property
  def plan(self) -> Callable[[Any], list[Plan]]:
    """The stage `plan`; see `Stages`."""
    return self.stages.plan

  @property
  def due(self) -> Callable[..., jax.Array]:
    """The stage `due`; see `Stages`."""
    return self.stages.due

  @property
  def refresh(self) -> Callable[..., Any]:
    """The stage `refresh`; see `Stages`."""
    return self.stages.refresh

  @property
  def project(self) -> Callable[..., Any]:
    """The stage `project`; see `Stages`."""
    return self.stages.project

  @property
  def apply(self) -> Callable[..., tuple[Any, Any]]:
    """The stage `apply`; see `Stages`."""
    return self.stages.apply

  @property
  def linear(self) -> bool:
    """The stage `linear`; see `Stages`."""
    return self.stages.linear

  @property
  def with_keeper(self) -> Callable[[Callable[[Any], Any]], 'Galore']:
    """The stage `with_keeper`; see `Stages`."""
    return self.stages.with_keeper


def has_stages(tx: Any) -> TypeGuard[Galore]:
  """Whether a transformation is a `Galore` that was not rebuilt."""
  return isinstance(tx, Galore) and tx._stages is not None


def _at_edge(stages: Stages) -> Stages:
  """Returns stages that accept trees in any containers."""

  def due(state: Any, **layer: Any) -> jax.Array:
    return stages.due(containers.unboxed(state), **layer)

  def refresh(grads: Any, state: Any, **layer: Any) -> Any:
    plain = containers.unboxed(state)
    new = stages.refresh(containers.opened(grads), plain, **layer)
    return containers.reboxed(new, state)

  def project(grads: Any, state: Any) -> Any:
    return stages.project(containers.opened(grads), containers.unboxed(state))

  def apply(
    low: Any,
    state: Any,
    params: Any = None,
    grads: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, Any]:
    low = containers.opened(low)
    weights = containers.where_present(containers.opened(params), low)
    gradients = None if grads is None else containers.opened(grads)
    plain = containers.unboxed(state)
    new, after = stages.apply(low, plain, weights, gradients, **extra_args)
    new = containers.closed(new, params if grads is None else grads)
    return new, containers.reboxed(after, state)

  return dataclasses.replace(
    stages,
    init=edge.at_init(stages.init),
    update=edge.at_update(stages.update),
    plan=lambda tree: stages.plan(containers.opened(tree)),
    due=due,
    refresh=refresh,
    project=project,
    apply=apply,
  )


class Stage(optax.GradientTransformationExtraArgs):
  """A `galore` without an inner optimizer; `chain` provides the inner."""

  around: Callable[[optax.GradientTransformation], Galore] | None = None
  """`(inner) -> Galore`; None if the stage was rebuilt from its fields."""

  @classmethod
  def of(
    cls, around: Callable[[optax.GradientTransformation], Galore]
  ) -> 'Stage':
    """Returns a stage whose `init` and `update` raise TypeError."""
    stage = cls(_raise_no_inner, _raise_no_inner)
    stage.around = around
    return stage


def _raise_no_inner(*_: Any, **__: Any) -> Any:
  raise TypeError(
    'galore(...) has no inner transformation: it comes before the optimizer in'
    ' a chain. Write'
    ' optax.chain(galore(rank=512), optax.adamw(lr)), with optax.chain looked'
    ' up after `import galore_optax` (or galore_optax.chain), or'
    ' galore(optax.adamw(lr), rank=512). Only the second one works inside'
    ' masked, named_chain or partition, or as the end of a nested chain'
  )
