"""Compares the loss in chunks with the loss of all tokens at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import cross_entropy
from tests.rounding import assert_close


def _inputs():
  rng = np.random.default_rng(0)
  return (
    rng.standard_normal((2, 13, 8), dtype=np.float32),
    rng.standard_normal((8, 31), dtype=np.float32),
    rng.integers(31, size=(2, 13), dtype=np.int32),
    rng.integers(3, size=(2, 13)).astype(np.float32),
  )


# The batch has 2 rows of 13 time steps. The chunks have fewer tokens than there
# are rows, divide the batch, do not divide it, or are larger than it.
@pytest.mark.parametrize('chunk', [1, 2, 6, 8, 13, 26, 1000])
def test_chunks_of_any_size_give_the_whole_loss(chunk):
  h_BTD, kernel_DV, targets_BT, weights_BT = _inputs()

  def whole(h_BTD, kernel_DV):
    log_p_BTV = jax.nn.log_softmax(h_BTD @ kernel_DV)
    log_p_BT = jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)
    return -jnp.sum(weights_BT * log_p_BT[..., 0])

  def chunked(h_BTD, kernel_DV):
    return cross_entropy.sum_in_chunks(
      h_BTD, kernel_DV, targets_BT, weights_BT, chunk=chunk
    )

  grad = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))(h_BTD, kernel_DV)
  # The order of sums over up to 31 terms and 26 tokens may differ.
  assert_close(grad(chunked), grad(whole), operations=31 + 26)


# Slow tests compile with all optimizations, on which the memory depends.
@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 4])
def test_whole_logits_never_exist(rows):
  V, D, num_tokens = 32_000, 16, 2_048
  shape = (rows, num_tokens // rows)

  def temp_bytes(chunk):
    def loss(h_BTD, kernel_DV, targets_BT, weights_BT):
      return cross_entropy.sum_in_chunks(
        h_BTD, kernel_DV, targets_BT, weights_BT, chunk=chunk
      )

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
      jax.ShapeDtypeStruct((*shape, D), jnp.float32),
      jax.ShapeDtypeStruct((D, V), jnp.float32),
      jax.ShapeDtypeStruct(shape, jnp.int32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes

  logits = num_tokens * V * 4
  assert temp_bytes(chunk=128) < logits / 4
  # Check the measurement: with a single chunk, the logits do exist.
  assert temp_bytes(chunk=num_tokens) >= logits


def test_a_batch_on_two_devices_stays_there():
  devices = jax.make_mesh((2,), ('data',), devices=jax.devices()[:2])
  split = jax.NamedSharding(devices, jax.P('data'))
  whole = jax.NamedSharding(devices, jax.P())
  h_BTD, kernel_DV, targets_BT, weights_BT = _inputs()

  def loss(h_BTD, kernel_DV, targets_BT, weights_BT):
    return cross_entropy.sum_in_chunks(
      h_BTD, kernel_DV, targets_BT, weights_BT, chunk=6
    )

  step = jax.jit(
    jax.value_and_grad(loss), in_shardings=(split, whole, split, split)
  )
  arguments = (h_BTD, kernel_DV, targets_BT, weights_BT)
  text = step.lower(*arguments).compile().as_text()
  assert 'all-reduce' in text
  assert 'all-gather' not in text and 'all-to-all' not in text
  # The order of sums over up to 31 terms and 26 tokens may differ.
  expected = jax.jit(jax.value_and_grad(loss))(*arguments)
  assert_close(step(*arguments), expected, operations=31 + 26)
