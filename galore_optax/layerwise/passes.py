"""The forward and the backward pass of a batch through a stack of layers.

`Passes.backward` goes through the model in reverse: the head, the layers from
the last to the first, the embedding. It computes the gradients of one layer at
a time and visits the weights of that layer one by one. The caller passes the
visit function, which updates a weight, adds to a sum, or does nothing.

Axes: L layers, the leading axis of a stack; K microbatches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from galore_optax.clipping import sum_of_squares
from galore_optax.layerwise import stack
from galore_optax.precision import full


class Passes(NamedTuple):
  """One batch on its way through a model."""

  model: Any  # the three functions of `layerwise`
  tree: stack.Parts  # of the parameters
  read: Callable[[Any], jax.Array]  # of a stored weight: what the model takes
  batch: Any  # microbatches [K, ...]
  frozen: Sequence[str] = ()  # weights outside the stack that are not visited

  def forward(self, stored):
    """Returns the input of each block [L, K, ...] and of the loss [K, ...]."""
    layers = {n: w for n, w in stored.items() if stack.in_stack(n)}
    rest = {n: self.read(w) for n, w in stored.items() if n not in layers}
    params = self.tree.build(rest)
    x = lax.map(lambda part: self.model.embed(params, part), self.batch)

    def block(x, layer):
      weights = {name: self.read(w) for name, w in layer.items()}
      return lax.map(lambda x: self._block(weights, x), x), stack.flat(x)

    x, saved = lax.scan(block, x, layers)
    return saved, x

  def backward(self, saved, x, entries, visit, *, stored=None, active=None):
    """Walks the gradient from the loss to the embedding.

    Args:
      saved: input of each block, as `forward` returns it.
      x: input of the loss.
      entries: what the visits change, by weight.
      visit: `(entry, name, gradient, layer, squares) -> entry`, called when a
        weight's gradient is complete; layer is None outside the stack. The sum
        of the squares so far, with this gradient, is finite until something is
        not, the loss included.
      stored: the weights, where no visit changes them: XLA would copy them in
        the entries. None where they are the first of each entry.
      active: the one layer whose weights are visited; None for all.

    Returns:
      The entries after the visits; the norm of what they saw; the metrics.
    """

    # A carry is the entries, the squared norm so far, and the layer in whose
    # entries weights are read and written, None outside the stack. Held with
    # the entries, it makes reads of a weight wait for the visits before them.
    def read(carry, name):
      entries, _, layer = carry
      weight = entries[name][0] if stored is None else stored[name]
      return self.read(stack.take(weight, layer))

    def see(carry, name, grad):
      entries, squares, layer = carry
      squares = squares + sum_of_squares(grad)
      new = {name: visit(entries[name], name, grad, layer, squares)}
      return entries | new, squares, layer

    carry = (entries, jnp.zeros([], jnp.float32), None)
    rest = {n: read(carry, n) for n in entries if not stack.in_stack(n)}
    build = lambda some: self.tree.build(rest | some)
    embed = lambda some, batch: self.model.embed(build(some), batch)
    loss = lambda some, x, batch: self.model.loss(build(some), x, batch)
    by_loss = _used(loss, rest, *stack.take((x, self.batch), 0))
    by_embed = _used(embed, rest, stack.take(self.batch, 0))
    moving = {n: w for n, w in rest.items() if n not in self.frozen}
    in_loss = {n: w for n, w in moving.items() if n in by_loss}
    # What nothing reads has a gradient of zero, and its update.
    in_embed = {n: w for n, w in moving.items() if n not in by_loss - by_embed}
    (value, sums, head), dx = _loss_gradient(loss, in_loss, x, self.batch)
    carry = (entries, jnp.where(jnp.isfinite(value), carry[1], jnp.nan), None)
    for name in in_loss:
      if name not in in_embed:
        carry = see(carry, name, head.pop(name))
    entries, squares, _ = carry
    layers = {n: entry for n, entry in entries.items() if stack.in_stack(n)}
    dx, layers, squares = self._through_stack(
      saved, x, (dx, layers, squares), read, see, active, bool(in_embed)
    )
    # Behind a condition that is always true, which the compiler cannot know:
    # it would make the zeros that the gradient of a lookup starts from before
    # the loop, and hold them through it.
    exact = lambda: _gradients(embed, in_embed, self.batch, dx)[0]
    zeros = lambda: jax.tree.map(jnp.zeros_like, in_embed)
    grads = lax.cond(squares != -1, exact, zeros)
    carry = (entries | layers, squares, None)
    for name in in_embed:
      grad = grads[name] + head[name] if name in head else grads[name]
      carry = see(carry, name, grad)
    sums = sums if isinstance(sums, Mapping) else {'aux': sums}
    return carry[0], jnp.sqrt(carry[1]), {**sums, 'loss': value}

  def _through_stack(self, saved, x, state, read, see, active, to_embed):
    """Returns the state (cotangents, entries, squares) below the stack."""
    num_layers = jax.tree.leaves(saved)[0].shape[0]
    inputs = lambda layer: stack.unflat(stack.take(saved, layer), x)

    def visited(layer, state):
      dx, entries, squares = state
      carry = (entries, squares, layer)
      weights = {name: read(carry, name) for name in sorted(entries)}
      grads, dx = _gradients(self._block, weights, inputs(layer), dx)
      # The visits begin when all gradients of the layer exist. The entries must
      # not pass through a barrier: the compiler would copy the whole stack.
      grads, dx, squares = lax.optimization_barrier((grads, dx, squares))
      carry = (entries, squares, layer)
      for name in weights:
        carry = see(carry, name, grads.pop(name))
      entries, squares, _ = carry
      return dx, entries, squares

    if active is None:
      body = lambda i, state: visited(num_layers - 1 - i, state)
      return lax.fori_loop(0, num_layers, body, state)

    def passed(layer, last, dx, entries):
      """Takes cotangents past the layers above `last`, without a gradient."""

      def body(passing):
        layer, dx = passing
        weights = {name: read((entries, None, layer), name) for name in entries}
        block = lambda _, x: self._block(weights, x)
        return layer - 1, _gradients(block, {}, inputs(layer), dx)[1]

      return lax.while_loop(lambda c: c[0] > last, body, (layer, dx))

    dx, entries, squares = state
    # The layer that the loop ends at, so that reads of it wait for the loop.
    top = jnp.full_like(active, num_layers - 1)
    active, dx = passed(top, active, dx, entries)
    dx, entries, squares = visited(active, (dx, entries, squares))
    if to_embed:
      _, dx = passed(active - 1, -1, dx, entries)
    return dx, entries, squares

  def _block(self, weights, x):
    return self.model.block(self.tree.build(weights)['blocks'], x)


def _used(f, weights, *args):
  """Returns the weights that `f` reads."""
  jaxpr = jax.make_jaxpr(f)(weights, *args).jaxpr
  atoms = [v for e in jaxpr.eqns for v in e.invars] + jaxpr.outvars
  used = {v for v in atoms if isinstance(v, jex.Var)}
  pairs = zip(sorted(weights), jaxpr.invars, strict=False)
  return {name for name, v in pairs if v in used}


def _loss_gradient(loss, head, x, batch):
  """Returns (loss, sums, gradients of the head), and the cotangent of x."""
  num = jax.tree.leaves(batch)[0].shape[0]

  def part(part):
    batch, x = part

    def mean(head, moving):
      value, sums = loss(head, stack.join(moving, x), batch)
      return value / num, sums

    grad = jax.value_and_grad(mean, (0, 1), has_aux=True)
    (value, sums), (grads, dx) = grad(head, stack.moving(x))
    return (value, sums, grads), dx

  return sum_over(part, (batch, x))


def _gradients(f, weights, x, dy):
  """Returns the gradients of f(weights, x), summed over the microbatches of x
  and dy [K, ...]; and the cotangent of what moves of x [K, ...]."""

  def part(part):
    x, dy = part
    moved = lambda w, moving: stack.moving(f(w, stack.join(moving, x)))
    return jax.vjp(moved, weights, stack.moving(x))[1](dy)

  return sum_over(part, (x, dy))


def sum_over(f: Callable, parts: Any) -> tuple[Any, Any]:
  """Sums f's first result over microbatches [K, ...], stacks the second.

  Sums are float32 and come back in the type of what is summed.

  >>> sum_over(lambda x: (x, -x), jnp.arange(3.0))
  (Array(3., dtype=float32), Array([-0., -1., -2.], dtype=float32))
  """
  first = stack.take(parts, 0)
  if jax.tree.leaves(parts)[0].shape[0] == 1:
    total, stacked = f(first)
    return total, jax.tree.map(lambda a: a[None], stacked)

  def body(sums, part):
    one, stacked = f(part)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, one), stacked

  like, _ = jax.eval_shape(f, first)
  zeros = jax.tree.map(lambda a: jnp.zeros_like(full(a)), like)
  sums, stacked = lax.scan(body, zeros, parts)
  return jax.tree.map(lambda a, b: a.astype(b.dtype), sums, like), stacked
