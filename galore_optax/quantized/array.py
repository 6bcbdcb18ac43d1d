"""Arrays stored as 8-bit codes or packed 4-bit codes, with a scale per block.

Axes: m rows, n columns, b blocks, k block size; leading axes are batch.
"""

import functools
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from galore_optax.checks import check_count, check_static
from galore_optax.quantized import codes as dynamic
from galore_optax.quantized.codes import Code

# Blocks run along rows if this needs at most 1.28 times as many scales as full
# blocks would. Otherwise the rows of a matrix are joined first.
_MAX_WASTE = 1.28
# The smallest normal float32. Dividing by a smaller number may overflow.
_TINY = float(np.finfo(np.float32).tiny)


class _Fields(NamedTuple):
  """The fields of `Quantized`; its docstring describes the class."""

  codes: Any
  """uint8 [..., m, n]; for 4-bit codes [..., m, ceil(n / 2)], two in a byte."""
  scale: Any
  """float32 [..., m, b], or [..., b] if rows are joined: the largest magnitude
  of a block (dynamic codes), or the step between its values (linear codes)."""
  code: Code
  """How codes represent values. This field and the next two are static: they
  are part of the structure of the pytree."""
  block_size: int
  """k, the number of elements that share a scale."""
  num_columns: int
  """n. The shape of packed codes does not determine it: an odd row is padded
  to a whole byte."""


class Quantized(_Fields):
  """An array stored as block-wise codes; `dequantize` returns the array.

  A block contains `block_size` consecutive elements of a row. The last block
  of a row may be shorter. If rows are too short for this (see `quantize`), the
  rows of each matrix are joined first, so a block never contains elements of
  two matrices of a stack. Leading axes are batch in every field: a stack can
  be sliced, scanned, mapped over and sharded like the array itself.

  For JAX this class is a pytree with two leaves, `codes` and `scale`. Orbax
  stores these two arrays. `flax.serialization` treats any named tuple as a
  dict of its fields, so its bytes also contain the three static fields, and
  this library does not have to import flax.
  """

  __slots__ = ()

  def __new__(
    cls,
    codes: Any,
    scale: Any,
    code: Code,
    block_size: int,
    num_columns: int,
  ) -> 'Quantized':
    """Converts the static fields, which a flax state dict stores as arrays."""
    static: Any = str(code), int(block_size), int(num_columns)
    return super().__new__(cls, codes, scale, *static)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the dequantized array."""
    return self.codes.shape[:-1] + (self.num_columns,)

  @property
  def size(self) -> int:
    """Number of elements of the dequantized array."""
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    """Bytes of the codes and the scales."""
    return sum(x.nbytes for x in jax.tree.leaves(self))


def _flatten(q: Quantized) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  return q[:2], q[2:]


def _flatten_with_keys(q: Quantized) -> tuple[Any, Any]:
  keys = map(jax.tree_util.GetAttrKey, Quantized._fields[:2])
  return tuple(zip(keys, q[:2], strict=True)), q[2:]


def _unflatten(static: tuple[Any, ...], arrays: Iterable[Any]) -> Quantized:
  return Quantized(*arrays, *static)


# JAX uses this registration instead of its default handling of named tuples.
jax.tree_util.register_pytree_with_keys(
  Quantized, _flatten_with_keys, _unflatten, _flatten
)


def check_layout(*, bits: int, group: int) -> None:
  """Raises ValueError unless `quantize_linear` accepts these options.

  >>> check_layout(bits=4, group=256)
  """
  check_static(bits=bits, group=group)
  if bits not in (4, 8):
    raise ValueError(f'bits must be 4 or 8, got {bits!r}')
  check_count(group=group)


def _join_rows(x: jax.Array) -> jax.Array:
  return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _join_short_rows(x: jax.Array, block_size: int) -> jax.Array:
  """Joins the rows of each matrix if blocks per row would waste scales."""
  n = x.shape[-1]
  stored = -(-n // block_size) * block_size
  return _join_rows(x) if x.ndim > 1 and stored > _MAX_WASTE * n else x


def _split_blocks(x: jax.Array, block_size: int) -> jax.Array:
  """Reshapes [..., n] to [..., b, k], padding a row with its last element."""
  pad = -x.shape[-1] % block_size
  if pad:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], mode='edge')
  return x.reshape(*x.shape[:-1], -1, block_size)


def _merge_blocks(blocks: jax.Array, num_columns: int) -> jax.Array:
  """Reshapes [..., b, k] to [..., n], without the padding of a row."""
  return _join_rows(blocks)[..., :num_columns]


def _block_max(blocks: jax.Array) -> jax.Array:
  """Returns the largest entry of each block, or NaN if any is non-finite.

  Non-finite entries are replaced by infinity before the maximum is computed,
  because on the CPU XLA's maximum of a long array ignores NaN (jaxlib 0.10.2).
  """
  largest = jnp.max(jnp.where(jnp.isfinite(blocks), blocks, jnp.inf), axis=-1)
  return jnp.where(jnp.isfinite(largest), largest, jnp.nan)


def _divide(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Divides by `scale`; returns 0 if the scale is 0 or subnormal."""
  usable = ~(scale < _TINY)  # A NaN is usable, so that the block becomes NaN.
  return x * jnp.where(usable, 1 / jnp.where(usable, scale, 1.0), 0.0)


def quantize(
  x: ArrayLike, *, code: Code = 'signed', block_size: int = 256
) -> Quantized:
  """Stores an array in 8 bits per element with a dynamic code.

  Blocks run along the last axis. If the short block at the end of each row
  would cost more than 28% extra scales, blocks run over the last two axes
  joined instead. With blocks of 256, all such rows are shorter than 800.

  Relative to the largest magnitude of the block, the error is at most 0.0071
  (signed) or 0.0036 (unsigned). Relative to the value itself, it is at most
  18% (signed) or 11% (unsigned) for values above 1e-3 of the largest
  magnitude, and at most 47% or 28% for values above 1e-5 of it. If a block
  contains a NaN or an infinity, the whole block is dequantized to NaN. The
  unsigned code has no negative values and stores them as 0.

  Args:
    x: floating array [..., n].
    code: 'signed' or 'unsigned', as in `quantized.codes.dynamic_map`. The
      unsigned code never rounds a positive value to 0.
    block_size: number of elements that share a scale.

  Returns:
    The `Quantized` array: 1 byte per element and 4 bytes per block.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax.quantized import array as blockwise
    >>> q = blockwise.quantize(jnp.array([-3.0, 0.0, 1e-3, 2.0]))
    >>> [round(float(x), 4) for x in blockwise.dequantize(q)]
    [-2.9789, 0.0, 0.0011, 2.0086]

  References:
    Dettmers et al., `8-bit optimizers via block-wise quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021.
  """
  x = jnp.asarray(x)
  q = quantize_rows(
    _join_short_rows(x, block_size), code=code, block_size=block_size
  )
  return q._replace(codes=q.codes.reshape(x.shape), num_columns=x.shape[-1])


@functools.partial(jax.jit, static_argnames=('code', 'block_size'))
def quantize_rows(rows: jax.Array, *, code: Code, block_size: int) -> Quantized:
  """Stores an array as `quantize` does, but never joins rows."""
  blocks = _split_blocks(rows.astype(jnp.float32), block_size)
  absmax = _block_max(jnp.abs(blocks))
  codes = dynamic.encode(_divide(blocks, absmax[..., None]), code)
  codes = _merge_blocks(codes, rows.shape[-1])
  return Quantized(codes, absmax, code, block_size, rows.shape[-1])


def rows_shape(q: Quantized) -> tuple[int, int]:
  """Returns the shape of `as_rows(q)`."""
  num_rows = q.scale.size // q.scale.shape[-1]
  num_columns = q.codes.size // num_rows
  if num_columns % q.block_size == 0:
    return q.scale.size, q.block_size
  return num_rows, num_columns


def as_rows(q: Quantized) -> Quantized:
  """Returns the same codes as a matrix whose blocks run along the last axis.

  If all blocks are full, each row of the matrix is one block.
  """
  m, n = rows_shape(q)
  codes = q.codes.reshape(m, n)
  return q._replace(codes=codes, scale=q.scale.reshape(m, -1), num_columns=n)


def quantized_full(
  shape: tuple[int, ...], value: float, *, code: Code, block_size: int
) -> Quantized:
  """Returns `quantize(jnp.full(shape, value))`, but never makes that array."""
  one, like = _quantized_fill(shape, value, code, block_size)

  def fill(x: np.ndarray, to: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(to.shape, x, to.dtype)

  return jax.tree.map(fill, one, like)


@functools.lru_cache
def _quantized_fill(
  shape: tuple[int, ...], value: float, code: Code, block_size: int
) -> tuple[Quantized, Quantized]:
  """Returns the code and the scale of a constant array, and the shapes.

  NumPy computes them, because compiling `quantize` takes a tenth of a second.
  """
  make = functools.partial(quantize, code=code, block_size=block_size)
  like = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32))
  scale = np.abs(np.float32(value))
  if not np.isfinite(scale):
    scale = np.float32(np.nan)
  if scale < _TINY:
    scale = np.float32(0)
  # The largest entry of a block is 1 relative to the scale.
  relative = np.sign(value) if scale > 0 else 0.0
  values = dynamic.dynamic_map(code)
  index = np.argmin(np.abs(values - relative)).astype(np.uint8)
  return like._replace(codes=index, scale=scale), like


def _pack_nibbles(codes: jax.Array) -> jax.Array:
  """Stores two 4-bit codes in each byte, the first one in the low half."""
  pairs = _split_blocks(codes, 2)
  return pairs[..., 0] | (pairs[..., 1] << 4)


def _unpack_nibbles(packed: jax.Array, num_columns: int) -> jax.Array:
  return _merge_blocks(
    jnp.stack([packed & 15, packed >> 4], axis=-1), num_columns
  )


def quantize_linear(
  x: ArrayLike,
  *,
  bits: Literal[4, 8] = 8,
  group: int = 256,
  key: jax.Array | None = None,
) -> Quantized:
  """Stores an array in 8 or 4 bits per element with equally spaced codes.

  The error is at most half a step, or less than one step if `key` is given.
  The step of a block is max |x| / 127 for 8 bits and max |x| / 7 for 4 bits.
  If a block contains a NaN or an infinity, the whole block is dequantized to
  NaN. Blocks are laid out as in `quantize`.

  Args:
    x: floating array [..., n].
    bits: 8, or 4 for two values per byte.
    group: number of elements that share a scale.
    key: random key for stochastic rounding, whose expected value is x. Without
      a key, values are rounded to nearest.

  Returns:
    The `Quantized` array: bits / 8 bytes per element, and 4 bytes per block.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax.quantized import array as blockwise
    >>> x = jnp.arange(256.0)
    >>> q = blockwise.quantize_linear(x, bits=4)
    >>> q.nbytes, round(float(abs(blockwise.dequantize(q) - x).max()), 2)
    (132, 18.14)
  """
  check_layout(bits=bits, group=group)
  x = jnp.asarray(x)
  rows = _join_short_rows(x, group)
  blocks = _split_blocks(rows.astype(jnp.float32), group)
  middle = 2 ** (bits - 1) - 1
  scale = _block_max(jnp.abs(blocks)) / middle
  steps = _divide(blocks, scale[..., None])
  if key is not None:
    steps = jnp.floor(steps + jax.random.uniform(key, steps.shape))
  steps = jnp.round(steps) + middle
  codes = jnp.clip(steps, 0, 2 * middle).astype(jnp.uint8)
  codes = _merge_blocks(codes, rows.shape[-1]).reshape(x.shape)
  if bits == 4:
    return Quantized(_pack_nibbles(codes), scale, 'int4', group, x.shape[-1])
  return Quantized(codes, scale, 'int8', group, x.shape[-1])


@functools.partial(jax.jit, static_argnames='dtype')
def dequantize(q: Quantized, dtype: DTypeLike = jnp.float32) -> jax.Array:
  """Returns the array that the codes represent.

  Args:
    q: result of `quantize` or `quantize_linear`, or a slice of such a result
      along leading axes.
    dtype: dtype of the returned array; the arithmetic is float32.

  Returns:
    Array of shape `q.shape`.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax.quantized import array as blockwise
    >>> blockwise.dequantize(blockwise.quantize(jnp.ones((2, 3)))).shape
    (2, 3)
  """
  codes = (
    _unpack_nibbles(q.codes, q.num_columns) if q.code == 'int4' else q.codes
  )
  rows = _join_rows(codes) if q.scale.ndim < q.codes.ndim else codes
  blocks = _split_blocks(rows, q.block_size)
  if q.code == 'signed' or q.code == 'unsigned':
    values = dynamic.decode(blocks, q.code)
  else:
    middle = 7 if q.code == 'int4' else 127
    values = blocks.astype(jnp.float32) - middle
  values = values * q.scale[..., None]
  return _merge_blocks(values, rows.shape[-1]).reshape(q.shape).astype(dtype)


def is_quantized(x: object) -> bool:
  """Whether a node of a tree is a `Quantized` array."""
  return isinstance(x, Quantized)


def dequantize_tree(tree: Any, dtype: DTypeLike = jnp.float32) -> Any:
  """Returns a tree whose `Quantized` nodes are dequantized.

  >>> dequantize_tree([quantize(jnp.ones(2)), 3])
  [Array([1., 1.], dtype=float32), 3]
  """
  return jax.tree.map(
    lambda x: dequantize(x, dtype) if is_quantized(x) else x,
    tree,
    is_leaf=is_quantized,
  )
