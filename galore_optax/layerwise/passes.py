"""The two passes over a layer stack: forward, and back gradient by gradient.

`Passes.backward` visits each weight when its gradient is complete: head, layer
after layer from the last, embedding. Within a layer, `pull_back` stops at each
gradient. What a visit does is the caller's: update, sum, nothing.

Axes: L layers, the leading axis of a stack; K microbatches.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from galore_optax import clipping
from galore_optax.layerwise import stack
from galore_optax.layerwise.stack import in_stack
from galore_optax.precision import full

PyTree = Any
Carry = TypeVar('Carry')
Weights = dict[str, Any]
"""By path, in the order of the tree."""
Visit = Callable[[Any, str, jax.Array, Any], Any]
"""`(entry, name, gradient, layer) -> entry`; layer None outside the stack."""


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
  """One batch on its way through a model."""

  model: Any
  """The three functions of `layerwise`."""
  tree: stack.Parts
  """The tree of parameters."""
  read: Callable[[Any], jax.Array]
  """A stored weight, as the model computes with it."""
  batch: PyTree
  """Microbatches [K, ...]."""

  def forward(self, stored: Weights) -> tuple[PyTree, PyTree]:
    """Returns the input of each block [L, K, ...] and of the loss [K, ...]."""
    rest = {n: self.read(w) for n, w in stored.items() if not in_stack(n)}
    params = self.tree.build(rest)
    x = lax.map(lambda part: self.model.embed(params, part), self.batch)

    def block(x, layer):
      weights = {name: self.read(w) for name, w in layer.items()}
      y = lax.map(lambda x: self._block(weights, x), x)
      return y, stack.flat(x)

    layers = {n: w for n, w in stored.items() if in_stack(n)}
    x, saved = lax.scan(block, x, layers)
    return saved, x

  def backward(
    self,
    saved: PyTree,
    x: PyTree,
    entries: Weights,
    visit: Visit,
    *,
    stored: Weights | None = None,
    active: jax.Array | None = None,
    frozen: Collection[str] = (),
  ) -> tuple[Weights, dict[str, PyTree]]:
    """Walks the gradient from the loss to the embedding.

    Args:
      saved: input of each block, as `forward` returns it.
      x: input of the loss.
      entries: what the visits change, by weight.
      visit: called when a weight's gradient is complete.
      stored: the weights, where no visit changes them: XLA would copy them in
        the entries. None where they are the first of each entry.
      active: the one layer whose weights are visited; None for all.
      frozen: weights outside the stack that are not visited.

    Returns:
      The entries after the visits; the metrics.
    """

    def read(entry, name, layer):
      weight = entry[0] if stored is None else stored[name]
      return self.read(stack.take(weight, layer))

    def see(carry, name, grad, layer=None):
      entries, squares = carry
      entry = visit(entries[name], name, grad, layer)
      squares += clipping.sum_of_squares(grad)
      return entries | {name: entry}, squares

    def embed(weights, batch):
      return self.model.embed(self.tree.build(rest | weights), batch)

    rest = {n: read(e, n, None) for n, e in entries.items() if not in_stack(n)}
    by_loss, by_embed = self._read_by(rest, x, frozen)
    (loss, sums, head), dx = self._loss_gradient(rest, by_loss, x)
    carry = (entries, jnp.zeros([], jnp.float32))
    for name in by_loss:
      if name not in by_embed:
        carry = see(carry, name, head.pop(name))

    entries, squares = carry
    layers = {n: entry for n, entry in entries.items() if in_stack(n)}
    dx, (layers, squares) = self._through_stack(
      (saved, x), (dx, (layers, squares)), read, see, active, bool(by_embed)
    )
    weights = {name: rest[name] for name in by_embed}
    # Behind a condition that is always true, which the compiler cannot know:
    # it would make the zeros that the gradient of a lookup starts from before
    # the loop, and hold them through it.
    grads = lax.cond(
      squares != -1,
      lambda: _gradients(embed, weights, self.batch, dx)[0],
      lambda: jax.tree.map(jnp.zeros_like, weights),
    )
    carry = (entries | layers, squares)
    for name in by_embed:
      grad = grads[name] + head[name] if name in head else grads[name]
      carry = see(carry, name, grad)
    entries, squares = carry
    sums = sums if isinstance(sums, Mapping) else {'aux': sums}
    return entries, {**sums, 'loss': loss, 'grad_norm': jnp.sqrt(squares)}

  def _read_by(
    self, rest: Weights, x: PyTree, frozen: Collection[str]
  ) -> tuple[list[str], list[str]]:
    """Returns the weights with a gradient through the loss; the embedding."""
    batch, x = jax.tree.map(lambda a: a[0], (self.batch, x))
    build = self.tree.build
    loss = _used(lambda rest: self.model.loss(build(rest), x, batch), rest)
    embed = _used(lambda rest: self.model.embed(build(rest), batch), rest)
    moving = [name for name in rest if name not in frozen]
    by_loss = [name for name in moving if name in loss]
    # What nothing reads has a gradient of zero, and its update.
    by_embed = [name for name in moving if name in embed or name not in loss]
    return by_loss, by_embed

  def _loss_gradient(
    self, rest: Weights, names: list[str], x: PyTree
  ) -> tuple[tuple[jax.Array, PyTree, Weights], PyTree]:
    """Returns loss, sums and the gradients by name; the cotangent of x."""
    num = jax.tree.leaves(self.batch)[0].shape[0]

    def part(part):
      batch, x = part

      def loss(head, moving):
        params, x_moved = self.tree.build(rest | head), stack.join(moving, x)
        value, sums = self.model.loss(params, x_moved, batch)
        return value / num, sums

      grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
      head = {name: rest[name] for name in names}
      (value, sums), (head, dx) = grad(head, stack.moving(x))
      return (value, sums, head), dx

    return sum_over(part, (self.batch, x))

  def _through_stack(self, saved, state, read, see, active, to_embed) -> Any:
    """Returns (cotangents, (entries, squares)) below the stack."""
    num_layers = jax.tree.leaves(saved[0])[0].shape[0]
    inputs = lambda layer: stack.unflat(stack.take(saved[0], layer), saved[1])
    visited = lambda layer, state: self._layer(
      layer, inputs(layer), state, read, see
    )
    if active is None:
      body = lambda i, state: visited(num_layers - 1 - i, state)
      return lax.fori_loop(0, num_layers, body, state)

    def passed(layer, last, dx, carry):
      """Takes cotangents past the layers above `last`, without a gradient."""

      def body(passing):
        layer, dx = passing
        weights = {n: read(e, n, layer) for n, e in carry[0].items()}
        block = lambda _, x: self._block(weights, x)
        return layer - 1, _gradients(block, {}, inputs(layer), dx)[1]

      return lax.while_loop(lambda c: c[0] > last, body, (layer, dx))

    dx, carry = state
    # The layer that the loop ends at, so that reads of it wait for the loop.
    top = jnp.full_like(active, num_layers - 1)
    active, dx = passed(top, active, dx, carry)
    dx, carry = visited(active, (dx, carry))
    if to_embed:
      _, dx = passed(active - 1, -1, dx, carry)
    return dx, carry

  def _layer(self, layer, x, state, read, see) -> Any:
    """Returns (cotangents, (entries, squares)) below one layer."""

    # The layer's index is held with the entries, so that reads of a weight
    # wait for the visits before them.
    def read_held(held, name):
      (entries, _), layer = held
      return read(entries[name], name, layer)

    def visit(held, name, grad):
      carry, layer = held
      return see(carry, name, grad, layer), layer

    dx, carry = state
    dx, (carry, _) = pull_back(
      lambda weights, dx: _gradients(self._block, weights, x, dx),
      dx,
      (carry, layer),
      names=list(carry[0]),
      read=read_held,
      visit=visit,
    )
    return dx, carry

  def _block(self, weights: Weights, x: PyTree) -> PyTree:
    return self.model.block(self.tree.build(weights)['blocks'], x)


def pull_back(
  backward: Callable[[Weights, PyTree], tuple[Weights, PyTree]],
  dy: PyTree,
  carry: Carry,
  *,
  names: Collection[str],
  read: Callable[[Carry, str], jax.Array],
  visit: Callable[[Carry, str, jax.Array], Carry],
) -> tuple[PyTree, Carry]:
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
    read: a weight, given the carry. Called again where the pass needs the
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

  due = _due(jaxpr, weight_of, grads)

  def value(atom):
    if isinstance(atom, jex.Literal):
      return atom.val
    if atom in weight_of:
      return read(carry, weight_of[atom])
    return pulled[atom] if atom in pulled else known[atom]

  for done in range(len(jaxpr.eqns) + 1):
    if done:
      eqn = jaxpr.eqns[done - 1]
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
  dx_leaves = [value(atom) for atom in jaxpr.outvars[num:]]
  return jax.tree.unflatten(jax.tree.structure(dx), dx_leaves), carry


def _due(
  jaxpr: jex.Jaxpr, weight_of: dict[jex.Var, str], grads: dict[str, Any]
) -> dict[str, int]:
  """Returns after how many operations each weight may change.

  Its gradient is there, and nothing reads it any more. That is at once where
  the gradient is the cotangent itself.
  """
  due = dict.fromkeys(grads, 0)
  for count, eqn in enumerate(jaxpr.eqns, 1):
    for var, name in weight_of.items():
      if var in eqn.invars or grads[name] in eqn.outvars:
        due[name] = count
  return due


def _run(
  jaxpr: jex.Jaxpr, eqn: jex.JaxprEqn, value: Callable[[Any], jax.Array]
) -> dict[jex.Var, jax.Array]:
  """Returns what one operation of a program makes."""
  operands = list(dict.fromkeys(_variables(eqn.invars)))
  alone = jaxpr.replace(
    constvars=[],
    invars=operands,
    outvars=eqn.outvars,
    eqns=[eqn],
    debug_info=jaxpr.debug_info.with_unknown_names(),
  )
  run = jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, []))
  return dict(zip(eqn.outvars, run(*map(value, operands)), strict=True))


def _variables(atoms: Iterable[Any]) -> list[jex.Var]:
  return [v for v in atoms if isinstance(v, jex.Var)]


def _gradients(
  f: Callable[[Weights, PyTree], PyTree],
  weights: Weights,
  x: PyTree,
  dy: PyTree,
) -> tuple[Weights, PyTree]:
  """Returns the gradients of f(weights, x), summed over the microbatches of x
  and dy [K, ...]; and the cotangent of what moves of x [K, ...]."""

  def part(part):
    x, dy = part
    moved = lambda weights, moving: stack.moving(
      f(weights, stack.join(moving, x))
    )
    return jax.vjp(moved, weights, stack.moving(x))[1](dy)

  return sum_over(part, (x, dy))


def sum_over(
  f: Callable[[PyTree], tuple[PyTree, PyTree]], parts: PyTree
) -> tuple[PyTree, PyTree]:
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


def _used(f: Callable[[Weights], PyTree], weights: Weights) -> set[str]:
  """Returns the weights that `f` reads."""
  jaxpr = jax.make_jaxpr(f)(weights).jaxpr
  atoms = [v for eqn in jaxpr.eqns for v in eqn.invars] + jaxpr.outvars
  used = set(_variables(atoms))
  pairs = zip(sorted(weights), jaxpr.invars, strict=True)
  return {name for name, v in pairs if v in used}
