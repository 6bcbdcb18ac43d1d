"""This module holds the layer-wise step: a reverse loop over a layer stack.

Every layer is updated as soon as its gradient appears, so that the gradient of
no more than one layer exists at a time. Any optax transformation is a rule:
`lomo(lr)` makes the step LOMO, `galore_adamw_8bit(...)` layer-wise GaLore.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax import clipping, gradients, parts, stacks
from galore_optax.pullback import pull_back
from galore_optax.weights import ARRAYS, Weights

# Axes: L layers, the leading axis of a stack; K microbatches; N examples.

PyTree = Any
Entry = tuple[Any, optax.OptState]  # a stored weight and its state of tx
Visit = Callable[[Any, str, jax.Array, Any], Any]


class Layers(Protocol):
  """What `layerwise` asks of a model: three pure functions.

  `params['blocks']` is the stack, every leaf `[L, ...]`; the other entries of
  `params` belong to `embed` and `loss`. `x` is a pytree of one structure and
  shape from the first block to the last; its integer leaves (positions,
  segments) are carried along and not differentiated.
  """

  def embed(self, params: PyTree, batch: PyTree) -> PyTree:
    """Returns what the first block reads."""
    ...

  def block(self, layer_params: PyTree, x: PyTree) -> PyTree:
    """Returns what the next block reads."""
    ...

  def loss(
    self, params: PyTree, x: PyTree, batch: PyTree
  ) -> tuple[jax.Array, PyTree]:
    """Returns the mean loss, and sums that the metrics carry."""
    ...


class LayerwiseState(NamedTuple):
  """State of a layer-wise step."""

  count: jax.Array  # [], int32: steps done
  norm: jax.Array  # [], float32: norm of the last gradient, before clipping
  inner: dict[str, optax.OptState]  # of tx, by weight; [L, ...] for 'blocks/'


def layerwise(
  model: Layers,
  tx: optax.GradientTransformation,
  *,
  clip_norm: float | None = None,
  clip: Literal['exact', 'previous'] = 'exact',
  microbatches: int = 1,
  slices: dict[str, int] | None = None,
  weights: Weights = ARRAYS,
) -> 'Layerwise':
  """Makes a training step that updates every layer as its gradient appears.

  Between the two passes only the input of each block is kept; the reverse
  loop recomputes one block, takes its gradient, updates that layer in place
  and moves on. The result is that of the whole-tree step (differentiate the
  composition, `tx.update`, `optax.apply_updates`) for every `tx` that treats
  leaves one by one and their leading axes as batch; `layer=`, the index of
  the layer, reaches `tx.update` as an extra argument. Jit the step and donate
  `params` and `state`, or nothing happens in place.

  Args:
    model: the three functions of `Layers`.
    tx: any optax transformation.
    clip_norm: largest global norm of the gradient, or None. Taken from `tx`
      if that is `clipped`.
    clip: where that norm comes from: 'exact' runs the backward pass twice, as
      LOMO does; 'previous' takes the norm of the step before (of this step at
      the first one) and costs nothing.
    microbatches: the batch is passed through the model in this many parts.
      Each layer's gradient is summed over the parts, in float32, before its
      update, so that a refresh sees the gradient of the whole batch and no
      second layer's gradient is ever held. The inputs of the blocks are kept
      for the whole batch.
    slices: weights outside the stack that are updated in this many slices of
      their leading axis, each with a state of its own, by path: bounds the
      scratch of a large vocabulary where `tx` works element by element.
    weights: how weights are stored; default, as the arrays they are.

  Returns:
    An object with `init(params) -> state` and `(params, state, batch) ->
    (params, state, metrics)`. Metrics are `loss`, the mean over microbatches;
    `grad_norm`, before clipping; and the sum of what `model.loss` returns
    beside the loss.

  Example:
    >>> class Linear:
    ...   def embed(self, params, batch):
    ...     return batch['x']
    ...   def block(self, layer_params, x):
    ...     return x @ layer_params['w']
    ...   def loss(self, params, x, batch):
    ...     return jnp.mean((x - batch['y']) ** 2), {}
    >>> params = {'blocks': {'w': jnp.stack([jnp.eye(2)] * 3)}}
    >>> batch = {'x': jnp.ones((4, 2)), 'y': jnp.zeros((4, 2))}
    >>> step = layerwise(Linear(), optax.sgd(0.1))
    >>> params, state, metrics = jax.jit(step)(params, step.init(params), batch)
    >>> print(metrics['loss'], params['blocks']['w'].shape)
    1.0 (3, 2, 2)

  References:
    Lv et al., Full Parameter Fine-tuning for Large Language Models with
    Limited Resources, 2023 <https://arxiv.org/abs/2306.09782>.
  """
  if isinstance(tx, clipping.ClippedTransformation):
    if clip_norm is not None:
      raise ValueError(
        f'clip_norm={clip_norm} beside a rule that clips at {tx.clip_norm}: '
        'give one of the two'
      )
    clip_norm, tx = tx.clip_norm, tx.rule
  if clip not in ('exact', 'previous'):
    raise ValueError(f"clip must be 'exact' or 'previous', got {clip!r}")
  return Layerwise(
    model=model,
    tx=optax.with_extra_args_support(tx),
    clip_norm=clip_norm,
    clip=clip,
    microbatches=microbatches,
    slices=slices or {},
    weights=weights,
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Layerwise:
  """A layer-wise training step; `layerwise` makes it and documents it."""

  model: Layers
  tx: optax.GradientTransformationExtraArgs
  clip_norm: float | None
  clip: str
  microbatches: int
  slices: dict[str, int]
  weights: Weights

  def init(self, params: PyTree) -> LayerwiseState:
    """Returns the state before the first step."""
    tree = parts.Parts(params)
    # A target that matches nothing anywhere is told here: `tx` is strict only
    # where it sees the whole tree.
    jax.eval_shape(
      lambda weights: self.tx.init(tree.build(self._read(weights))),
      tree.weights(params),
    )

    def init_weight(name, stored):
      init = lambda one: self.tx.init(tree.alone(name, self.weights.read(one)))
      if name in self.slices:
        stored = stacks.sliced(stored, self.slices[name])
      stacked = parts.in_stack(name) or name in self.slices
      return jax.vmap(init)(stored) if stacked else init(stored)

    return LayerwiseState(
      count=jnp.zeros([], jnp.int32),
      norm=jnp.zeros([], jnp.float32),
      inner={n: init_weight(n, w) for n, w in tree.weights(params).items()},
    )

  def __call__(
    self, params: PyTree, state: LayerwiseState, batch: PyTree
  ) -> tuple[PyTree, LayerwiseState, dict[str, PyTree]]:
    """Returns parameters and state one step on, and the step's metrics."""
    tree = parts.Parts(params)
    weights = tree.weights(params)
    batch = stacks.split(batch, self.microbatches)
    saved, x = self._forward(tree, weights, batch)
    backward = functools.partial(self._backward, tree, batch, saved)
    factor = self._factor(state, weights, functools.partial(backward, x))
    # The second pass begins after the first: their gradients never coexist.
    x, factor = lax.optimization_barrier((x, factor))
    key = jax.random.fold_in(jax.random.key(0), state.count)

    def read(entry, name, layer):
      return self.weights.read(parts.at(name, entry[0], layer))

    def visit(entry, name, grad, layer):
      update = functools.partial(self._update, tree, key, factor, name)
      if name in self.slices:
        return _update_in_slices(update, entry, grad, self.slices[name])
      new = update(parts.at(name, entry, layer), grad, layer)
      return stacks.put(entry, new, layer) if parts.in_stack(name) else new

    entries = {name: (w, state.inner[name]) for name, w in weights.items()}
    entries, metrics = backward(x, entries, read, visit)
    state = LayerwiseState(
      count=jnp.asarray(optax.safe_increment(state.count)),
      norm=metrics['grad_norm'],
      inner={name: inner for name, (_, inner) in entries.items()},
    )
    params = tree.build({name: stored for name, (stored, _) in entries.items()})
    return params, state, metrics

  def _factor(self, state, weights, backward):
    """Returns what the gradient is multiplied by, None without clipping."""
    if self.clip_norm is None:
      return None

    def exact():
      # The weights are not in the carry, where XLA would copy them.
      read = lambda _, name, layer: self.weights.read(
        parts.at(name, weights[name], layer)
      )
      keep = lambda entry, name, grad, layer: entry
      return backward(dict.fromkeys(weights, ()), read, keep)[1]['grad_norm']

    if self.clip == 'exact':
      norm = exact()
    else:
      norm = lax.cond(state.count == 0, exact, lambda: state.norm)
    return clipping.clip_coefficient(norm, self.clip_norm)

  def _forward(self, tree, weights, batch):
    """Returns the input of each block [L, K, ...] and of the loss [K, ...]."""
    rest = {n: w for n, w in weights.items() if not parts.in_stack(n)}
    rest = tree.build(self._read(rest))
    x = lax.map(lambda part: self.model.embed(rest, part), batch)

    def block(x, layer_weights):
      layer_params = tree.build(self._read(layer_weights))['blocks']
      y = lax.map(lambda x: self.model.block(layer_params, x), x)
      return y, stacks.flat(x)

    stack = {n: w for n, w in weights.items() if parts.in_stack(n)}
    x, saved = lax.scan(block, x, stack)
    return saved, x

  def _backward(self, tree, batch, saved, x, entries, read, visit):
    """Walks the gradient from the loss to the embedding.

    Args:
      tree: the tree of parameters.
      batch: microbatches [K, ...].
      saved: input of each block, as `_forward` returns it.
      x: input of the loss.
      entries: what the visits change, by weight.
      read: `(entry, name, layer) -> weight`, as the model reads it.
      visit: `(entry, name, gradient, layer) -> entry`, called when a weight's
        gradient is complete.

    Returns:
      The entries after the visits; the metrics.
    """
    entries = dict(entries)
    squares = jnp.zeros([], jnp.float32)

    def visit_rest(squares, name, grad):
      entries[name] = visit(entries[name], name, grad, 0)
      return squares + clipping.sum_of_squares(grad)

    rest = {
      n: read(entries[n], n, 0) for n in tree.names if not parts.in_stack(n)
    }
    loss, sums, head, embed, dx = gradients.loss_gradient(
      self.model, tree, batch, x, rest
    )
    for name in [n for n in head if n not in embed]:
      squares = visit_rest(squares, name, head.pop(name))

    stack = [name for name in tree.names if parts.in_stack(name)]
    num_layers = jax.tree.leaves(saved)[0].shape[0]

    def body(i, carry):
      layer = num_layers - 1 - i
      x_l = stacks.unflat(stacks.take(saved, layer), x)
      # The layer's index is in the carry so that reads of a weight wait for
      # the visits before them.
      dx, carry = carry[0], (*carry[1:], layer)
      return self._layer(tree, stack, x_l, dx, carry, read, visit)

    carry = (dx, [entries[name] for name in stack], squares)
    dx, block_entries, squares = lax.fori_loop(0, num_layers, body, carry)
    entries |= zip(stack, block_entries, strict=True)

    # Behind a condition that is always true, which the compiler cannot know:
    # it would make the zeros that the gradient of a lookup starts from before
    # the loop, and hold them through it.
    embed = lax.cond(
      squares != -1,
      lambda: gradients.embed_gradient(
        self.model, tree, batch, dx, rest, embed
      ),
      lambda: {name: jnp.zeros_like(rest[name]) for name in embed},
    )
    for name, grad in embed.items():
      if name in head:
        grad += head[name]
      squares = visit_rest(squares, name, grad)
    return entries, {'loss': loss, 'grad_norm': jnp.sqrt(squares), **sums}

  def _layer(self, tree, names, x, dx, carry, read, visit):
    """Returns the cotangents below one layer, its entries, the squares."""

    def block(weights, moving, x):
      params = tree.build(dict(zip(names, weights, strict=True)))
      y = self.model.block(params['blocks'], stacks.join(moving, x))
      return stacks.moving(y)

    def read_i(carry, i):
      entries, _, layer = carry
      return read(entries[i], names[i], layer)

    def visit_i(carry, i, grad):
      entries, squares, layer = carry
      entries = list(entries)
      entries[i] = visit(entries[i], names[i], grad, layer)
      return entries, squares + clipping.sum_of_squares(grad), layer

    if self.microbatches == 1:
      x, dx = stacks.take((x, dx), 0)
      dx, carry = pull_back(
        lambda weights, moving: block(weights, moving, x),
        stacks.moving(x),
        dx,
        carry,
        num_params=len(names),
        read=read_i,
        visit=visit_i,
      )
      return jax.tree.map(lambda a: a[None], dx), *carry[:2]
    weights = [read_i(carry, i) for i in range(len(names))]

    def part(part):
      x, dx = part
      f = lambda weights, moving: block(weights, moving, x)
      return jax.vjp(f, weights, stacks.moving(x))[1](dx)

    grads, dx = gradients.sum_over(part, (x, dx))
    for i, grad in enumerate(grads):
      carry = visit_i(carry, i, grad)
    return dx, *carry[:2]

  def _update(self, tree, key, factor, name, entry, grad, layer):
    """Returns one weight, layer or slice and its state, updated."""
    stored, inner = entry
    if factor is not None:
      grad = clipping.times(grad, factor)
    updates, inner = self.tx.update(
      tree.alone(name, grad),
      inner,
      tree.alone(name, self.weights.read(stored)),
      layer=layer,
    )
    key = jax.random.fold_in(key, tree.names.index(name))
    key = jax.random.fold_in(key, layer)
    return self.weights.write(stored, jax.tree.leaves(updates)[0], key), inner

  def _read(self, weights):
    return {name: self.weights.read(w) for name, w in weights.items()}


def _update_in_slices(update, entry, grad, num):
  """Returns (stored, inner state) of a weight, updated slice by slice."""
  stored, inner = entry
  grad = stacks.sliced(grad, num)

  def body(i, entry):
    new = update(stacks.take(entry, i), stacks.take(grad, i), i)
    return stacks.put(entry, new, i)

  entry = (stacks.sliced(stored, num), inner)
  new, inner = lax.fori_loop(0, num, body, entry)
  return stacks.unflat(new, stored), inner
