"""`galore_adamw_8bit` is `galore_adamw` with quantized moments."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore_adamw, galore_adamw_8bit
from galore_optax.quantized.array import Quantized
from models.llama import Layers, llama
from tests.galore_optax.program import normal, normal32, run, tree
from tests.rounding import distance, units

OPTIONS = dict(rank=9, gap=2, weight_decay=0.1)


# The moments of the stack and of the matrix have at least 4,096 elements.
# Smaller moments are not quantized.
SHAPES = {'stack': (3, 12, 600), 'tall': (560, 13), 'bias': (7,)}


def is_code(x):
  return isinstance(x, Quantized)


def codes(state):
  return list(filter(is_code, jax.tree.leaves(state, is_leaf=is_code)))


def trail(tx, steps=4):
  """Returns the updates of each step and the last state.

  It also asserts that the update is traced once.
  """
  params = tree(SHAPES)
  state = tx.init(params)
  update = jax.jit(chex.assert_max_traces(tx.update, n=1))
  chex.clear_trace_counter()
  updates = []
  for i in range(steps):
    now, state = update(tree(SHAPES, 10 * i + 3), state, params)
    updates.append(now)
  return updates, state


@pytest.fixture(scope='module')
def exact():
  return trail(galore_adamw(0.1, **OPTIONS))


def test_with_no_leaf_large_enough_it_is_galore_adamw(exact):
  ours, state = trail(galore_adamw_8bit(0.1, min_size=10**9, **OPTIONS))
  want, want_state = exact
  # The tolerance allows for different programs, which sum up to 560 terms in
  # each of four steps.
  assert distance((ours, state), (want, want_state)) < units(4 * 560)


def test_codes_stand_for_the_moments_and_nothing_else_changes(exact):
  ours, state = trail(galore_adamw_8bit(0.1, **OPTIONS))
  want, want_state = exact
  assert len(codes(state)) == 4
  # The tolerance allows for different programs. The error of a singular vector
  # is eps divided by its distance from the next singular value.
  assert distance(state[0].basis, want_state[0].basis) < units(1000)
  # The first update does not read stored moments, so it has no quantization
  # error. The tolerance allows for sums of up to 560 terms.
  assert distance(ours[0], want[0]) < units(560)
  for now, expected in zip(ours, want, strict=True):
    for name, x in expected.items():
      # The measured distance of 0.0095 to 0.0116 is the quantization error.
      assert distance(now[name], x) < 0.03


def test_a_stack_is_its_layers():
  tx = galore_adamw_8bit(0.1, **OPTIONS)
  start, *grads = (np.asarray(tree(SHAPES, s)['stack']) for s in (0, 3, 13, 23))
  whole = run(tx, {'w': start}, [{'w': g} for g in grads], apply=False)
  for i in range(3):
    # The layers have the same shape, so that one program updates each of them.
    layers = [{'w': g[i]} for g in grads]
    alone = run(tx, {'w': start[i]}, layers, apply=False)
    for stacked, one in zip(whole, alone, strict=True):
      found = np.asarray(stacked.updates['w'])[i]
      assert distance(found, one.updates['w']) < units(1000)
    for stacked, one in zip(
      codes(whole[-1].state), codes(alone[-1].state), strict=True
    ):
      # The tolerance allows for values half-way between two codes, which may
      # round to either.
      off = np.abs(np.int32(stacked.codes[i]) - np.int32(one.codes))
      assert off.max() <= 1 and off.mean() < 0.002


def test_a_transposed_weight_has_the_transposed_update():
  """Blocks run along the long side of wide and of tall low-rank moments."""
  tx = galore_adamw_8bit(0.1, rank=3, gap=2, min_size=1, block_size=8)
  grads = [normal32((7, 40), seed) for seed in range(4)]
  wide, tall = (
    run(tx, jnp.zeros(shape), gs, apply=False)
    for shape, gs in (((7, 40), grads), ((40, 7), [g.T for g in grads]))
  )
  for one, other in zip(wide, tall, strict=True):
    assert distance(other.updates.T, one.updates) < units(1000)
  for one, other in zip(codes(wide[-1]), codes(tall[-1]), strict=True):
    # The tolerance allows for values half-way between two codes, which may
    # round to either.
    off = np.abs(np.int32(one.codes) - np.int32(other.codes))
    assert one.shape == other.shape == (3, 40)
    assert off.max() <= 1 and off.mean() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(344, 128), (128, 344)], ids=str)
def test_the_projected_side_does_not_matter(shape):
  """Blocks run along the long side of wide and of tall low-rank moments.

  A block thus contains entries of one direction of the subspace, which have
  similar magnitudes. The singular values of the gradients decay as 1 / k; the
  run has 200 steps.
  """
  m, n = sorted(shape)
  u_mm, _ = np.linalg.qr(normal((m, m)))
  u_mm = u_mm / np.arange(1, m + 1)
  grads = jnp.asarray(u_mm @ normal((200, m, n), 1), jnp.float32)
  grads = grads if shape == (m, n) else grads.swapaxes(1, 2)

  def last(tx):
    def step(carry, g):
      w, state = carry
      updates, state = tx.update(g, state, w)
      return (optax.apply_updates(w, updates), state), None

    w = jnp.zeros(shape)
    return jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), grads)[0][0])()

  options = dict(rank=16, gap=50, scale=1.0)
  want = last(galore_adamw(0.01, **options))
  ours = last(galore_adamw_8bit(0.01, min_size=1, **options))
  off = distance(ours, want)
  # The measured distance is 0.0240 for both shapes. With blocks along the rank
  # axis, it would be 0.056 for moments [n, r].
  assert off < 0.04


def test_a_moment_of_a_real_model_takes_1_02_bytes_an_element():
  layers = Layers(llama('60m', vocab_size=4096))
  params = jax.eval_shape(layers.init, jax.random.key(0))
  state = jax.eval_shape(galore_adamw_8bit(0.01, rank=128).init, params)
  adam = state[0].inner[0]
  shapes = jax.eval_shape(galore_adamw(0.01, rank=128).init, params)
  large = [x for x in jax.tree.leaves(shapes[0].inner[0].mu) if x.size >= 4096]
  elements = sum(x.size for x in large)
  for moment in (adam.mu, adam.nu):
    stored = codes(moment)
    assert [q.shape for q in stored] == [x.shape for x in large]
    arrays = jax.tree.leaves(stored)
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    assert size <= 1.02 * elements
  assert {q.code for q in codes(adam.nu)} == {'unsigned'}
