"""Dropout whose zeros depend on the example alone, not on its batch.

The noise of a batch is a key for each example, [B, 2] uint32, any bits.
"""

import functools

import jax
import jax.numpy as jnp

# The bits of a key are those of one generator, whatever JAX's default is.
_keys = functools.partial(jax.random.wrap_key_data, impl='threefry2x32')


def folded(noise_B2, number):
  """The keys of something else, from keys [B, 2]."""
  folded_B = jax.vmap(jax.random.fold_in, (0, None))(_keys(noise_B2), number)
  return jax.random.key_data(folded_B)


def following(noise_B2):
  """The keys of what comes next, such as a layer."""
  first = lambda key: jax.random.split(key, 1)[0]
  return jax.random.key_data(jax.vmap(first)(_keys(noise_B2)))


def drop(x, noise_B2, share: float):
  """Sets a share of numbers to 0, and makes up for it with the others.

  What is left out of an example depends on its own key alone.
  """
  draw = lambda key: jax.random.bernoulli(key, 1 - share, x.shape[1:])
  return jnp.where(jax.vmap(draw)(_keys(noise_B2)), x / (1 - share), 0)
