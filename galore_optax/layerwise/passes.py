"""The forward and the backward pass of a batch through a stack of layers.

`Passes.backward` goes through the model in reverse: the head, the layers from
the last to the first, the embedding. It computes the gradients of one layer at
a time and visits the weights of that layer one by one. The caller passes the
visit function, which updates a weight, adds to a sum, or does nothing.

Axes: L layers, the leading axis of a stack; K microbatches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from galore_optax.clipping import sum_of_squares
from galore_optax.layerwise import stack
from galore_optax.precision import at_least_float32

PyTree = Any
# Index of a layer, or None for a weight outside the stack.
Layer = jax.Array | int | None
# A function `(entries, name, layer) -> weight`.
Read = Callable[[dict[str, Any], str, Layer], jax.Array]


class Layers(Protocol):
  """The interface of a model for `layerwise`: three pure functions.

  `params['blocks']` is the layer stack, with leaves `[L, ...]`. The other
  entries of `params` are read by `embed` and `loss`. `x` is a pytree whose
  structure and shapes are the same before and after every layer. Its integer
  leaves (positions, segments) are passed on and not differentiated.
  """

  def embed(self, params: PyTree, batch: PyTree) -> PyTree:
    """Returns the input of the first layer."""

  def block(self, layer_params: PyTree, x: PyTree) -> PyTree:
    """Returns the output of a layer, the input of the next one."""

  def loss(self, params: PyTree, x: PyTree, batch: PyTree) -> Any:
    """Returns (mean loss [], sums over the batch, which become metrics)."""


class Visit(Protocol):
  """A function that is called with the gradient of each weight."""

  def __call__(
    self,
    entry: Any,
    name: str,
    grad: jax.Array,
    layer: Layer,
    squares: jax.Array,
    /,
  ) -> Any:
    """Returns the new entry of a weight.

    Args:
      entry: the current entry of the weight; all layers if it is stacked.
      name: the path of the weight.
      grad: the gradient of the weight; of one layer if it is stacked.
      layer: the index of that layer, or None outside the stack.
      squares: the sum of squares of all gradients up to and including this one.
        It is non-finite if the loss or any of these gradients is non-finite.
    """
    ...


class Visited(NamedTuple):
  """Values that the backward pass carries from one weight to the next."""

  entries: dict[str, Any]
  """The entry of each weight, by path, as updated so far."""
  squares: jax.Array
  """[], float32: the sum of squares of the gradients so far."""


# A function `(visited, name, grad, layer) -> visited` that visits one weight.
VisitWeight = Callable[[Visited, str, jax.Array, Layer], Visited]


class Passes(NamedTuple):
  """The forward and the backward pass of one batch."""

  model: Layers
  """The model."""
  tree: stack.Parts
  """The structure of the parameters."""
  read: Callable[[Any], jax.Array]
  """Converts a stored weight to the array that the model computes with."""
  batch: PyTree
  """Microbatches [K, ...]."""
  frozen: Sequence[str] = ()
  """Paths of weights outside the stack that are not visited."""

  def forward(self, stored: dict[str, Any]) -> tuple[PyTree, PyTree]:
    """Returns the input of each layer [L, K, ...] and of the loss [K, ...]."""
    layers = {n: w for n, w in stored.items() if stack.in_layer_stack(n)}
    rest = {n: self.read(w) for n, w in stored.items() if n not in layers}
    params = self.tree.build(rest)
    x = lax.map(lambda part: self.model.embed(params, part), self.batch)

    def layer(x: PyTree, stored: dict[str, Any]) -> tuple[PyTree, PyTree]:
      weights = {name: self.read(w) for name, w in stored.items()}
      above = lax.map(lambda x: self._apply_layer(weights, x), x)
      return above, stack.flat(x)

    x, saved = lax.scan(layer, x, layers)
    return saved, x

  def backward(
    self,
    saved: PyTree,
    x: PyTree,
    entries: dict[str, Any],
    visit: Visit,
    *,
    stored: dict[str, Any] | None = None,
    active: jax.Array | None = None,
  ) -> tuple[dict[str, Any], jax.Array, dict[str, Any]]:
    """Computes the gradients from the loss to the embedding, with visits.

    Args:
      saved: the input of each layer, as `forward` returns it.
      x: the input of the loss.
      entries: for each weight, the data that its visits read and replace.
      visit: called once with the gradient of each weight, and for a stacked
        weight once for each layer.
      stored: the stored weights, if the visits do not change them. None if the
        first element of each entry is the stored weight. Weights that do not
        change should not be in the entries, because XLA would copy them.
      active: the only layer whose weights are visited; None visits all layers.

    Returns:
      The entries after the visits; the norm of the visited gradients; the
      metrics.
    """

    # Weights are read from the current entries, so a read after a visit waits
    # for that visit.
    def read(entries: dict[str, Any], name: str, layer: Layer) -> jax.Array:
      weight = entries[name][0] if stored is None else stored[name]
      return self.read(stack.take(weight, layer))

    def visit_weight(
      visited: Visited, name: str, grad: jax.Array, layer: Layer
    ) -> Visited:
      squares = visited.squares + sum_of_squares(grad)
      entry = visit(visited.entries[name], name, grad, layer, squares)
      return Visited(visited.entries | {name: entry}, squares)

    rest = {
      name: read(entries, name, None)
      for name in entries
      if not stack.in_layer_stack(name)
    }

    def embed(some: dict[str, Any], batch: PyTree) -> PyTree:
      return self.model.embed(self.tree.build(rest | some), batch)

    def loss(some: dict[str, Any], x: PyTree, batch: PyTree) -> Any:
      return self.model.loss(self.tree.build(rest | some), x, batch)

    # A weight is visited as soon as its gradient is complete. This is after the
    # loss, or at the end if `embed` reads the weight. A tied embedding is read
    # by both functions; its two gradients are added. A weight that neither
    # function reads is visited at the end, with a zero gradient.
    by_loss = _used(loss, rest, *stack.take((x, self.batch), 0))
    by_embed = _used(embed, rest, stack.take(self.batch, 0))
    moving = {n: w for n, w in rest.items() if n not in self.frozen}
    in_loss = {n: w for n, w in moving.items() if n in by_loss}
    in_embed = {n: w for n, w in moving.items() if n not in by_loss - by_embed}
    (value, sums, head), dx = _loss_gradient(loss, in_loss, x, self.batch)
    visited = Visited(entries, jnp.where(jnp.isfinite(value), 0.0, jnp.nan))
    for name in in_loss:
      if name not in in_embed:
        visited = visit_weight(visited, name, head.pop(name), None)
    entries = visited.entries
    layers = {n: entry for n, entry in entries.items() if n not in rest}
    dx, visited = self._through_stack(
      saved,
      x,
      dx,
      Visited(layers, visited.squares),
      read,
      visit_weight,
      active=active,
      to_embed=bool(in_embed),
    )

    def embed_gradients() -> dict[str, jax.Array]:
      return _gradients(embed, in_embed, self.batch, dx)[0]

    # This condition is always true, but the compiler cannot infer that. Without
    # it, the compiler would allocate the zeros to which the gradient of an
    # embedding lookup is added before the loop, and keep them during the loop.
    grads = lax.cond(
      visited.squares != -1,
      embed_gradients,
      lambda: jax.tree.map(jnp.zeros_like, in_embed),
    )
    visited = Visited(entries | visited.entries, visited.squares)
    for name in in_embed:
      grad = grads[name] + head[name] if name in head else grads[name]
      visited = visit_weight(visited, name, grad, None)
    metrics = dict(sums) if isinstance(sums, Mapping) else {'aux': sums}
    return visited.entries, jnp.sqrt(visited.squares), metrics | {'loss': value}

  def _through_stack(
    self,
    saved: PyTree,
    x: PyTree,
    dx: PyTree,
    visited: Visited,
    read: Read,
    visit_weight: VisitWeight,
    *,
    active: jax.Array | None,
    to_embed: bool,
  ) -> tuple[PyTree, Visited]:
    """Computes the gradients of the layers, from the last one, with visits.

    Args:
      saved: the input of each layer.
      x: the input of the loss, for its shapes.
      dx: the cotangents of the input of the loss.
      visited: the results of the visits before.
      read: reads a weight.
      visit_weight: visits a weight.
      active: the only layer whose weights are visited; None visits all layers.
      to_embed: whether to continue to the embedding below the active layer.

    Returns:
      The cotangents of the input of the lowest layer that was reached; the
      results of the visits.
    """
    num_layers = jax.tree.leaves(saved)[0].shape[0]

    def inputs(layer: Layer) -> PyTree:
      return stack.unflat(stack.take(saved, layer), x)

    def visit_layer(
      layer: jax.Array, dx: PyTree, visited: Visited
    ) -> tuple[PyTree, Visited]:
      entries = visited.entries
      weights = {name: read(entries, name, layer) for name in sorted(entries)}
      grads, dx = _gradients(self._apply_layer, weights, inputs(layer), dx)
      # The visits write to the stacks, which the gradients and dx read before.
      layer = _index_after((grads, dx), layer)
      for name in weights:
        visited = visit_weight(visited, name, grads.pop(name), layer)
        # Each visit begins after the previous one, so that only one visit needs
        # scratch memory at a time.
        entry = visited.entries[name]
        grads, entry, layer = lax.optimization_barrier((grads, entry, layer))
        visited = visited._replace(entries=visited.entries | {name: entry})
      return dx, visited

    if active is None:

      def body(i: jax.Array, state: tuple[PyTree, Visited]) -> Any:
        return visit_layer(num_layers - 1 - i, *state)

      return lax.fori_loop(0, num_layers, body, (dx, visited))

    def pass_layers(
      layer: jax.Array, last: Layer, dx: PyTree, entries: dict[str, Any]
    ) -> tuple[jax.Array, PyTree]:
      """Propagates cotangents down to the output of `last`, without visits."""

      def body(state: tuple[jax.Array, PyTree]) -> Any:
        layer, dx = state
        weights = {name: read(entries, name, layer) for name in entries}
        _, dx = _gradients(
          lambda _, x: self._apply_layer(weights, x), {}, inputs(layer), dx
        )
        return layer - 1, dx

      return lax.while_loop(lambda state: state[0] > last, body, (layer, dx))

    # `pass_layers` returns the index of the layer at which its loop ends. That
    # index is used below, so that reads of the layer wait for the loop.
    top = jnp.full_like(active, num_layers - 1)
    active, dx = pass_layers(top, active, dx, visited.entries)
    dx, visited = visit_layer(active, dx, visited)
    if to_embed:
      _, dx = pass_layers(active - 1, -1, dx, visited.entries)
    return dx, visited

  def _apply_layer(self, weights: dict[str, Any], x: PyTree) -> PyTree:
    return self.model.block(self.tree.build(weights)['blocks'], x)


def _index_after(arrays: PyTree, index: jax.Array) -> jax.Array:
  """Returns `index`, computed so that its use waits for all `arrays`.

  The condition is always true, but the compiler cannot infer that. If the order
  of reading and writing a stack were only given by an optimization barrier, the
  CPU compiler, which drops barriers early, would copy the whole stack.
  """
  return jnp.where(sum_of_squares(arrays) != -1, index, 0)


def _used(
  f: Callable[..., Any], weights: dict[str, jax.Array], *args: Any
) -> set[str]:
  """Returns the paths of the weights that `f` reads, from its jaxpr."""
  jaxpr = jax.make_jaxpr(f)(weights, *args).jaxpr
  atoms = [v for e in jaxpr.eqns for v in e.invars] + jaxpr.outvars
  used = {v for v in atoms if isinstance(v, jex.Var)}
  pairs = zip(sorted(weights), jaxpr.invars, strict=False)
  return {name for name, v in pairs if v in used}


def _loss_gradient(
  loss: Callable[..., Any], head: dict[str, jax.Array], x: PyTree, batch: PyTree
) -> tuple[Any, PyTree]:
  """Returns (loss, sums, gradients of `head`) and the cotangents of x.

  All are totals over the microbatches, except for the cotangents [K, ...].
  """
  num = jax.tree.leaves(batch)[0].shape[0]

  def of_part(part: tuple[PyTree, PyTree]) -> tuple[Any, PyTree]:
    batch, x = part

    def mean(head: dict[str, jax.Array], moving: PyTree) -> Any:
      value, sums = loss(head, stack.join_moving(moving, x), batch)
      return value / num, sums

    gradient = jax.value_and_grad(mean, (0, 1), has_aux=True)
    (value, sums), (grads, dx) = gradient(head, stack.moving(x))
    return (value, sums, grads), dx

  return sum_over(of_part, (batch, x))


def _gradients(
  f: Callable[[dict[str, jax.Array], PyTree], PyTree],
  weights: dict[str, jax.Array],
  x: PyTree,
  dy: PyTree,
) -> tuple[dict[str, jax.Array], PyTree]:
  """Runs `jax.vjp` of `f(weights, x)` for each microbatch.

  Args:
    f: the function.
    weights: arrays by path.
    x: inputs [K, ...].
    dy: cotangents of the floating leaves of the outputs [K, ...].

  Returns:
    Gradients of the weights, summed over the microbatches; cotangents of the
    floating leaves of x [K, ...].
  """

  def of_part(part: tuple[PyTree, PyTree]) -> tuple[Any, PyTree]:
    x, dy = part

    def moved(weights: dict[str, jax.Array], moving: PyTree) -> PyTree:
      return stack.moving(f(weights, stack.join_moving(moving, x)))

    return jax.vjp(moved, weights, stack.moving(x))[1](dy)

  return sum_over(of_part, (x, dy))


def sum_over(
  f: Callable[[Any], tuple[Any, Any]], parts: PyTree
) -> tuple[Any, PyTree]:
  """Calls f for each microbatch; sums its first results, stacks the second.

  Sums are computed in float32 and returned in the dtypes of the results.

  >>> sum_over(lambda x: (x, -x), jnp.arange(3.0))
  (Array(3., dtype=float32), Array([-0., -1., -2.], dtype=float32))
  """
  first = stack.take(parts, 0)
  if jax.tree.leaves(parts)[0].shape[0] == 1:
    total, stacked = f(first)
    return total, jax.tree.map(lambda a: a[None], stacked)

  def body(sums: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
    one, stacked = f(part)
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, one), stacked

  like, _ = jax.eval_shape(f, first)
  zeros = jax.tree.map(lambda a: jnp.zeros_like(at_least_float32(a)), like)
  sums, stacked = lax.scan(body, zeros, parts)
  return jax.tree.map(lambda a, b: a.astype(b.dtype), sums, like), stacked
