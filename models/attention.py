"""Attention within segments, without an array of all scores.

`attend` uses cuDNN's kernel or `blockwise`. Neither stores the scores
[B, N, T, T], in the forward or the backward pass. `blockwise` processes one
block of queries and one block of keys at a time, and combines the blocks of
keys into one softmax by a running maximum and sum. `attend_cached` is for few
queries and a cache of earlier keys and values; it does store its scores.

Shapes: B batch, T time, N query heads, K key-value heads, G query heads per
key-value head, H head dimension, I blocks of C time steps each. S counts keys:
those of a cache, or of a block.

Source: Dao et al., `FlashAttention <https://arxiv.org/abs/2205.14135>`_, 2022.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Kind: TypeAlias = Literal['auto', 'cudnn', 'blockwise']

Abstract: TypeAlias = jax.Array | jax.ShapeDtypeStruct
"""An array, or only its shape and type."""

_Residuals: TypeAlias = tuple[jax.Array, ...]
"""Arrays that the forward pass stores for the backward pass."""


class Call(NamedTuple):
  """The sizes of an attention in a model."""

  length: int
  """Number of time steps in a row, T."""
  num_heads: int
  """Number of query heads, N."""
  kv_heads: int
  """Number of key-value heads, K."""
  head_width: int
  """Size of a head, H."""
  window: int | None = None
  """Number of time steps that a query attends to; None is all."""
  causal: bool = False
  """Whether later keys are masked."""


BLOCK = 128
"""Maximum number of time steps in a block."""

MASKED = -1e30
"""Score of a masked key. It is finite because the difference of two infinite
scores would be NaN."""


def attend(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segments_BT: jax.Array,
  *,
  window: int | None = None,
  kind: Kind = 'auto',
  causal: bool = True,
) -> jax.Array:
  """Returns softmax(q k / sqrt(H)) v over the keys of a query's segment.

  Args:
    q_BTNH: Queries.
    k_BTKH: Keys; each key-value head serves N / K query heads.
    v_BTKH: Values.
    segments_BT: Integers. A query attends only to keys of the same integer.
    window: Number of time steps that a query attends to, its own and those
      before it; None is all.
    kind: 'cudnn' is cuDNN's kernel, 'blockwise' is plain JAX. 'auto' is 'cudnn'
      on a GPU if JAX supports it for these arrays, else 'blockwise'.
    causal: Whether later keys are masked. False requires that `window` is
      None, which is not checked.

  Returns:
    An array [B, T, N, H] of the inputs' type.

  Raises:
    ValueError: `kind` is 'cudnn', and JAX does not support it for these arrays.
  """
  if window is not None and window >= q_BTNH.shape[1]:
    window = None
  if kind == 'cudnn' and (reason := refusal(q_BTNH, k_BTKH, window, causal)):
    q = jax.typeof(q_BTNH).str_short()
    raise ValueError(
      f"attention='cudnn' cannot be had for queries {q}: {reason}; "
      "attention='auto' goes block by block there"
    )
  if kind == 'auto':
    on_gpu = jax.default_backend() == 'gpu'
    supported = on_gpu and not refusal(q_BTNH, k_BTKH, window, causal)
    kind = 'cudnn' if supported else 'blockwise'
  implementation = {'cudnn': cudnn, 'blockwise': blockwise}[kind]
  return implementation(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, causal)


def attend_cached(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  keys_BSKH: jax.Array,
  values_BSKH: jax.Array,
  positions_BT: jax.Array,
  *,
  window: int | None = None,
) -> jax.Array:
  """Returns causal attention over cached keys and the keys of new time steps.

  Each row is one segment. All scores [B, N, T, S + T] exist at once, in
  float32.

  Args:
    q_BTNH: Queries of the new time steps.
    k_BTKH: Keys of the new time steps.
    v_BTKH: Values of the new time steps.
    keys_BSKH: Cached keys, indexed by position. Only entries before the row's
      first new position are read.
    values_BSKH: Cached values, indexed in the same way.
    positions_BT: Positions of the new time steps: consecutive integers in each
      row.
    window: Number of time steps that a query attends to, as in `attend`.

  Returns:
    An array [B, T, N, H] of the queries' type.
  """
  B, T, N, H = q_BTNH.shape
  S, K = keys_BSKH.shape[1:3]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  old_BKGTS = _product('btkgh,bskh->bkgts', q_BTKGH, keys_BSKH)
  new_BKGTT = _product('btkgh,bskh->bkgts', q_BTKGH, k_BTKH)
  times_1S = jnp.arange(S)[None]
  later = jnp.iinfo(jnp.int32).max
  old_BS = jnp.where(times_1S < positions_BT[:, :1], times_1S, later)
  times = jnp.concatenate([old_BS, positions_BT], axis=1)[:, None, :]
  seen = times <= positions_BT[:, :, None]
  if window is not None:
    seen &= positions_BT[:, :, None] - times < window
  scores = jnp.concatenate([old_BKGTS, new_BKGTT], axis=-1) * _scale(q_BTNH)
  p = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED), axis=-1)
  y_BTKGH = _product('bkgts,bskh->btkgh', p[..., :S], values_BSKH)
  y_BTKGH += _product('bkgts,bskh->btkgh', p[..., S:], v_BTKH)
  return y_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def refusal(
  q_BTNH: Abstract,
  k_BTKH: Abstract,
  window: int | None = None,
  causal: bool = True,
) -> str | None:
  """Returns why JAX cannot train with cuDNN's kernel here; None if it can.

  The kernel and its gradient are traced. JAX then checks the version of cuDNN,
  the type, the head dimension and the number of time steps for this GPU, and
  raises an error if the kernel does not support them.

  Args:
    q_BTNH: Queries, or their shape and type.
    k_BTKH: Keys, or their shape and type.
    window: As in `attend`.
    causal: As in `attend`.

  Returns:
    The first line of JAX's error message, or None.
  """
  segments_BT = jax.ShapeDtypeStruct(q_BTNH.shape[:2], jnp.int32)

  def total(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
  ) -> jax.Array:
    y_BTNH = cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, causal)
    return jnp.sum(y_BTNH.astype(jnp.float32))

  try:
    jax.eval_shape(jax.grad(total), q_BTNH, k_BTKH, k_BTKH, segments_BT)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    # The other lines are about JAX's traceback.
    return str(error).splitlines()[0].rstrip('.')
  return None


def cudnn(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segments_BT: jax.Array,
  window: int | None = None,
  causal: bool = True,
) -> jax.Array:
  """Returns the result of `attend` by cuDNN's kernel.

  The mask of the segments [B, 1, T, T] is an array shared by all heads.
  """
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  return jax.nn.dot_product_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    mask=same_BTS[:, None],
    is_causal=causal,
    local_window_size=None if window is None else (window - 1, 0),
    implementation='cudnn',
  )


def blockwise(
  q_BTNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  segments_BT: jax.Array,
  window: int | None = None,
  causal: bool = True,
) -> jax.Array:
  """Returns the result of `attend` in plain JAX, on any device.

  Scores, softmax and sums are float32. The operands of matrix products have the
  inputs' type. Pairs of blocks that are masked completely, by causality or by
  the window, are skipped.

  Returns:
    An array [B, T, N, H] of the inputs' type.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  I = -(-T // BLOCK)
  C = -(-T // I)

  def blocks(x_BT: jax.Array, fill: int = 0) -> jax.Array:
    """Splits [B, T, ...] into blocks [I, B, C, ...]; `fill` pads the last."""
    padding = [(0, 0)] * x_BT.ndim
    padding[1] = (0, I * C - T)
    padded = jnp.pad(x_BT, padding, constant_values=fill)
    x_BIC = padded.reshape(B, I, C, *x_BT.shape[2:])
    return jnp.moveaxis(x_BIC, 1, 0)

  y_IBKGCH = _attend(
    blocks(q_BTNH).reshape(I, B, C, K, N // K, H).transpose(0, 1, 3, 4, 2, 5),
    blocks(k_BTKH).swapaxes(2, 3),
    blocks(v_BTKH).swapaxes(2, 3),
    # The padding is a segment of its own, so that no token attends to it.
    blocks(segments_BT, fill=-1),
    window,
    causal,
  )
  return y_IBKGCH.transpose(1, 0, 4, 2, 3, 5).reshape(B, I * C, N, H)[:, :T]


def _attend_blocks(
  q_IBKGCH: jax.Array,
  k_IBKSH: jax.Array,
  v_IBKSH: jax.Array,
  segments_IBC: jax.Array,
  window: int | None,
  causal: bool,
) -> jax.Array:
  return _forward(q_IBKGCH, k_IBKSH, v_IBKSH, segments_IBC, window, causal)[0]


def _forward(
  q_IBKGCH: jax.Array,
  k_IBKSH: jax.Array,
  v_IBKSH: jax.Array,
  segments_IBC: jax.Array,
  window: int | None,
  causal: bool,
) -> tuple[jax.Array, _Residuals]:
  """Returns the result and the residuals for the backward pass."""
  I, _, C = segments_IBC.shape

  def add_pair(
    carry: tuple[jax.Array, jax.Array, jax.Array],
    pair: tuple[jax.Array, jax.Array],
  ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
    """Adds key block j to the running softmax of query block i."""
    top, total, y = carry
    i, j = pair
    scores = _scores(q_IBKGCH, k_IBKSH, segments_IBC, i, j, window, causal)
    new = jnp.maximum(top[i], jnp.max(scores, axis=-1))
    p, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top[i] - new)
    part = _product('bkgcs,bksh->bkgch', p, v_IBKSH[j])
    return (
      top.at[i].set(new),
      total.at[i].set(total[i] * shrink + jnp.sum(p, axis=-1)),
      y.at[i].set(y[i] * shrink[..., None] + part),
    ), None

  y = jnp.zeros(q_IBKGCH.shape, jnp.float32)
  zeros = y[..., 0]
  pairs = _pairs(I, C, window, causal)
  (top, total, y), _ = jax.lax.scan(add_pair, (zeros + MASKED, zeros, y), pairs)
  y = (y / total[..., None]).astype(q_IBKGCH.dtype)
  return y, (q_IBKGCH, k_IBKSH, v_IBKSH, segments_IBC, y, top + jnp.log(total))


def _backward(
  window: int | None, causal: bool, residuals: _Residuals, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """Returns the cotangents of q, k and v, and None for the segments.

  The softmax of each pair of blocks is computed again from its scores.
  """
  q, k, v, segments, y, log_total = residuals
  I, _, C = segments.shape
  # The gradient of a softmax subtracts the mean of dp, sum(p * dp) over the
  # keys. It is equal to sum(y * dy) over the head dimension.
  mean_dp = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)

  def add_pair(
    carry: tuple[jax.Array, jax.Array, jax.Array],
    pair: tuple[jax.Array, jax.Array],
  ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
    """Adds the gradients of query block i and key block j."""
    dq, dk, dv = carry
    i, j = pair
    scores = _scores(q, k, segments, i, j, window, causal)
    p = jnp.exp(scores - log_total[i][..., None])
    dp = _product('bkgch,bksh->bkgcs', dy[i], v[j])
    ds = p * (dp - mean_dp[i][..., None]) * _scale(q)
    return (
      dq.at[i].add(_product('bkgcs,bksh->bkgch', ds, k[j])),
      dk.at[j].add(_product('bkgcs,bkgch->bksh', ds, q[i])),
      dv.at[j].add(_product('bkgcs,bkgch->bksh', p, dy[i])),
    ), None

  zeros = (
    jnp.zeros(q.shape, jnp.float32),
    jnp.zeros(k.shape, jnp.float32),
    jnp.zeros(v.shape, jnp.float32),
  )
  pairs = _pairs(I, C, window, causal)
  (dq, dk, dv), _ = jax.lax.scan(add_pair, zeros, pairs)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


# `_forward` and `_backward` replace the gradient of the scan, which would store
# the softmax of every pair of blocks.
_attend = jax.custom_vjp(_attend_blocks, nondiff_argnums=(4, 5))
_attend.defvjp(_forward, _backward)


def _pairs(
  num_blocks: int, size: int, window: int | None, causal: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns the pairs (i, j) of query and key blocks that are not all masked.

  Args:
    num_blocks: Number of blocks.
    size: Number of time steps in a block.
    window: As in `attend`.
    causal: As in `attend`.

  Returns:
    The indices of the query blocks and of the key blocks, two int32 arrays.
  """
  i, j = np.tril_indices(num_blocks, 0 if causal else num_blocks)
  if window is not None:
    # The first query of block i and the last key of block j are the closest
    # pair: their distance is (i - j - 1) * size + 1.
    near = (i - j - 1) * size + 1 < window
    i, j = i[near], j[near]
  return jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32)


def _scores(
  q_IBKGCH: jax.Array,
  k_IBKSH: jax.Array,
  segments_IBC: jax.Array,
  i: jax.Array,
  j: jax.Array,
  window: int | None,
  causal: bool,
) -> jax.Array:
  """Returns the masked scores [B, K, G, C, S] of query block i, key block j."""
  scores = _product('bkgch,bksh->bkgcs', q_IBKGCH[i], k_IBKSH[j])
  C = segments_IBC.shape[-1]
  times = jnp.arange(C)
  queries, keys = i * C + times[:, None], j * C + times[None, :]
  in_reach_CS = (queries >= keys) | (not causal)
  if window is not None:
    in_reach_CS &= queries - keys < window
  same_BCS = segments_IBC[i][:, :, None] == segments_IBC[j][:, None, :]
  seen = (in_reach_CS[None] & same_BCS)[:, None, None]
  return jnp.where(seen, scores * _scale(q_IBKGCH), MASKED)


def _scale(q: jax.Array) -> float:
  return q.shape[-1] ** -0.5


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns an einsum of operands of y's type, accumulated in float32."""
  return jnp.einsum(
    subscripts, x.astype(y.dtype), y, preferred_element_type=jnp.float32
  )
