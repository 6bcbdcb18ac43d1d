"""Cross entropy over a large vocabulary, a chunk of tokens at a time.

Shapes: B batch, T time, D width, V vocabulary, J chunks of C time steps each.
"""

import functools

import jax
import jax.numpy as jnp


def multiply(x, kernel):
  """x @ kernel in x's type, with the leading axes of x as one.

  XLA's CPU backend takes 1.6 times as long for the products of the backward
  pass where there are more; elsewhere it is the same.
  """
  flat = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
  return flat.reshape(*x.shape[:-1], -1)


def project_logits(h_BTD, kernel_DV):
  """Logits in float32 from a matmul in the activations' type."""
  return multiply(h_BTD, kernel_DV).astype(jnp.float32)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sum_in_chunks(h_BTD, kernel_DV, targets_BT, weights_BT, chunk):
  """sum(weights * nll) with the logits of about `chunk` tokens at a time.

  Chunks cut the time axis and keep the batch whole, so that a batch sharded
  over devices stays where it is. Where a gradient is wanted, each chunk's is
  found while its logits exist: the backward pass computes none of them again,
  which would be a quarter of the head's work.
  """

  def add(total, chunk_BC):
    h_BCD, targets_BC, weights_BC = chunk_BC
    nll_BC = negative_log_likelihood(h_BCD, kernel_DV, targets_BC)
    return total + jnp.sum(weights_BC * nll_BC), None

  chunks_JBC = _split((h_BTD, targets_BT, weights_BT), chunk)
  return jax.lax.scan(add, jnp.float32(0), chunks_JBC)[0]


def in_chunks(h_BTD, kernel_DV, targets_BT, chunk):
  """nll [B, T] with the logits of about `chunk` tokens at a time."""

  def find(chunk_BC):
    h_BCD, targets_BC = chunk_BC
    return negative_log_likelihood(h_BCD, kernel_DV, targets_BC)

  nll_JBC = jax.lax.map(find, _split((h_BTD, targets_BT), chunk))
  return _join(nll_JBC, targets_BT.shape[1])


def _sum_with_gradient(h_BTD, kernel_DV, targets_BT, weights_BT, chunk):
  """The sum, and its gradient with respect to h, kernel and weights."""

  def add(sums, chunk_BC):
    h_BCD, targets_BC, weights_BC = chunk_BC

    def score(kernel_DV, h_BCD, weights_BC):
      nll_BC = negative_log_likelihood(h_BCD, kernel_DV, targets_BC)
      return jnp.sum(weights_BC * nll_BC)

    gradient = jax.value_and_grad(score, (0, 1, 2))
    nll, (dkernel_DV, *rest) = gradient(kernel_DV, h_BCD, weights_BC)
    return jax.tree.map(jnp.add, sums, (nll, dkernel_DV)), rest

  zeros = (jnp.float32(0), jnp.zeros_like(kernel_DV))
  chunks_JBC = _split((h_BTD, targets_BT, weights_BT), chunk)
  (nll, dkernel_DV), chunks_JBC = jax.lax.scan(add, zeros, chunks_JBC)
  dh_BTD, dweights_BT = _join(chunks_JBC, targets_BT.shape[1])
  return nll, (dh_BTD, dkernel_DV, dweights_BT)


def _scale_gradient(chunk, gradient, dnll):
  """Multiplies the gradient by that of what became of the sum."""
  del chunk
  dh_BTD, dkernel_DV, dweights_BT = jax.tree.map(
    lambda x: (dnll * x).astype(x.dtype), gradient
  )
  return dh_BTD, dkernel_DV, None, dweights_BT


sum_in_chunks.defvjp(_sum_with_gradient, _scale_gradient)


def _split(x_BT, chunk):
  """[B, T, ...] in chunks [J, B, C, ...] of about `chunk` tokens."""
  num_rows, num_steps = jax.tree.leaves(x_BT)[-1].shape
  num_chunks = -(-num_steps // max(1, chunk // num_rows))
  size = -(-num_steps // num_chunks)

  def split(x_BT):
    rest = ((0, 0),) * (x_BT.ndim - 2)
    padding = ((0, 0), (0, num_chunks * size - num_steps), *rest)
    padded = jnp.pad(x_BT, padding)
    shape = (num_rows, num_chunks, size, *x_BT.shape[2:])
    return jnp.moveaxis(padded.reshape(shape), 1, 0)

  return jax.tree.map(split, x_BT)


def _join(x_JBC, num_steps):
  """Undoes `_split`."""

  def join(x_JBC):
    x_BJC = jnp.moveaxis(x_JBC, 0, 1)
    shape = (x_BJC.shape[0], -1, *x_BJC.shape[3:])
    return x_BJC.reshape(shape)[:, :num_steps]

  return jax.tree.map(join, x_JBC)
