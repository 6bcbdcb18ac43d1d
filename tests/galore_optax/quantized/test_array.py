"""Quantized arrays: error bounds, bytes, layout and non-finite values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax.quantized import array as blockwise
from galore_optax.quantized import codes as dynamic
from tests.rounding import assert_close, units

# A shape for each layout: rows of full blocks, rows with a short block, joined
# rows of full blocks, joined rows with a short block, and a short vector.
SHAPES = [(3, 512), (2, 1376), (3, 8, 96), (2, 7, 344), (5,)]


# Without `jit` each operation would be compiled separately, which takes longer.
quantize_linear = jax.jit(
  blockwise.quantize_linear, static_argnames=('bits', 'group')
)


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def block_of(q):
  """Returns the block index of each element, computed element by element."""
  block = np.zeros(q.shape, int)
  joined = q.scale.ndim < q.codes.ndim
  for index in np.ndindex(*q.shape):
    inner = index[-2] * q.shape[-1] + index[-1] if joined else index[-1]
    outer = index[:-2] if joined else index[:-1]
    at = (*outer, inner // q.block_size)
    block[index] = np.ravel_multi_index(at, q.scale.shape)
  return block


@pytest.mark.parametrize('code', ['signed', 'unsigned'])
def test_every_value_of_a_code_survives(code):
  values = dynamic.dynamic_map(code)
  assert len(values) == 256 and np.all(np.diff(values) > 0)
  q = blockwise.quantize(values, code=code)
  np.testing.assert_array_equal(q.codes, np.arange(256))
  # Dequantization computes in float32. `dynamic_map` computes in float64 and
  # rounds once.
  np.testing.assert_allclose(blockwise.dequantize(q), values, rtol=units(3))


@pytest.mark.parametrize('code', ['signed', 'unsigned'])
def test_the_code_is_the_nearest(code):
  values = dynamic.dynamic_map(code).astype(np.float64)
  x = np.concatenate([[1.0], np.geomspace(1e-9, 1, 4001)[:-1]])
  x = np.concatenate([x, -x]) if code == 'signed' else x
  x = x.astype(np.float32)
  q = blockwise.quantize(x, code=code, block_size=len(x))
  chosen = values[np.asarray(q.codes)]
  error = np.abs(chosen - x)
  best = np.abs(values[:, None] - x).min(axis=0)
  if code == 'unsigned':  # Positive values are never rounded to 0.
    best = np.abs(values[1:, None] - x).min(axis=0)
    assert np.all(np.asarray(q.codes) > 0)
  # Rounding errors in `encode` may move a tie to the other neighbour.
  assert np.all(error <= best + 2e-7 * np.abs(x) + 1e-13)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('code', ['signed', 'unsigned'])
def test_error_is_bounded_by_the_block(shape, code):
  x = normal(shape)
  x = x if code == 'signed' else x**2
  q = blockwise.quantize(x, code=code)
  assert q.shape == shape and q.codes.dtype == jnp.uint8
  absmax = np.zeros(q.scale.size, np.float32)
  block = block_of(q)
  np.maximum.at(absmax, block, np.abs(x))
  np.testing.assert_array_equal(q.scale.ravel(), absmax)
  # The error is half of the widest gap between values, plus float32 rounding.
  gap = 0.9 / (64 if code == 'signed' else 128)
  error = np.abs(blockwise.dequantize(q) - x)
  assert np.all(error <= (gap / 2 + 1e-6) * absmax[block])


@pytest.mark.parametrize('shape', [SHAPES[0], SHAPES[3]])
@pytest.mark.parametrize('bits', [4, 8])
def test_linear_error_is_half_a_step(shape, bits):
  x = normal(shape) + 0.5
  q = quantize_linear(x, bits=bits)
  step = np.asarray(q.scale).ravel()[block_of(q)]
  error = np.abs(blockwise.dequantize(q) - x)
  # The error is half a step, plus float32 rounding of x / step and code * step.
  assert np.all(error <= 0.5 * step + 1e-6 * np.abs(x).max())


@pytest.mark.parametrize('num_columns', [16, 7, 1])
def test_packing_is_exact_for_every_pair(num_columns):
  pairs = np.stack(np.meshgrid(np.arange(15), np.arange(15)), -1)
  values = np.resize(pairs.ravel(), (64, num_columns)) - 7.0
  values[:, 0] = 7.0  # makes the quantization step 1
  q = quantize_linear(values, bits=4, group=num_columns)
  assert q.codes.shape == (64, (num_columns + 1) // 2)
  np.testing.assert_array_equal(blockwise.dequantize(q), values)


def test_bytes_are_exact():
  x = normal((32, 1024))
  linear = quantize_linear
  n, groups = x.size, x.size // 256
  assert blockwise.quantize(x).nbytes == n + 4 * groups <= 1.02 * n
  assert linear(x).nbytes == n + 4 * groups
  assert linear(x, bits=4).nbytes == n // 2 + 4 * groups


@pytest.mark.parametrize('num_columns', [65, 172, 257, 344, 513, 688, 1376])
def test_no_width_costs_more_than_two_percent(num_columns):
  q = blockwise.quantize(np.ones((100, num_columns)))
  assert q.nbytes <= 1.02 * q.size


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
  'store',
  [
    blockwise.quantize,
    lambda x: blockwise.quantize(abs(x), code='unsigned'),
    quantize_linear,
    lambda x: quantize_linear(x, bits=4),
    lambda x: quantize_linear(x, key=jax.random.key(0)),
  ],
)
def test_what_is_not_finite_poisons_its_block_alone(store, bad):
  # XLA reduces small and large arrays with different code.
  for rows in (2, 40):
    x = normal((rows, 512))
    x[1, 300] = bad
    y = np.asarray(blockwise.dequantize(store(x)))
    assert np.all(np.isnan(y[1, 256:]))
    assert np.isfinite(y).sum() == x.size - 256


@pytest.mark.parametrize('tiny', [0.0, -0.0, 1e-40, -1e-45])
def test_zero_and_subnormal_blocks_become_zero(tiny):
  x = np.full(256, tiny, np.float32)
  for q in (blockwise.quantize(x), quantize_linear(x)):
    np.testing.assert_array_equal(blockwise.dequantize(q), np.zeros(256))


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('value', [0.0, 0.1])
def test_full_equals_quantize(shape, value):
  for code in ('signed', 'unsigned'):
    made = blockwise.quantized_full(shape, value, code=code, block_size=64)
    array = jnp.full(shape, value)
    want = blockwise.quantize(array, code=code, block_size=64)
    chex.assert_trees_all_equal(made, want)


@pytest.mark.parametrize('shape', [(3, 4, 512), (3, 5, 344)])
@pytest.mark.parametrize(
  'store',
  [
    blockwise.quantize,
    pytest.param(
      lambda x: quantize_linear(x, bits=4),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_stack_is_its_slices(shape, store):
  x = normal(shape)
  whole = store(x)
  loop = jax.device_get([store(y) for y in x])
  stacked = jax.tree.map(lambda *ys: np.stack(ys), *loop)
  scan = lambda x: jax.lax.scan(lambda c, y: (c, store(y)), 0, x)[1]
  for made in (stacked, jax.jit(jax.vmap(store))(x), jax.jit(scan)(x)):
    for ours, other in zip(*map(jax.tree.leaves, (whole, made)), strict=True):
      if ours.dtype != jnp.uint8:
        # A scale is the largest magnitude divided by the number of steps.
        assert_close(ours, other, operations=2)
        continue
      # Another program may round a value at a tie to the other neighbour. In a
      # byte with two packed codes, either of them may differ.
      off = np.asarray(ours) != np.asarray(other)
      assert off.mean() < 0.002
  layer = jax.tree.map(lambda y: y[1], jax.device_get(whole))
  # Dequantization multiplies a code by a scale.
  assert_close(
    blockwise.dequantize(layer),
    np.asarray(blockwise.dequantize(whole))[1],
    operations=3,
  )


def test_random_rounding_is_right_on_average():
  num, fraction = 100_000, 0.3
  x = np.full((num // 250, 250), 10 + fraction, np.float32)
  x[:, 0] = 127.0  # makes the quantization step 1
  q = quantize_linear(x, group=250, key=jax.random.key(1))
  up = np.asarray(blockwise.dequantize(q))[:, 1:] - 10
  assert set(np.unique(up)) == {0.0, 1.0}
  sigma = np.sqrt(fraction * (1 - fraction) / up.size)
  assert abs(up.mean() - fraction) < 5 * sigma


def test_rounds_without_temporaries_of_the_size_of_a_table():
  x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
  compiled = blockwise.quantize_rows.lower(
    x, code='signed', block_size=256
  ).compile()
  # The maximum on the CPU reads a float32 copy of 4 MiB. Comparing each element
  # with 256 values would need 1 GiB.
  assert compiled.memory_analysis().temp_size_in_bytes <= 2**22
