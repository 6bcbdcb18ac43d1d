"""The two passes over a layer stack: forward, and back gradient by gradient.

`Passes.backward` visits each weight when its gradient is complete: head, layer
after layer from the last, embedding. Within a layer, `pull_back` stops at each
gradient. What a visit does is the caller's: update, sum, nothing.

Axes: L layers, the leading axis of a stack; K microbatches.
"""

import dataclasses
import functools
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
Read = Callable[[Any, str, Any], jax.Array]
"""`(entry, name, layer) -> weight`, as the model reads it."""
Visit = Callable[[Any, str, jax.Array, Any], Any]
"""`(entry, name, gradient, layer) -> entry`; no layer, None, outside a stack."""


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
  """One batch on its way through a model."""

  model: Any
  """The three functions of `layerwise`."""
  tree: stack.Parts
  """The tree of parameters."""
  batch: PyTree
  """Microbatches [K, ...]."""

  def forward(
    self, stored: Weights, read: Callable[[Any], jax.Array]
  ) -> tuple[PyTree, PyTree]:
    """Returns the input of each block [L, K, ...] and of the loss [K, ...]."""
    rest = {n: read(w) for n, w in stored.items() if not in_stack(n)}
    params = self.tree.build(rest)
    x = lax.map(lambda part: self.model.embed(params, part), self.batch)

    def block(x, layer):
      weights = {name: read(w) for name, w in layer.items()}
      params = self.tree.build(weights)['blocks']
      y = lax.map(lambda x: self.model.block(params, x), x)
      return y, stack.flat(x)

    layers = {n: w for n, w in stored.items() if in_stack(n)}
    x, saved = lax.scan(block, x, layers)
    return saved, x

  def backward(
    self,
    saved: PyTree,
    x: PyTree,
    entries: Weights,
    read: Read,
    visit: Visit,
    *,
    active: jax.Array | None = None,
    frozen: Collection[str] = (),
  ) -> tuple[Weights, dict[str, PyTree]]:
    """Walks the gradient from the loss to the embedding.

    Args:
      saved: input of each block, as `forward` returns it.
      x: input of the loss.
      entries: what the visits change, by weight.
      read: a weight, given its entry.
      visit: called when a weight's gradient is complete.
      active: the one layer whose weights are visited; None for all.
      frozen: weights outside the stack that are not visited.

    Returns:
      The entries after the visits; the metrics.
    """

    def see(carry, name, grad, layer=None):
      entries, squares = carry
      entry = visit(entries[name], name, grad, layer)
      squares += clipping.sum_of_squares(grad)
      return entries | {name: entry}, squares

    names = [n for n in self.tree.names if not in_stack(n)]
    rest = {name: read(entries[name], name, None) for name in names}
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
    # Behind a condition that is always true, which the compiler cannot know:
    # it would make the zeros that the gradient of a lookup starts from before
    # the loop, and hold them through it.
    grads = lax.cond(
      squares != -1,
      lambda: self._embed_gradient(rest, by_embed, dx),
      lambda: {name: jnp.zeros_like(rest[name]) for name in by_embed},
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

  def _embed_gradient(
    self, rest: Weights, names: list[str], dx: PyTree
  ) -> Weights:
    """Returns the gradients of the named weights through the embedding."""

    def part(part):
      batch, dx = part

      def embed(read):
        params = self.tree.build(rest | read)
        return stack.moving(self.model.embed(params, batch))

      return jax.vjp(embed, {name: rest[name] for name in names})[1](dx)[0], ()

    return sum_over(part, (self.batch, dx))[0]

  def _through_stack(self, saved, state, read, see, active, to_embed) -> Any:
    """Returns (cotangents, (entries, squares)) below the stack."""
    num_layers = jax.tree.leaves(saved[0])[0].shape[0]
    inputs = lambda layer: stack.unflat(stack.take(saved[0], layer), saved[1])
    visited = lambda layer, state: self._layer(
      layer, inputs(layer), *state, read, see
    )
    if active is None:
      body = lambda i, state: visited(num_layers - 1 - i, state)
      return lax.fori_loop(0, num_layers, body, state)

    def passed(layer, last, dx, carry):
      """Takes cotangents past the layers above `last`, without a gradient."""

      def body(passing):
        layer, dx = passing
        weights = {n: read(e, n, layer) for n, e in carry[0].items()}

        def part(part):
          x, dx = part
          block = functools.partial(self._block(x), weights)
          return jax.vjp(block, stack.moving(x))[1](dx)[0]

        return layer - 1, lax.map(part, (inputs(layer), dx))

      return lax.while_loop(lambda c: c[0] > last, body, (layer, dx))

    dx, carry = state
    # The layer that the loop ends at, so that reads of it wait for the loop.
    top = jnp.full_like(active, num_layers - 1)
    active, dx = passed(top, active, dx, carry)
    dx, carry = visited(active, (dx, carry))
    if to_embed:
      _, dx = passed(active - 1, -1, dx, carry)
    return dx, carry

  def _layer(self, layer, x, dx, carry, read, see) -> Any:
    """Returns (cotangents, (entries, squares)) below one layer."""

    # The layer's index is held with the entries, so that reads of a weight
    # wait for the visits before them.
    def read_held(held, name):
      (entries, _), layer = held
      return read(entries[name], name, layer)

    def visit(held, name, grad):
      carry, layer = held
      return see(carry, name, grad, layer), layer

    held = (carry, layer)
    if jax.tree.leaves(dx)[0].shape[0] == 1:
      x, dx = stack.take((x, dx), 0)
      dx, held = pull_back(
        self._block(x),
        stack.moving(x),
        dx,
        held,
        names=list(carry[0]),
        read=read_held,
        visit=visit,
      )
      return jax.tree.map(lambda a: a[None], dx), held[0]
    weights = {name: read_held(held, name) for name in carry[0]}

    def part(part):
      x, dx = part
      return jax.vjp(self._block(x), weights, stack.moving(x))[1](dx)

    grads, dx = sum_over(part, (x, dx))
    for name, grad in grads.items():
      held = visit(held, name, grad)
    return dx, held[0]

  def _block(self, x: PyTree) -> Callable[[Weights, PyTree], PyTree]:
    """Returns the block as a function of its weights and of what moves of x."""

    def block(weights, moving):
      params = self.tree.build(weights)['blocks']
      return stack.moving(self.model.block(params, stack.join(moving, x)))

    return block


def pull_back(
  f: Callable[[Weights, PyTree], PyTree],
  x: PyTree,
  dy: PyTree,
  carry: Carry,
  *,
  names: Collection[str],
  read: Callable[[Carry, str], jax.Array],
  visit: Callable[[Carry, str, jax.Array], Carry],
) -> tuple[PyTree, Carry]:
  """Walks back through `f`, visiting each weight's gradient in turn.

  `jax.vjp` returns all gradients of a function at once, so all of them exist
  at once. This runs the same operations in the same order, hands over each
  gradient when it appears, and lets nothing that follows begin before what was
  done with it is done.

  Args:
    f: function of weights by name and of x.
    x: its other argument, floating leaves only.
    dy: cotangent of its result.
    carry: what the visits change.
    names: of the weights.
    read: a weight, given the carry. Called again where the backward pass needs
      the weight, so that no copy of it waits for that.
    visit: `(carry, name, gradient) -> carry`.

  Returns:
    Cotangent of x, and the last carry.

  Example:
    >>> f = lambda weights, x: weights['b'] * (weights['a'] * x)
    >>> weights = {'a': jnp.float32(5), 'b': jnp.float32(7)}
    >>> visit = lambda carry, name, grad: carry | {name: carry[name] - grad}
    >>> dx, weights = pull_back(
    ...   f, jnp.float32(2), jnp.float32(1), weights, names='ab',
    ...   read=dict.get, visit=visit)
    >>> print(dx, weights['a'], weights['b'])
    35.0 -9.0 -3.0
  """
  names = sorted(names)
  weights = {name: read(carry, name) for name in names}
  _, vjp = jax.vjp(f, weights, x)
  closed = jax.make_jaxpr(vjp)(dy)
  jaxpr = closed.jaxpr
  residuals = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  of = {id(weight): name for name, weight in weights.items()}
  reread = {v: of[id(a)] for v, a in residuals.items() if id(a) in of}
  values = dict(zip(jaxpr.invars, jax.tree.leaves(dy), strict=True))
  grads, rest = jaxpr.outvars[: len(names)], jaxpr.outvars[len(names) :]
  grads = dict(zip(names, grads, strict=True))
  due, last = _lifetimes(jaxpr, grads, rest, reread)

  def value(atom):
    if isinstance(atom, jex.Literal):
      return atom.val
    if atom in reread:
      return read(carry, reread[atom])
    return residuals[atom] if atom in residuals else values[atom]

  # A gradient may be there before any operation: the cotangent itself.
  for done in range(len(jaxpr.eqns) + 1):
    if done:
      values |= _run(jaxpr, jaxpr.eqns[done - 1], value)
    ready = [name for name in names if due[name] == done]
    for name in ready:
      carry = visit(carry, name, value(grads[name]))
    if ready:
      # What follows waits for the visits; residuals are of the forward pass,
      # and holding them up would order nothing.
      live = [v for v in values if last.get(v, 0) > done]
      held = [values[v] for v in live]
      held, carry = lax.optimization_barrier((held, carry))
      values = dict(zip(live, held, strict=True))
  return jax.tree.unflatten(jax.tree.structure(x), map(value, rest)), carry


def _lifetimes(
  jaxpr: jex.Jaxpr,
  grads: dict[str, Any],
  rest: list[Any],
  reread: dict[jex.Var, str],
) -> tuple[dict[str, int], dict[jex.Var, int]]:
  """Returns after how many operations each weight can be changed, as its
  gradient is there and nothing reads it any more; and each value is done."""
  made, last = {}, {}
  for count, eqn in enumerate(jaxpr.eqns, 1):
    last |= dict.fromkeys(_variables(eqn.invars), count)
    made |= dict.fromkeys(eqn.outvars, count)
  due = {n: made.get(v, 0) if _variables([v]) else 0 for n, v in grads.items()}
  for var, name in reread.items():
    due[name] = max(due[name], last.get(var, 0))
  for name, var in grads.items():
    if _variables([var]):
      last[var] = max(due[name], last.get(var, 0))
  return due, last | dict.fromkeys(_variables(rest), len(jaxpr.eqns) + 1)


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
  used = set(_variables(jaxpr.outvars))
  used.update(*(_variables(eqn.invars) for eqn in jaxpr.eqns))
  pairs = zip(sorted(weights), jaxpr.invars, strict=True)
  return {name for name, v in pairs if v in used}
