"""Compares block-wise attention with attention over all scores, in float64."""

import functools

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention
from tests.galore_optax.program import each
from tests.rounding import assert_close

B, H = 2, 8


def _inputs(T, *, heads=4, kv_heads=2, dtype=jnp.float32):
  """Returns q, k, v, and segments that end inside blocks and at their ends."""
  rng = np.random.default_rng(T)
  draw = lambda n: rng.standard_normal((B, T, n, H)).astype(dtype)
  ends = sorted({T // 3, min(T, attention.BLOCK), T})
  segments_T = np.searchsorted(ends, np.arange(T), side='right') + 1
  segments_BT = np.stack([segments_T, np.ones_like(segments_T)])
  return draw(heads), draw(kv_heads), draw(kv_heads), np.int32(segments_BT)


def _whole(q_BTNH, k_BTKH, v_BTKH, segments_BT, window=None, causal=True):
  """Computes attention by its definition, with all scores at once."""
  T, N, K = *q_BTNH.shape[1:3], k_BTKH.shape[2]
  k_BTNH, v_BTNH = (jnp.repeat(x, N // K, axis=2) for x in (k_BTKH, v_BTKH))
  scores = jnp.einsum('btnh,bsnh->bnts', q_BTNH, k_BTNH) / np.sqrt(H)
  seen = segments_BT[:, :, None] == segments_BT[:, None, :]
  if causal:
    seen &= np.tril(np.ones((1, T, T), bool))
  if window is not None:
    seen &= np.triu(np.ones((1, T, T), bool), 1 - window)
  p = jax.nn.softmax(jnp.where(seen[:, None], scores, -np.inf))
  return jnp.einsum('bnts,bsnh->btnh', p, v_BTNH)


def _value_and_gradient(function, q, k, v, segments):
  """Returns the result, and the gradient of a nonlinear function of it."""

  def score(q, k, v):
    y = function(q, k, v, segments)
    return jnp.sum(jnp.sin(3 * y)), y

  grads, y = jax.jit(jax.grad(score, (0, 1, 2), has_aux=True))(q, k, v)
  return y, grads


def _agree(T, **options):
  """Asserts that block-wise attention and its gradient match the definition."""
  q, k, v, segments = _inputs(T)
  of = lambda f: functools.partial(f, **options)
  with jax.enable_x64(True):
    wide = (np.float64(x) for x in (q, k, v))
    expected = _value_and_gradient(of(_whole), *wide, segments)
  found = _value_and_gradient(of(attention.blockwise), q, k, v, segments)
  # The tolerance allows for float32 sums of up to 300 terms of order 1.
  chex.assert_trees_all_close(
    jax.tree.map(np.float64, found), expected, rtol=1e-5, atol=1e-5
  )


# Lengths are one time step, part of a block, one block, one step more, and
# three blocks.
@each('T', [1, 5, 128, 129, 300], quick=[5, 300])
def test_blocks_give_whole_attention_and_its_gradient(T):
  _agree(T)


@pytest.mark.parametrize('T', [5, 129])
def test_both_directions_give_whole_attention_and_its_gradient(T):
  _agree(T, causal=False)


# Windows are one time step, part of a block, one block, one step more, and more
# than two blocks.
@each('window', [1, 5, 100, 101, 250], quick=[1, 250])
def test_a_window_gives_whole_attention_in_it_and_its_gradient(window):
  _agree(300, window=window)  # The blocks have 100 time steps.


@pytest.mark.parametrize('window', [300, 1000])
def test_a_window_of_all_time_is_none(window):
  q, k, v, segments = _inputs(300)
  for attend in (attention.attend, attention.blockwise):
    found, expected = (
      jax.jit(functools.partial(attend, window=length))(q, k, v, segments)
      for length in (window, None)
    )
    # The two programs may sum 300 terms in different orders.
    assert_close(found, expected, operations=300)


def test_blocks_outside_a_window_are_not_visited():
  q, k, v, segments = _inputs(512)
  # Reading these values would give NaN, even with weight 0.
  v[:, :128] = np.nan
  blockwise = jax.jit(functools.partial(attention.blockwise, window=129))
  y = blockwise(q, k, v, segments)
  assert np.all(np.isfinite(y[:, 256:]))
  assert np.all(np.isnan(y[:, :256]))


@pytest.mark.parametrize('heads, kv_heads', [(1, 1), (3, 3), (4, 1)])
def test_any_grouping_of_heads(heads, kv_heads):
  q, k, v, segments = _inputs(150, heads=heads, kv_heads=kv_heads)
  chex.assert_trees_all_close(
    _value_and_gradient(attention.blockwise, q, k, v, segments),
    _value_and_gradient(_whole, q, k, v, segments),
    rtol=1e-4,
    atol=2e-5,  # Here, both sides are computed in float32.
  )


def test_large_scores_do_not_overflow():
  q, k, v, segments = _inputs(200)
  y, grads = _value_and_gradient(
    attention.blockwise, 1e4 * q, 1e4 * k, v, segments
  )
  chex.assert_tree_all_finite((y, grads))
  # With scores this large, the softmax selects a single time step.
  whole = jax.jit(_whole)(1e4 * q, 1e4 * k, v, segments)
  chex.assert_trees_all_close(y, whole, atol=1e-5)


def test_products_of_bfloat16_are_summed_in_float32():
  q, k, v, segments = _inputs(300, dtype=jnp.bfloat16)
  found = jax.jit(attention.blockwise)(q, k, v, segments)
  assert found.dtype == jnp.bfloat16
  wide = (np.float32(x) for x in (q, k, v))
  expected = jax.jit(_whole)(*wide, segments)
  # The softmax and the result are each rounded to 8 bits, which is an error of
  # 2 * 2^-9 of values up to 3.
  chex.assert_trees_all_close(np.float32(found), expected, atol=0.02)


def test_no_array_has_every_score():
  T = 1024
  q, k, v, segments = _inputs(T)
  backward = jax.grad(lambda *x: jnp.sum(attention.blockwise(*x, segments)))
  scores = B * q.shape[2] * T * T

  def sizes(jaxpr):
    for eqn in jaxpr.eqns:
      yield from (var.aval.size for var in eqn.outvars)
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        yield from sizes(inner)

  found = max(sizes(jax.make_jaxpr(backward)(q, k, v).jaxpr))
  assert found < scores / 32
  # Check the measurement: attention by the definition has such an array.
  whole = jax.grad(lambda *x: jnp.sum(_whole(*x, segments)))
  assert max(sizes(jax.make_jaxpr(whole)(q, k, v).jaxpr)) >= scores
