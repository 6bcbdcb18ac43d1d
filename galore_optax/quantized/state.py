"""Optimizer state in 8 bits, for any optax transformation.

`quantize_state` keeps the structure of the inner's state, with `Quantized`
nodes where its moments were. The arrays themselves are in `array`.
"""

from typing import Any, NamedTuple

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
from galore_optax.quantized.array import is_coded, quantize, unpacked
from galore_optax.sharding import on_any_mesh, placed
from galore_optax.trial import NeedsFunctionError, try_update

# States of what goes around `quantize_state`, as it looks at a whole tree.
GUARDS = (
  *(optax.ApplyIfFiniteState, optax.MaskedState),
  *(optax.MultiStepsState, optax.transforms.PartitionState),
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
  def init_fn(params):
    if elementwise:
      _check_elementwise(inner, params)
    seen = _tried(inner, params)
    init = lambda params: _packed(inner, params, seen, block_size, min_size)
    is_shape = lambda x: isinstance(x, jax.ShapeDtypeStruct)
    if any(map(is_shape, jax.tree.leaves(params))):
      zeros = lambda x: jnp.zeros(x.shape, x.dtype)
      return jax.jit(lambda: init(jax.tree.map(zeros, params)))()
    # Jitted, so that no float32 moment is allocated on the way.
    return jax.jit(init)(params)

  @on_any_mesh(lambda updates, state, params=None: (updates, state))
  def update_fn(updates, state, params=None, **extra_args):
    run = lambda g, s, w: inner.update(g, s, w, **extra_args)
    if elementwise:
      new, state = _leaf_by_leaf(run, Outer.of(inner), updates, state, params)
    else:
      new, after = run(wide(updates), unpacked(state), params)
      state = repacked(after, state)
    return optax.tree.cast_like(new, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Outer(NamedTuple):
  """The structure of an inner's state around its trees like the parameters."""

  treedef: Any  # Of the state; a leaf is such a tree, or a counter.
  is_tree: list[bool]  # Which of them are trees.

  @classmethod
  def of(cls, inner: optax.GradientTransformation) -> 'Outer':
    """Reads the structure off the state of parameters without leaves."""
    is_tree = lambda x: isinstance(x, optax.MaskedNode)
    empty = inner.init(optax.MaskedNode())
    nodes, treedef = jax.tree.flatten(empty, is_leaf=is_tree)
    return cls(treedef, [is_tree(x) for x in nodes])

  def split(self, state: Any) -> tuple[list[Any], list[Any]]:
    """Returns the trees and the counters of a state."""
    nodes = self.treedef.flatten_up_to(state)
    pairs = [*zip(nodes, self.is_tree, strict=True)]
    return [x for x, yes in pairs if yes], [x for x, yes in pairs if not yes]

  def join(self, trees: Any, counters: Any) -> Any:
    """Inverts `split`."""
    trees, counters = iter(trees), iter(counters)
    nodes = [next(trees if yes else counters) for yes in self.is_tree]
    return self.treedef.unflatten(nodes)


def _tried(inner, params) -> list[tuple[bool, bool]]:
  """Returns what a trial on weights of one element shows of each leaf of state.

  Whether it starts the same whatever the weights are, so is no copy of them;
  and whether gradients below zero make it negative. What is traced counts.
  """
  filled = lambda value: single(params, value)
  holds = lambda x: isinstance(x, Tracer) or bool(x)
  with jax.ensure_compile_time_eval():
    ones, twos = (inner.init(filled(value)) for value in (1.0, 2.0))
    state = ones
    try:
      for g in (-1.0, -2.0):
        _, state = try_update(inner, filled(g), state, filled(1.0))
    except TypeError:  # It needs extra args, which only `update` is given.
      state = jax.tree.map(lambda x: jnp.full_like(x, -1), ones)
    # A random key has no sign.
    sign = lambda x: x if jnp.issubdtype(x.dtype, jnp.number) else jnp.zeros(())
    state = jax.tree.map(sign, jax.tree.map(jnp.asarray, state))
    rows = zip(*map(jax.tree.leaves, (ones, twos, state)), strict=True)
    return [(holds(jnp.all(x == y)), holds(jnp.any(z < 0))) for x, y, z in rows]


def _packed(inner, params, seen, block_size, min_size) -> Any:
  """Returns the inner's first state with codes for its moments."""
  state = jax.tree.map(jnp.asarray, inner.init(wide(params)))
  pairs = jax.tree_util.tree_leaves_with_path(params)
  like = {path: jnp.shape(x) for path, x in pairs}

  def pack(path, x, is_fixed, is_signed):
    same = any(like.get(path[i:]) == x.shape for i in range(len(path) + 1))
    is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.ndim
    if not (same and is_fixed and is_float and x.size >= min_size):
      return x
    squares = SQUARES & {getattr(key, 'name', None) for key in path}
    code = 'unsigned' if squares and not is_signed else 'signed'
    # Hidden, or the compiler takes half a minute to fold blocks of zeros.
    x *= jax.lax.optimization_barrier(jnp.ones([], x.dtype))
    return quantize(x, code=code, block_size=block_size)

  leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
  rows = zip(leaves, seen, strict=True)
  return treedef.unflatten([pack(*leaf, *one) for leaf, one in rows])


def _leaf_by_leaf(run, outer: Outer, updates, state, params) -> tuple[Any, Any]:
  """Runs the inner on each coded leaf alone, on the others together."""
  grads, treedef = jax.tree.flatten(updates)
  flat = treedef.flatten_up_to
  weights = [None] * len(grads) if params is None else flat(params)
  trees, counters = outer.split(state)
  moments = [flat(tree) for tree in trees]

  def step(g, m, w, store=quantize):
    """Returns updates, moments and counters of a leaf, a piece or a list."""
    u, after = run(wide(g), outer.join(unpacked(m), counters), wide(w))
    new, after = outer.split(after)
    return u, repacked(new, m, store), repacked(after, counters, store)

  every, new, after, last = range(len(grads)), {}, counters, None
  coded = [i for i in every if any(is_coded(m[i]) for m in moments)]
  plain = [i for i in every if i not in coded]
  if plain or not grads:
    of = lambda values: [values[i] for i in plain]
    w = None if params is None else of(weights)
    u, lists, after = step(of(grads), [of(m) for m in moments], w)
    new |= zip(plain, zip(u, *lists, strict=True), strict=True)
  for i in coded:
    m = [m[i] for m in moments]
    if last is not None:
      # Without it the compiler may dequantize every leaf at the start. The
      # barrier would give the moments tangents of zero if `last` had any, and
      # the derivative of a root of zero times zero is not a number.
      m, _ = jax.lax.optimization_barrier((m, jax.lax.stop_gradient(last)))
    u, m, after = last = _leaf(step, grads[i], m, weights[i])
    new[i] = u, *m
  columns = zip(*(new[i] for i in every), strict=True)
  u, *trees = map(treedef.unflatten, columns) if grads else (updates, *trees)
  return u, outer.join(trees, after)


def _leaf(step, g, m, w) -> tuple[jax.Array, list[Any], Any]:
  """Returns the update of one leaf, its moments, and the counters."""
  num_rows, num_columns = array.rows_shape(next(x for x in m if is_coded(x)))
  if g.size < DIVIDE_FROM or num_rows < 2 or not _is_local((g, m)):
    return step(g, m, w)
  size = _piece_size(num_rows, num_columns)
  count, rest = divmod(num_rows, size)
  flat = lambda x: jnp.reshape(x, (num_rows, num_columns))
  rows = [array.as_rows(x) if is_coded(x) else flat(x) for x in (g, *m)]
  w_rows = jax.tree.map(flat, w)
  # The decay of the inner has one slope, which one piece tells: as a loop's
  # carry its derivative would double the temporaries.
  fixed_w = jax.lax.stop_gradient(w_rows)

  def piece(start, size, rows, w):
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
    (g, *m), w = jax.tree.map(cut, (rows, w))
    u, m, counters = step(g, m, w, array.quantize_rows)
    return [u.astype(g.dtype), *m], counters

  def paste(rows, new, start):
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
    return jax.tree.map(put, rows, new)

  # A piece is written before the next one is read: with both in one step the
  # compiler copies the whole array to keep the old values readable.
  def body(i, carry):
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
    of_piece = lambda w: piece(0, size, rows, w)[0][0]
    _, slope = jax.jvp(of_piece, (w_rows,), (jnp.ones_like(w_rows),))
    u = _with_slope(u, slope[0, 0], w)
  return u, m, counters


@jax.custom_jvp
def _with_slope(u, slope, w) -> jax.Array:
  """Returns u, whose derivative by w is the slope."""
  return u


_with_slope.defjvps(
  lambda du, *_: du,
  None,
  lambda dw, _, u, slope, w: (slope * dw).astype(u.dtype),
)


def repacked(new: Any, old: Any, store: Any = quantize) -> Any:
  """Returns the new state, in codes where the old one is.

  >>> repacked({'mu': 2.0}, {'mu': jnp.zeros(())})
  {'mu': Array(2., dtype=float32)}
  """

  def pack(old, new):
    if is_coded(old):
      return store(new, code=old.code, block_size=old.block_size)
    return jnp.asarray(new, jax.typeof(old).dtype)

  return jax.tree.map(pack, old, new, is_leaf=is_coded)


def _is_local(arrays: Any) -> bool:
  """Whether no mesh is known: a loop over a sharded axis would gather it."""
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)]
  return all(mesh.size <= 1 for mesh in meshes)


def _piece_size(num_rows: int, num_columns: int) -> int:
  """Rows of a piece: at least two pieces, if possible equal ones."""
  limit = max(1, min(num_rows // 2, PIECE_SIZE // num_columns))
  equal = (n for n in range(limit, limit // 4, -1) if num_rows % n == 0)
  return next(equal, limit)


def _check_elementwise(inner, params) -> None:
  """Raises ValueError where a piece of a leaf would get another update."""
  is_guard = lambda x: isinstance(x, GUARDS)
  try:
    state = jax.eval_shape(inner.init, params)
    for tree in Outer.of(inner).split(state)[0]:
      jax.tree.structure(params).flatten_up_to(tree)
    nodes = jax.tree.leaves(state, is_leaf=is_guard)
    known = not any(map(is_guard, nodes)) and _acts_alone(inner)
  except (ValueError, TypeError, LookupError, AttributeError):
    known = False
  if not known:
    raise ValueError(
      'quantize_state runs its inner piece by piece, and this one looks at'
      ' more than an element at a time. Masks, partitions, apply_if_finite,'
      ' MultiSteps, snapshots and clipping by a norm go around quantize_state;'
      ' for Adafactor, Muon or a trust ratio pass elementwise=False'
    )


def _acts_alone(inner) -> bool:
  """Whether the update of four elements is that of each alone."""
  g, w = jnp.array([[1e-2, -1.0], [1e3, 2.0]]), jnp.array([[1.0, -2], [3, 0.5]])

  def update(at: Any = ...):
    u, state = try_update(inner, g[at], inner.init(w[at]), w[at])
    return [jnp.asarray(x) for x in jax.tree.leaves((u, state))]

  with jax.ensure_compile_time_eval():
    try:
      whole = update()
    except NeedsFunctionError:
      return False  # A line search, or a Hessian.
    except TypeError:
      return True  # It needs extra args, which only `update` is given.
    if any(isinstance(x, Tracer) for x in whole):
      return True  # A hyperparameter is traced.
    cells = [np.s_[i : i + 1, j : j + 1] for i, j in np.ndindex(2, 2)]
    cut = lambda at: [x[at] if x.ndim == 2 else x for x in whole]
    return all(all(map(close, update(at), cut(at))) for at in cells)
