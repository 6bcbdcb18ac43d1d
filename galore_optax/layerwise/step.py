"""The layer-wise step: a reverse loop over a layer stack.

Every layer is updated as soon as its gradients exist, so that the gradients of
only one layer exist at a time. Any optax transformation is a rule:
`lomo(lr)` makes the step LOMO, `galore_adamw_8bit(...)` layer-wise GaLore.
With `accumulate`, projected gradients of parts of the batch are summed first.
The forward and the backward pass are in `passes`.

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

from galore_optax import clipping
from galore_optax.checks import check_count, check_one_of
from galore_optax.galore import Galore
from galore_optax.layerwise import stack
from galore_optax.layerwise.passes import Layer, Layers, Passes
from galore_optax.layerwise.weights import ARRAYS, Weights
from galore_optax.precision import full
from galore_optax.quantized.rounding import apply_updates_stochastic
from galore_optax.sharding import on_any_mesh, placed

PyTree = Any
# The stored weight and the state of its rule.
Entry = tuple[Any, Any]


class LayerwiseState(NamedTuple):
  """State of a layer-wise step."""

  count: jax.Array  # [], int32: steps done, of a finite norm
  norm: jax.Array  # [], float32: of the last of them, in its metrics
  # State of tx by weight: [L, ...] for 'blocks/', of one layer for `badam`; ()
  # for what is frozen.
  inner: dict[str, optax.OptState]


@dataclasses.dataclass(eq=False)
class Layerwise:
  """A training step that updates every layer as soon as its gradients exist.

  It has `init(params) -> state`, and is called with `(params, state, batch)`
  for `(params, state, metrics)`. Metrics are `loss`, a mean; `grad_norm`,
  before clipping, or with `accumulate` the `projected_grad_norm`; and sums of
  what stands beside the loss, by name or as `aux`.

  Only the input of each layer is kept. The reverse loop recomputes one layer,
  computes the gradients of all its weights, updates the weights one by one in
  place and goes on with the layer below. The gradients of one layer exist at a
  time. The result is that of a step on the whole tree. Jit the step and donate
  `params` and `state`.

  Nothing changes, and the `grad_norm` of the metrics is not finite, where the
  loss is not, or where the norm to clip by was found first and is not. If it
  was not found first, nothing changes from the first gradient on that is not
  finite. With `accumulate`, refreshes are done before.

  Args:
    model: the three functions of `Layers`.
    tx: any optax transformation that treats weights one by one, leading axes
      as batch, and so not `optax.clip_by_global_norm`: see `clip_norm`. Its
      update gets `layer=`, the layer's index, as an extra argument.
    clip_norm: largest global norm of the gradient; that of `tx` if `clipped`.
    clip: 'exact' finds that norm by a backward pass of its own, as LOMO does,
      for a `clip_norm` of infinity too; 'previous' takes that of the step
      before, after the first, at no cost.
    microbatches: parts of a batch, over which a layer's gradient is summed, in
      float32: a refresh sees the whole batch, all inputs of blocks are kept.
    accumulate: parts that a batch is cut into before, which pass forward and
      back one after another; their projected gradients are summed for all
      layers. A refresh sees the first part alone, and the norm to clip by is
      that of the sums. `tx` must be a `galore` without a residual rule, or
      start with one in `optax.chain`.
    sums_dtype: of these sums; bfloat16 sums are rounded stochastically.
    slices: by path, in how many slices of its leading axis a weight outside
      the stack is updated: bounds the scratch where `tx` is elementwise.
    weights: how weights are stored; default, as the arrays they are.

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
    """Raises ValueError for options that fit no model, or not each other."""
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

  @placed
  def init(self, params: PyTree) -> LayerwiseState:
    """Returns the state before the first step."""
    tree = stack.Parts(params)
    read = self.weights.read
    weights = tree.weights(params)
    stacked = {name: stack.in_layer_stack(name) for name in weights}
    if not any(stacked.values()):
      rule = "params['blocks'] must hold the layers, every leaf [L, ...]"
      raise ValueError(f'{rule}, got {", ".join(weights)}')
    if self._trains_one_layer():
      self.tx.check_blocks(stacked)

    # A target that matches nothing anywhere is told here: `tx` is strict only
    # where it sees the whole tree.
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

  # Metrics are whole everywhere, as the counter is.
  @on_any_mesh(lambda _, params, state, batch: (params, state, state.count))
  def __call__(
    self, params: PyTree, state: LayerwiseState, batch: PyTree
  ) -> tuple[PyTree, LayerwiseState, dict[str, Any]]:
    """Returns parameters and state one step on, and the step's metrics."""
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
      (stored, state of tx) by weight; the norm of the gradient; the metrics.
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
    # The second pass begins after the first: their gradients never coexist.
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
      # The state is of one layer if one is trained at a time.
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

    The batch passes through the model in parts, forward and back, one after
    another. Of a part's gradient only the projection is kept.

    Returns:
      (stored, state of tx) by weight; the norm of the mean of projected
      gradients; the metrics.
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
    # Of a loss that is not finite, it is not finite either.
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
    """Returns (state of tx, sums) of a weight after a gradient of a part."""
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
    """Returns what a gradient adds to the sums: all of it before slices."""
    if name in self.slices:
      return grad
    return jax.tree.leaves(self.tx.project(tree.alone(name, grad), inner))[0]

  def sums(self, params: PyTree, state: LayerwiseState) -> list[jax.Array]:
    """Returns the zeros that `accumulate` adds projected gradients to."""
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
    """Returns the way of a batch [N, ...] through the model."""
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
    """Returns (stored, state) of one weight, layer or slice, updated.

    The gradient, or the sum of projected ones, counts `scale[1]` times; the
    entry stays as it is where `scale[0]` is not finite.
    """

    def updated(entry: Entry) -> Entry:
      stored, inner = entry
      weight = self.weights.read(stored)
      projected = self.accumulate > 1 and name not in self.slices
      rule = self.tx.apply if projected else self._rule(name).update
      g = grad if scale[1] is None else full(grad) * scale[1]
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
    """Whether tx has the parts of a `badam`, whose state is of one layer."""
    return hasattr(self.tx, 'check_blocks')

  def _rule(self, name: str) -> Any:
    """Returns what updates a weight; None if it is frozen."""
    if not self._trains_one_layer():
      return self.tx
    return self.tx.rule if stack.in_layer_stack(name) else self.tx.rest


layerwise = Layerwise
