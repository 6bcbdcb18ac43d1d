"""The two passes over a layer stack: forward, and back gradient by gradient.

`Passes.backward` visits each weight when its gradient is complete: head, layer
after layer from the last, embedding. Within a layer, `pull_back` stops at each
gradient. What a visit does is the caller's: update, sum, nothing.

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
      dx, *carry = state
      x = inputs(layer)
      back = lambda weights, dx: _gradients(self._block, weights, x, dx)
      how = dict(names=carry[0], read=read, visit=see)
      dx, (entries, squares, _) = pull_back(back, dx, (*carry, layer), **how)
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


def pull_back(backward, dy, carry, *, names, read, visit):
  """Runs a backward pass, visiting each weight's gradient in turn.

  `jax.vjp` returns all gradients of a function at once, so all of them exist
  at once. This runs the same operations in the same order, hands over each
  gradient when it appears, and lets nothing that follows begin before what was
  done with it is done.

  Args:
    backward: `(weights by name, dy) -> (gradients by name, dx)`.
    dy: cotangent of the result.
    carry: what the visits change.
    names: of the weights.
    read: `(carry, name) -> weight`. Called again where the pass needs the
      weight again, so that no copy of it waits for that.
    visit: `(carry, name, gradient) -> carry`.

  Returns:
    Cotangent dx, and the last carry.

  Example:
    >>> def backward(weights, dy):
    ...   f = lambda weights, x: weights['b'] * (weights['a'] * x)
    ...   return jax.vjp(f, weights, jnp.float32(2))[1](dy)
    >>> weights = {'a': jnp.float32(5), 'b': jnp.float32(7)}
    >>> visit = lambda carry, name, grad: carry | {name: carry[name] - grad}
    >>> dx, weights = pull_back(
    ...   backward, jnp.float32(1), weights, names='ab', read=dict.get,
    ...   visit=visit)
    >>> print(dx, weights['a'], weights['b'])
    35.0 -9.0 -3.0
  """
  names = sorted(names)
  weights = jax.eval_shape(lambda: {name: read(carry, name) for name in names})
  closed, (_, dx) = jax.make_jaxpr(backward, return_shape=True)(weights, dy)
  jaxpr, num = closed.jaxpr, len(names)
  weight_of = dict(zip(jaxpr.invars[:num], names, strict=True))
  grads = dict(zip(names, jaxpr.outvars[:num], strict=True))
  known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  pulled = dict(zip(jaxpr.invars[num:], jax.tree.leaves(dy), strict=True))
  # After how many operations a weight may change: its gradient is there, and
  # nothing reads it any more. At once, if the gradient is the cotangent itself.
  due = dict.fromkeys(names, 0)
  for count, eqn in enumerate(jaxpr.eqns, 1):
    for var, name in weight_of.items():
      if var in eqn.invars or grads[name] in eqn.outvars:
        due[name] = count

  def value(atom):
    if isinstance(atom, jex.Literal):
      return atom.val
    if atom in weight_of:
      return read(carry, weight_of[atom])
    return pulled[atom] if atom in pulled else known[atom]

  for done, eqn in enumerate([None, *jaxpr.eqns]):
    if eqn is not None:
      moves = not pulled.keys().isdisjoint(_variables(eqn.invars))
      (pulled if moves else known).update(_run(jaxpr, eqn, value))
    ready = [name for name in names if due[name] == done]
    for name in ready:
      carry = visit(carry, name, value(grads[name]))
    if ready:
      # What follows waits for the visits; what is known without dy is of the
      # forward pass, and holding it up would order nothing.
      later = [v for eqn in jaxpr.eqns[done:] for v in eqn.invars]
      later += [grads[name] for name in names if due[name] > done]
      later = {*_variables(later + jaxpr.outvars[num:])}
      live = [v for v in pulled if v in later]
      held, carry = lax.optimization_barrier(([pulled[v] for v in live], carry))
      pulled = dict(zip(live, held, strict=True))
  dx_leaves = map(value, jaxpr.outvars[num:])
  return jax.tree.unflatten(jax.tree.structure(dx), dx_leaves), carry


def _run(jaxpr, eqn, value):
  """Returns what one operation of a program makes, by variable."""
  operands = list(dict.fromkeys(_variables(eqn.invars)))
  info = jaxpr.debug_info.with_unknown_names()
  io = dict(constvars=[], invars=operands, outvars=eqn.outvars)
  one = jex.ClosedJaxpr(jaxpr.replace(**io, eqns=[eqn], debug_info=info), [])
  made = jex.jaxpr_as_fun(one)(*map(value, operands))
  return dict(zip(eqn.outvars, made, strict=True))


def _variables(atoms):
  return [v for v in atoms if isinstance(v, jex.Var)]


def _used(f, weights, *args):
  """Returns the weights that `f` reads."""
  jaxpr = jax.make_jaxpr(f)(weights, *args).jaxpr
  used = _variables([v for e in jaxpr.eqns for v in e.invars] + jaxpr.outvars)
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
