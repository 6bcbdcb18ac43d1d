"""This module holds the two passes over a layer stack, forward and back."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax import clipping
from galore_optax.layerwise import gradients, parts
from galore_optax.layerwise import stack as stacks
from galore_optax.layerwise.pullback import pull_back
from galore_optax.layerwise.weights import Weights

# Axes: L layers, the leading axis of a stack; K microbatches.

PyTree = Any
Entries = dict[str, Any]
Read = Callable[[Any, str, jax.Array | int], jax.Array]
Visit = Callable[[Any, str, jax.Array, jax.Array | int], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
  """One batch on its way through a model."""

  model: Any
  """The three functions of `layerwise`."""
  tree: parts.Parts
  """The tree of parameters."""
  weights: Weights
  """How weights are stored."""
  batch: PyTree
  """Microbatches [K, ...]."""

  def forward(self, stored: Entries) -> tuple[PyTree, PyTree]:
    """Returns the input of each block [L, K, ...] and of the loss [K, ...]."""
    rest = {n: w for n, w in stored.items() if not parts.in_stack(n)}
    params = self.tree.build(self._read(rest))
    x = lax.map(lambda part: self.model.embed(params, part), self.batch)

    def block(x, layer_weights):
      layer_params = self.tree.build(self._read(layer_weights))['blocks']
      y = lax.map(lambda x: self.model.block(layer_params, x), x)
      return y, stacks.flat(x)

    stack = {n: w for n, w in stored.items() if parts.in_stack(n)}
    x, saved = lax.scan(block, x, stack)
    return saved, x

  def backward(
    self,
    saved: PyTree,
    x: PyTree,
    entries: Entries,
    read: Read,
    visit: Visit,
    *,
    active: jax.Array | None = None,
    frozen: Collection[str] = (),
  ) -> tuple[Entries, dict[str, PyTree]]:
    """Walks the gradient from the loss to the embedding.

    Args:
      saved: input of each block, as `forward` returns it.
      x: input of the loss.
      entries: what the visits change, by weight.
      read: `(entry, name, layer) -> weight`, as the model reads it.
      visit: `(entry, name, gradient, layer) -> entry`, called when a weight's
        gradient is complete.
      active: the one layer whose weights are visited; None for all.
      frozen: weights outside the stack that are not visited.

    Returns:
      The entries after the visits; the metrics.
    """
    entries = dict(entries)
    squares = jnp.zeros([], jnp.float32)

    def visit_rest(squares, name, grad) -> jax.Array:
      entries[name] = visit(entries[name], name, grad, 0)
      return squares + clipping.sum_of_squares(grad)

    rest = {
      n: read(entries[n], n, 0)
      for n in self.tree.names
      if not parts.in_stack(n)
    }
    loss, sums, head, embed, dx = gradients.loss_gradient(
      self.model, self.tree, self.batch, x, rest, frozen
    )
    for name in [n for n in head if n not in embed]:
      squares = visit_rest(squares, name, head.pop(name))

    stack = [name for name in self.tree.names if parts.in_stack(name)]
    carry = (dx, [entries[name] for name in stack], squares)
    carry = self._stack(
      stack, saved, x, carry, read, visit, active, to_embed=bool(embed)
    )
    dx, block_entries, squares = carry
    entries |= zip(stack, block_entries, strict=True)

    # Behind a condition that is always true, which the compiler cannot know:
    # it would make the zeros that the gradient of a lookup starts from before
    # the loop, and hold them through it.
    embed = lax.cond(
      squares != -1,
      lambda: gradients.embed_gradient(
        self.model, self.tree, self.batch, dx, rest, embed
      ),
      lambda: {name: jnp.zeros_like(rest[name]) for name in embed},
    )
    for name, grad in embed.items():
      if name in head:
        grad += head[name]
      squares = visit_rest(squares, name, grad)
    if not isinstance(sums, Mapping):
      sums = {'aux': sums}
    return entries, {**sums, 'loss': loss, 'grad_norm': jnp.sqrt(squares)}

  def _stack(
    self, names, saved, x, carry, read, visit, active, *, to_embed
  ) -> Any:
    """Returns the carry (cotangents, entries, squares) below the stack."""
    num_layers = jax.tree.leaves(saved)[0].shape[0]
    inputs = lambda layer: stacks.unflat(stacks.take(saved, layer), x)

    def visited(layer, carry):
      # The layer's index is in the carry so that reads of a weight wait for
      # the visits before them.
      dx, carry = carry[0], (*carry[1:], layer)
      return self._layer(names, inputs(layer), dx, carry, read, visit)

    if active is None:
      body = lambda i, carry: visited(num_layers - 1 - i, carry)
      return lax.fori_loop(0, num_layers, body, carry)

    def passed(layer, last, carry):
      """Takes the cotangents past the layers above `last`; returns it too."""
      dx, entries, squares = carry

      def body(passing):
        layer, dx = passing
        weights = [
          read(e, n, layer) for e, n in zip(entries, names, strict=True)
        ]
        return layer - 1, self._passed(names, weights, inputs(layer), dx)

      # The layer that the loop ends at, so that reads of it wait for the loop.
      layer, dx = lax.while_loop(lambda c: c[0] > last, body, (layer, dx))
      return layer, (dx, entries, squares)

    top = jnp.full_like(active, num_layers - 1)
    active, carry = passed(top, active, carry)
    carry = visited(active, carry)
    return passed(active - 1, -1, carry)[1] if to_embed else carry

  def _block(self, names, weights, moving, x):
    params = self.tree.build(dict(zip(names, weights, strict=True)))
    y = self.model.block(params['blocks'], stacks.join(moving, x))
    return stacks.moving(y)

  def _passed(self, names, weights, x, dx):
    """Returns the cotangents below a layer whose weights have no gradient."""

    def part(part):
      x, dx = part
      f = lambda moving: self._block(names, weights, moving, x)
      return jax.vjp(f, stacks.moving(x))[1](dx)[0]

    return lax.map(part, (x, dx))

  def _layer(self, names, x, dx, carry, read, visit):
    """Returns the cotangents below one layer, its entries, the squares."""

    def read_i(carry, i):
      entries, _, layer = carry
      return read(entries[i], names[i], layer)

    def visit_i(carry, i, grad):
      entries, squares, layer = carry
      entries = list(entries)
      entries[i] = visit(entries[i], names[i], grad, layer)
      return entries, squares + clipping.sum_of_squares(grad), layer

    if jax.tree.leaves(dx)[0].shape[0] == 1:
      x, dx = stacks.take((x, dx), 0)
      dx, carry = pull_back(
        lambda weights, moving: self._block(names, weights, moving, x),
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
      f = lambda weights, moving: self._block(names, weights, moving, x)
      return jax.vjp(f, weights, stacks.moving(x))[1](dx)

    grads, dx = gradients.sum_over(part, (x, dx))
    for i, grad in enumerate(grads):
      carry = visit_i(carry, i, grad)
    return dx, *carry[:2]

  def _read(self, stored):
    return {name: self.weights.read(w) for name, w in stored.items()}
