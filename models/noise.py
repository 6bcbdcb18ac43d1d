"""Dropout whose zeros depend only on an example, not on the rest of its batch.

The noise of a batch is an array [B, 2] uint32: one random key per example, any
bits.
"""

import jax
import jax.numpy as jnp


def folded(noise_B2: jax.Array, number: int) -> jax.Array:
  """Returns keys [B, 2] with a number folded in.

  Args:
    noise_B2: One key per example.
    number: Integer that distinguishes the uses of the same keys.

  Returns:
    New keys [B, 2].
  """
  folded_B = jax.vmap(jax.random.fold_in, (0, None))(keys(noise_B2), number)
  return jax.random.key_data(folded_B)


def following(noise_B2: jax.Array) -> jax.Array:
  """Returns the keys [B, 2] for the next layer."""

  def split_one(key: jax.Array) -> jax.Array:
    return jax.random.split(key, 1)[0]

  return jax.random.key_data(jax.vmap(split_one)(keys(noise_B2)))


def drop(x: jax.Array, noise_B2: jax.Array, share: float) -> jax.Array:
  """Applies dropout: zeroes some entries and divides the others by 1 - share.

  The zeros of an example depend only on its key.

  Args:
    x: Activations [B, ...].
    noise_B2: One key per example.
    share: Probability with which an entry is zeroed.

  Returns:
    An array like x.
  """

  def draw_kept(key: jax.Array) -> jax.Array:
    return jax.random.bernoulli(key, 1 - share, x.shape[1:])

  return jnp.where(jax.vmap(draw_kept)(keys(noise_B2)), x / (1 - share), 0)


def keys(noise_B2: jax.Array) -> jax.Array:
  """Converts keys [B, 2] to typed keys [B] of JAX.

  The generator is fixed, so that results do not depend on JAX's default one,
  and two uint32 numbers are always a valid key.
  """
  return jax.random.wrap_key_data(noise_B2, impl='threefry2x32')
