"""Attention inside segments, one pair of blocks of time at a time.

No array of [B, heads, T, T] exists, forward or backward: `attend` takes cuDNN's
kernel, or `blockwise`, in which a block of queries meets the blocks of keys (up
to its own, where it is causal), one after another, while a running maximum and
sum make one softmax of all of them. `attend_cached` is for few queries, and
keys from before.

Shapes: B batch, T time, N query heads, K key-value heads, G query heads of
each, H head dimension; I blocks of C time steps each (S where they are keys).

Source: Dao et al., `FlashAttention <https://arxiv.org/abs/2205.14135>`_, 2022.
"""

import functools
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Kind: TypeAlias = Literal['auto', 'cudnn', 'blockwise']

BLOCK = 128
"""Time steps of a block, at most."""

MASKED = -1e30
"""A score of what is not seen: finite, as a difference of two is no NaN."""


def attend(
  q_BTNH,
  k_BTKH,
  v_BTKH,
  segments_BT,
  *,
  window: int | None = None,
  kind: Kind = 'auto',
  causal: bool = True,
):
  """softmax(q k / sqrt(H)) v over what is not later, and of the same segment.

  Args:
    q_BTNH: queries.
    k_BTKH: keys.
    v_BTKH: values.
    segments_BT: integers; what has different ones does not meet.
    window: time steps that a query sees, its own and those before; None is all
      of them.
    kind: 'cudnn', cuDNN's kernel; 'blockwise', the products below; 'auto', the
      first on a GPU where JAX has it for such arrays, else the second.
    causal: False is for a model that sees what is later too, and no window.

  Returns:
    [B, T, N, H], of the inputs' type.

  Raises:
    ValueError: 'cudnn' where JAX refuses it.
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
    here = on_gpu and not refusal(q_BTNH, k_BTKH, window, causal)
    kind = 'cudnn' if here else 'blockwise'
  of_kind = {'cudnn': cudnn, 'blockwise': blockwise}[kind]
  return of_kind(q_BTNH, k_BTKH, v_BTKH, segments_BT, window, causal)


def attend_cached(
  q_BTNH,
  k_BTKH,
  v_BTKH,
  keys_BSKH,
  values_BSKH,
  positions_BT,
  *,
  window: int | None = None,
):
  """The same over keys from before and these ones; all rows are one segment.

  Every score [B, N, T, S + T] exists at once, in float32.

  Args:
    q_BTNH: queries.
    k_BTKH: keys of the same time steps.
    v_BTKH: values of them.
    keys_BSKH: keys from before, that of position s at s; of a row those before
      the first of its positions count.
    values_BSKH: values from before.
    positions_BT: integers, of each row one after another.
    window: as in `attend`.

  Returns:
    [B, T, N, H], of the queries' type.
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
  q_BTNH, k_BTKH, window: int | None = None, causal: bool = True
) -> str | None:
  """Returns why JAX has no kernel of cuDNN's to train with; None if it has.

  Tracing it asks for the version of cuDNN, the type, the head dimension and
  the number of time steps, by the rules of this JAX for this card.
  """
  segments_BT = jax.ShapeDtypeStruct(q_BTNH.shape[:2], jnp.int32)
  total = lambda *x: jnp.sum(cudnn(*x, window, causal).astype(jnp.float32))
  try:
    jax.eval_shape(jax.grad(total), q_BTNH, k_BTKH, k_BTKH, segments_BT)
  except (RuntimeError, NotImplementedError, ValueError) as error:
    # JAX adds lines about its traceback.
    return str(error).splitlines()[0].rstrip('.')
  return None


def cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=None, causal=True):
  """The same by cuDNN's kernel; the one mask [B, 1, T, T] is for all heads."""
  same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
  return jax.nn.dot_product_attention(
    *(q_BTNH, k_BTKH, v_BTKH),
    mask=same_BTS[:, None],
    is_causal=causal,
    local_window_size=None if window is None else (window - 1, 0),
    implementation='cudnn',
  )


def blockwise(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=None, causal=True):
  """The same by JAX's own products, on any device.

  Scores, softmax and sums are float32, products are of the inputs' type. Work
  that causality or the window makes superfluous is not done, but within a
  block.

  Returns:
    [B, T, N, H], of the inputs' type.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BTKH.shape[2]
  I = -(-T // BLOCK)
  C = -(-T // I)

  def blocks(x_BT, fill=0):
    padding = ((0, 0), (0, I * C - T), *((0, 0),) * (x_BT.ndim - 2))
    padded = jnp.pad(x_BT, padding, constant_values=fill)
    x_BIC = padded.reshape(B, I, C, *x_BT.shape[2:])
    return jnp.moveaxis(x_BIC, 1, 0)

  y_IBKGCH = _attend(
    blocks(q_BTNH).reshape(I, B, C, K, N // K, H).transpose(0, 1, 3, 4, 2, 5),
    blocks(k_BTKH).swapaxes(2, 3),
    blocks(v_BTKH).swapaxes(2, 3),
    # What is added at the end is a segment of its own.
    blocks(segments_BT, fill=-1),
    window,
    causal,
  )
  return y_IBKGCH.transpose(1, 0, 4, 2, 3, 5).reshape(B, I * C, N, H)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_IBKGCH, k_IBKSH, v_IBKSH, segments_IBC, window, causal):
  return _forward(q_IBKGCH, k_IBKSH, v_IBKSH, segments_IBC, window, causal)[0]


def _forward(q_IBKGCH, k_IBKSH, v_IBKSH, segments_IBC, window, causal):
  """Returns the result, and what the backward pass reads."""

  def meet(found, pair):
    top, total, y = found
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
  none = y[..., 0]
  pairs = _pairs(*segments_IBC.shape[::2], window, causal)
  (top, total, y), _ = jax.lax.scan(meet, (none + MASKED, none, y), pairs)
  y = (y / total[..., None]).astype(q_IBKGCH.dtype)
  return y, (q_IBKGCH, k_IBKSH, v_IBKSH, segments_IBC, y, top + jnp.log(total))


def _backward(window, causal, kept, dy):
  """Returns the cotangents of q, k and v; softmax is found again."""
  q, k, v, segments, y, log_total = kept
  # What the normalization of a softmax takes from each of its scores.
  taken = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)

  def meet(found, pair):
    dq, dk, dv = found
    i, j = pair
    scores = _scores(q, k, segments, i, j, window, causal)
    p = jnp.exp(scores - log_total[i][..., None])
    dp = _product('bkgch,bksh->bkgcs', dy[i], v[j])
    ds = p * (dp - taken[i][..., None]) * _scale(q)
    return (
      dq.at[i].add(_product('bkgcs,bksh->bkgch', ds, k[j])),
      dk.at[j].add(_product('bkgcs,bkgch->bksh', ds, q[i])),
      dv.at[j].add(_product('bkgcs,bkgch->bksh', p, dy[i])),
    ), None

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  pairs = _pairs(*segments.shape[::2], window, causal)
  found, _ = jax.lax.scan(meet, zeros, pairs)
  return *(
    dx.astype(x.dtype) for dx, x in zip(found, kept[:3], strict=True)
  ), None


_attend.defvjp(_forward, _backward)


def _pairs(num_blocks, size, window, causal):
  """Blocks of queries, and for each those of keys that it sees."""
  i, j = np.tril_indices(num_blocks, 0 if causal else num_blocks)
  if window is not None:
    # The first query of block i and the last key of block j are the closest.
    near = (i - j - 1) * size + 1 < window
    i, j = i[near], j[near]
  return np.int32(i), np.int32(j)


def _scores(q_IBKGCH, k_IBKSH, segments_IBC, i, j, window, causal):
  """Scores [B, K, G, C, S] of block i of queries with block j of keys."""
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


def _scale(q):
  return q.shape[-1] ** -0.5


def _product(subscripts, x, y):
  """A product of y's type, summed in float32."""
  return jnp.einsum(
    subscripts, x.astype(y.dtype), y, preferred_element_type=jnp.float32
  )
