"""The sum of projected gradients equals the projection of their sum."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import Galore, quantize_bases
from galore_optax.clipping import clip_coefficient
from galore_optax.layerwise import layerwise
from tests.galore_optax.every import build
from tests.galore_optax.layerwise.program import (
  Residual,
  galore_rule,
  make_batch,
  make_params,
  run,
)
from tests.galore_optax.program import each
from tests.rounding import units


def seed_rule():
  """A rule with a random basis, which does not depend on the gradients."""
  return galore_rule(subspace='random')


@functools.cache
def in_three_parts(microbatches=1):
  return layerwise(
    Residual(), seed_rule(), accumulate=3, microbatches=microbatches
  )


@each('microbatches', [1, 2], quick=[1])
def test_parts_are_one_large_batch_over_three_refreshes(microbatches):
  options = dict(steps=6, examples=12)
  parts, state, metrics = run(in_three_parts(microbatches), **options)
  whole, _, expected = run(layerwise(Residual(), seed_rule()), **options)
  # The sums over examples are computed in another order.
  chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-6)
  for name in ('loss', 'nll'):
    # These are sums over 84 tokens, after six steps through three layers.
    np.testing.assert_allclose(metrics[name], expected[name], rtol=units(84))
  # The norm of projected gradients is smaller than that of the gradients.
  norm = metrics['projected_grad_norm']
  assert 0 < norm < expected['grad_norm']
  assert state.norm == norm
  assert 'grad_norm' not in metrics
  assert state.count == 6


RULES = {
  'momentum': galore_rule,
  'adamw': lambda: build(
    'Galore', 0.01, rank=3, gap=2, weight_decay=0.1, targets=['blocks/.*']
  ),
  'adafactor': lambda: build(
    'GaloreAdafactor',
    0.01,
    rank=3,
    gap=2,
    b1=0.9,
    scale_parameter=True,
    targets=['blocks/.*'],
  ),
  'rotate': lambda: galore_optax.galore(
    optax.sgd(0.1, momentum=0.9),
    **dict(rank=6, gap=2, moments='rotate', targets=['blocks/w']),
  ),
  'full': lambda: galore_optax.galore(
    optax.adam(0.01, eps=1e-3),
    **dict(rank=2, gap=2, side='full', moments='reset', targets=['.*/u']),
  ),
}


@each('name', RULES, quick=[])
def test_equal_parts_are_one_of_them(name):
  # Both parts are equal, so the basis of the first part is that of the batch.
  model, batch = Residual(), make_batch(0)
  twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)
  two = layerwise(model, RULES[name](), accumulate=2)
  one = layerwise(model, RULES[name]())

  def steps(step, batch):
    params = make_params()
    state = step.init(params)
    for _ in range(5):
      params, state, _ = jax.jit(step)(params, state, batch)
    return params

  # The mean of two equal gradients is exact, but the two programs round
  # differently.
  chex.assert_trees_all_close(
    steps(two, twice), steps(one, batch), rtol=1e-4, atol=1e-5
  )


def test_a_refresh_sees_the_first_part():
  model, tx = Residual(), galore_rule()
  params, batch = make_params(), make_batch(0, 12)
  step = layerwise(model, tx, accumulate=3)
  _, state, _ = jax.jit(step)(params, step.init(params), batch)
  first = jax.tree.map(lambda x: x[::3], batch)
  step = layerwise(model, tx)
  _, expected, _ = jax.jit(step)(params, step.init(params), first)
  for name in ('blocks/u', 'blocks/w'):
    basis = state.inner[name].basis['blocks'][name[-1]]
    want = expected.inner[name].basis['blocks'][name[-1]]
    # Both programs decompose the same matrix. The error of a singular vector is
    # eps divided by the gap between singular values.
    np.testing.assert_allclose(basis, want, atol=units(1000))


def test_clips_by_the_norm_of_what_is_summed():
  bound, options = 0.2, dict(steps=1, examples=12)
  step = layerwise(Residual(), seed_rule(), accumulate=3, clip_norm=bound)
  clipped, _, metrics = run(step, **options)
  norm = metrics['projected_grad_norm']
  assert norm > bound
  factor = clip_coefficient(norm, bound)
  free, _, _ = run(in_three_parts(), **options)
  start, free = jax.device_get((make_params(), free))
  expected = jax.tree.map(lambda p, q: p + float(factor) * (q - p), start, free)
  # The first step of SGD with momentum is linear in the gradient.
  chex.assert_trees_all_close(clipped, expected, rtol=1e-5, atol=1e-6)


# 8-bit bases are not exactly orthonormal, so projecting the sum a second time
# would change it.
QUANTIZED = quantize_bases(galore_rule(), bits=8, group=4)


@pytest.fixture(scope='module')
def quantized_step():
  """Returns the weights after a step with the basis of the first of 3 parts."""
  model, params, batch = Residual(), make_params(), make_batch(0, 12)
  first = jax.tree.map(lambda x: x[::3], batch)
  gradient = jax.jit(lambda batch: jax.grad(model, has_aux=True)(params, batch))

  @jax.jit
  def expected(first, whole):
    state = QUANTIZED.refresh(first, QUANTIZED.init(params))
    low = QUANTIZED.project(whole, state)
    return optax.apply_updates(params, QUANTIZED.apply(low, state, params)[0])

  return expected(gradient(first)[0], gradient(batch)[0])


def test_quantized_bases_and_slices(quantized_step):
  step = layerwise(Residual(), QUANTIZED, accumulate=3, slices={'head/w': 3})
  whole, _, _ = run(step, steps=1, examples=12)
  # The sums over examples are computed in another order and multiplied by 8-bit
  # bases.
  chex.assert_trees_all_close(whole, quantized_step, rtol=1e-4, atol=1e-5)


def test_sums_in_bfloat16(quantized_step):
  step = layerwise(Residual(), QUANTIZED, accumulate=3, sums_dtype=jnp.bfloat16)
  rounded, _, _ = run(step, steps=1, examples=12)
  # A sum of gradients below 1 is rounded three times, each by at most 2^-8.
  # The learning rate is 0.1.
  chex.assert_trees_all_close(rounded, quantized_step, atol=3 * 2**-8 * 0.1)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(rounded, quantized_step, atol=1e-6)


def test_a_preset_accumulates_if_its_update_is_linear_in_the_gradient():
  yes = (
    build('Galore', rank=2),
    build('Galore8bit', rank=2),
    build('GaloreAdafactor', rank=2),
    optax.chain(galore_optax.galore(rank=2), optax.adamw(0.1)),
  )
  assert all(isinstance(tx, Galore) and tx.linear for tx in yes)
  no = (
    build('Fira', rank=2),
    build('Frugal'),
    optax.adamw(0.1),
    optax.chain(
      optax.clip_by_global_norm(1.0), galore_optax.galore(rank=2), optax.sgd(1)
    ),
  )
  for tx in no:
    with pytest.raises(ValueError, match='accumulate=2 sums projected'):
      layerwise(Residual(), tx, accumulate=2)
