"""The dynamic 8-bit code: 256 numbers between -1 and 1 over seven decades."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# How codes stand for values; the last two are linear, see `array`.
Code = Literal['signed', 'unsigned', 'int8', 'int4']

_NUM_DECADES = 7


def _decades(code: Code) -> list[tuple[float, int, int]]:
  """Upper end, index of the first value, and number of values of each."""
  first = 1 if code == 'signed' else 2
  tops = [10.0 ** (i + 1 - _NUM_DECADES) for i in range(_NUM_DECADES)]
  return [(top, first * (2**i - 1), first * 2**i) for i, top in enumerate(tops)]


@functools.cache
def _magnitudes(code: Code) -> np.ndarray:
  """Positive values below 1, ascending."""
  decades = []
  for top, _, num in _decades(code):
    edges = np.linspace(0.1, 1.0, num + 1)
    decades.append(top * ((edges[:-1] + edges[1:]) / 2))
  return np.concatenate(decades)


def dynamic_map(code: Code) -> np.ndarray:
  """Returns the 256 values, ascending, of a dynamic 8-bit code.

  Seven decades, 1e-6 to 1. A decade nearer to 1 has twice the fractions, all
  equally spaced: relative precision is highest where it matters most, and
  nothing above about 3e-7 of the largest value is lost to zero.

  Args:
    code: 'signed' (127 magnitudes a sign, 0 and 1) or 'unsigned' (254
      magnitudes, 0 and 1).

  Returns:
    float32 [256].

  Example:
    >>> from galore_optax.quantized.codes import dynamic_map
    >>> [round(float(x), 4) for x in dynamic_map('signed')[[0, 1, 127, 255]]]
    [-0.993, -0.9789, 0.0, 1.0]

  References:
    Dettmers, 8-bit approximations for parallelism in deep learning,
    arXiv 1511.04561.
  """
  positive = _magnitudes(code)
  negative = -positive[::-1] if code == 'signed' else positive[:0]
  return np.concatenate([negative, [0.0], positive, [1.0]]).astype(np.float32)


def encode(y: jax.Array, code: Code) -> jax.Array:
  """Nearest code of y in [-1, 1].

  Within a decade the values are equally spaced, so the nearest one is a
  floor: arithmetic only, no table and no temporary. A positive value never
  becomes an unsigned 0: a second moment of 0 under a gradient that is not 0
  makes Adam's update up to 1 / sqrt(1 - b2) times too large.
  """
  values = _magnitudes(code)
  magnitude = jnp.abs(y) if code == 'signed' else y
  # Halfway between neighbours, and 0 below the first unsigned value.
  edges = (np.concatenate([[0.0], values]) + np.append(values, 1.0)) / 2
  edges[0] *= code == 'signed'
  # In a decade the cell is floor(slope * magnitude + base), at most `last`:
  # what it is made of is chosen, and computed once.
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
  if code == 'signed':  # There is a code for 1 and none for -1.
    index = end + jnp.where(y < 0, -jnp.minimum(index, end), index)
  return index.astype(jnp.uint8)


def decode(codes: jax.Array, code: Code) -> jax.Array:
  """The values of `dynamic_map`, by arithmetic: every compiler fuses it."""
  end = len(_magnitudes(code))
  index = codes.astype(jnp.float32) - (end if code == 'signed' else 0)
  magnitude = jnp.abs(index)
  value = jnp.zeros_like(index)
  for top, start, num in _decades(code):
    fraction = (magnitude - (start + 0.5)) * (0.9 * top / num) + 0.1 * top
    value = jnp.where(magnitude > start, fraction, value)
  return jnp.sign(index) * jnp.where(magnitude > end, 1.0, value)
