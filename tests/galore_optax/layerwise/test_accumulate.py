"""Summing projected gradients equals projecting the summed gradient."""

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
from tests.galore_optax.layerwise.program import (
  Residual,
  galore_rule,
  make_batch,
  make_params,
  run,
)
from tests.rounding import units


def seed_rule():
  """Returns a rule whose bases depend only on a seed, not on gradients.

  The results of two runs can then differ only in how gradients are summed.
  """
  return galore_rule(subspace='random')


@pytest.mark.slow
@pytest.mark.parametrize('microbatches', [1, 2])
def test_parts_are_one_large_batch_over_three_refreshes(microbatches):
  model, tx = Residual(), seed_rule()
  options = dict(steps=6, examples=12)
  step = layerwise(model, tx, accumulate=3, microbatches=microbatches)
  parts, state, metrics = run(step, **options)
  whole, _, expected = run(layerwise(model, tx), **options)
  # The tolerance allows for summing gradients over examples in a different
  # order.
  chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-6)
  for name in ('loss', 'nll'):
    # The tolerance allows for rounding in sums over 84 tokens, after six steps
    # through three layers.
    np.testing.assert_allclose(metrics[name], expected[name], rtol=units(84))
  # The norm excludes gradient components outside the subspaces.
  norm = metrics['projected_grad_norm']
  assert 0 < norm < expected['grad_norm']
  assert state.norm == norm
  assert 'grad_norm' not in metrics
  assert state.count == 6


@pytest.mark.slow
@pytest.mark.parametrize(
  'rule',
  [
    galore_rule,
    lambda: galore_optax.galore_adamw(
      0.01, rank=3, gap=2, weight_decay=0.1, targets=['blocks/.*']
    ),
    lambda: galore_optax.galore_adafactor(
      0.01, rank=3, gap=2, b1=0.9, scale_parameter=True, targets=['blocks/.*']
    ),
    lambda: galore_optax.galore(
      optax.sgd(0.1, momentum=0.9),
      **dict(rank=6, gap=2, moments='rotate', targets=['blocks/w']),
    ),
    lambda: galore_optax.galore(
      optax.adam(0.01, eps=1e-3),
      **dict(rank=2, gap=2, side='full', moments='reset', targets=['.*/u']),
    ),
  ],
  ids=['momentum', 'adamw', 'adafactor', 'rotate', 'full'],
)
def test_equal_parts_are_one_of_them(rule):
  # Both parts have the same gradient as the whole batch, so the first part
  # finds the same basis.
  model, batch = Residual(), make_batch(0)
  twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)
  two, one = layerwise(model, rule(), accumulate=2), layerwise(model, rule())

  def steps(step, batch):
    params = make_params()
    state = step.init(params)
    for _ in range(5):
      params, state, _ = jax.jit(step)(params, state, batch)
    return params

  # Adding two equal gradients and halving the sum is exact. The tolerance
  # allows for the different programs.
  chex.assert_trees_all_close(
    steps(two, twice), steps(one, batch), rtol=1e-4, atol=1e-5
  )


@pytest.mark.slow
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
    # The tolerance allows for two programs that decompose the same matrix. The
    # error of a singular vector is eps divided by its distance from the next
    # singular value.
    np.testing.assert_allclose(basis, want, atol=units(1000))


@pytest.mark.slow
def test_clips_by_the_norm_of_what_is_summed():
  model, bound = Residual(), 0.2
  options = dict(steps=1, examples=12)
  step = layerwise(model, seed_rule(), accumulate=3, clip_norm=bound)
  clipped, _, metrics = run(step, **options)
  norm = metrics['projected_grad_norm']
  assert norm > bound
  factor = clip_coefficient(norm, bound)
  free, _, _ = run(layerwise(model, seed_rule(), accumulate=3), **options)
  start = make_params()
  expected = jax.tree.map(lambda p, q: p + factor * (q - p), start, free)
  # The first step of SGD is linear in the gradient, so clipping the gradient
  # scales the update.
  chex.assert_trees_all_close(clipped, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_quantized_bases_and_slices_and_bfloat16_sums():
  # Bases in 8 bits are not orthonormal. Projecting the accumulated gradient a
  # second time would therefore change it.
  model = Residual()
  tx = quantize_bases(galore_rule(), bits=8, group=4)
  options = dict(steps=1, examples=12)
  whole, _, _ = run(
    layerwise(model, tx, accumulate=3, slices={'head/w': 3}), **options
  )
  params, batch = make_params(), make_batch(0, 12)
  state = tx.init(params)
  first = jax.tree.map(lambda x: x[::3], batch)
  # The expected step finds the basis on the first part and applies the gradient
  # of all parts.
  grads = jax.grad(model, has_aux=True)(params, first)[0]
  state = tx.refresh(grads, state)
  grads = jax.grad(model, has_aux=True)(params, batch)[0]
  updates, _ = tx.apply(tx.project(grads, state), state, params)
  expected = optax.apply_updates(params, updates)
  # The tolerance allows for summing gradients over examples in a different
  # order, and for products with 8-bit bases.
  chex.assert_trees_all_close(whole, expected, rtol=1e-4, atol=1e-5)
  rounded, _, _ = run(
    layerwise(model, tx, accumulate=3, sums_dtype=jnp.bfloat16), **options
  )
  # The tolerance allows for three bfloat16 roundings of 2^-8 each. The gradient
  # is below 1 and the learning rate is 0.1.
  chex.assert_trees_all_close(rounded, expected, atol=3 * 2**-8 * 0.1)
  with pytest.raises(AssertionError):
    chex.assert_trees_all_close(rounded, expected, atol=1e-6)


def test_a_preset_accumulates_if_its_update_is_linear_in_the_gradient():
  yes = (
    galore_optax.galore_adamw(0.1, rank=2),
    galore_optax.galore_adamw_8bit(0.1, rank=2),
    galore_optax.galore_adafactor(0.1, rank=2),
    optax.chain(galore_optax.galore(rank=2), optax.adamw(0.1)),
  )
  assert all(isinstance(tx, Galore) and tx.linear for tx in yes)
  no = (
    galore_optax.fira(0.1, rank=2),
    galore_optax.frugal(0.1),
    optax.adamw(0.1),
    optax.chain(
      optax.clip_by_global_norm(1.0), galore_optax.galore(rank=2), optax.sgd(1)
    ),
  )
  for tx in no:
    with pytest.raises(ValueError, match='accumulate=2 sums projected'):
      layerwise(Residual(), tx, accumulate=2)
