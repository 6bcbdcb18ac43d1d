"""Cross entropy over a large vocabulary, computed in chunks of tokens.

Shapes: B batch, T time, D width, V vocabulary, J chunks of C time steps each.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

PyTree: TypeAlias = Any


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Returns x @ kernel in the type of x.

  The leading axes of x are flattened to one for the product. With several
  leading axes, XLA's CPU backend takes 1.6 times as long for the products of
  the backward pass. Other backends are equally fast either way.

  Args:
    x: Activations [..., in].
    kernel: Matrix [in, out] of any floating-point type.

  Returns:
    An array [..., out].
  """
  flat = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
  return flat.reshape(*x.shape[:-1], -1)


def project_logits(h_BTD: jax.Array, kernel_DV: jax.Array) -> jax.Array:
  """Returns float32 logits [B, T, V]; the matmul has the activations' type."""
  return multiply(h_BTD, kernel_DV).astype(jnp.float32)


def negative_log_likelihood(
  h_BCD: jax.Array, kernel_DV: jax.Array, targets_BC: jax.Array
) -> jax.Array:
  """Returns -log p(target) [B, C] in float32, for one chunk.

  Args:
    h_BCD: Activations after the last norm.
    kernel_DV: Matrix from activations to logits.
    targets_BC: Target tokens.
  """
  # `project_logits` casts the kernel here, inside the loop over chunks, so that
  # the kernel's gradient is summed over chunks in the parameters' type.
  logits_BCV = project_logits(h_BCD, kernel_DV)
  tokens_V = jnp.arange(kernel_DV.shape[-1], dtype=targets_BC.dtype)
  # The target's logit is selected by a comparison instead of a gather, whose
  # gradient would be a scatter into another array of the size of the logits.
  chosen_BCV = targets_BC[..., None] == tokens_V[None, None, :]
  chosen_BC = jnp.sum(jnp.where(chosen_BCV, logits_BCV, 0.0), axis=-1)
  return jax.nn.logsumexp(logits_BCV, axis=-1) - chosen_BC


def sum_in_chunks(
  h_BTD: jax.Array,
  kernel_DV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int,
) -> jax.Array:
  """Returns sum(weights * nll), with the logits of `chunk` tokens at a time.

  Chunks split the time axis and not the batch axis, so that a batch that is
  sharded over devices is not moved. If a gradient is required, the forward pass
  computes the gradient of each chunk while its logits exist. The backward pass
  therefore does not compute logits again, which saves a quarter of the head's
  work.

  Args:
    h_BTD: Activations after the last norm.
    kernel_DV: Matrix from activations to logits.
    targets_BT: Target tokens.
    weights_BT: Weights of the targets, float32.
    chunk: Approximate number of tokens per chunk, over the whole batch.

  Returns:
    A float32 scalar.
  """
  return _weighted_sum(h_BTD, kernel_DV, targets_BT, weights_BT, chunk)


def _sum_chunks(
  h_BTD: jax.Array,
  kernel_DV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int,
) -> jax.Array:
  """Returns the sum if no gradient is required."""

  def add(
    total: jax.Array, chunk_BC: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    h_BCD, targets_BC, weights_BC = chunk_BC
    nll_BC = negative_log_likelihood(h_BCD, kernel_DV, targets_BC)
    return total + jnp.sum(weights_BC * nll_BC), None

  chunks_JBC = _split_chunks((h_BTD, targets_BT, weights_BT), chunk)
  return jax.lax.scan(add, jnp.float32(0), chunks_JBC)[0]


def in_chunks(
  h_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
  """Returns -log p(target) [B, T], with the logits of `chunk` tokens at a time.

  Args:
    h_BTD: Activations after the last norm.
    kernel_DV: Matrix from activations to logits.
    targets_BT: Target tokens.
    chunk: Approximate number of tokens per chunk, over the whole batch.
  """

  def chunk_nll(chunk_BC: tuple[jax.Array, jax.Array]) -> jax.Array:
    h_BCD, targets_BC = chunk_BC
    return negative_log_likelihood(h_BCD, kernel_DV, targets_BC)

  nll_JBC = jax.lax.map(chunk_nll, _split_chunks((h_BTD, targets_BT), chunk))
  return _join_chunks(nll_JBC, targets_BT.shape[1])


def _sum_with_gradient(
  h_BTD: jax.Array,
  kernel_DV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunk: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
  """Returns the sum and its gradients with respect to h, kernel and weights."""

  def add(
    sums: tuple[jax.Array, jax.Array],
    chunk_BC: tuple[jax.Array, jax.Array, jax.Array],
  ) -> tuple[tuple[jax.Array, jax.Array], list[jax.Array]]:
    h_BCD, targets_BC, weights_BC = chunk_BC

    def score(
      kernel_DV: jax.Array, h_BCD: jax.Array, weights_BC: jax.Array
    ) -> jax.Array:
      nll_BC = negative_log_likelihood(h_BCD, kernel_DV, targets_BC)
      return jnp.sum(weights_BC * nll_BC)

    gradient = jax.value_and_grad(score, (0, 1, 2))
    nll, (dkernel_DV, *rest) = gradient(kernel_DV, h_BCD, weights_BC)
    return jax.tree.map(jnp.add, sums, (nll, dkernel_DV)), rest

  zeros = (jnp.float32(0), jnp.zeros_like(kernel_DV))
  chunks_JBC = _split_chunks((h_BTD, targets_BT, weights_BT), chunk)
  (nll, dkernel_DV), chunks_JBC = jax.lax.scan(add, zeros, chunks_JBC)
  dh_BTD, dweights_BT = _join_chunks(chunks_JBC, targets_BT.shape[1])
  return nll, (dh_BTD, dkernel_DV, dweights_BT)


def _scale_gradient(
  chunk: int,
  gradient: tuple[jax.Array, jax.Array, jax.Array],
  dnll: jax.Array,
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
  """Returns the cotangents: the stored gradients times that of the sum."""
  del chunk
  dh_BTD, dkernel_DV, dweights_BT = jax.tree.map(
    lambda x: (dnll * x).astype(x.dtype), gradient
  )
  return dh_BTD, dkernel_DV, None, dweights_BT


_weighted_sum = jax.custom_vjp(_sum_chunks, nondiff_argnums=(4,))
_weighted_sum.defvjp(_sum_with_gradient, _scale_gradient)


def _split_chunks(x_BT: PyTree, chunk: int) -> PyTree:
  """Splits a tree of arrays [B, T, ...] into chunks [J, B, C, ...].

  A chunk has about `chunk` tokens. The last chunk is padded with zeros.
  """
  num_rows, num_steps = jax.tree.leaves(x_BT)[-1].shape
  num_chunks = -(-num_steps // max(1, chunk // num_rows))
  size = -(-num_steps // num_chunks)

  def split_array(x_BT: jax.Array) -> jax.Array:
    padding = [(0, 0)] * x_BT.ndim
    padding[1] = (0, num_chunks * size - num_steps)
    padded = jnp.pad(x_BT, padding)
    shape = (num_rows, num_chunks, size, *x_BT.shape[2:])
    return jnp.moveaxis(padded.reshape(shape), 1, 0)

  return jax.tree.map(split_array, x_BT)


def _join_chunks(x_JBC: PyTree, num_steps: int) -> PyTree:
  """Joins chunks [J, B, C, ...] to arrays [B, T, ...], without the padding."""

  def join_array(x_JBC: jax.Array) -> jax.Array:
    x_BJC = jnp.moveaxis(x_JBC, 0, 1)
    shape = (x_BJC.shape[0], -1, *x_BJC.shape[3:])
    return x_BJC.reshape(shape)[:, :num_steps]

  return jax.tree.map(join_array, x_JBC)
