"""This module holds an optimizer of one layer of a stack at a time.

Its state is that of one layer: the layers take turns, and with each turn it
starts anew. A layer-wise step reads the parts of a `OneBlock`, and computes
the weight gradient of the layer whose turn it is and of no other.

Axes: L layers, the leading axis of a stack.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import decay
from galore_optax import paths as selection
from galore_optax.layerwise import stack as stacks
from galore_optax.precision import in_float32
from galore_optax.presets.step_size import scale_by_step_size
from galore_optax.subspace.turns import Turns

PyTree = Any


class TurnState(NamedTuple):
  """State of the rule of a block."""

  count: jax.Array  # [], int32: updates done, over all turns
  inner: optax.OptState  # of the block whose turn it is


class MasterState(NamedTuple):
  """State of `on_master_weights`."""

  master: PyTree  # the parameters in float32
  inner: optax.OptState


class OneBlockState(NamedTuple):
  """State of `one_block`."""

  block: Any  # TurnState, of one layer
  rest: Any  # of what is in no block; () where that is frozen


class OneBlock(optax.GradientTransformationExtraArgs):
  """A transformation that trains one layer at a time, in a form to be read."""

  rule: optax.GradientTransformationExtraArgs
  rest: optax.GradientTransformationExtraArgs | None
  turns: Turns
  switch_every: int
  blocks: str

  def active(self, count: jax.Array, num_layers: int) -> jax.Array:
    """Returns the layer whose turn it is: [], int32."""
    return self.turns.at(count // self.switch_every, 1, num_layers)[0]

  def check_blocks(self, stacked: dict[str, bool]) -> None:
    """Raises ValueError where the blocks are not the layers of a model."""
    odd = [
      n
      for n, yes in stacked.items()
      if yes != bool(re.fullmatch(self.blocks, n))
    ]
    if odd:
      raise ValueError(
        f'blocks {self.blocks!r} must match the whole layer stack, blocks/..., '
        'and nothing else where layers are updated one by one; not so for '
        + ', '.join(odd)
      )


def one_block(
  rule: optax.GradientTransformationExtraArgs,
  rest: optax.GradientTransformationExtraArgs | None,
  *,
  turns: Turns,
  switch_every: int,
  blocks: str,
) -> OneBlock:
  """Applies a rule to the layer whose turn it is.

  Args:
    rule: for the weights of one layer; see `with_turns`.
    rest: for what is in no block; None freezes that.
    turns: in which order.
    switch_every: updates of a turn.
    blocks: regex on the paths of the stacked leaves [L, ...].

  Raises:
    ValueError: at `init`, the regex matches nothing, or leaves that are not
      stacks of one length.
  """

  def marks(tree: PyTree) -> list[bool]:
    return selection.matched([blocks], tree, option='blocks')

  def init_fn(params: optax.Params) -> OneBlockState:
    mine = marks(params)
    _check_stacks(params, mine, blocks)
    layer, others = _pick(params, mine, _first), _pick(params, mine, None)
    return OneBlockState(
      rule.init(layer), () if rest is None else rest.init(others)
    )

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, OneBlockState]:
    if params is None:
      raise ValueError('badam needs params: tx.update(g, state, params)')
    mine = marks(updates)
    num_layers = _num_layers(updates, mine)
    active = tx.active(state.block.count, num_layers)
    take = lambda x: stacks.take(x, active)
    layer_updates, block = rule.update(
      _pick(updates, mine, take),
      state.block,
      _pick(params, mine, take),
      **extra_args,
    )
    others, rest_state = _pick(updates, mine, None), state.rest
    if rest is None:
      others = jax.tree.map(jnp.zeros_like, others)
    else:
      others, rest_state = rest.update(
        others, rest_state, _pick(params, mine, None), **extra_args
      )
    layer, kept = map(iter, map(jax.tree.leaves, (layer_updates, others)))
    leaves, treedef = jax.tree.flatten(updates)
    whole = [
      stacks.put(jnp.zeros_like(g), next(layer), active) if yes else next(kept)
      for g, yes in zip(leaves, mine, strict=True)
    ]
    return treedef.unflatten(whole), OneBlockState(block, rest_state)

  tx = OneBlock(init_fn, update_fn)
  tx.rule, tx.rest, tx.blocks = rule, rest, blocks
  tx.turns, tx.switch_every = turns, switch_every
  return tx


def with_turns(
  inner: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  *,
  restart_every: int | None,
  weight_decay: float,
  master_weights: bool,
) -> optax.GradientTransformationExtraArgs:
  """Returns a rule whose inner starts anew with each turn.

  The learning rate follows the count of all updates. Everything is computed
  in float32, and the updates come back in the type of the gradients.

  Args:
    inner: a transformation without a learning rate.
    learning_rate: a number, or a schedule of the step.
    restart_every: updates of a turn; None for one that does not end.
    weight_decay: decoupled, times the learning rate.
    master_weights: keep float32 weights during a turn.

  Example:
    >>> tx = with_turns(
    ...   optax.trace(0.5), 1.0, restart_every=2, weight_decay=0.0,
    ...   master_weights=False)
    >>> w = jnp.zeros(1)
    >>> state, out = tx.init(w), []
    >>> for _ in range(4):
    ...   u, state = tx.update(jnp.ones(1), state, w)
    ...   out.append(float(u[0]))
    >>> out
    [-1.0, -1.5, -1.0, -1.5]
  """
  rule = optax.chain(
    inner, optax.add_decayed_weights(weight_decay), scale_by_step_size()
  )
  if master_weights:
    rule = on_master_weights(rule)

  def init_fn(params: optax.Params) -> TurnState:
    return TurnState(jnp.zeros([], jnp.int32), rule.init(params))

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, TurnState]:
    # At the first update too: `init` may have seen no more than shapes.
    due = state.count == 0
    if restart_every is not None:
      due = state.count % restart_every == 0
    # A select, which joins the update that follows; a cond would copy.
    inner_state = jax.tree.map(
      lambda new, old: jnp.where(due, jnp.asarray(new, old.dtype), old),
      rule.init(params),
      state.inner,
    )
    size = decay.rate_at(learning_rate, state.count)
    sizes = jax.tree.map(lambda _: size, updates)
    updates, inner_state = rule.update(
      updates, inner_state, params, step_size=sizes, **extra_args
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, TurnState(count, inner_state)

  return in_float32(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def on_master_weights(
  inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Updates a float32 copy of the weights, which the weights are rounded from.

  Without it, a bfloat16 weight loses every update below 2^-9 of it.

  Args:
    inner: a transformation that returns steps to add; of `in_float32`.

  Example:
    >>> tx = in_float32(on_master_weights(optax.sgd(1.0)))
    >>> w = jnp.ones(1, jnp.bfloat16)
    >>> state = tx.init(w)
    >>> for _ in range(4):
    ...   u, state = tx.update(jnp.full(1, -2.0**-9), state, w)
    ...   w = optax.apply_updates(w, u)
    >>> print(w, state.master)
    [1.00781] [1.0078125]
  """
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> MasterState:
    return MasterState(jax.tree.map(_concrete, params), inner.init(params))

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, MasterState]:
    steps, inner_state = inner.update(
      updates, state.inner, state.master, **extra_args
    )
    master = optax.apply_updates(state.master, steps)
    apart = jax.tree.map(lambda m, w: m - w, master, params)
    return apart, MasterState(master, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_stacks(params: PyTree, mine: list[bool], blocks: str) -> None:
  shapes = {
    path: x.shape
    for path, x, yes in zip(
      selection.paths(params), jax.tree.leaves(params), mine, strict=True
    )
    if yes
  }
  if any(len(s) < 2 for s in shapes.values()) or (
    len({s[0] for s in shapes.values()}) != 1
  ):
    raise ValueError(
      f'blocks {blocks!r} must match stacks [L, ...] of one length L, got '
      + ', '.join(f'{path} {shape}' for path, shape in shapes.items())
    )


def _num_layers(tree: PyTree, mine: list[bool]) -> int:
  leaves = zip(jax.tree.leaves(tree), mine, strict=True)
  return next(x.shape[0] for x, yes in leaves if yes)


def _pick(
  tree: PyTree, mine: list[bool], take: Callable[[Any], Any] | None
) -> PyTree:
  """Returns the stacks, one layer taken of each; without `take`, the others."""
  leaves, treedef = jax.tree.flatten(tree)
  none = optax.MaskedNode()
  return treedef.unflatten(
    [
      (take(x) if take else none) if yes else (none if take else x)
      for x, yes in zip(leaves, mine, strict=True)
    ]
  )


def _first(x: Any) -> Any:
  """Returns the first layer of an array, abstract or not."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  return x[0]


def _concrete(x: Any) -> jax.Array:
  """Returns an array; zeros where it is abstract."""
  return (
    jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x
  )
