"""Stochastic rounding is unbiased, and exact for representable sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.quantized.rounding import apply_updates_stochastic

NUM = 200_000


@pytest.mark.parametrize('sign', [1, -1])
@pytest.mark.parametrize('weight', [1.0, -1.0, 3.0, 1e-3])
def test_a_quarter_ulp_moves_the_mean_by_a_quarter_ulp(weight, sign):
  params = jnp.full(NUM, weight, jnp.bfloat16)
  start = float(params[0])
  # Below a power of two, the spacing of floats is halved. Use the spacing in
  # the direction of the update.
  outward = np.sign(weight)
  ulp = float(jnp.nextafter(params[0], jnp.bfloat16(outward * 1e9))) - start
  share = 0.25 * sign
  inward = float(jnp.nextafter(params[0], jnp.bfloat16(0))) - start
  spacing = abs(ulp) if sign * outward > 0 else abs(inward)
  update = jnp.full(NUM, share * spacing)
  new = apply_updates_stochastic(params, update, jax.random.key(0))
  moved = (np.asarray(new, np.float64) - start) / spacing
  assert set(np.unique(moved)) == {0.0, float(sign)}
  # The number of weights that moved is binomial with p = 1/4.
  sigma = np.sqrt(0.25 * 0.75 / NUM)
  assert abs(moved.mean() - share) < 5 * sigma
  # Rounding to nearest moves no weight at all.
  nearest = optax.apply_updates(params, update)
  np.testing.assert_array_equal(nearest, params)


def test_every_representable_sum_is_unchanged():
  bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
  values = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
  new = apply_updates_stochastic(values, jnp.zeros(2**16), jax.random.key(1))
  want = np.asarray(values, np.float32)
  is_normal = (np.abs(want) >= np.finfo(np.float32).tiny) | (want == 0)
  keep = is_normal | ~np.isfinite(want)  # compilers flush subnormals to 0
  np.testing.assert_array_equal(np.asarray(new, np.float32)[keep], want[keep])


def test_the_largest_value_does_not_round_to_infinity():
  largest = jnp.finfo(jnp.bfloat16).max
  params = jnp.full(1000, largest, jnp.bfloat16)
  quarter = 0.25 * 2.0**120  # quarter of the spacing below 2^128
  for sign in (1, -1):
    new = apply_updates_stochastic(
      sign * params, jnp.full(1000, sign * quarter), jax.random.key(2)
    )
    np.testing.assert_array_equal(new, sign * params)
  new = apply_updates_stochastic(
    params, jnp.full(1000, jnp.inf), jax.random.key(2)
  )
  assert np.all(np.isinf(np.asarray(new, np.float32)))


def test_leaves_of_other_dtypes_are_added_plainly():
  x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
  params = {'a': jnp.asarray(x), 'b': jnp.asarray(x, jnp.bfloat16), 'c': None}
  updates = {'a': jnp.asarray(x) / 3, 'b': jnp.asarray(x) / 3, 'c': None}
  new = apply_updates_stochastic(params, updates, jax.random.key(0))
  want = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(new['a'], want['a'])
  assert new['b'].dtype == jnp.bfloat16 and new['c'] is None


def test_leaves_and_steps_draw_different_bits():
  params = {k: jnp.ones(1000, jnp.bfloat16) for k in 'ab'}
  updates = jax.tree.map(lambda x: jnp.full(x.shape, 1 / 256), params)
  one, two = (
    apply_updates_stochastic(params, updates, jax.random.key(i)) for i in (0, 1)
  )
  assert np.any(np.asarray(one['a'] != one['b']))
  assert np.any(np.asarray(one['a'] != two['a']))
