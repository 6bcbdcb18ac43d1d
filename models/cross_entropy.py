"""Cross entropy over a large vocabulary, a chunk of tokens at a time.

Shapes: B batch, T time, D width, V vocabulary, J chunks of C time steps each.
"""

import functools

import jax
import jax.numpy as jnp


def negative_log_likelihood(h_BCD, kernel_DV, targets_BC):
  """-log p(target) in float32; the logits are this function's own."""
  # The kernel is cast here, inside the loop over chunks, so that its gradient
  # is summed over chunks in the parameters' type.
  logits_BCV = project_logits(h_BCD, kernel_DV)
  tokens_V = jnp.arange(kernel_DV.shape[-1], dtype=targets_BC.dtype)
  # A comparison, not a gather: the gather's gradient is a scatter into one
  # more array of the logits' size.
  chosen_BCV = targets_BC[..., None] == tokens_V[None, None, :]
  chosen_BC = jnp.sum(jnp.where(chosen_BCV, logits_BCV, 0.0), axis=-1)
  return jax.nn.logsumexp(logits_BCV, axis=-1) - chosen_BC


def project_logits(h_BTD, kernel_DV):
  """Logits in float32 from a matmul in the activations' type."""
  return (h_BTD @ kernel_DV.astype(h_BTD.dtype)).astype(jnp.float32)


def sum_in_chunks(h_BTD, kernel_DV, targets_BT, weights_BT, *, chunk):
  """sum(weights * nll) with the logits of about `chunk` tokens at a time.

  Chunks cut the time axis and keep the batch whole, so that a batch sharded
  over devices stays where it is. The backward pass recomputes each chunk's
  logits.
  """
  num_rows, num_steps = targets_BT.shape
  num_chunks = -(-num_steps // max(1, chunk // num_rows))
  size = -(-num_steps // num_chunks)

  def split(x_BT):
    rest = ((0, 0),) * (x_BT.ndim - 2)
    padding = ((0, 0), (0, num_chunks * size - num_steps), *rest)
    padded = jnp.pad(x_BT, padding)
    shape = (num_rows, num_chunks, size, *x_BT.shape[2:])
    return jnp.moveaxis(padded.reshape(shape), 1, 0)

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def sum_chunk(total, chunk_BC):
    h_BCD, targets_BC, weights_BC = chunk_BC
    nll_BC = negative_log_likelihood(h_BCD, kernel_DV, targets_BC)
    return total + jnp.sum(weights_BC * nll_BC), None

  chunks_JBC = jax.tree.map(split, (h_BTD, targets_BT, weights_BT))
  return jax.lax.scan(sum_chunk, jnp.float32(0), chunks_JBC)[0]
