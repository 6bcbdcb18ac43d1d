"""BAdam: an optimizer that trains one layer of a stack at a time.

The layers are trained in turns. The state is that of one layer, and it is reset
at the start of each turn. The layer-wise step reads the attributes of
`OneLayerRule`, and computes weight gradients only for the layer being trained.

Axes: L layers, the leading axis of a stack.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax import checks, edge, paths
from galore_optax.decay import rate_at
from galore_optax.one_layer import OneLayerRule
from galore_optax.options import names_options
from galore_optax.precision import in_float32
from galore_optax.presets.inner import (
  Inner,
  check_numbers,
  require_no_learning_rate,
)
from galore_optax.sharding import on_any_mesh

Rule: TypeAlias = optax.GradientTransformationExtraArgs
Order: TypeAlias = Literal['random', 'ascending', 'descending', 'fixed']


class TurnState(NamedTuple):
  """State of the rule for one layer, or of the rule for all other leaves."""

  count: jax.Array
  """[], int32: number of updates so far, over all turns."""
  inner: optax.OptState
  """State of the inner optimizer for the layer being trained."""
  master: Any
  """float32 copy of that layer's weights; () without `master_weights`."""


class OneLayerState(NamedTuple):
  """State of `badam`."""

  block: Any
  """State of the rule for the layer being trained: a TurnState, or several of
  them with `grouped`."""
  rest: Any
  """TurnState of all other leaves; EmptyState if they are frozen."""


@names_options()
def badam(
  learning_rate: optax.ScalarOrSchedule,
  *,
  switch_every: int = 100,
  order: Order = 'random',
  inner: Inner = 'adam',
  weight_decay: float = 0.0,
  blocks: str = 'blocks/.*',
  train_rest: bool = False,
  master_weights: bool = False,
  start: int | None = None,
  seed: int = 0,
) -> OneLayerRule:
  """Adam, or another inner optimizer, on one layer of a stack at a time.

  The inner optimizer has the state of one layer, which is reset at the start of
  the next layer's turn. The layer being trained is a function of the step
  count, so a resumed run continues with the same layer. `layerwise` computes
  weight gradients only for the layer being trained. Updates are computed in
  float32.

  State: that of the inner optimizer for one layer, in float32 (Adam: 8 bytes
  for each element of the layer), and 4 bytes more with `master_weights`.

  Args:
    learning_rate: a number, or a schedule of the step.
    switch_every: number of updates of a layer in one turn.
    order: 'random' (a new permutation in each cycle), 'ascending',
      'descending', or 'fixed' (always the same layer).
    inner: 'adam', 'lion', 'sgdm', or a transformation without a learning rate.
    weight_decay: decoupled, times the learning rate, on the weights being
      trained.
    blocks: regex on the paths of the stacked leaves [L, ...].
    train_rest: train the leaves outside the stack (embedding, head, norm) too,
      at every step; they are frozen otherwise.
    master_weights: store a float32 copy of the layer being trained. bfloat16
      weights need it, because they lose every update below 2^-9 of their size.
    start: index of the first layer. The default is the last layer for
      'descending', and layer 0 otherwise. Not allowed with a random order.
    seed: seed of the random order.

  Raises:
    ValueError: an option out of range; at `init`, `blocks` matches nothing, or
      leaves that are not stacks of one length, or the inner optimizer has a
      learning rate.

  Example:
    >>> tx = badam(0.01, order='ascending')
    >>> params = {'blocks': {'w': jnp.ones((4, 3, 5))}, 'head': jnp.ones(3)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(abs(updates['blocks']['w']).sum((1, 2)) > 0, updates['head'])
    [ True False False False] [0. 0. 0.]

  References:
    Luo et al., `BAdam <https://arxiv.org/abs/2404.02827>`_, 2024.
  """
  checks.check_static(
    switch_every=switch_every,
    train_rest=train_rest,
    master_weights=master_weights,
    start=start,
  )
  checks.check_count(switch_every=switch_every)
  checks.check_one_of(get_args(Order), order=order)
  check_numbers(learning_rate, weight_decay)
  checks.check_integer(seed=seed)
  checks.check_flag(train_rest=train_rest, master_weights=master_weights)
  if not isinstance(blocks, str):
    regex = 'a regex on paths, such as blocks/.*'
    raise ValueError(f'blocks must be {regex}, got {blocks!r}')
  if start is not None:
    checks.check_size(start=start)
  if order == 'random' and start is not None:
    raise ValueError(f"order 'random' has no start, got {start}")
  checked_inner = require_no_learning_rate(inner)

  def rule(reset_every: int | None) -> Rule:
    return _in_turns(
      checked_inner, learning_rate, weight_decay, master_weights, reset_every
    )

  def active(count: jax.Array, num_layers: int) -> jax.Array:
    turn = count // switch_every
    return layer_of_turn(turn, num_layers, order, start, seed)

  return one_layer_rule(
    rule(None if order == 'fixed' else switch_every),
    rule(None) if train_rest else None,
    active,
    blocks,
  )


def layer_of_turn(
  turn: Any,
  num_layers: int,
  order: Order = 'random',
  start: int | None = None,
  seed: int = 0,
) -> jax.Array:
  """Returns the index of the layer that is trained in a turn: [], int32.

  Args:
    turn: number of the turn, from 0.
    num_layers: number L of layers.
    order: as in `badam`.
    start: as in `badam`.
    seed: as in `badam`.

  >>> [int(layer_of_turn(t, 3, 'descending')) for t in range(4)]
  [2, 1, 0, 2]
  """
  cycle, place = divmod(jnp.asarray(turn, jnp.int32), num_layers)
  if order == 'random':
    key = jax.random.fold_in(jax.random.key(seed), cycle)
    return jax.random.permutation(key, num_layers)[place].astype(jnp.int32)
  if start is None:
    start = num_layers - 1 if order == 'descending' else 0
  if start not in range(num_layers):
    raise ValueError(f'start must be in 0..{num_layers - 1}, got {start!r}')
  step = {'ascending': 1, 'descending': -1, 'fixed': 0}[order]
  return (start + step * place) % num_layers


def _in_turns(
  inner: optax.GradientTransformationExtraArgs,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float,
  master_weights: bool,
  reset_every: int | None,
) -> Rule:
  """Returns the rule of one layer, or of the leaves outside the stack.

  Args:
    inner: the inner optimizer.
    learning_rate: a number, or a schedule of the number of updates over all
      turns.
    weight_decay: as in `badam`.
    master_weights: as in `badam`.
    reset_every: number of updates after which the state is reset; None for
      never.
  """

  def init_fn(params: optax.Params) -> TurnState:
    # Placeholder: params may be abstract here, and the first update overwrites
    # it.
    master = optax.tree.zeros_like(params) if master_weights else ()
    return TurnState(jnp.zeros([], jnp.int32), inner.init(params), master)

  def update(
    updates: optax.Updates,
    state: Any,
    params: Any,
    extra_args: dict[str, Any],
  ) -> tuple[Any, TurnState]:
    count = state.count
    # The state at count 0 is a placeholder, so it is reset in every case.
    turn_starts = (count if reset_every is None else count % reset_every) == 0

    def reset(new: Any, old: jax.Array) -> jax.Array:
      # XLA fuses a select with the update after it. A `lax.cond` would copy the
      # state.
      return jnp.where(turn_starts, jnp.asarray(new, old.dtype), old)

    inner_state = jax.tree.map(reset, inner.init(params), state.inner)
    first_master = params if master_weights else ()
    master = jax.tree.map(reset, first_master, state.master)
    weights = master if master_weights else params
    steps, inner_state = inner.update(
      updates, inner_state, weights, **extra_args
    )
    rate: Any = rate_at(learning_rate, count)

    def scale_and_decay(u: jax.Array, w: jax.Array) -> jax.Array:
      return jnp.asarray(-rate, u.dtype) * (u + weight_decay * w)

    steps: Any = jax.tree.map(scale_and_decay, steps, weights)
    if master_weights:
      master = optax.apply_updates(master, steps)
      steps = jax.tree.map(lambda m, w: m - w, master, params)
    count = jnp.asarray(optax.safe_increment(count))
    return steps, TurnState(count, inner_state, master)

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, TurnState]:
    run = on_any_mesh(update, like=lambda: (updates, state))
    return run(updates, state, params, extra_args)

  return in_float32(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def one_layer_rule(
  rule: Rule,
  rest: Rule | None,
  active: Callable[[jax.Array, int], jax.Array],
  blocks: str,
  check: Callable[[Any], None] | None = None,
) -> OneLayerRule:
  """Applies one rule to the layer being trained, and another to other leaves.

  Args:
    rule: transformation of one layer.
    rest: transformation of the leaves outside the stack; None freezes them.
    active: as in `OneLayerRule`.
    blocks: regex on the paths of the stacked leaves.
    check: receives the parameters at `init`, and raises ValueError if they do
      not fit.
  """
  rest_rule = rest or optax.with_extra_args_support(optax.set_to_zero())

  def init_fn(params: Any) -> OneLayerState:
    if check is not None:
      check(params)
    stacks, others = _split(params, blocks)
    shapes = [x.shape for x in jax.tree.leaves(stacks)]
    lengths = {shape[0] for shape in shapes if len(shape) > 1}
    if len(lengths) > 1 or any(len(shape) < 2 for shape in shapes):
      pairs = zip(paths.paths(stacks), shapes, strict=True)
      raise ValueError(
        f'blocks {blocks!r} must match stacks [L, ...] of one length L, got '
        + ', '.join(f'{path} {shape}' for path, shape in pairs)
      )

    def one_layer(x: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    layer: Any = jax.tree.map(one_layer, stacks)
    return OneLayerState(rule.init(layer), rest_rule.init(others))

  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, OneLayerState]:
    checks.check_params(params, 'badam')
    stacks, others = _split(updates, blocks)
    stacked_weights, other_weights = _split(params, blocks)
    num_layers = jax.tree.leaves(stacks)[0].shape[0]
    layer = active(_updates_done(state.block), num_layers)

    def take(stack: jax.Array) -> jax.Array:
      return lax.dynamic_index_in_dim(stack, layer, keepdims=False)

    def put(stack: jax.Array, x: jax.Array) -> jax.Array:
      return lax.dynamic_update_index_in_dim(stack, x, layer, 0)

    grads = jax.tree.map(take, stacks)
    weights = jax.tree.map(take, stacked_weights)
    step, layer_state = rule.update(grads, state.block, weights, **extra_args)
    others, rest_state = rest_rule.update(
      others, state.rest, other_weights, **extra_args
    )
    stacks = jax.tree.map(put, optax.tree.zeros_like(stacks), step)
    # For each leaf, one of the two trees has a MaskedNode.
    updates = jax.tree.map(
      lambda x, other: other if _is_masked(x) else x,
      stacks,
      others,
      is_leaf=_is_masked,
    )
    return updates, OneLayerState(layer_state, rest_state)

  def check_blocks(stacked: dict[str, bool]) -> None:
    odd = [x for x in stacked if stacked[x] != bool(re.fullmatch(blocks, x))]
    if odd:
      raise ValueError(
        f'blocks {blocks!r} must match the whole layer stack, blocks/..., and'
        ' nothing else where layers are updated one by one; not so for '
        + ', '.join(odd)
      )

  tx = OneLayerRule(edge.at_init(init_fn), edge.at_update(update_fn))
  tx.rule = rule
  tx.rest = rest
  tx.active = active
  tx.blocks = blocks
  tx.check_blocks = check_blocks
  return tx


def _updates_done(state: Any) -> jax.Array:
  """Returns the number of updates from the state of a rule.

  With `grouped`, the state contains a `TurnState` for each group, and all have
  the same count.
  """

  def is_turn(x: Any) -> bool:
    return isinstance(x, TurnState)

  turns = filter(is_turn, jax.tree.leaves(state, is_leaf=is_turn))
  # Without a `TurnState` all layers are frozen, and any index is correct.
  return next((turn.count for turn in turns), jnp.int32(0))


def _is_masked(node: Any) -> bool:
  return isinstance(node, optax.MaskedNode)


def _split(tree: Any, blocks: str) -> tuple[Any, Any]:
  """Returns the stacked leaves, and the other leaves, as two trees.

  In each tree, a MaskedNode replaces the leaves of the other one.
  """
  is_stacked = paths.matched([blocks], tree, option='blocks')
  leaves, treedef = jax.tree.flatten(tree)
  pairs = list(zip(leaves, is_stacked, strict=True))
  none = optax.MaskedNode()
  stacked = treedef.unflatten([x if yes else none for x, yes in pairs])
  others = treedef.unflatten([none if yes else x for x, yes in pairs])
  return stacked, others
