"""Decay of any inner optimizer is exact, or `init` raises an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import decay, galore
from galore_optax.projection import Projection, Whole
from tests.galore_optax.program import each, normal32
from tests.rounding import assert_close, units

LR = 0.1


def model(dtype=jnp.float32):
  return {
    'up': {'kernel': normal32((11, 17)).astype(dtype)},
    'down': {'kernel': normal32((17, 11), 1).astype(dtype)},
    'stack': normal32((2, 9, 13), 2).astype(dtype),
    'norm': normal32((13,), 3).astype(dtype),
  }


def warmup(count):
  return LR * jnp.minimum(count / 4, 1)


def mask_tree(params):
  mask = jax.tree.map(lambda _: True, params)
  mask['down']['kernel'] = mask['norm'] = False
  return mask


def ones_of(params):
  return jax.tree.map(jnp.ones_like, params)


def updates_of(tx, params, steps, gradients):
  """Returns the updates and the params after each step."""
  step = jax.jit(lambda g, state, params: tx.update(g, state, params))
  state, trail = tx.init(params), []
  for i in range(steps):
    g = jax.tree.map(lambda x: x * (1 + i), gradients)  # noqa: B023
    updates, state = step(g, state, params)
    params = optax.apply_updates(params, updates)
    trail.append((updates, params))
  return trail


@pytest.mark.parametrize(
  'make_mask',
  [
    pytest.param(None, id='all', marks=pytest.mark.slow),
    pytest.param(mask_tree, id='tree'),
    pytest.param('callable', id='callable', marks=pytest.mark.slow),
  ],
)
def test_without_gradients_updates_are_the_decay_of_optax(make_mask):
  # With zero gradients, the update consists only of decay. It must equal
  # optax's own decay for projected leaves as well, for any scale.
  params = model()
  mask = mask_tree if make_mask == 'callable' else make_mask
  mask = mask(params) if mask is mask_tree and make_mask is mask_tree else mask
  inner = optax.adamw(warmup, weight_decay=0.3, mask=mask)
  zeros = jax.tree.map(jnp.zeros_like, params)
  ours = updates_of(galore(inner, rank=4, gap=2, scale=9.0), params, 7, zeros)
  want = updates_of(inner, params, 7, zeros)
  for (u, w), (u_want, w_want) in zip(ours, want, strict=True):
    # The tolerance allows for three roundings in each of seven steps. The decay
    # is computed as factor * w here, and as lr * (decay * w) in optax.
    assert_close((u, w), (u_want, w_want), operations=3 * 7)
  first, last = ours[0][0], ours[-1][0]
  assert not np.any(jax.tree.leaves(first)[0])  # the warm-up starts at zero
  assert np.any(last['up']['kernel'])
  assert np.any(last['down']['kernel']) == (make_mask is None)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_whole_trajectory_with_decay_follows_float64(dtype):
  """Compares with w' = w - lr(t) (scale P u + decay w) in NumPy, with masks."""
  params = {k: v for k, v in model(dtype).items() if k in ('up', 'down')}
  mask = {'up': {'kernel': True}, 'down': {'kernel': False}}
  inner = optax.adamw(warmup, weight_decay=0.3, mask=mask)
  tx = galore(inner, rank=4, gap=3, scale=0.25)
  step = jax.jit(tx.update)
  state, seen = tx.init(params), params
  want = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  moments = {k: [0.0, 0.0] for k in params}
  for t in range(7):
    gradients = {
      k: {'kernel': normal32(v['kernel'].shape, 50 + t).astype(dtype)}
      for k, v in params.items()
    }
    updates, state = step(gradients, state, seen)
    for name in params:
      g = np.asarray(gradients[name]['kernel'], np.float64)
      p = np.asarray(state.basis[name]['kernel'], np.float64)
      low = p @ g if name == 'up' else g @ p.T
      mu, nu = moments[name]
      moments[name] = mu, nu = 0.9 * mu + 0.1 * low, 0.999 * nu + 1e-3 * low**2
      u = mu / (1 - 0.9 ** (t + 1))
      u = u / (np.sqrt(nu / (1 - 0.999 ** (t + 1))) + 1e-8)
      u = p.T @ u if name == 'up' else u @ p
      w = want[name]['kernel']
      lr = LR * min(t / 4, 1)
      u = -lr * (0.25 * u + 0.3 * mask[name]['kernel'] * w)
      got = np.asarray(updates[name]['kernel'], np.float64)
      # The tolerance allows for an error of 2e-5 in 1 - 0.999^t, which is
      # computed in float32. Entries that cancel lose more, so errors are
      # relative to the largest entry. A bfloat16 result is rounded once more.
      atol = 2e-5 + (dtype == jnp.bfloat16) * units(0.5, dtype)
      atol *= np.abs(u).max()
      np.testing.assert_allclose(got, u, rtol=0, atol=atol)
      assert updates[name]['kernel'].dtype == dtype
    seen = optax.apply_updates(seen, updates)
    # The oracle continues from our weights, so that errors of the weights do
    # not accumulate. Each step still proves its decay.
    want = jax.tree.map(lambda x: np.asarray(x, np.float64), seen)


def test_decay_is_not_scaled():
  params, zeros = model(), jax.tree.map(jnp.zeros_like, model())

  @jax.jit
  def first_update(scale):
    tx = galore(optax.adamw(LR, weight_decay=0.5), rank=3, scale=scale)
    return tx.update(zeros, tx.init(params), params)[0]

  one, other = first_update(1.0), first_update(0.01)
  jax.tree.map(np.testing.assert_array_equal, one, other)
  # The tolerance allows for multiplying the three numbers in a different order.
  assert_close(
    one['up']['kernel'], -0.05 * params['up']['kernel'], operations=3
  )


def test_an_inner_that_reads_no_params_needs_none():
  params, step = model(), jax.jit(galore(optax.adam(LR), rank=3).update)
  state = galore(optax.adam(LR), rank=3).init(params)
  bad = jax.tree.map(lambda x: jnp.nan * x, params)
  with_params, with_bad = (step(params, state, x)[0] for x in (params, bad))
  jax.tree.map(np.testing.assert_array_equal, with_params, with_bad)
  # The tolerance allows for a different program without params, with one
  # decomposition and sums of up to 17 terms. Adam's first update is a sign, for
  # gradients of any size.
  assert_close(step(params, state)[0], with_params, operations=20)


def test_an_inner_that_reads_params_says_so():
  params = model()
  tx = galore(optax.adamw(LR, weight_decay=0.1), rank=3)
  state = jax.eval_shape(tx.init, params)
  with pytest.raises(ValueError, match='params'):
    jax.eval_shape(tx.update, ones_of(params), state)


WARMUP = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)
COUPLED = {
  'lamb': optax.lamb(LR),
  'lamb, lr 0 at 0': optax.lamb(warmup),
  'lamb, lr 0 at 0 and 100': optax.lamb(WARMUP),
  'lars': optax.lars(LR),
  'adafactor with parameter scale': optax.adafactor(LR),
  'adaptive clipping': optax.chain(
    optax.adaptive_grad_clip(0.01), optax.sgd(LR)
  ),
  'decay that enters momentum': optax.chain(
    optax.add_decayed_weights(0.1), optax.sgd(LR, momentum=0.9)
  ),
  'L2 before Adam': optax.chain(optax.add_decayed_weights(0.1), optax.adam(LR)),
  'novograd with decay': optax.novograd(LR, weight_decay=0.1),
  'prodigy': optax.contrib.prodigy(),
  'schedule_free inside': optax.contrib.schedule_free(optax.sgd(LR), LR),
}


@each(
  'name',
  COUPLED,
  quick=['lamb', 'lamb, lr 0 at 0 and 100', 'L2 before Adam', 'prodigy'],
)
def test_other_uses_of_params_raise_at_init(name):
  tx, params = galore(COUPLED[name], rank=3), {'w': jnp.ones((7, 9))}
  with pytest.raises(ValueError, match='more than decoupled weight decay'):
    tx.init(params)


@pytest.mark.parametrize('transform', [jax.jit, jax.eval_shape])
def test_they_raise_under_tracing_too(transform):
  tx, params = (
    galore(COUPLED['lamb, lr 0 at 0'], rank=3),
    {'w': jnp.ones((7, 9))},
  )
  init = (
    jax.jit(tx.init)
    if transform is jax.jit
    else functools.partial(jax.eval_shape, tx.init)
  )
  with pytest.raises(ValueError, match='more than decoupled weight decay'):
    init(params)


def test_an_unprojected_leaf_may_have_any_inner():
  # LAMB depends on the params of all its leaves, but only a bias uses it here.
  inner = optax.partition(
    {'w': optax.adamw(LR), 'b': optax.lamb(LR)}, {'w': 'w', 'bias': 'b'}
  )
  params = {'w': jnp.ones((7, 9)), 'bias': jnp.arange(1.0, 10.0)}
  tx = galore(inner, rank=3)
  step = jax.jit(
    lambda tx, g, w: tx.update(g, tx.init(w), w)[0], static_argnums=0
  )
  updates = step(tx, ones_of(params), params)
  want = step(optax.lamb(LR), jnp.ones(9), params['bias'])
  # The tolerance allows for norms of nine terms in two programs.
  assert_close(updates['bias'], want, operations=9)


def test_a_traced_learning_rate_is_no_obstacle():
  params = {'w': normal32((7, 9))}

  def first_update(lr):
    tx = galore(optax.adamw(lr, weight_decay=0.1), rank=3)
    return tx.update(params, tx.init(params), params)[0]['w']

  rates = jnp.array([0.1, 0.2])
  one, two = jax.jit(jax.vmap(first_update))(rates)
  # The tolerance allows for rounding a few products, and for sums of two terms
  # that may cancel.
  assert_close(two, 2 * one, operations=10)


def test_the_factor_follows_counters_and_hyperparameters():
  params = {'w': jnp.zeros((3, 5)), 'b': jnp.zeros(4)}
  inner = optax.inject_hyperparams(optax.adamw)(0.5, weight_decay=0.25)
  inner = optax.with_extra_args_support(inner)
  state = inner.init(params)
  state.hyperparams['learning_rate'] = jnp.float32(2.0)
  plans = [
    Whole('b', (4,)),
    Projection('w', (6, 5), ((0,), (1,)), (3,), (-2,)),
  ]
  weights = {'w': jnp.ones((6, 5)), 'b': jnp.ones(4)}
  updates, slopes, _ = decay.run_inner(inner, plans, params, state, weights, {})
  # For a leaf that is not projected, the inner optimizer applies the decay
  # itself.
  assert {k: float(x) for k, x in slopes.items()} == {'b': 0.0, 'w': -0.5}
  np.testing.assert_allclose(updates['b'], -0.5)
