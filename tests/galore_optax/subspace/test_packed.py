"""Quantized bases: their bytes, when they are quantized, for every finder."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Coordinates, Lazy, galore, quantize_bases
from galore_optax.quantized.array import Quantized, dequantize
from tests.galore_optax.program import each, gradients, normal32, run
from tests.rounding import assert_close, units

every_width = pytest.mark.parametrize('bits', [8, 4])


def params():
  return {'stack': normal32((2, 21, 33)), 'tall': normal32((41, 13), 1)}


def is_code(x):
  return isinstance(x, Quantized)


def codes(state):
  return list(filter(is_code, jax.tree.leaves(state, is_leaf=is_code)))


def trail_of(tx, steps):
  """Returns each step. It also asserts that the update is traced once."""
  weights = jax.tree.map(np.asarray, params())
  once = tx._replace(update=chex.assert_max_traces(tx.update, n=1))
  chex.clear_trace_counter()
  grads = [gradients(weights, i) for i in range(steps)]
  return run(once, weights, grads, apply=False)


@every_width
def test_bytes_of_the_basis_of_a_real_weight(bits):
  # This is mlp/up of the 60M model: eight layers of [512, 1376].
  up = {'up': jax.ShapeDtypeStruct((8, 512, 1376), jnp.bfloat16)}
  tx = quantize_bases(galore(optax.sgd(0.1), rank=128), bits=bits)
  basis = jax.jit(lambda: tx.init(up))().basis['up']
  size, groups = 8 * 128 * 512, 8 * 128 * 512 // 256
  assert basis.shape == (8, 128, 512)
  assert basis.nbytes == size * bits // 8 + 4 * groups
  assert sum(x.nbytes for x in jax.tree.leaves(basis)) == basis.nbytes


@each('bits', [8, 4], quick=[4])
@each('side', ['std', 'full'], quick=['std'])
def test_a_basis_is_packed_when_it_is_found_and_stays(bits, side):
  tx = galore(optax.sgd(0.1), rank=5, gap=2, side=side)
  trail = trail_of(quantize_bases(tx, bits=bits), 4)
  one, two, three, four = (jax.device_get(codes(step.state)) for step in trail)
  assert len(one) == (4 if side == 'full' else 2)
  chex.assert_trees_all_equal(one, two)
  chex.assert_trees_all_equal(three, four)
  assert all(
    np.any(a.codes != b.codes) for a, b in zip(two, three, strict=True)
  )
  # Both runs have the same gradients, because the weights are fixed. Their
  # bases differ by at most half a quantization step. A step is 1 / 127 or 1 / 7
  # of the largest entry.
  plain = trail_of(tx, 4)
  for packed, step in zip((one, three), plain[::2], strict=True):
    for code, basis in zip(
      packed, jax.tree.leaves(step.state.basis), strict=True
    ):
      width = np.max(np.abs(basis)) / (127 if bits == 8 else 7)
      # The sign of a new vector follows the previous basis, which is quantized
      # in only one of the runs. Compare magnitudes.
      off = np.abs(np.abs(dequantize(code)) - np.abs(basis))
      # The tolerance allows for two programs that decompose the same matrix, in
      # sums of up to 41 terms.
      assert np.max(off) <= 0.5 * width + units(41)
  ours, theirs = jax.device_get((trail[0].updates, plain[0].updates))
  square = lambda tree: sum(np.sum(x * x) for x in jax.tree.leaves(tree))
  off = np.sqrt(square(jax.tree.map(np.subtract, ours, theirs)))
  size = np.sqrt(square(theirs))
  # The measured distances are 0.008 and 0.0095 in 8 bits, 0.129 and 0.167 in 4
  # bits.
  assert 0 < off < (0.02 if bits == 8 else 0.2) * size


def test_only_basis_vectors_are_packed():
  lazy = Lazy(threshold=0.0, memory=1)
  trail = trail_of(
    quantize_bases(galore(optax.sgd(0.1), rank=5, gap=1, subspace=lazy)), 4
  )
  plain = trail_of(galore(optax.sgd(0.1), rank=5, gap=1, subspace=lazy), 4)
  for ours, want in zip(trail, plain, strict=True):
    for name in params():
      packed, basis = ours.state.basis[name], want.state.basis[name]
      assert is_code(packed.basis)
      chex.assert_trees_all_equal(packed.wait, basis.wait)
      chex.assert_trees_all_equal(packed.gaps, basis.gaps)


def test_coordinates_are_not_packed():
  stage = galore(optax.sgd(0.1), rank=5, gap=2, subspace=Coordinates())
  # The tolerance allows for different programs. Projecting onto coordinates
  # only selects rows, which is exact.
  assert_close(
    trail_of(quantize_bases(stage), 3), trail_of(stage, 3), operations=2
  )
