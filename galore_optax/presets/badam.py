"""BAdam: an optimizer that trains one layer of a stack at a time.

The layers are trained in turns. The state is that of one layer, and it is reset
at the start of each turn. The layer-wise step reads the attributes of
`OneBlock`, and computes weight gradients only for the layer being trained.

Axes: L layers, the leading axis of a stack.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax import checks, paths
from galore_optax.decay import rate_at
from galore_optax.options import names_options
from galore_optax.precision import in_float32
from galore_optax.presets.inner import Inner, check_numbers, without_rate
from galore_optax.sharding import on_any_mesh, placed

Rule = optax.GradientTransformationExtraArgs
Order = Literal['random', 'ascending', 'descending', 'fixed']


class TurnState(NamedTuple):
  """State of the rule for one layer, or of the rule for all other leaves."""

  count: jax.Array
  """[], int32: number of updates so far, over all turns."""
  inner: optax.OptState
  """State of the inner optimizer for the layer being trained."""
  master: Any
  """float32 copy of that layer's weights; () without `master_weights`."""


class OneBlockState(NamedTuple):
  """State of `badam`."""

  block: TurnState
  """State of the layer being trained."""
  rest: Any
  """TurnState of all other leaves; EmptyState if they are frozen."""


class OneBlock(optax.GradientTransformationExtraArgs):
  """A transformation that trains one layer at a time.

  The layer-wise step applies its attributes to each weight separately.
  """

  rule: Rule
  """The transformation of one layer's weights."""
  rest: Rule | None
  """The transformation of leaves outside the stack; None if they are frozen."""
  active: Callable[[jax.Array, int], jax.Array]
  """`(count, number of layers) -> []`, int32: index of the layer to train."""
  check_blocks: Callable[[dict[str, bool]], None]
  """Receives for each path whether the leaf is stacked, and raises ValueError
  unless `blocks` matches exactly the stacked leaves."""
  blocks: str
  """Regex on the paths of the stacked leaves."""


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
) -> OneBlock:
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
  checks.check_count(switch_every=switch_every)
  checks.check_one_of(get_args(Order), order=order)
  check_numbers(learning_rate, weight_decay)
  checks.check_integer(seed=seed)
  checks.check_flag(train_rest=train_rest, master_weights=master_weights)
  regex = 'a regex on paths, such as blocks/.*'
  checks.require(regex, lambda x: isinstance(x, str), blocks=blocks)
  if start is not None:
    checks.check_size(start=start)
  if order == 'random' and start is not None:
    raise ValueError(f"order 'random' has no start, got {start}")
  options = learning_rate, weight_decay, master_weights
  rule = functools.partial(_in_turns, without_rate(inner), *options)
  active = lambda count, num_layers: layer_of_turn(
    count // switch_every, num_layers, order, start, seed
  )
  one = rule(None if order == 'fixed' else switch_every)
  return one_block(one, rule(None) if train_rest else None, active, blocks)


def layer_of_turn(turn, num_layers, order='random', start=None, seed=0):
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
  layers = range(num_layers)
  checks.require(f'in 0..{num_layers - 1}', layers.__contains__, start=start)
  step = {'ascending': 1, 'descending': -1, 'fixed': 0}[order]
  return (start + step * place) % num_layers


def _in_turns(inner, learning_rate, weight_decay, master_weights, every):
  """Returns a rule that resets its inner optimizer every `every` updates.

  None for `every` means never. A learning-rate schedule receives the count of
  updates over all turns.
  """

  def init_fn(params):
    # Placeholder: params may be abstract here, and the first update overwrites
    # it.
    master = optax.tree.zeros_like(params) if master_weights else ()
    return TurnState(jnp.zeros([], jnp.int32), inner.init(params), master)

  @on_any_mesh(lambda updates, state, *_, **__: (updates, state))
  def update_fn(updates, state, params=None, **extra_args):
    count, *kept = state
    due = (count if every is None else count % every) == 0
    new = [inner.init(params), params if master_weights else ()]
    # XLA fuses a select with the update after it. A `lax.cond` would copy the
    # state.
    select = lambda x, old: jnp.where(due, jnp.asarray(x, old.dtype), old)
    kept, master = jax.tree.map(select, new, kept)
    weights = master if master_weights else params
    steps, kept = inner.update(updates, kept, weights, **extra_args)
    rate: Any = rate_at(learning_rate, count)
    down = lambda u, w: jnp.asarray(-rate, u.dtype) * (u + weight_decay * w)
    steps = jax.tree.map(down, steps, weights)
    if master_weights:
      master = optax.apply_updates(master, steps)
      steps = jax.tree.map(lambda m, w: m - w, master, params)
    count = jnp.asarray(optax.safe_increment(count))
    return steps, TurnState(count, kept, master)

  return in_float32(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def one_block(
  rule: Any,
  rest: Any,
  active: Callable[[jax.Array, int], jax.Array],
  blocks: str,
  check: Callable[[Any], None] | None = None,
) -> OneBlock:
  """Applies one rule to the layer being trained, and another to other leaves.

  Args:
    rule: transformation of one layer.
    rest: transformation of the leaves outside the stack; None freezes them.
    active: as in `OneBlock`.
    blocks: regex on the paths of the stacked leaves.
    check: receives the parameters at `init`, and raises ValueError if they do
      not fit.
  """
  rest_rule = rest or optax.with_extra_args_support(optax.set_to_zero())

  @placed
  def init_fn(params):
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
    first = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    layer = jax.tree.map(first, stacks)
    return OneBlockState(rule.init(layer), rest_rule.init(others))

  def update_fn(updates, state, params=None, **extra):
    checks.check_params(params, 'badam')
    (stacks, others), weights = _split(updates, blocks), _split(params, blocks)
    num_layers = jax.tree.leaves(stacks)[0].shape[0]
    layer = active(_updates_done(state.block), num_layers)
    take = lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False)
    ours, own_weights = jax.tree.map(take, (stacks, weights[0]))
    ours, block = rule.update(ours, state.block, own_weights, **extra)
    others, kept = rest_rule.update(others, state.rest, weights[1], **extra)
    put = lambda x, one: lax.dynamic_update_index_in_dim(x, one, layer, 0)
    stacks = jax.tree.map(put, optax.tree.zeros_like(stacks), ours)
    masked = lambda x: isinstance(x, optax.MaskedNode)
    either = lambda x, other: other if masked(x) else x
    updates = jax.tree.map(either, stacks, others, is_leaf=masked)
    return updates, OneBlockState(block, kept)

  def check_blocks(stacked):
    odd = [x for x in stacked if stacked[x] != bool(re.fullmatch(blocks, x))]
    if odd:
      raise ValueError(
        f'blocks {blocks!r} must match the whole layer stack, blocks/..., and'
        ' nothing else where layers are updated one by one; not so for '
        + ', '.join(odd)
      )

  tx = OneBlock(init_fn, update_fn)
  tx.rule, tx.rest = rule, rest
  tx.active, tx.check_blocks, tx.blocks = active, check_blocks, blocks
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


def _split(tree, blocks):
  """Returns the stacked leaves, and the other leaves, as two trees.

  In each tree, a MaskedNode replaces the leaves of the other one.
  """
  mine = paths.matched([blocks], tree, option='blocks')
  mine = jax.tree.structure(tree).unflatten(mine)
  keep = lambda x, yes: x if yes else optax.MaskedNode()
  others = jax.tree.map(lambda x: not x, mine)
  return jax.tree.map(keep, tree, mine), jax.tree.map(keep, tree, others)
