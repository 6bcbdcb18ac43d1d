"""The layer-wise step: a reverse loop over a layer stack.

Every layer is updated as soon as its gradients exist, so that the gradients of
only one layer exist at a time. Any optax transformation can compute the
updates: with `lomo(lr)` the step is LOMO, with `galore_adamw_8bit(...)` it is
layer-wise GaLore. With `accumulate`, the projected gradients of parts of the
batch are summed before the update. The forward and the backward pass are in
`passes`.

Axes: L layers, the leading axis of a stack; N examples.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax import clipping, containers, edge
from galore_optax.checks import check_count, check_one_of
from galore_optax.galore import Galore
from galore_optax.layerwise import stack
from galore_optax.layerwise.passes import Layer, Layers, Passes
from galore_optax.layerwise.weights import ARRAYS, Weights
from galore_optax.one_layer import OneLayerRule
from galore_optax.precision import at_least_float32
from galore_optax.quantized.rounding import apply_updates_stochastic
from galore_optax.sharding import on_any_mesh

PyTree = Any
# (stored weight, state of its transformation).
Entry = tuple[Any, Any]


class LayerwiseState(NamedTuple):
  """State of a layer-wise step."""

  count: jax.Array
  """[], int32: number of steps whose gradient norm was finite."""
  norm: jax.Array
  """[], float32: gradient norm of the last of these steps."""
  inner: dict[str, optax.OptState]
  """State of `tx` for each weight, by path. States of stacked weights are
  [L, ...], but those of `badam` belong to one layer. Frozen weights have ()."""


@dataclasses.dataclass(eq=False)
class Layerwise:
  """A training step that updates every layer as soon as its gradients exist.

  Its method `init(params)` returns a state. The step is called with `(params,
  state, batch)` and returns `(params, state, metrics)`. The metrics are the
  mean `loss`; the `grad_norm` before clipping, or with `accumulate` the
  `projected_grad_norm`; and the sums that the model's `loss` returns with the
  loss, by name or as `aux`.

  Only the input of each layer is kept. The reverse loop recomputes one layer,
  computes the gradients of all its weights, updates the weights one by one in
  place and goes on with the layer below. The gradients of one layer exist at a
  time. The result is that of a step on the whole tree. Jit the step and donate
  `params` and `state`.

  If the loss is non-finite, the step changes no weight and no state, and the
  reported `grad_norm` is non-finite. The same holds if the norm is computed
  first (`clip='exact'`) and is non-finite. Otherwise a non-finite gradient is
  detected when it is computed: weights that were updated before keep their
  updates, and the other weights do not change. With `accumulate`, bases may be
  refreshed although nothing else changes.

  Args:
    model: an object with the three functions of `Layers`.
    tx: any optax transformation that treats each weight separately and leading
      axes as batch. `optax.clip_by_global_norm` does not; use `clip_norm`. The
      index of the layer is passed to its update as the extra argument `layer`.
    clip_norm: largest global norm of the gradient. If `tx` was made by
      `clipped`, its norm is used instead.
    clip: 'exact' computes the norm in an extra backward pass, as LOMO does,
      even if `clip_norm` is infinity. 'previous' uses the norm of the previous
      step, at no cost; only the first step computes it.
    microbatches: number of parts of a batch. A layer's gradient is summed over
      the parts in float32 before it is used, so a refresh uses the whole batch.
      The layer inputs of the whole batch are kept.
    accumulate: number of parts that pass forward and backward one after
      another. Only the layer inputs of one part are kept. The projected
      gradients of all layers are summed over the parts. A refresh uses only the
      first part, and clipping uses the norm of the sums. `tx` must be a
      `galore` without a residual rule, or an `optax.chain` that starts with
      such a `galore`.
    sums_dtype: dtype of these sums; bfloat16 sums are rounded stochastically.
    slices: for paths of weights outside the stack, the number of slices of the
      leading axis that are updated one after another. This limits the scratch
      memory, and requires an elementwise `tx`.
    weights: how weights are stored between steps; by default as arrays.

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
    Lv et al., `LOMO <https://arxiv.org/abs/2306.09782>`_, 2023.
  """

  model: Layers
  tx: Any
  _: dataclasses.KW_ONLY
  clip_norm: float | None = None
  clip: Literal['exact', 'previous'] = 'exact'
  microbatches: int = 1
  accumulate: int = 1
  sums_dtype: Any = jnp.float32
  slices: Mapping[str, int] = dataclasses.field(default_factory=dict)
  weights: Weights = ARRAYS

  def __post_init__(self) -> None:
    """Raises ValueError for invalid or incompatible options."""
    if isinstance(self.tx, clipping.ClippedTransformation):
      if self.clip_norm is not None:
        its = f'a rule that clips at {self.tx.clip_norm}: give one of the two'
        raise ValueError(f'clip_norm={self.clip_norm} beside {its}')
      self.clip_norm, self.tx = self.tx.clip_norm, self.tx.rule
    self.tx = optax.with_extra_args_support(self.tx)
    check_count(microbatches=self.microbatches, accumulate=self.accumulate)
    clipping.check_norm(self.clip_norm)
    check_one_of(('exact', 'previous'), clip=self.clip)
    linear = isinstance(self.tx, Galore) and self.tx.linear
    if self.accumulate > 1 and not linear:
      its = f'accumulate={self.accumulate} sums projected gradients: tx must be'
      raise ValueError(f'{its} a galore without residual, or use microbatches')

  def init(self, params: PyTree) -> LayerwiseState:
    """Returns the state before the first step."""
    # Stored weights may be integers, so only boxes are opened.
    return edge.at_init(self._init, opened=containers.unboxed)(params)

  def _init(self, params: PyTree) -> LayerwiseState:
    """Returns the state for a tree without boxes."""
    tree = stack.Parts(params)
    read = self.weights.read
    weights = tree.weights(params)
    stacked = {name: stack.in_layer_stack(name) for name in weights}
    if not any(stacked.values()):
      rule = "params['blocks'] must hold the layers, every leaf [L, ...]"
      raise ValueError(f'{rule}, got {", ".join(weights)}')
    if self._trains_one_layer():
      self.tx.check_blocks(stacked)

    # Initialize the whole tree abstractly, so that `tx` raises if one of its
    # target patterns matches no weight. It cannot check trees of one weight.
    def init_all(weights: dict[str, Any]) -> Any:
      arrays = {name: read(stored) for name, stored in weights.items()}
      return self.tx.init(tree.build(arrays))

    jax.eval_shape(init_all, weights)

    def init_weight(name: str, stored: Any) -> Any:
      rule = self._rule(name)
      if rule is None:
        return ()

      def init(stored: Any) -> Any:
        return rule.init(tree.alone(name, read(stored)))

      if name in self.slices:
        return jax.vmap(init)(stack.sliced(stored, self.slices[name]))
      if stacked[name] and not self._trains_one_layer():
        return jax.vmap(init)(stored)
      return init(stack.take(stored, 0 if stacked[name] else None))

    inner: Any = {name: init_weight(name, w) for name, w in weights.items()}
    return LayerwiseState(jnp.int32(0), jnp.float32(0), inner)

  def __call__(
    self, params: PyTree, state: LayerwiseState, batch: PyTree
  ) -> tuple[PyTree, LayerwiseState, dict[str, Any]]:
    """Returns the parameters and the state after one step, and its metrics."""
    weights, plain = containers.unboxed(params), containers.unboxed(state)
    # The metrics are replicated, like the step counter.
    run = on_any_mesh(self._step, like=lambda: (weights, plain, plain.count))
    weights, plain, metrics = run(weights, plain, batch)
    new = containers.reboxed((weights, plain), (params, state))
    return *new, metrics

  def _step(
    self, params: PyTree, state: LayerwiseState, batch: PyTree
  ) -> tuple[PyTree, LayerwiseState, dict[str, Any]]:
    """Returns the result of `__call__`."""
    tree = stack.Parts(params)
    summed = self.accumulate > 1
    step = self._in_parts if summed else self._at_once
    key = jax.random.fold_in(jax.random.key(0), state.count)
    weights = tree.weights(params)
    entries, norm, metrics = step(tree, weights, state, batch, key)
    metrics['projected_grad_norm' if summed else 'grad_norm'] = norm
    params = tree.build({name: stored for name, (stored, _) in entries.items()})
    inner = {name: inner for name, (_, inner) in entries.items()}
    is_finite = jnp.isfinite(norm)
    next_count = optax.safe_increment(state.count)
    count = jnp.where(is_finite, next_count, state.count)
    norm = jnp.where(is_finite, norm, state.norm)
    return params, LayerwiseState(count, norm, inner), metrics

  def _at_once(
    self,
    tree: stack.Parts,
    weights: dict[str, Any],
    state: LayerwiseState,
    batch: PyTree,
    key: jax.Array,
  ) -> tuple[dict[str, Entry], jax.Array, dict[str, Any]]:
    """Updates the weights of each layer as soon as their gradients exist.

    Returns:
      The entry of each weight; the norm of the gradient; the metrics.
    """
    passes = self.passes(tree, batch)
    saved, x = passes.forward(weights)
    active = None
    if self._trains_one_layer():
      active = self.tx.active(state.count, jax.tree.leaves(saved)[0].shape[0])
    back = functools.partial(passes.backward, saved, active=active)

    def exact_norm() -> jax.Array:
      no_entries = dict.fromkeys(weights)
      return back(x, no_entries, lambda entry, *_: entry, stored=weights)[1]

    norm = jnp.float32(0)
    factor = None
    if self.clip_norm is not None:
      if self.clip == 'exact':
        norm = exact_norm()
      else:
        norm = lax.cond(state.count == 0, exact_norm, lambda: state.norm)
      factor = clipping.clip_coefficient(norm, self.clip_norm)
    # The second backward pass begins after the first one has ended, so that
    # their gradients do not exist at the same time.
    x, norm, factor = lax.optimization_barrier((x, norm, factor))

    def visit(
      entry: Entry,
      name: str,
      grad: jax.Array,
      layer: Layer,
      squares: jax.Array,
    ) -> Entry:
      scale = (norm + squares, factor)
      update = functools.partial(self.update, tree, key, scale, name)
      if layer is None:
        return stack.in_slices(update, entry, grad, self.slices.get(name))
      # If only one layer is trained at a time, its state has no layer axis.
      places = (layer, layer if active is None else None)
      new = update(tuple(map(stack.take, entry, places)), grad, layer)
      return tuple(map(stack.put, entry, new, places))

    entries = {name: (w, state.inner[name]) for name, w in weights.items()}
    return back(x, entries, visit)

  def _in_parts(
    self,
    tree: stack.Parts,
    weights: dict[str, Any],
    state: LayerwiseState,
    batch: PyTree,
    key: jax.Array,
  ) -> tuple[dict[str, Entry], jax.Array, dict[str, Any]]:
    """Updates every weight from the sum of its projected gradients.

    The parts of the batch pass through the model one after another, forward
    and backward. Only the projection of each gradient is kept.

    Returns:
      The entry of each weight; the norm of the mean projected gradient; the
      metrics.
    """
    num = self.accumulate
    pairs = zip(weights, self.sums(tree.build(weights), state), strict=True)
    entries = {name: (state.inner[name], zero) for name, zero in pairs}

    def part(
      entries: dict[str, Any], numbered: tuple[jax.Array, PyTree]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
      number, batch = numbered
      passes = self.passes(tree, batch)
      saved, x = passes.forward(weights)
      add = functools.partial(self._add, tree, key, number)
      new, _, metrics = passes.backward(saved, x, entries, add, stored=weights)
      return new, metrics

    numbered = (jnp.arange(num), stack.split_microbatches(batch, num))
    entries, metrics = lax.scan(part, entries, numbered)
    metrics = jax.tree.map(lambda a: jnp.sum(a, 0), metrics)
    metrics['loss'] /= num
    sums = {name: total for name, (_, total) in entries.items()}
    # `0 * loss` makes the norm non-finite if the loss is non-finite.
    norm = jnp.sqrt(clipping.sum_of_squares((sums, 0 * metrics['loss']))) / num
    factor = clipping.clip_coefficient(norm, self.clip_norm or jnp.inf) / num

    def updated(name: str) -> Entry:
      update = functools.partial(self.update, tree, key, (norm, factor), name)
      entry = (weights[name], entries[name][0])
      if stack.in_layer_stack(name):
        return stack.map_layers(update, entry, sums[name])
      return stack.in_slices(update, entry, sums[name], self.slices.get(name))

    return {name: updated(name) for name in weights}, norm, metrics

  def _add(
    self,
    tree: stack.Parts,
    key: jax.Array,
    number: jax.Array,
    entry: tuple[Any, jax.Array],
    name: str,
    grad: jax.Array,
    layer: Layer,
    squares: jax.Array,
  ) -> tuple[Any, jax.Array]:
    """Adds the projected gradient of one part to the sum of a weight.

    The first part may refresh the basis before.

    Returns:
      The state of tx; the sum.
    """
    inner, total = stack.take(entry, layer)
    index = 0 if layer is None else layer
    if name not in self.slices:
      alone = tree.alone(name, grad)
      due = (number == 0) & self.tx.due(inner, layer=index)
      inner = lax.cond(
        due,
        lambda inner: self.tx.refresh(alone, inner, layer=index),
        lambda inner: inner,
        inner,
      )
    low = self._projected(tree, name, grad, inner)
    noise = tree.key(jax.random.fold_in(key, number), name, index)
    new = (inner, apply_updates_stochastic(total, low, noise))
    return stack.put(entry, new, layer)

  def _projected(
    self, tree: stack.Parts, name: str, grad: jax.Array, inner: Any
  ) -> jax.Array:
    """Returns the projected gradient, or the gradient of a sliced weight."""
    if name in self.slices:
      return grad
    return jax.tree.leaves(self.tx.project(tree.alone(name, grad), inner))[0]

  def sums(self, params: PyTree, state: LayerwiseState) -> list[jax.Array]:
    """Returns the initial sums of projected gradients, one for each weight."""
    if self.accumulate == 1:
      return []
    tree = stack.Parts(params)
    weights = tree.weights(params)

    def zero(name: str) -> jax.Array:
      def project(stored: Any, inner: Any) -> jax.Array:
        return self._projected(tree, name, self.weights.read(stored), inner)

      if stack.in_layer_stack(name):
        project = jax.vmap(project)
      shape = jax.eval_shape(project, weights[name], state.inner[name]).shape
      return jnp.zeros(shape, self.sums_dtype)

    return [zero(name) for name in weights]

  def passes(self, tree: stack.Parts, batch: PyTree) -> Passes:
    """Returns the passes of a batch [N, ...]."""
    batch = stack.split_microbatches(batch, self.microbatches)
    frozen = [name for name in tree.names if self._rule(name) is None]
    return Passes(self.model, tree, self.weights.read, batch, frozen)

  def update(
    self,
    tree: stack.Parts,
    key: jax.Array,
    scale: tuple[jax.Array, jax.Array | None],
    name: str,
    entry: Entry,
    grad: jax.Array,
    layer: jax.Array | int,
  ) -> Entry:
    """Updates a weight, one slice of it, or one layer of a stacked weight.

    Args:
      tree: structure of the parameters.
      key: random key of the step.
      scale: (x, factor). The entry is returned unchanged if x is non-finite.
        The gradient is multiplied by the factor, unless it is None.
      name: path of the weight.
      entry: (stored weight, state of tx).
      grad: gradient, or with `accumulate` the sum of projected gradients.
      layer: index of the layer or slice; 0 for a whole weight.

    Returns:
      The updated entry.
    """

    def updated(entry: Entry) -> Entry:
      stored, inner = entry
      weight = self.weights.read(stored)
      projected = self.accumulate > 1 and name not in self.slices
      rule = self.tx.apply if projected else self._rule(name).update
      g = grad if scale[1] is None else at_least_float32(grad) * scale[1]
      if not projected:
        g = g.astype(weight.dtype)
      weight_tree = tree.alone(name, weight)
      new, inner = rule(tree.alone(name, g), inner, weight_tree, layer=layer)
      noise = tree.key(key, name, layer)
      return self.weights.write(stored, jax.tree.leaves(new)[0], noise), inner

    with jax.named_scope('if_finite'):
      return lax.cond(
        jnp.isfinite(scale[0]), updated, lambda entry: entry, entry
      )

  def _trains_one_layer(self) -> bool:
    """Whether `tx` trains one layer at a time and has state for one layer."""
    return isinstance(self.tx, OneLayerRule)

  def _rule(self, name: str) -> Any:
    """Returns the transformation of a weight; None if it is frozen."""
    if not self._trains_one_layer():
      return self.tx
    return self.tx.rule if stack.in_layer_stack(name) else self.tx.rest


layerwise = Layerwise
