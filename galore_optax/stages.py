"""`Galore`: the transformation that `galore` returns, as separate stages.

A `Galore` is an optax transformation whose update can also be called in three
stages: `refresh`, `project` and `apply`. A `Stage` is a `galore` without an
inner optimizer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

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
  """`(tree) -> plans`: one plan for each leaf of parameters or gradients."""
  due: Callable[..., jax.Array]
  """`(state, *, layer=0) -> []`, bool: whether a refresh is due."""
  refresh: Callable[..., Any]
  """`(grads, state, *, layer=0) -> state`: finds the bases that are due, and
  adapts the moments to them."""
  project: Callable[..., Any]
  """`(grads, state) -> low`: the projected gradients [..., r, n], and the whole
  gradients of other leaves, in float32 at least. A frozen group has a zero. The
  function is linear in the gradients."""
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

  stages: Stages
  """The functions of this transformation."""

  @classmethod
  def of(cls, stages: Stages) -> 'Galore':
    """Returns the transformation of the stages.

    The constructor takes `init` and `update`, as that of every transformation
    does: JAX rebuilds a NamedTuple from its fields. A rebuilt transformation
    does not have `stages`.
    """
    tx = cls(stages.init, stages.update)
    tx.stages = stages
    return tx

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


class Stage(optax.GradientTransformationExtraArgs):
  """A `galore` without an inner optimizer; `chain` provides the inner."""

  around: Callable[[optax.GradientTransformation], Galore]
  """`(inner) -> Galore`."""

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
    'galore(...) has no inner transformation. Write'
    ' optax.chain(galore(rank=512), optax.adamw(lr)), with optax.chain looked'
    ' up after `import galore_optax` (or galore_optax.chain), or'
    ' galore(optax.adamw(lr), rank=512). Only the second one works inside'
    ' masked, named_chain or partition, or as the end of a nested chain'
  )
