"""Optimizer state in 8 bits, for any optax transformation.

`quantize_state` keeps the structure of the inner optimizer's state and stores
its moments as `Quantized` nodes, which `array` defines.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from galore_optax import edge, trial
from galore_optax.checks import (
  check_count,
  check_flag,
  check_size,
  check_static,
)
from galore_optax.precision import (
  allclose,
  at_least_float32,
  one_element,
  tree_at_least_float32,
)
from galore_optax.quantized import array
from galore_optax.quantized.array import (
  Quantized,
  dequantize_tree,
  is_quantized,
  quantize,
  quantized_full,
)
from galore_optax.quantized.codes import Code
from galore_optax.sharding import alike, compile_time_eval, on_any_mesh
from galore_optax.trial import (
  TRACED,
  UNKNOWN,
  NeedsFunctionError,
  RunOnce,
  Traced,
  map_once,
  try_update,
  warn_untried,
)
from galore_optax.unstack import unstack

# States of wrappers that read several leaves at once. Such a wrapper must go
# around `quantize_state`, which would otherwise run it leaf by leaf.
GUARDS = (
  optax.ApplyIfFiniteState,
  optax.MaskedState,
  optax.MultiStepsState,
  optax.transforms.PartitionState,
)
# Names of fields that hold second moments. Some optimizers use such a name for
# another average, so a field that becomes negative is not a second moment.
SQUARES = {'nu', 'nu_max', 'v', 'n', 'sum_of_squares'}
# A leaf of at least this many elements is updated piece by piece in a loop. The
# compiler reuses the temporary memory of one loop for the next one, but not
# always that of straight-line code.
DIVIDE_FROM = 2**20
# Largest number of elements in a piece: 16 MiB of float32 for each moment.
PIECE_SIZE = 2**22
# Fewest small leaves of one shape that are updated together. A stack saves
# compilation time for many leaves, but each step has to copy it.
FEWEST = 8


def quantize_state(
  inner: optax.GradientTransformation,
  *,
  block_size: int = 256,
  min_size: int = 4096,
  elementwise: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Stores the moments of a transformation in 8 bits.

  A leaf of the inner optimizer's state is quantized if all of these hold: it is
  floating, it has the path and the shape of a parameter, it has at least
  `min_size` elements, and its initial value does not depend on the weights (a
  copy of the weights is not a moment). Second moments, in fields such as `nu`
  and `v`, are stored with the unsigned dynamic code, other moments with the
  signed code. All other leaves are unchanged. Moments that are not quantized
  are float32, even if the parameters are bfloat16.

  An elementwise inner optimizer (Adam, Lion, momentum, clipping by value) runs
  leaf by leaf. A leaf of more than 1 M elements is updated piece by piece and
  in place, so that no float32 copy of the state exists. Set `elementwise=False`
  for an inner optimizer that reads a whole leaf (Adafactor, Muon, a trust
  ratio) or several leaves (clipping by a norm); the whole tree is then
  dequantized for each update. Masks, partitions, `apply_if_finite` and
  `MultiSteps` go around `quantize_state`.

  8-bit Adam differs from Adam for very small entries. A second moment below
  about 1e-7 of the largest one in its block is rounded up to 3e-7 of it. The
  update of such an entry is too small, but never too large.

  Args:
    inner: any optax transformation. Schedules and injected hyperparameters
      work as usual.
    block_size: number of elements that share a float32 scale.
    min_size: leaves with fewer elements stay float32. In a layer-wise step this
      is the size of one layer's weight, not of the stack.
    elementwise: whether the update of an element depends only on the gradient,
      the state and the weight of that element.

  Returns:
    A transformation whose state has the structure of `inner`'s state, with
    `Quantized` nodes instead of arrays: 1 byte per element and 4 bytes per
    block. A block never spans two matrices of a stack, so stacks of small
    matrices need more scales. Updates have the dtype of the gradients. `init`
    accepts `jax.ShapeDtypeStruct`s and allocates no float32 moments.

  Raises:
    ValueError: at `init`, if `elementwise` is set and the inner optimizer is
      not elementwise.

  Example:
    >>> tx = quantize_state(optax.adam(1e-3))
    >>> params = {'w': jnp.ones((64, 256)), 'b': jnp.ones(64)}
    >>> state = tx.init(params)
    >>> state[0].nu['w'].nbytes, state[0].nu['b'].nbytes
    (16640, 256)

  References:
    Dettmers et al., `8-bit optimizers via block-wise quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021.
  """
  check_static(block_size=block_size, min_size=min_size)
  check_count(block_size=block_size)
  check_size(min_size=min_size)
  check_flag(elementwise=elementwise)
  inner = optax.with_extra_args_support(inner)
  is_elementwise = functools.cache(functools.partial(_is_elementwise, inner))
  probed: dict[Hashable, list[Probe]] = {}

  def init_fn(params: Any) -> Any:
    if elementwise:
      _check_elementwise(inner, params, is_elementwise)
    kinds = trial.kinds(params)
    if kinds not in probed:
      probed[kinds] = _probe_leaves(inner, params)
    probes = probed[kinds]
    shapes = jax.tree.map(_wide_shape, params)
    traced = Traced(inner.init, shapes)
    fills = traced.fills()

    def quantized(state: Any) -> Any:
      return _quantized_init(state, params, probes, fills, block_size, min_size)

    def init(params: Any) -> Any:
      state = inner.init(tree_at_least_float32(params))
      return quantized(jax.tree.map(jnp.asarray, state))

    if None not in fills and not any(
      map(_is_weak, jax.tree.leaves(traced.result))
    ):
      # The whole state is constant, so nothing has to be compiled.
      return quantized(traced.result)
    leaves = jax.tree.leaves(params)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
      return jax.jit(lambda: init(jax.tree.map(_zeros, params)))()
    # Under `jit` the float32 moments are not allocated before quantization.
    return jax.jit(init)(params)

  def update(
    updates: Any, state: Any, params: Any, extra_args: dict[str, Any]
  ) -> tuple[Any, Any]:
    def run(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
      return inner.update(grads, state, params, **extra_args)

    if elementwise:
      outer = Outer.of(inner)
      new, after = _leaf_by_leaf(run, outer, updates, state, params)
    else:
      new, after = run(
        tree_at_least_float32(updates), dequantize_tree(state), params
      )
      after = quantize_tree(after, state)
    return optax.tree.cast_like(new, updates), _alike_codes(after, state)

  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    run = on_any_mesh(update, like=lambda: (updates, state))
    return run(updates, state, params, extra_args)

  return edge.at_edge(optax.GradientTransformationExtraArgs(init_fn, update_fn))


def _is_weak(x: Any) -> bool:
  """Whether the type of an array is weak, as that of a Python number."""
  return getattr(x, 'weak_type', False)


def _wide_shape(x: Any) -> jax.ShapeDtypeStruct:
  """Returns the shape of a parameter, with the dtype of its moments."""
  return at_least_float32(jax.ShapeDtypeStruct(x.shape, x.dtype))


def _zeros(x: Any) -> jax.Array:
  return jnp.zeros(x.shape, x.dtype)


class Outer(NamedTuple):
  """The outer structure of a state, down to its moment trees and counters.

  A moment tree has the structure of the parameters. Every other leaf of the
  state, such as a step count, is called a counter here.
  """

  treedef: Any
  """Structure of the state, whose leaves are moment trees and counters."""
  is_tree: list[bool]
  """For each leaf of `treedef`, whether it is a moment tree."""

  @classmethod
  def of(cls, inner: optax.GradientTransformation) -> 'Outer':
    """Finds the structure by initializing the inner with a `MaskedNode`.

    A `MaskedNode` is a tree without leaves. It appears in the state once for
    each moment tree.
    """

    def is_tree(x: object) -> bool:
      return isinstance(x, optax.MaskedNode)

    empty: Any = optax.MaskedNode()
    nodes, treedef = jax.tree.flatten(inner.init(empty), is_leaf=is_tree)
    return cls(treedef, [is_tree(x) for x in nodes])

  def split_state(self, state: Any) -> tuple[list[Any], list[Any]]:
    """Returns the moment trees and the counters of a state."""
    nodes = self.treedef.flatten_up_to(state)
    pairs = [*zip(nodes, self.is_tree, strict=True)]
    trees = [x for x, is_tree in pairs if is_tree]
    return trees, [x for x, is_tree in pairs if not is_tree]

  def join_state(self, trees: Sequence[Any], counters: Sequence[Any]) -> Any:
    """Builds a state from its moment trees and counters."""
    next_tree = iter(trees)
    next_counter = iter(counters)
    nodes = [
      next(next_tree if is_tree else next_counter) for is_tree in self.is_tree
    ]
    return self.treedef.unflatten(nodes)


class Probe(NamedTuple):
  """Properties of a state leaf, measured on weights of one element."""

  is_fixed: bool
  """Whether the initial value is the same for different weights."""
  is_signed: bool
  """Whether negative gradients make it negative."""


def _probe_leaves(
  inner: optax.GradientTransformation, params: Any
) -> list[Probe]:
  """Returns a probe for each leaf of the state.

  The values of tracers are unknown, so their properties are assumed to hold.
  """
  with compile_time_eval():
    ones, twos = (one_element(params, value) for value in (1.0, 2.0))
  init, updates = Traced(inner.init, ones), list[Traced]()
  try:
    state = init.result
    for _ in range(2):
      # The second update is the same program, unless the first one changes the
      # dtype of a moment, or is not traced.
      update = updates[-1] if updates else None
      if update is None or not _is_for(update, state):
        update = Traced(functools.partial(try_update, inner), ones, state, ones)
      updates.append(update)
      state = UNKNOWN if update.closed is None else update.result[1]
  except TypeError:
    # The inner cannot be tried. `_check_elementwise` warns about that.
    updates = []

  def probe(ones: Any, twos: Any) -> Any:
    first = last = init(ones)
    for update, g in zip(updates, (ones, twos), strict=False):
      _, last = update(map_once(jnp.negative, g), last, ones)
    if not updates:
      # Assume that every leaf of the state can become negative and needs signed
      # codes.
      last = jax.tree.map(lambda x: jnp.full_like(x, -1), first)
    columns = map(jax.tree.leaves, (first, init(twos), last))
    return map_once(_measured, *columns)

  if any(one.reads_tracers for one in (init, *updates)):
    # A hyperparameter is a tracer. Values that depend on it are tracers too,
    # and all others are computed one by one.
    with jax.ensure_compile_time_eval():
      rows = probe(ones, twos)
  else:
    with compile_time_eval():
      rows = RunOnce(probe)(ones, twos)
  return [Probe(*map(_may_hold, row)) for row in rows]


def _is_for(update: Traced, state: Any) -> bool:
  """Whether an update was traced for a state of these shapes and dtypes."""
  if update.closed is None:
    return False
  return _types(state) == _types(update.args[1])


def _types(tree: Any) -> list[Any]:
  """Returns shape and dtype of each leaf."""
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _measured(one: Any, two: Any, after: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the two properties of `Probe` for a leaf of the state."""
  return jnp.all(one == two), _any_negative(after)


def _any_negative(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  # Random keys cannot be compared with 0.
  if not jnp.issubdtype(x.dtype, jnp.number):
    return jnp.zeros((), bool)
  return jnp.any(x < 0)


def _may_hold(condition: Any) -> bool:
  return isinstance(condition, Tracer) or bool(condition)


def _quantized_init(
  state: Any,
  params: Any,
  probes: list[Probe],
  fills: list[float | None],
  block_size: int,
  min_size: int,
) -> Any:
  """Returns the inner's initial state with quantized moments.

  Args:
    state: the initial state; its shapes are enough if all leaves have a fill.
    params: parameters of the inner.
    probes: one for each leaf of the state.
    fills: for each leaf of the state, the number that fills it, if there is
      one.
    block_size: as in `quantize_state`.
    min_size: as in `quantize_state`.
  """
  pairs = jax.tree_util.tree_leaves_with_path(params)
  like = {path: jnp.shape(x) for path, x in pairs}

  def stored(path: Any, x: jax.Array, probe: Probe, fill: float | None) -> Any:
    same = any(like.get(path[i:]) == x.shape for i in range(len(path) + 1))
    is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    if not (same and probe.is_fixed and is_float and x.size >= min_size):
      if fill is not None and isinstance(x, jax.ShapeDtypeStruct):
        return jnp.full(x.shape, fill, x.dtype)
      return x
    squares = SQUARES & {getattr(key, 'name', None) for key in path}
    code: Code = 'unsigned' if squares and not probe.is_signed else 'signed'
    if fill is not None:
      # Quantizing zeros in a program takes long to compile for many leaves.
      return quantized_full(x.shape, fill, code=code, block_size=block_size)
    # The barrier hides that x is constant. Otherwise the compiler takes half a
    # minute to evaluate its quantization at compile time.
    x *= jax.lax.optimization_barrier(jnp.ones([], x.dtype))
    return quantize(x, code=code, block_size=block_size)

  leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
  rows = zip(leaves, probes, fills, strict=True)
  return treedef.unflatten(
    [stored(path, x, probe, fill) for (path, x), probe, fill in rows]
  )


class Store(Protocol):
  """A function that quantizes an array, such as `quantize`."""

  def __call__(self, x: Any, /, *, code: Code, block_size: int) -> Quantized:
    """Returns the quantized array."""
    ...


# A function of gradients, moments, weights and optionally a `Store`. It returns
# updates, new moments and new counters. The arguments belong to one leaf, to a
# piece of a leaf, or to a list of leaves.
Step = Callable[..., tuple[Any, Any, Any]]


def _leaf_by_leaf(
  run: Callable[[Any, Any, Any], tuple[Any, Any]],
  outer: Outer,
  updates: Any,
  state: Any,
  params: Any,
) -> tuple[Any, Any]:
  """Runs the inner on one quantized leaf at a time, then joins the results.

  All leaves whose moments are not quantized are updated in a single call.
  """
  grads, treedef = jax.tree.flatten(updates)
  if params is None:
    weights = [None] * len(grads)
  else:
    weights = treedef.flatten_up_to(params)
  trees, counters = outer.split_state(state)
  moments = [treedef.flatten_up_to(tree) for tree in trees]

  def step(g: Any, m: Any, w: Any, store: Store = quantize) -> Any:
    """Dequantizes the moments, runs the inner and quantizes them again."""
    state = outer.join_state(dequantize_tree(m), counters)
    u, after = run(tree_at_least_float32(g), state, tree_at_least_float32(w))
    new, new_counters = outer.split_state(after)
    new_counters = quantize_tree(new_counters, counters, store)
    return u, quantize_tree(new, m, store), new_counters

  num_leaves = len(grads)
  coded = [
    i for i in range(num_leaves) if any(is_quantized(m[i]) for m in moments)
  ]
  plain = [i for i in range(num_leaves) if i not in coded]
  new: dict[int, tuple[Any, ...]] = {}
  after = counters
  if plain or not grads:
    u, lists, after = step(
      [grads[i] for i in plain],
      [[m[i] for i in plain] for m in moments],
      None if params is None else [weights[i] for i in plain],
    )
    new |= zip(plain, zip(u, *lists, strict=True), strict=True)
  last = None
  for some in _grouped(grads, moments, weights, coded):
    g, w = (_stacked([x[i] for i in some]) for x in (grads, weights))
    m = [_stacked([m[i] for i in some]) for m in moments]
    if last is not None:
      # The barrier makes this leaf wait for the previous one. Otherwise the
      # compiler may dequantize all leaves at the start. `stop_gradient` keeps
      # the barrier from giving the moments tangents of zero. Adam takes their
      # square root, whose derivative at 0 is infinite, and 0 * inf is NaN.
      m, _ = jax.lax.optimization_barrier((m, jax.lax.stop_gradient(last)))
    last = _update_leaf(step, g, m, w, in_loop=len(some) > 1)
    u, m, after = last
    each = unstack((u, *m), len(some)) if len(some) > 1 else [(u, *m)]
    new |= zip(some, each, strict=True)
  if not grads:
    return updates, outer.join_state(trees, after)
  columns = zip(*(new[i] for i in range(num_leaves)), strict=True)
  u, *trees = map(treedef.unflatten, columns)
  return u, outer.join_state(trees, after)


def _grouped(
  grads: Sequence[Any],
  moments: Sequence[Any],
  weights: Sequence[Any],
  leaves: Sequence[int],
) -> list[list[int]]:
  """Returns the leaves in groups that are updated together, as a stack.

  Small matrices of one shape are a group, so that the update is compiled for
  each shape and not for each leaf. A group has less than `DIVIDE_FROM`
  elements, so a stack is no larger than a leaf that is updated in one piece.

  Args:
    grads: gradient of each leaf.
    moments: for each moment tree, the moment of each leaf.
    weights: weight of each leaf, or None.
    leaves: indices of the leaves to group.
  """
  groups: list[list[int]] = []
  latest: dict[Any, list[int]] = {}
  for i in leaves:
    arrays = grads[i], [m[i] for m in moments], weights[i]
    types = [jax.typeof(x) for x in jax.tree.leaves(arrays)]
    kind = jax.tree.structure(arrays), tuple(types)
    group = latest.get(kind, [])
    # Blocks of a vector would be laid out across the vectors of a stack.
    fits = grads[i].ndim > 1 and _is_local(arrays)
    if group and fits and (len(group) + 1) * grads[i].size < DIVIDE_FROM:
      group.append(i)
    else:
      latest[kind] = [i]
      groups.append(latest[kind])
  return [
    some
    for group in groups
    for some in ([group] if len(group) >= FEWEST else [[i] for i in group])
  ]


def _stacked(trees: Sequence[Any]) -> Any:
  """Returns one tree with a leading axis; a single tree is returned as is."""
  if len(trees) == 1:
    return trees[0]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _update_leaf(
  step: Step, g: jax.Array, m: list[Any], w: Any, *, in_loop: bool = False
) -> tuple[jax.Array, list[Any], Any]:
  """Returns the update of one leaf, its new moments, and the counters.

  A large leaf is updated piece by piece, unless it is sharded. A stack of small
  leaves is too (`in_loop`): the compiler would fuse the update with each slice
  of the result, and so compile it for each leaf.
  """
  first_coded = next(x for x in m if is_quantized(x))
  num_rows, num_columns = array.rows_shape(first_coded)
  is_small = g.size < DIVIDE_FROM and not in_loop
  if is_small or num_rows < 2 or not _is_local((g, m)):
    return step(g, m, w)
  size = _piece_size(num_rows, num_columns)
  count, rest = divmod(num_rows, size)

  def in_rows(x: Any) -> Any:
    if is_quantized(x):
      return array.as_rows(x)
    return jnp.reshape(x, (num_rows, num_columns))

  rows = [in_rows(x) for x in (g, *m)]
  w_rows = jax.tree.map(in_rows, w)
  # The update depends on the weights through weight decay, with one slope for
  # all elements. The slope is computed from one piece below. Differentiating
  # the loop itself would double its temporary memory.
  fixed_w = jax.lax.stop_gradient(w_rows)

  def piece(start: Any, size: int, rows: Any, w: Any) -> tuple[list[Any], Any]:
    (g, *m), w = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), (rows, w)
    )
    u, m, counters = step(g, m, w, array.quantize_rows)
    return [u.astype(g.dtype), *m], counters

  def paste(rows: Any, new: Any, start: Any) -> Any:
    return jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0),
      rows,
      new,
    )

  # Each iteration first writes the result of the iteration before it, then
  # reads its own piece. If one iteration read a piece and wrote the same piece,
  # the compiler would copy the whole array.
  def body(i: Any, carry: Any) -> Any:
    rows, last, _ = carry
    rows = paste(rows, last, jnp.maximum(i - 1, 0) * size)
    return rows, *piece(i * size, size, rows, fixed_w)

  first = jax.tree.map(lambda x: x[:size], rows)
  _, counters = jax.eval_shape(lambda: piece(0, size, rows, fixed_w))
  carry = rows, first, jax.tree.map(jnp.zeros_like, counters)
  new, last, counters = jax.lax.fori_loop(0, count, body, carry)
  new = paste(new, last, (count - 1) * size)
  if rest:
    tail, _ = piece(count * size, rest, new, fixed_w)
    new = paste(new, tail, count * size)
  like, treedef = jax.tree.flatten([g, *m])
  pairs = zip(jax.tree.leaves(new), like, strict=True)
  u, *m = treedef.unflatten([x.reshape(old.shape) for x, old in pairs])
  if w is not None:
    _, slope = jax.jvp(
      lambda w: piece(0, size, rows, w)[0][0],
      (w_rows,),
      (jnp.ones_like(w_rows),),
    )
    u = _with_slope(u, slope[0, 0], w)
  return u, m, counters


@jax.custom_jvp
def _with_slope(u: jax.Array, slope: jax.Array, w: jax.Array) -> jax.Array:
  """Returns u, with `slope` as its derivative with respect to w."""
  return u


_with_slope.defjvps(
  lambda du, *_: du,
  None,
  lambda dw, _, u, slope, w: (slope * dw).astype(u.dtype),
)


def quantize_tree(new: Any, old: Any, store: Store = quantize) -> Any:
  """Quantizes the leaves of `new` whose counterparts in `old` are quantized.

  >>> quantize_tree({'mu': 2.0}, {'mu': jnp.zeros(())})
  {'mu': Array(2., dtype=float32)}
  """

  def stored(old: Any, new: Any) -> Any:
    if is_quantized(old):
      return store(new, code=old.code, block_size=old.block_size)
    return jnp.asarray(new, jax.typeof(old).dtype)

  return jax.tree.map(stored, old, new, is_leaf=is_quantized)


def _alike_codes(new: Any, old: Any) -> Any:
  """Returns `new`, whose quantized arrays are sharded like those of `old`."""

  def of_node(old: Any, new: Any) -> Any:
    return alike(new, old) if is_quantized(old) else new

  return jax.tree.map(of_node, old, new, is_leaf=is_quantized)


def _is_local(arrays: Any) -> bool:
  """Whether the arrays are on one device, as far as their types show.

  A loop over a sharded axis would gather the array on every device.
  """
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
  return all(mesh.size <= 1 for mesh in meshes)


def _piece_size(num_rows: int, num_columns: int) -> int:
  """Returns the number of rows in a piece.

  There are at least two pieces, and they are equal if a divisor of `num_rows`
  is close enough to the largest size.
  """
  limit = max(1, min(num_rows // 2, PIECE_SIZE // num_columns))
  for size in range(limit, limit // 4, -1):
    if num_rows % size == 0:
      return size
  return limit


def _check_elementwise(
  inner: optax.GradientTransformation,
  params: Any,
  is_elementwise: Callable[[], bool],
) -> None:
  """Raises ValueError unless the inner can run piece by piece."""
  remedy = (
    'Masks, partitions, apply_if_finite, MultiSteps, snapshots and clipping by'
    ' a norm go around quantize_state; for Adafactor, Muon or a trust ratio'
    ' pass elementwise=False'
  )
  try:
    known = _has_plain_state(inner, params) and is_elementwise()
  except (ValueError, TypeError, LookupError, AttributeError) as error:
    raise ValueError(
      'quantize_state runs its inner piece by piece, and this one raises for a'
      f' piece: {error}. {remedy}'
    ) from error
  if not known:
    raise ValueError(
      'quantize_state runs its inner piece by piece, and this one looks at'
      f' more than an element at a time. {remedy}'
    )


def _has_plain_state(inner: optax.GradientTransformation, params: Any) -> bool:
  """Whether the state consists of moment trees and counters, without guards.

  Raises:
    ValueError: a moment tree does not have the structure of the parameters.
  """

  def is_guard(x: object) -> bool:
    return isinstance(x, GUARDS)

  state = jax.eval_shape(inner.init, params)
  for tree in Outer.of(inner).split_state(state)[0]:
    jax.tree.structure(params).flatten_up_to(tree)
  return not any(map(is_guard, jax.tree.leaves(state, is_leaf=is_guard)))


def _is_elementwise(inner: optax.GradientTransformation) -> bool:
  """Whether updating a 2 x 2 weight equals updating its elements separately.

  The inner has to be run to find this out. Its state is not enough:
  `optax.clip` and `optax.clip_by_global_norm` both have an empty state.
  """
  g = jnp.array([[1e-2, -1.0], [1e3, 2.0]])
  w = jnp.array([[1.0, -2.0], [3.0, 0.5]])

  def update(g: jax.Array, w: jax.Array) -> list[jax.Array]:
    u, state = try_update(inner, g, inner.init(w), w)
    return [jnp.asarray(x) for x in jax.tree.leaves((u, state))]

  def is_separate(whole: list[jax.Array], row: int, column: int) -> bool:
    at = np.s_[row : row + 1, column : column + 1]
    cut = [x[at] if x.ndim == 2 else x for x in whole]
    return all(map(allclose, compiled(g[at], w[at]), cut))

  compiled = jax.jit(update)

  with compile_time_eval():
    try:
      if Traced(update, g, w).reads_tracers:
        # A hyperparameter is traced, so no results can be compared.
        return True
      try:
        whole = compiled(g, w)
      except TRACED:
        # The inner reads values in Python, which a compiled one cannot.
        compiled = update
        whole = compiled(g, w)
    except NeedsFunctionError:
      # A line search or a Hessian evaluates the loss for the whole tree.
      return False
    except TypeError as error:
      warn_untried(error, 'it updates each element by itself')
      return True
    return all(is_separate(whole, *place) for place in np.ndindex(2, 2))
