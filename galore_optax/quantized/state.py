"""Optimizer state in 8 bits, for any optax transformation.

The arrays themselves are in `blockwise`, stochastic rounding of weights is in
`rounding`; both are offered here too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.quantized import dataflow, leafwise
from galore_optax.quantized.array import Quantized as Quantized
from galore_optax.quantized.array import dequantize as dequantize
from galore_optax.quantized.array import full as full
from galore_optax.quantized.array import quantize as quantize
from galore_optax.quantized.array import quantize_linear as quantize_linear
from galore_optax.quantized.codes import dynamic_map as dynamic_map
from galore_optax.quantized.rounding import (
  apply_updates_stochastic as apply_updates_stochastic,
)
from galore_optax.static import check_count, check_static


def quantize_state(
  inner: optax.GradientTransformation,
  *,
  block_size: int = 256,
  min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
  """Stores the parameter-like state of any transformation in 8 bits.

  A state leaf is stored in blocks of 8-bit codes if it is floating, has the
  path and the shape of a parameter and at least `min_size` elements, and
  starts at a constant (a copy of the weights is no moment). It gets
  the unsigned dynamic code if it starts at zero or above and the operations
  of `inner.update` cannot make it negative (Adam's `nu`), else the signed one
  (`mu`, a trace). Scalar hyper-parameters and differences of them, such as
  1 - b2, count as not negative. Everything else in the state stays as it is;
  moments of bfloat16 parameters that stay unquantized are float32.

  `inner` is traced and its own operations run in another order: leaf after
  leaf is dequantized, updated and quantized again, and an elementwise inner
  takes a leaf of more than 4 M elements in pieces that are written in place.
  The numbers do not depend on that order. Operations that read the state of
  several leaves at once (the norm of all updates, `optax.MultiSteps` inside)
  make these leaves one unit, in float32 together while they are updated;
  gradient clipping reads no state and does not. Rows that depend on each
  other (a trust ratio) make the leaf one piece, as does a leaf sharded over
  more than one device.

  What 8 bits do to Adam: an entry below about 1e-7 of its block's largest
  second moment is rounded up to 3e-7 of it, so that its update is too small,
  never too large.

  Args:
    inner: any optax transformation; masks, partitions, schedules and injected
      hyper-parameters in it work as usual.
    block_size: elements that share a float32 scale.
    min_size: smaller leaves stay float32. A layer-wise step shows one layer
      of a stack, and the size of that counts.

  Returns:
    A transformation with `inner`'s state structure, in which `Quantized`
    nodes stand for arrays: 1 byte an element and 4 bytes a block. A block
    ends where a matrix of a stack does: small ones take more. Updates
    have the dtype of the gradients. Its `init` accepts shape structs and
    allocates no float32 array for moments that start at a constant.

  Example:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from galore_optax.quantized.state import quantize_state
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

  def init_fn(params):
    return _init(inner, params, block_size, min_size)

  def update_fn(updates, state, params=None, **extra_args):
    update = functools.partial(inner.update, **extra_args)
    return leafwise.update(update, updates, state, params)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init(
  inner: optax.GradientTransformationExtraArgs,
  params: Any,
  block_size: int,
  min_size: int,
) -> Any:
  """Returns the inner's first state, its moments as codes from the start."""
  wide = _as_float32(params)
  program, treedef = dataflow.trace(inner.init, wide)
  avals = [program.avals[number] for number in program.outputs]
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
  state = treedef.unflatten(shapes)
  fills = dataflow.fill_values(program)
  like = _like_parameters(state, params, min_size)
  moments = [
    is_like and fill is not None
    for is_like, fill in zip(like, fills, strict=True)
  ]
  unsigned = _nonnegative(inner, wide, state, moments, fills)
  rest = iter(_compute(inner.init, params, [x is None for x in fills]))

  def leaf(shape, fill, is_moment, is_unsigned):
    if fill is None:
      return jax.lax.convert_element_type(next(rest), shape.dtype)
    if is_moment:
      code = 'unsigned' if is_unsigned else 'signed'
      return full(shape.shape, fill, code=code, block_size=block_size)
    return jnp.full(shape.shape, fill, shape.dtype)

  return treedef.unflatten(map(leaf, shapes, fills, moments, unsigned))


def _as_float32(params: Any) -> Any:
  """Shapes of the parameters; low-precision floats count as float32."""

  def widen(x):
    x = jnp.asarray(x)
    is_low = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if is_low else x

  return jax.eval_shape(lambda tree: jax.tree.map(widen, tree), params)


def _like_parameters(shapes: Any, params: Any, min_size: int) -> list[bool]:
  """Per state leaf, whether it is like a parameter, floating and large."""
  by_path = {
    tuple(path): jnp.shape(x)
    for path, x in jax.tree_util.tree_leaves_with_path(params)
  }

  def is_like(path, x):
    suffixes = (tuple(path[i:]) for i in range(len(path) + 1))
    same = any(by_path.get(suffix) == x.shape for suffix in suffixes)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return same and is_float and x.size >= max(min_size, 1) and x.ndim > 0

  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  return [is_like(path, x) for path, x in leaves]


def _nonnegative(
  inner: optax.GradientTransformationExtraArgs,
  params: Any,
  state: Any,
  moments: list[bool],
  fills: list[Any],
) -> list[bool]:
  """Per state leaf, whether it is a moment that no update makes negative."""
  proven = [m and f >= 0 for m, f in zip(moments, fills, strict=True)]
  if not any(proven):
    return proven
  try:
    program, _ = dataflow.trace(inner.update, params, state, params)
  except TypeError:  # It needs extra arguments, which `init` does not have.
    return [False] * len(proven)
  num_params = len(jax.tree.leaves(params))
  inputs = program.inputs[num_params:][: len(proven)]
  outputs = program.outputs[num_params:]
  candidates = None
  while proven != candidates:
    candidates = proven
    assumed = [i for i, c in zip(inputs, candidates, strict=True) if c]
    known = dataflow.nonnegative(program, assumed)
    proven = [
      c and o in known for c, o in zip(candidates, outputs, strict=True)
    ]
  return proven


def _compute(init: Callable, params: Any, is_wanted: list[bool]) -> list[Any]:
  """The wanted leaves of the state, and no others."""
  if not any(is_wanted):
    return []

  def wanted(params):
    leaves = zip(jax.tree.leaves(init(params)), is_wanted, strict=True)
    return [x for x, is_wanted in leaves if is_wanted]

  leaves = jax.tree.leaves(params)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
    return jax.jit(lambda: wanted(params))()
  return jax.jit(wanted)(params)
