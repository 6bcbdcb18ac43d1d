"""Arrays stored as 8-bit or packed 4-bit codes with one scale a block.

Legend: L leading (batch) axes, m rows, n columns, b blocks, k block size.
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

# Short blocks may cost at most this many scales more than full ones would.
_MAX_WASTE = 1.28
# The smallest normal float32: the quotient by anything below may overflow.
_TINY = float(np.finfo(np.float32).tiny)


class _Fields(NamedTuple):
  """The fields of `Quantized`; its docstring describes the class."""

  # uint8 [..., m, n], or [..., m, ceil(n / 2)] where two share a byte.
  codes: Any
  # float32 [..., m, b], or [..., b] where rows are joined: the largest
  # magnitude of a block (dynamic codes) or its step (linear codes).
  scale: Any
  # The fields from here on are static: a pytree keeps them in its structure.
  code: Code
  block_size: int
  # n: the packed codes of an odd row hold one value more.
  num_columns: int


class Quantized(_Fields):
  """An array as block-wise codes; `dequantize` gives the array back.

  A block is `block_size` consecutive elements of a row (the last one of a row
  may be shorter). Rows too short for that (see `quantize`) are first joined
  to one row a matrix, so that a block never straddles two matrices of a
  stack. Leading axes are batch in every field: a stack can be sliced,
  scanned, mapped over and sharded like the array itself.

  To JAX this class is a pytree of `codes` and `scale`. To `flax.serialization`,
  which recognizes any named tuple, it is a dict of all five fields. The bytes
  therefore contain the static fields too, and this library does not import
  flax. Orbax stores the two arrays.
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
    """Makes static fields hashable: a state dict may hold them as arrays."""
    static: Any = str(code), int(block_size), int(num_columns)
    return super().__new__(cls, codes, scale, *static)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the array that the codes stand for."""
    return self.codes.shape[:-1] + (self.num_columns,)

  @property
  def size(self) -> int:
    """Number of elements of the array that the codes stand for."""
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


# JAX prefers a registration to its own handling of named tuples.
jax.tree_util.register_pytree_with_keys(
  Quantized, _flatten_with_keys, _unflatten, _flatten
)


def check_layout(*, bits: int, group: int) -> None:
  """Raises ValueError for a layout of linear codes that no array has.

  >>> check_layout(bits=4, group=256)
  """
  check_static(bits=bits, group=group)
  if bits not in (4, 8):
    raise ValueError(f'bits must be 4 or 8, got {bits!r}')
  check_count(group=group)


def _join_rows(x: jax.Array) -> jax.Array:
  return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _join_short_rows(x: jax.Array, block_size: int) -> jax.Array:
  """Joins the rows of a matrix where blocks of each row would waste scales."""
  n = x.shape[-1]
  stored = -(-n // block_size) * block_size
  return _join_rows(x) if x.ndim > 1 and stored > _MAX_WASTE * n else x


def _split_blocks(x: jax.Array, block_size: int) -> jax.Array:
  """[..., n] to [..., b, k]; a short block repeats its last element."""
  pad = -x.shape[-1] % block_size
  if pad:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)], mode='edge')
  return x.reshape(*x.shape[:-1], -1, block_size)


def _merge_blocks(blocks: jax.Array, num_columns: int) -> jax.Array:
  """Inverse of `_split_blocks`."""
  return _join_rows(blocks)[..., :num_columns]


def _block_max(blocks: jax.Array) -> jax.Array:
  """The largest entry of a block; NaN if one is not finite.

  NaN is replaced first: on the CPU XLA's own maximum of a long enough array
  passes over it (seen with jaxlib 0.10.2).
  """
  largest = jnp.max(jnp.where(jnp.isfinite(blocks), blocks, jnp.inf), axis=-1)
  return jnp.where(jnp.isfinite(largest), largest, jnp.nan)


def _divide(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Divides by `scale`; 0 for a block whose scale is 0 or subnormal."""
  usable = ~(scale < _TINY)  # True for NaN.
  return x * jnp.where(usable, 1 / jnp.where(usable, scale, 1.0), 0.0)


def quantize(
  x: ArrayLike, *, code: Code = 'signed', block_size: int = 256
) -> Quantized:
  """Stores an array in 8 bits an element with a dynamic code.

  Blocks run along the last axis. Where its last, short block would waste
  scales (more than 28% of them: rows shorter than about 900 that are no
  multiple of `block_size`), blocks run over the last two axes joined instead.

  The round trip is off by at most 0.0071 (signed) or 0.0036 (unsigned) of the
  block's largest magnitude, and by at most 18% (11%) of a value above 1e-3 of
  it, 47% (28%) of one above 1e-5. A block that holds a NaN or an infinity comes
  back as NaN, whole. Negative values have no unsigned code: they become 0.

  Args:
    x: floating array [..., n].
    code: 'signed' or 'unsigned', a name of `quantized.codes.dynamic_map`. A
      positive value never becomes an unsigned 0.
    block_size: elements that share a scale.

  Returns:
    The `Quantized` array: 1 byte an element and 4 a block.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax.quantized import array as blockwise
    >>> q = blockwise.quantize(jnp.array([-3.0, 0.0, 1e-3, 2.0]))
    >>> [round(float(x), 4) for x in blockwise.dequantize(q)]
    [-2.9789, 0.0, 0.0011, 2.0086]

  References:
    Dettmers et al., 8-bit optimizers via block-wise quantization,
    arXiv 2110.02861.
  """
  x = jnp.asarray(x)
  q = quantize_rows(
    _join_short_rows(x, block_size), code=code, block_size=block_size
  )
  return q._replace(codes=q.codes.reshape(x.shape), num_columns=x.shape[-1])


@functools.partial(jax.jit, static_argnames=('code', 'block_size'))
def quantize_rows(rows: jax.Array, *, code: Code, block_size: int) -> Quantized:
  """As `quantize`, with blocks along the last axis whatever its size."""
  blocks = _split_blocks(rows.astype(jnp.float32), block_size)
  absmax = _block_max(jnp.abs(blocks))
  codes = dynamic.encode(_divide(blocks, absmax[..., None]), code)
  codes = _merge_blocks(codes, rows.shape[-1])
  return Quantized(codes, absmax, code, block_size, rows.shape[-1])


def rows_shape(q: Quantized) -> tuple[int, int]:
  """Shape of `as_rows(q)`."""
  num_rows = q.scale.size // q.scale.shape[-1]
  num_columns = q.codes.size // num_rows
  if num_columns % q.block_size == 0:
    return q.scale.size, q.block_size
  return num_rows, num_columns


def as_rows(q: Quantized) -> Quantized:
  """The same codes as a matrix whose blocks lie along the last axis.

  A row is a single block where all blocks are full.
  """
  m, n = rows_shape(q)
  codes = q.codes.reshape(m, n)
  return q._replace(codes=codes, scale=q.scale.reshape(m, -1), num_columns=n)


def quantized_full(
  shape: tuple[int, ...], value: float, *, code: Code, block_size: int
) -> Quantized:
  """Returns `quantize(jnp.full(shape, value))` without the float array."""
  make = functools.partial(quantize, code=code, block_size=block_size)
  like = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32))
  one = make(jnp.full(1, value))._replace(num_columns=shape[-1])

  def fill(x: jax.Array, to: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.full(to.shape, x.reshape(()), to.dtype)

  return jax.tree.map(fill, one, like)


def _pack_nibbles(codes: jax.Array) -> jax.Array:
  """Two 4-bit codes a byte, the first in the low half."""
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
  """Stores an array in 8 or 4 bits an element with equally spaced codes.

  The round trip is off by at most half a step of the block, and by less than
  one with `key`. A step is max |x| / 127 (or / 7) of the block. A block that
  holds a NaN or an infinity comes back as NaN, whole. Groups are laid out as
  in `quantize`.

  Args:
    x: floating array [..., n].
    bits: 8, or 4 for two values a byte.
    group: elements that share a scale.
    key: round up or down at random, right on average. None: to nearest.

  Returns:
    The `Quantized` array: bits / 8 bytes an element plus the scales.

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
  """Returns the array that the codes stand for.

  Args:
    q: what `quantize` or `quantize_linear` returned, or a slice of it along
      leading axes.
    dtype: of the result; the arithmetic is float32.

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
  """Whether a node of a tree stands for an array in codes."""
  return isinstance(x, Quantized)


def dequantize_tree(tree: Any, dtype: DTypeLike = jnp.float32) -> Any:
  """Returns a tree with arrays where it has codes.

  >>> dequantize_tree([quantize(jnp.ones(2)), 3])
  [Array([1., 1.], dtype=float32), 3]
  """
  return jax.tree.map(
    lambda x: dequantize(x, dtype) if is_quantized(x) else x,
    tree,
    is_leaf=is_quantized,
  )


# Former names.
is_coded = is_quantized
unpacked = dequantize_tree
full = quantized_full
