"""Optimizer state in 8 bits, for any optax transformation.

`quantize_state` keeps the structure of the inner's state, with `Quantized`
nodes where its moments were. The arrays themselves are in `array`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from galore_optax.checks import (
  check_count,
  check_flag,
  check_size,
  check_static,
)
from galore_optax.precision import close, single, wide
from galore_optax.quantized import array
from galore_optax.quantized.array import (
  Quantized,
  dequantize_tree,
  is_quantized,
  quantize,
)
from galore_optax.quantized.codes import Code
from galore_optax.sharding import on_any_mesh, placed
from galore_optax.trial import NeedsFunctionError, try_update

# States of what goes around `quantize_state`, as it looks at a whole tree.
GUARDS = (
  optax.ApplyIfFiniteState,
  optax.MaskedState,
  optax.MultiStepsState,
  optax.transforms.PartitionState,
)
# Fields of second moments, unless an update makes them negative: an average
# of differences has such a name too.
SQUARES = {'nu', 'nu_max', 'v', 'n', 'sum_of_squares'}
# A leaf of so many elements is updated in pieces: in a loop, because only the
# temporaries of loops are sure to share memory from leaf to leaf.
DIVIDE_FROM = 2**20
# Elements of a piece: 16 MiB of float32 a moment.
PIECE_SIZE = 2**22


def quantize_state(
  inner: optax.GradientTransformation,
  *,
  block_size: int = 256,
  min_size: int = 4096,
  elementwise: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """Stores the parameter-like state of a transformation in 8 bits.

  A state leaf is stored in blocks of 8-bit codes if it is floating, has the
  path and the shape of a parameter and at least `min_size` elements, and does
  not depend on the weights at first (a copy of them is no moment). Second
  moments (fields nu, v and the like) get the unsigned dynamic code, others the
  signed one.
  Everything else stays as it is; moments of bfloat16 parameters that stay
  unquantized are float32.

  An elementwise inner (Adam, Lion, momentum, clipping by value) runs leaf
  after leaf, and on a leaf of more than 1 M elements piece by piece, written
  in place: no float32 copy of the state exists. What looks at a whole leaf
  (Adafactor, Muon, a trust ratio) or at several (clipping by a norm) needs
  `elementwise=False`, which dequantizes the tree for an update. Masks,
  partitions, `apply_if_finite` and `MultiSteps` go around `quantize_state`.

  What 8 bits do to Adam: an entry below about 1e-7 of its block's largest
  second moment is rounded up to 3e-7 of it, so that its update is too small,
  never too large.

  Args:
    inner: any optax transformation; schedules and injected hyper-parameters in
      it work as usual.
    block_size: elements that share a float32 scale.
    min_size: smaller leaves stay float32. A layer-wise step shows one layer
      of a stack, and the size of that counts.
    elementwise: whether an element's update depends on that element alone.

  Returns:
    A transformation with `inner`'s state structure, in which `Quantized`
    nodes stand for arrays: 1 byte an element and 4 bytes a block. A block
    ends where a matrix of a stack does: small ones take more. Updates
    have the dtype of the gradients. Its `init` accepts shape structs and
    allocates no float32 array for moments.

  Raises:
    ValueError: at `init`, an elementwise inner whose state is not made of
      trees like the parameters.

  Example:
    >>> tx = quantize_state(optax.adam(1e-3))
    >>> params = {'w': jnp.ones((64, 256)), 'b': jnp.ones(64)}
    >>> state = tx.init(params)
    >>> state[0].nu['w'].nbytes, state[0].nu['b'].nbytes
    (16640, 256)

  References:
    Dettmers et al., 8-bit optimizers via block-wise quantization,
    arXiv 2110.02861.
  """
  check_static(block_size=block_size, min_size=min_size)
  check_count(block_size=block_size)
  check_size(min_size=min_size)
  check_flag(elementwise=elementwise)
  inner = optax.with_extra_args_support(inner)

  @placed
  def init_fn(params: Any) -> Any:
    if elementwise:
      _check_elementwise(inner, params)
    probes = _probe_leaves(inner, params)

    def init(params: Any) -> Any:
      return _quantized_init(inner, params, probes, block_size, min_size)

    leaves = jax.tree.leaves(params)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
      return jax.jit(lambda: init(jax.tree.map(_zeros, params)))()
    # Jitted, so that no float32 moment is allocated on the way.
    return jax.jit(init)(params)

  @on_any_mesh(lambda updates, state, params=None: (updates, state))
  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    def run(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
      return inner.update(grads, state, params, **extra_args)

    if elementwise:
      new, state = _leaf_by_leaf(run, Outer.of(inner), updates, state, params)
    else:
      new, after = run(wide(updates), dequantize_tree(state), params)
      state = quantize_tree(after, state)
    return optax.tree.cast_like(new, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _zeros(x: Any) -> jax.Array:
  return jnp.zeros(x.shape, x.dtype)


class Outer(NamedTuple):
  """The structure of an inner's state around its trees like the parameters."""

  treedef: Any  # Of the state; a leaf is such a tree, or a counter.
  is_tree: list[bool]  # Which of them are trees.

  @classmethod
  def of(cls, inner: optax.GradientTransformation) -> 'Outer':
    """Reads the structure off the state of parameters without leaves."""

    def is_tree(x: object) -> bool:
      return isinstance(x, optax.MaskedNode)

    empty: Any = optax.MaskedNode()
    nodes, treedef = jax.tree.flatten(inner.init(empty), is_leaf=is_tree)
    return cls(treedef, [is_tree(x) for x in nodes])

  def split_state(self, state: Any) -> tuple[list[Any], list[Any]]:
    """Returns the trees and the counters of a state."""
    nodes = self.treedef.flatten_up_to(state)
    pairs = [*zip(nodes, self.is_tree, strict=True)]
    trees = [x for x, is_tree in pairs if is_tree]
    return trees, [x for x, is_tree in pairs if not is_tree]

  def join_state(self, trees: Sequence[Any], counters: Sequence[Any]) -> Any:
    """Inverts `split_state`."""
    next_tree = iter(trees)
    next_counter = iter(counters)
    nodes = [
      next(next_tree if is_tree else next_counter) for is_tree in self.is_tree
    ]
    return self.treedef.unflatten(nodes)


class Probe(NamedTuple):
  """What a trial on weights of one element shows of a leaf of state."""

  is_fixed: bool  # It starts the same whatever the weights: no copy of them.
  is_signed: bool  # Gradients below zero make it negative.


def _probe_leaves(
  inner: optax.GradientTransformation, params: Any
) -> list[Probe]:
  """Returns a probe of each leaf of state. What is traced counts as yes."""
  with jax.ensure_compile_time_eval():
    ones, twos = (inner.init(single(params, value)) for value in (1.0, 2.0))
    state = ones
    try:
      for g in (-1.0, -2.0):
        weights = single(params, 1.0)
        _, state = try_update(inner, single(params, g), state, weights)
    except TypeError:  # It needs extra args, which only `update` is given.
      state = jax.tree.map(lambda x: jnp.full_like(x, -1), ones)
    rows = zip(*map(jax.tree.leaves, (ones, twos, state)), strict=True)
    return [
      Probe(_may_hold(jnp.all(one == two)), _may_hold(_any_negative(last)))
      for one, two, last in rows
    ]


def _any_negative(x: Any) -> jax.Array:
  x = jnp.asarray(x)
  # A random key has no sign.
  if not jnp.issubdtype(x.dtype, jnp.number):
    return jnp.zeros((), bool)
  return jnp.any(x < 0)


def _may_hold(condition: Any) -> bool:
  return isinstance(condition, Tracer) or bool(condition)


def _quantized_init(
  inner: optax.GradientTransformation,
  params: Any,
  probes: list[Probe],
  block_size: int,
  min_size: int,
) -> Any:
  """Returns the inner's first state with codes for its moments."""
  state = jax.tree.map(jnp.asarray, inner.init(wide(params)))
  pairs = jax.tree_util.tree_leaves_with_path(params)
  like = {path: jnp.shape(x) for path, x in pairs}

  def stored(path: Any, x: jax.Array, probe: Probe) -> Any:
    same = any(like.get(path[i:]) == x.shape for i in range(len(path) + 1))
    is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    if not (same and probe.is_fixed and is_float and x.size >= min_size):
      return x
    squares = SQUARES & {getattr(key, 'name', None) for key in path}
    code: Code = 'unsigned' if squares and not probe.is_signed else 'signed'
    # Hidden, or the compiler takes half a minute to fold blocks of zeros.
    x *= jax.lax.optimization_barrier(jnp.ones([], x.dtype))
    return quantize(x, code=code, block_size=block_size)

  leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
  rows = zip(leaves, probes, strict=True)
  return treedef.unflatten([stored(path, x, one) for (path, x), one in rows])


class Store(Protocol):
  """How an array becomes codes, as `quantize` does it."""

  def __call__(self, x: Any, /, *, code: Code, block_size: int) -> Quantized:
    """Returns the codes of an array."""
    ...


# Updates, and moments and counters after them, of a leaf, a piece or a list.
Step = Callable[..., tuple[Any, Any, Any]]


def _leaf_by_leaf(
  run: Callable[[Any, Any, Any], tuple[Any, Any]],
  outer: Outer,
  updates: Any,
  state: Any,
  params: Any,
) -> tuple[Any, Any]:
  """Runs the inner on each coded leaf alone, on the others together."""
  grads, treedef = jax.tree.flatten(updates)
  if params is None:
    weights = [None] * len(grads)
  else:
    weights = treedef.flatten_up_to(params)
  trees, counters = outer.split_state(state)
  moments = [treedef.flatten_up_to(tree) for tree in trees]

  def step(g: Any, m: Any, w: Any, store: Store = quantize) -> Any:
    """Returns updates, moments and counters of a leaf, a piece or a list."""
    state = outer.join_state(dequantize_tree(m), counters)
    u, after = run(wide(g), state, wide(w))
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
  for i in coded:
    m = [m[i] for m in moments]
    if last is not None:
      # Without it the compiler may dequantize every leaf at the start. The
      # barrier would give the moments tangents of zero if `last` had any, and
      # the derivative of a root of zero times zero is not a number.
      m, _ = jax.lax.optimization_barrier((m, jax.lax.stop_gradient(last)))
    last = _update_leaf(step, grads[i], m, weights[i])
    u, m, after = last
    new[i] = (u, *m)
  if not grads:
    return updates, outer.join_state(trees, after)
  columns = zip(*(new[i] for i in range(num_leaves)), strict=True)
  u, *trees = map(treedef.unflatten, columns)
  return u, outer.join_state(trees, after)


def _update_leaf(
  step: Step, g: jax.Array, m: list[Any], w: Any
) -> tuple[jax.Array, list[Any], Any]:
  """Returns the update of one leaf, its moments, and the counters."""
  first_coded = next(x for x in m if is_quantized(x))
  num_rows, num_columns = array.rows_shape(first_coded)
  if g.size < DIVIDE_FROM or num_rows < 2 or not _is_local((g, m)):
    return step(g, m, w)
  size = _piece_size(num_rows, num_columns)
  count, rest = divmod(num_rows, size)

  def in_rows(x: Any) -> Any:
    if is_quantized(x):
      return array.as_rows(x)
    return jnp.reshape(x, (num_rows, num_columns))

  rows = [in_rows(x) for x in (g, *m)]
  w_rows = jax.tree.map(in_rows, w)
  # The decay of the inner has one slope, which one piece tells: as a loop's
  # carry its derivative would double the temporaries.
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

  # A piece is written before the next one is read: with both in one step the
  # compiler copies the whole array to keep the old values readable.
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
  """Returns u, whose derivative by w is the slope."""
  return u


_with_slope.defjvps(
  lambda du, *_: du,
  None,
  lambda dw, _, u, slope, w: (slope * dw).astype(u.dtype),
)


def quantize_tree(new: Any, old: Any, store: Store = quantize) -> Any:
  """Returns the new state, in codes where the old one is.

  >>> quantize_tree({'mu': 2.0}, {'mu': jnp.zeros(())})
  {'mu': Array(2., dtype=float32)}
  """

  def stored(old: Any, new: Any) -> Any:
    if is_quantized(old):
      return store(new, code=old.code, block_size=old.block_size)
    return jnp.asarray(new, jax.typeof(old).dtype)

  return jax.tree.map(stored, old, new, is_leaf=is_quantized)


# The former name.
repacked = quantize_tree


def _is_local(arrays: Any) -> bool:
  """Whether no mesh is known: a loop over a sharded axis would gather it."""
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
  return all(mesh.size <= 1 for mesh in meshes)


def _piece_size(num_rows: int, num_columns: int) -> int:
  """Rows of a piece: at least two pieces, if possible equal ones."""
  limit = max(1, min(num_rows // 2, PIECE_SIZE // num_columns))
  for size in range(limit, limit // 4, -1):
    if num_rows % size == 0:
      return size
  return limit


def _check_elementwise(
  inner: optax.GradientTransformation, params: Any
) -> None:
  """Raises ValueError where a piece of a leaf would get another update."""
  try:
    known = _has_plain_state(inner, params) and _is_elementwise(inner)
  except (ValueError, TypeError, LookupError, AttributeError):
    known = False
  if not known:
    raise ValueError(
      'quantize_state runs its inner piece by piece, and this one looks at'
      ' more than an element at a time. Masks, partitions, apply_if_finite,'
      ' MultiSteps, snapshots and clipping by a norm go around quantize_state;'
      ' for Adafactor, Muon or a trust ratio pass elementwise=False'
    )


def _has_plain_state(inner: optax.GradientTransformation, params: Any) -> bool:
  """Whether the state is made of trees like the parameters, and of counters.

  Raises what `flatten_up_to` raises for a tree of another structure.
  """

  def is_guard(x: object) -> bool:
    return isinstance(x, GUARDS)

  state = jax.eval_shape(inner.init, params)
  for tree in Outer.of(inner).split_state(state)[0]:
    jax.tree.structure(params).flatten_up_to(tree)
  return not any(map(is_guard, jax.tree.leaves(state, is_leaf=is_guard)))


def _is_elementwise(inner: optax.GradientTransformation) -> bool:
  """Whether the update of four elements is that of each alone.

  The state does not tell: `optax.clip` and `optax.clip_by_global_norm` both
  have none.
  """
  g = jnp.array([[1e-2, -1.0], [1e3, 2.0]])
  w = jnp.array([[1.0, -2.0], [3.0, 0.5]])

  def update(g: jax.Array, w: jax.Array) -> list[jax.Array]:
    u, state = try_update(inner, g, inner.init(w), w)
    return [jnp.asarray(x) for x in jax.tree.leaves((u, state))]

  def is_separate(whole: list[jax.Array], row: int, column: int) -> bool:
    at = np.s_[row : row + 1, column : column + 1]
    cut = [x[at] if x.ndim == 2 else x for x in whole]
    return all(map(close, update(g[at], w[at]), cut))

  with jax.ensure_compile_time_eval():
    try:
      whole = update(g, w)
    except NeedsFunctionError:
      return False  # A line search, or a Hessian.
    except TypeError:
      return True  # It needs extra args, which only `update` is given.
    if any(isinstance(x, Tracer) for x in whole):
      return True  # A hyperparameter is traced.
    return all(is_separate(whole, *place) for place in np.ndindex(2, 2))
