"""The dynamic 8-bit code: 256 numbers between -1 and 1 in seven decades."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# How codes represent values: the first two are dynamic and defined here, the
# other two are equally spaced, see `array.quantize_linear`.
Code = Literal['signed', 'unsigned', 'int8', 'int4']

_NUM_DECADES = 7


def _decades(code: Code) -> list[tuple[float, int, int]]:
  """Returns (upper end, index of the first value, number of values) of each."""
  first = 1 if code == 'signed' else 2
  tops = [10.0 ** (i + 1 - _NUM_DECADES) for i in range(_NUM_DECADES)]
  return [(top, first * (2**i - 1), first * 2**i) for i, top in enumerate(tops)]


@functools.cache
def _magnitudes(code: Code) -> np.ndarray:
  """Returns the positive values below 1, ascending."""
  decades = []
  for top, _, num in _decades(code):
    edges = np.linspace(0.1, 1.0, num + 1)
    decades.append(top * ((edges[:-1] + edges[1:]) / 2))
  return np.concatenate(decades)


def dynamic_map(code: Code) -> np.ndarray:
  """Returns the 256 values of a dynamic 8-bit code, ascending.

  The values cover seven decades up to 1. The values of a decade are equally
  spaced, and each decade has twice as many values as the decade below it.
  Large values therefore have the highest relative precision, and only values
  below about 3e-7 can be rounded to zero.

  Args:
    code: 'signed' (127 magnitudes of each sign, 0 and 1) or 'unsigned' (254
      magnitudes, 0 and 1).

  Returns:
    float32 [256].

  Example:
    >>> from galore_optax.quantized.codes import dynamic_map
    >>> [round(float(x), 4) for x in dynamic_map('signed')[[0, 1, 127, 255]]]
    [-0.993, -0.9789, 0.0, 1.0]

  References:
    Dettmers, `8-bit approximations for parallelism in deep learning
    <https://arxiv.org/abs/1511.04561>`_, 2015.
  """
  positive = _magnitudes(code)
  negative = -positive[::-1] if code == 'signed' else positive[:0]
  return np.concatenate([negative, [0.0], positive, [1.0]]).astype(np.float32)


def encode(y: jax.Array, code: Code) -> jax.Array:
  """Returns the nearest code of each number y in [-1, 1].

  The values of a decade are equally spaced, so a floor computes the nearest
  one, without a table of values and without a large temporary array. The
  unsigned code never rounds a positive value to 0. With a second moment of 0
  and a nonzero gradient, Adam's update would be up to 1 / sqrt(1 - b2) times
  too large.
  """
  values = _magnitudes(code)
  magnitude = jnp.abs(y) if code == 'signed' else y
  # Rounding thresholds, halfway between neighbours. The first threshold of the
  # unsigned code is 0, so that no positive value is rounded to 0.
  edges = (np.concatenate([[0.0], values]) + np.append(values, 1.0)) / 2
  edges[0] *= code == 'signed'
  # The index is floor(slope * magnitude + base), at most `last`, with numbers
  # that depend on the decade. The loop only selects them; the floor is computed
  # once.
  slope = base = last = jnp.zeros_like(y)
  for top, start, num in _decades(code):
    inside = magnitude > edges[start]
    steps = num / (0.9 * top)
    slope = jnp.where(inside, steps, slope)
    base = jnp.where(inside, start + 1 - 0.1 * top * steps, base)
    last = jnp.where(inside, start + num, last)
  index = jnp.floor(slope * magnitude + base)
  index = jnp.clip(index, magnitude > edges[0], last)
  end = len(values)
  index = jnp.where(magnitude > edges[end], end + 1.0, index)
  if code == 'signed':  # The code has the value 1, but not -1.
    index = end + jnp.where(y < 0, -jnp.minimum(index, end), index)
  return index.astype(jnp.uint8)


def decode(codes: jax.Array, code: Code) -> jax.Array:
  """Returns the values of codes, as `dynamic_map` lists them.

  They are computed instead of looked up, so that XLA can fuse the function.
  """
  end = len(_magnitudes(code))
  index = codes.astype(jnp.float32) - (end if code == 'signed' else 0)
  magnitude = jnp.abs(index)
  value = jnp.zeros_like(index)
  for top, start, num in _decades(code):
    fraction = (magnitude - (start + 0.5)) * (0.9 * top / num) + 0.1 * top
    value = jnp.where(magnitude > start, fraction, value)
  return jnp.sign(index) * jnp.where(magnitude > end, 1.0, value)
