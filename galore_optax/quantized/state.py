"""Optimizer state in 8 bits, for any optax transformation.

`quantize_state` keeps the structure of the inner's state, with `Quantized`
nodes where its moments were. The arrays themselves are in `array`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.checks import check_count, check_static
from galore_optax.precision import full
from galore_optax.quantized.array import (
  Quantized,
  as_rows,
  dequantize,
  quantize,
  quantize_rows,
  rows_shape,
)

GUARDS = (
  optax.ApplyIfFiniteState,
  optax.MaskedState,
  optax.MultiStepsState,
  optax.transforms.PartitionState,
)
"""States of what goes around `quantize_state`, as it looks at a whole tree."""

SQUARES = {'nu', 'nu_max', 'v', 'n', 'sum_of_squares'}
"""Fields of second moments, unless an update makes them negative: an average
of differences has such a name too."""

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
  inner = optax.with_extra_args_support(inner)

  def init_fn(params: optax.Params) -> Any:
    if elementwise:
      _check_elementwise(inner, params)
    seen = _tried(inner, params)
    init = lambda params: _packed(inner, params, seen, block_size, min_size)
    leaves = jax.tree.leaves(params)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
      zeros = lambda x: jnp.zeros(x.shape, x.dtype)
      return jax.jit(lambda: init(jax.tree.map(zeros, params)))()
    # Jitted, so that no float32 moment is allocated on the way.
    return jax.jit(init)(params)

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, Any]:
    run = lambda g, s, w: inner.update(g, s, w, **extra_args)
    if elementwise:
      new, state = _leaf_by_leaf(run, Outer.of(inner), updates, state, params)
    else:
      new, after = run(_wide(updates), _unpacked(state), params)
      state = _repacked(after, state, quantize)
    return optax.tree.cast_like(new, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Outer(NamedTuple):
  """The structure of an inner's state around its trees like the parameters."""

  treedef: Any
  """Of the state; a leaf is a tree like the parameters, or a counter."""
  is_tree: list[bool]
  """Which of them are trees."""

  @classmethod
  def of(cls, inner: optax.GradientTransformation) -> 'Outer':
    """Reads the structure off the state of parameters without leaves."""
    is_tree = lambda x: isinstance(x, optax.MaskedNode)
    nodes, treedef = jax.tree.flatten(
      inner.init(optax.MaskedNode()), is_leaf=is_tree
    )
    return cls(treedef, [is_tree(x) for x in nodes])

  def split(self, state: Any) -> tuple[list[Any], list[Any]]:
    """Returns the trees and the counters of a state."""
    pairs = list(
      zip(self.treedef.flatten_up_to(state), self.is_tree, strict=True)
    )
    return [x for x, yes in pairs if yes], [x for x, yes in pairs if not yes]

  def join(self, trees: Sequence[Any], counters: Sequence[Any]) -> Any:
    """Inverts `split`."""
    trees, counters = iter(trees), iter(counters)
    return self.treedef.unflatten(
      [next(trees if yes else counters) for yes in self.is_tree]
    )


class Seen(NamedTuple):
  """What a small trial shows of a leaf of state."""

  is_fixed: bool
  """It starts the same whatever the weights are: it is no copy of them."""
  is_signed: bool
  """Gradients below zero make it negative."""


def _tried(
  inner: optax.GradientTransformationExtraArgs, params: Any
) -> list[Seen]:
  """Tries an inner on weights of one element; one entry for a state leaf."""
  filled = lambda value: jax.tree.map(
    lambda x: jnp.full((1,) * x.ndim, value, jnp.float32), params
  )
  is_traced = lambda x: isinstance(x, jax.core.Tracer)
  with jax.ensure_compile_time_eval():
    ones, twos = (inner.init(filled(value)) for value in (1.0, 2.0))
    state = ones
    try:
      for g in (-1.0, -2.0):
        _, state = inner.update(filled(g), state, filled(1.0))
    except TypeError:  # It needs extra args, which only `update` is given.
      state = jax.tree.map(lambda x: jnp.full_like(x, -1), ones)
    rows = zip(*map(jax.tree.leaves, (ones, twos, state)), strict=True)
    return [
      Seen(
        is_traced(x) or bool(jnp.all(x == y)),
        is_traced(z) or bool(jnp.any(z < 0)),
      )
      for x, y, z in rows
    ]


def _packed(
  inner: optax.GradientTransformation,
  params: Any,
  seen: list[Seen],
  block_size: int,
  min_size: int,
) -> Any:
  """Returns the inner's first state with codes for its moments."""
  state = jax.tree.map(jnp.asarray, inner.init(_wide(params)))
  like = {
    tuple(path): jnp.shape(x)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }

  def pack(path: Any, x: jax.Array, seen: Seen) -> Any:
    ends = (tuple(path[i:]) for i in range(len(path) + 1))
    same = any(like.get(end) == x.shape for end in ends)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    if not (same and seen.is_fixed and is_float and x.ndim):
      return x
    if x.size < min_size:
      return x
    squares = SQUARES & {getattr(key, 'name', None) for key in path}
    code = 'unsigned' if squares and not seen.is_signed else 'signed'
    return quantize(x, code=code, block_size=block_size)

  leaves = jax.tree_util.tree_leaves_with_path(state)
  packed = [
    pack(path, x, one) for (path, x), one in zip(leaves, seen, strict=True)
  ]
  return jax.tree.structure(state).unflatten(packed)


def _leaf_by_leaf(
  run: Callable, outer: Outer, updates: Any, state: Any, params: Any
) -> tuple[Any, Any]:
  """Runs the inner on each coded leaf alone, on the others together."""
  grads, treedef = jax.tree.flatten(updates)
  weights = [None] * len(grads)
  if params is not None:
    weights = treedef.flatten_up_to(params)
  trees, counters = outer.split(state)
  moments = [[] for _ in grads]
  for tree in trees:
    for m, x in zip(moments, treedef.flatten_up_to(tree), strict=True):
      m.append(x)

  def step(g: Any, m: Any, w: Any, store: Callable = quantize) -> Any:
    """Returns updates, moments and counters of a leaf, a piece or a list."""
    wide = None if w is None else _wide(w)
    before = outer.join(_unpacked(m), counters)
    u, after = run(_wide(g), before, wide)
    new, after = outer.split(after)
    return u, _repacked(new, m, store), _repacked(after, counters, store)

  coded = [i for i, m in enumerate(moments) if any(map(_is_coded, m))]
  plain = [i for i in range(len(grads)) if i not in coded]
  new: dict[int, Any] = {}
  after = counters
  if plain or not grads:
    of = lambda values: [values[i] for i in plain]
    lists = [list(x) for x in zip(*of(moments), strict=True)] or [[]] * len(
      trees
    )
    w = None if params is None else of(weights)
    u, lists, after = step(of(grads), lists, w)
    new |= zip(plain, zip(u, *lists, strict=True), strict=True)
  last = None
  for i in coded:
    if last is not None:
      # Without it the compiler may dequantize every leaf at the start.
      moments[i], _ = jax.lax.optimization_barrier((moments[i], last))
    u, m, after = last = _leaf(step, grads[i], moments[i], weights[i])
    new[i] = u, *m
  columns = zip(*(new[i] for i in range(len(grads))), strict=True)
  u, *trees = map(treedef.unflatten, columns) if grads else (updates, *trees)
  return u, outer.join(trees, after)


def _leaf(step: Callable, g: jax.Array, m: list[Any], w: Any) -> Any:
  """Returns the update of one leaf, its moments, and the counters."""
  num_rows, num_columns = rows_shape(next(x for x in m if _is_coded(x)))
  if g.size < DIVIDE_FROM or num_rows < 2 or not _is_local((g, m)):
    return step(g, m, w)
  view = lambda x: (
    as_rows(x) if _is_coded(x) else jnp.reshape(x, (num_rows, num_columns))
  )
  size = _piece_size(num_rows, num_columns)
  rows = [view(g), *map(view, m)]
  w_rows = None if w is None else view(w)

  def piece(start: Any, size: int, rows: Any, w: Any) -> Any:
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
    (g, *m), w = jax.tree.map(cut, (rows, w))
    u, m, counters = step(g, m, w, quantize_rows)
    return [u.astype(g.dtype), *m], counters

  def paste(rows: Any, new: Any, start: Any) -> Any:
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0)
    return jax.tree.map(put, rows, new)

  # A piece is written before the next one is read: with both in one step the
  # compiler copies the whole array to keep the old values readable.
  def body(i: Any, carry: Any) -> Any:
    rows, last, _ = carry
    rows = paste(rows, last, jnp.maximum(i - 1, 0) * size)
    return rows, *piece(i * size, size, rows, fixed_w)

  # The decay of the inner has one slope, which one piece tells: as a loop's
  # carry its derivative would double the temporaries.
  fixed_w = None if w is None else jax.lax.stop_gradient(w_rows)
  count, rest = divmod(num_rows, size)
  first = jax.tree.map(lambda x: x[:size], rows)
  counters = jax.eval_shape(lambda: piece(0, size, rows, fixed_w)[1])
  counters = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), counters)
  new, last, counters = jax.lax.fori_loop(
    0, count, body, (rows, first, counters)
  )
  new = paste(new, last, (count - 1) * size)
  if rest:
    tail, _ = piece(count * size, rest, new, fixed_w)
    new = paste(new, tail, count * size)
  shaped = jax.tree.unflatten(
    jax.tree.structure([g, *m]),
    [
      x.reshape(old.shape)
      for x, old in zip(
        jax.tree.leaves(new), jax.tree.leaves([g, *m]), strict=True
      )
    ],
  )
  u, *m = shaped
  if w is not None:
    ones = jnp.ones_like(w_rows)
    of_piece = lambda w: piece(0, size, rows, w)[0][0]
    _, slope = jax.jvp(of_piece, (w_rows,), (ones,))
    u = _with_slope(u, slope[0, 0], w)
  return u, m, counters


@jax.custom_jvp
def _with_slope(u: jax.Array, slope: jax.Array, w: jax.Array) -> jax.Array:
  """Returns u, whose derivative by w is the slope."""
  del slope, w
  return u


@_with_slope.defjvp
def _with_slope_jvp(primals: Any, tangents: Any) -> Any:
  u, slope, w = primals
  du, _, dw = tangents
  return _with_slope(u, slope, w), du + (slope * dw).astype(u.dtype)


def _is_coded(x: Any) -> bool:
  return isinstance(x, Quantized)


def _wide(tree: Any) -> Any:
  return jax.tree.map(full, tree)


def _unpacked(state: Any) -> Any:
  return jax.tree.map(
    lambda x: dequantize(x) if _is_coded(x) else x, state, is_leaf=_is_coded
  )


def _repacked(new: Any, old: Any, store: Callable) -> Any:
  """Returns the new state, in codes where the old one is."""

  def pack(old: Any, new: Any) -> Any:
    if not _is_coded(old):
      return jnp.asarray(new, jax.typeof(old).dtype)
    return store(new, code=old.code, block_size=old.block_size)

  return jax.tree.map(pack, old, new, is_leaf=_is_coded)


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
  inner: optax.GradientTransformationExtraArgs, params: Any
) -> None:
  """Raises ValueError where a piece of a leaf would get another update."""
  try:
    state = jax.eval_shape(inner.init, params)
    trees, _ = Outer.of(inner).split(state)
    for tree in trees:
      jax.tree.structure(params).flatten_up_to(tree)
    guards = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, GUARDS))
    known = not any(isinstance(x, GUARDS) for x in guards)
    known = known and _acts_alone(inner)
  except (ValueError, TypeError, KeyError, AttributeError):
    known = False
  if not known:
    raise ValueError(
      'quantize_state runs its inner piece by piece, and this one looks at'
      ' more than an element at a time. Masks, partitions, apply_if_finite,'
      ' MultiSteps and clipping by a norm go around quantize_state; for'
      ' Adafactor, Muon or a trust ratio pass elementwise=False'
    )


def _acts_alone(inner: optax.GradientTransformationExtraArgs) -> bool:
  """Whether the update of four elements is that of each alone."""
  g, w = jnp.array([[1e-2, -1.0], [1e3, 2.0]]), jnp.array([[1.0, -2], [3, 0.5]])
  with jax.ensure_compile_time_eval():

    def update(at: Any) -> Any:
      u, state = inner.update(g[at], inner.init(w[at]), w[at])
      return jax.tree.map(jnp.asarray, (u, state))

    try:
      whole = update(slice(None))
    except TypeError:
      return True  # It needs extra args, which only `update` is given.
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
      one = update((slice(i, i + 1), slice(j, j + 1)))
      pairs = zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True)
      for x, y in pairs:
        if isinstance(y, jax.core.Tracer):
          return True  # A hyperparameter is traced.
        at = y[i : i + 1, j : j + 1] if y.ndim == 2 else y
        if at.shape != x.shape or (
          jnp.issubdtype(y.dtype, jnp.number)
          and not jnp.allclose(x, at, rtol=1e-4, atol=1e-6)
        ):
          return False
  return True
