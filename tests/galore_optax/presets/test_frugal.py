"""FRUGAL against its equations, its limits, and its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import PowerIteration, fira, frugal
from tests.galore_optax.program import (
  MATRICES,
  SHAPES,
  Adam,
  each,
  normal,
  rows_of,
  trajectory,
  tree,
)

STEPS, GAP, DENSITY, DECAY = 8, 2, 0.4, 0.3
WARM_UP = optax.linear_schedule(0.0, 0.25, 4)
"""Warm-up from zero in binary fractions, which float32 represents exactly."""


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


class Lion:
  """Lion for one weight in NumPy."""

  def __init__(self):
    self.m = 0

  def __call__(self, g):
    update = np.sign(0.9 * self.m + 0.1 * g)
    self.m = 0.99 * self.m + 0.01 * g
    return update


class Momentum:
  """Heavy-ball momentum for one weight in NumPy."""

  def __init__(self):
    self.m = 0

  def __call__(self, g):
    self.m = 0.9 * self.m + g
    return self.m


INNERS = {'adam': Adam, 'lion': Lion, 'sgdm': Momentum}


def svd_rows(g):
  """Returns the leading singular vectors of the shorter side as rows."""
  g = g if g.shape[0] <= g.shape[1] else g.T
  return np.linalg.svd(g)[0][:, : round(g.shape[0] * DENSITY)].T


def parts(subspace, g, kept):
  """Returns functions that map a gradient to its subspace and back.

  Args:
    subspace: option of `frugal`.
    g: gradient of one matrix or stack.
    kept: stored basis, or indices of the kept entries, rows, columns or layers.
  """
  if subspace in ('svd', 'random', 'power'):
    p = svd_rows(g) if subspace == 'svd' else np.asarray(kept)
    if g.shape[0] <= g.shape[1]:
      return lambda x: p @ x, lambda x: p.T @ x
    return lambda x: x @ p.T, lambda x: x @ p
  mask = np.zeros(g.shape)
  if subspace == 'entries':
    mask.reshape(-1)[kept] = 1
  elif subspace == 'rows':
    mask[:, kept] = 1
  else:
    mask[kept] = 1
  # These inner optimizers map zeros to zeros, so masking entries is equivalent
  # to extracting them into a smaller array.
  return lambda x: x * mask, lambda x: x * mask


def kept_at(subspace, weights, states):
  """Returns the stored basis, or the indices, of each matrix at each step."""
  if subspace != 'random':
    return states.basis
  tx = frugal(0.1, density=DENSITY, gap=GAP, subspace='random')
  return rows_of(tx, 'random', weights, states.basis)


def oracle(subspace, inner, residual, scale, weights, grads, kept):
  """Returns the weights after each step, from the paper's equations."""
  w = {name: np.array(x) for name, x in weights.items()}
  inners, split, trail = {'vector': INNERS[inner]()}, {}, []
  for t in range(STEPS):
    lr = min(t, 4) / 16
    for name in w:
      g = np.asarray(grads[name][t])
      w[name] = w[name] * (1 - lr * DECAY)
      if name == 'vector':
        w[name] = w[name] - lr * inners[name](g)
        continue
      if t % GAP == 0:
        inners[name] = INNERS[inner]()
        split[name] = parts(subspace, g, kept[name][t])
      down, up = split[name]
      low = down(g)
      rest = g - up(low)
      rest = np.sign(rest) if residual == 'sign' else rest
      w[name] = w[name] - lr * (up(inners[name](low)) + scale * rest)
    trail.append(dict(w))
  return {name: np.stack([x[name] for x in trail]) for name in w}


CASES = [
  ('svd', 'adam', 'sign', 1.0),
  ('svd', 'lion', 'sgd', 0.7),
  ('random', 'sgdm', 'sign', 0.7),
  ('columns', 'adam', 'sgd', 0.7),
  ('columns', 'sgdm', 'sgd', 1.0),
  ('rows', 'lion', 'sign', 0.7),
  ('entries', 'adam', 'sign', 0.7),
  ('power', 'adam', 'sign', 1.0),
]
QUICK = [CASES[0], CASES[4]]


@each('subspace, inner, residual, scale', CASES, quick=QUICK)
def test_it_is_the_papers_algorithm(x64, subspace, inner, residual, scale):
  shapes = SHAPES
  weights, grads = tree(shapes), tree(shapes, seed=10, leading=(STEPS,))
  tx = frugal(
    WARM_UP,
    density=DENSITY,
    gap=GAP,
    subspace=PowerIteration() if subspace == 'power' else subspace,
    inner=inner,
    residual=residual,
    residual_scale=scale,
    weight_decay=DECAY,
  )
  ours, states = trajectory(tx, weights, grads)
  kept = kept_at(subspace, weights, states)
  want = oracle(subspace, inner, residual, scale, weights, grads, kept)
  for name in shapes:
    # Preset and oracle run in float64. The tolerance allows for rounding in an
    # SVD and in roots of squares.
    np.testing.assert_allclose(ours[name], want[name], rtol=1e-9, atol=1e-10)
    if name == 'vector':
      continue
    each = np.asarray(kept[name]).reshape(STEPS, -1)
    changed = np.any(each[1:] != each[:-1], axis=1)
    assert changed.tolist() == [t % GAP == 0 for t in range(1, STEPS)]


@each('inner', INNERS, quick=['adam'])
def test_density_one_is_the_inner_and_zero_is_sign_descent(inner):
  weights = tree(seed=1, dtype=jnp.float32)
  grads = tree(seed=20, leading=(3,), dtype=jnp.float32)
  rule = {
    'adam': optax.scale_by_adam,
    'lion': optax.scale_by_lion,
    'sgdm': lambda: optax.trace(0.9),
  }[inner]
  # The learning rate is a power of two, so multiplying by it is exact in any
  # order.
  rate = optax.scale(-0.25)
  want, _ = trajectory(optax.chain(rule(), rate), weights, grads)
  one, _ = trajectory(frugal(0.25, density=1.0, inner=inner), weights, grads)
  for name in SHAPES:
    np.testing.assert_array_equal(one[name], want[name])
  sign, _ = trajectory(optax.sign_sgd(0.25), weights, grads)
  none, _ = trajectory(frugal(0.25, density=0.0, inner=inner), weights, grads)
  for name in MATRICES:
    np.testing.assert_array_equal(none[name], sign[name])
  # The vector is not projected, so Adam trains it. The tolerance allows for one
  # ulp, because XLA fuses Adam differently in a different program.
  np.testing.assert_allclose(none['vector'], want['vector'], rtol=1e-6)


SMOOTHNESS, BETA = 1.0, 0.9


@jax.jit
def squared_gradients(rate, noise, w, goal, curvature):
  """Returns |grad f|^2 at each step of FRUGAL on a quadratic function f."""
  tx = frugal(
    rate,
    density=0.4,
    gap=20,
    subspace='entries',
    inner=optax.ema(BETA, debias=False),
    residual='sgd',
  )

  def step(carry, key):
    w, state = carry
    exact = curvature * (w['w'] - goal)
    g = {'w': exact + noise * jax.random.normal(key, goal.shape)}
    updates, state = tx.update(g, state, w)
    return (optax.apply_updates(w, updates), state), jnp.sum(exact**2)

  keys = jax.random.split(jax.random.key(0), 2000)
  return jax.lax.scan(step, ({'w': w}, tx.init({'w': w})), keys)[1]


@pytest.mark.slow
def test_sgdm_inside_and_sgd_outside_converge_as_proved():
  """Checks the bound O(f(0) / (rate k) + SMOOTHNESS rate noise^2)."""
  goal = jnp.asarray(normal((7, 9)), jnp.float32)
  curvature = jnp.linspace(0.02, SMOOTHNESS, goal.size).reshape(goal.shape)
  start = float(jnp.sum(curvature * goal**2) / 2)
  rate = (1 - BETA) / (4 - BETA + BETA**2) / SMOOTHNESS
  along = lambda rate, noise, w: np.asarray(
    squared_gradients(rate, noise, w, goal, curvature)
  )
  exact = along(rate, 0.0, 0 * goal)
  for k in (20, 200, 2000):
    assert exact[:k].mean() < 2 * start / (rate * k)
  assert exact[-1] < 1e-2 * exact[0]
  # If the run starts at the optimum, only the noise term of the bound is left.
  # It is proportional to the learning rate, so the ratio for rates 4 : 1 is
  # about 4. Directions of small curvature do not converge in 2,000 steps, and
  # the sample is finite.
  coarse, fine = (along(c * rate, 0.3, goal)[500:].mean() for c in (4, 1))
  assert 3 < coarse / fine < 6


@pytest.mark.parametrize('density', [0, 0.5, 1])
def test_options_are_checked_for_every_density(density):
  with pytest.raises(ValueError, match='gap must be an integer'):
    frugal(0.1, density=density, gap=-1)
  injected = optax.inject_hyperparams(frugal, static_args=('gap',))
  with pytest.raises(ValueError, match='density must be a Python number'):
    injected(0.1, density=density).init({'w': jnp.ones((5, 7))})


def test_params_are_required_only_for_decay():
  w = {'w': jnp.ones((5, 7))}
  tx = frugal(0.1)
  update, state = jax.jit(tx.update), tx.init(w)
  # The update is the sign of the gradient times the rate, which is exact.
  (blind, _), (seen, _) = update(w, state), update(w, state, w)
  np.testing.assert_array_equal(blind['w'], seen['w'])
  tx = frugal(0.1, weight_decay=0.1)
  with pytest.raises(ValueError, match='params'):
    tx.update(w, tx.init(w))


def test_an_inner_with_a_learning_rate_raises():
  w = {'w': jnp.zeros((6, 9))}
  fira_of_2 = functools.partial(fira, rank=2)
  for inner in (
    optax.adam(1e-3),
    optax.lion(optax.linear_schedule(0.0, 1.0, 50)),
    optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
  ):
    for make in (frugal, fira_of_2):
      with pytest.raises(ValueError, match='learning rate of its own'):
        make(0.1, inner=inner).init(w)
  with pytest.raises(ValueError, match='adam, lion, sgdm or a transf'):
    frugal(0.1, inner='lamb')


def test_whole_layers_are_badams():
  with pytest.raises(ValueError, match='subspace must be one of'):
    frugal(0.1, subspace='blocks')


@pytest.mark.parametrize(
  'option, value',
  [
    ('density', 'a'),
    ('density', 1.5),
    ('residual_scale', -1.0),
    ('weight_decay', -0.1),
    ('residual', 'fira'),
  ],
)
def test_bad_values_name_the_option(option, value):
  with pytest.raises(ValueError, match=f'{option} must be'):
    frugal(0.1, **{option: value})
