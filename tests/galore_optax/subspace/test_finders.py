"""Each finder returns an orthonormal basis that captures most of the energy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Coordinates,
  Gram,
  PowerIteration,
  Randomized,
  RandomOrthogonal,
  Svd,
  galore,
)
from tests.galore_optax.program import ORTHONORMAL, each, find, gram
from tests.rounding import assert_close

DENSE = [Svd(), Gram(), Randomized(), PowerIteration(), RandomOrthogonal()]
KEY = jax.random.key(0)
FIND = jax.jit(find, static_argnums=0)


def _power_law(m=29, n=53, exponent=1.0, seed=0):
  rng = np.random.default_rng(seed)
  u, _ = np.linalg.qr(rng.normal(size=(m, m)))
  v, _ = np.linalg.qr(rng.normal(size=(n, m)))
  values = np.arange(1, m + 1) ** -exponent
  return jnp.asarray((u * values) @ v.T, jnp.float32)


def _energy(basis_rm, g_mn):
  return float(jnp.sum((basis_rm @ g_mn) ** 2))


@pytest.mark.parametrize('finder', DENSE, ids=lambda f: type(f).__name__)
@each(
  'kind',
  ['plain', 'zero', 'deficient', 'tiny', 'huge', 'whole'],
  quick=['zero', 'deficient', 'huge'],
)
def test_rows_are_orthonormal(finder, kind):
  g_mn = _power_law()
  r = 29 if kind == 'whole' else 7
  g_mn = {
    'zero': 0 * g_mn,
    'deficient': g_mn[:, :1] @ g_mn[:1],
    'tiny': g_mn * 1e-30,
    'huge': g_mn * 1e30,
  }.get(kind, g_mn)
  basis_rm = FIND(finder, g_mn, jnp.zeros((r, 29)), KEY)
  chex.assert_trees_all_close(gram(basis_rm), jnp.eye(r), atol=ORTHONORMAL)


@pytest.mark.parametrize(
  'finder,share',
  [
    (Gram(), 1 - 1e-5),
    (Randomized(), 0.99),
    (PowerIteration(), 0.99),
    (RandomOrthogonal(), 0.05),
  ],
  ids=lambda x: type(x).__name__,
)
def test_captured_energy(finder, share):
  g_mn = _power_law()
  none_rm = jnp.zeros((7, 29))
  best = _energy(FIND(Svd(), g_mn, none_rm, KEY), g_mn)
  found = _energy(FIND(finder, g_mn, none_rm, KEY), g_mn)
  assert share * best < found < best * (1 + 1e-5)


def test_power_iteration_follows_a_moving_gradient():
  # One iteration per refresh, started from the last basis, keeps the energy
  # while the gradient drifts.
  basis_rm = jnp.zeros((7, 29))
  drift = _power_law(seed=1)
  for t in range(4):
    g_mn = _power_law() + 0.05 * t * drift
    basis_rm = FIND(PowerIteration(), g_mn, basis_rm, KEY)
    best = _energy(FIND(Svd(), g_mn, 0 * basis_rm, KEY), g_mn)
    assert _energy(basis_rm, g_mn) > 0.99 * best


def test_power_iteration_does_not_move_an_invariant_subspace():
  g_mn = _power_law()
  exact_rm = FIND(Svd(), g_mn, jnp.zeros((7, 29)), KEY)
  gauge_rr, _ = jnp.linalg.qr(jax.random.normal(KEY, (7, 7)))
  basis_rm = gauge_rr @ exact_rm
  again_rm = FIND(PowerIteration(), g_mn, basis_rm, KEY)
  # The shift does not move an invariant subspace. The tolerance allows for
  # rounding errors divided by the spread of the singular values.
  chex.assert_trees_all_close(again_rm, basis_rm, atol=1e-4)


@pytest.mark.parametrize('finder', [PowerIteration(), RandomOrthogonal()])
def test_no_solver_is_called(finder):
  shape = jax.ShapeDtypeStruct((29, 53), jnp.float32)
  start = jax.ShapeDtypeStruct((7, 29), jnp.float32)
  text = jax.jit(finder).lower(shape, start, KEY).as_text()
  assert 'custom_call' not in text
  assert 'custom_call' in jax.jit(Gram()).lower(shape, start, KEY).as_text()


def test_power_iteration_without_a_gradient_returns_the_basis():
  basis_rm = FIND(RandomOrthogonal(), _power_law(), jnp.zeros((7, 29)), KEY)
  same_rm = FIND(PowerIteration(), jnp.zeros((29, 53)), basis_rm, KEY)
  # The tolerance allows for rounding in ten polynomials with sums of up to 29
  # terms. The polynomials shrink earlier errors.
  assert_close(same_rm, basis_rm, operations=29)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float8_e4m3fn])
def test_power_iteration_from_a_basis_of_few_digits(dtype):
  g_mn = _power_law()
  exact_rm = FIND(Svd(), g_mn, jnp.zeros((7, 29)), KEY)
  # NumPy does the rounding, because XLA cannot convert to float8 on CPUs
  # without the instruction set F16C.
  rough_rm = jnp.float32(np.asarray(exact_rm).astype(dtype))
  basis_rm = FIND(PowerIteration(), g_mn, rough_rm, KEY)
  chex.assert_trees_all_close(gram(basis_rm), jnp.eye(7), atol=ORTHONORMAL)
  assert _energy(basis_rm, g_mn) > 0.999 * _energy(exact_rm, g_mn)


def test_power_iteration_of_a_stack_is_a_loop():
  # The second matrix has no previous basis and takes more iterations than the
  # first.
  g_kmn = jnp.stack([_power_law(seed=seed) for seed in range(2)])
  warm_rm = FIND(Svd(), g_kmn[0], jnp.zeros((7, 29)), KEY)
  old_krm = jnp.stack([warm_rm, 0 * warm_rm])
  power = lambda g_mn, old_rm: find(PowerIteration(), g_mn, old_rm, KEY)
  loop = jnp.stack(
    [
      FIND(PowerIteration(), *pair, KEY)
      for pair in zip(g_kmn, old_krm, strict=True)
    ]
  )
  # The tolerance allows for an error of eps / s in a direction with a share s
  # of the spectrum. The smallest share is 1e-3.
  batched = jax.jit(jax.vmap(power))(g_kmn, old_krm)
  chex.assert_trees_all_close(batched, loop, atol=1e-4)
  by_pair = lambda *pairs: jax.lax.map(lambda pair: power(*pair), pairs)
  mapped = jax.jit(by_pair)(g_kmn, old_krm)
  chex.assert_trees_all_close(mapped, loop, atol=1e-4)


def test_largest_coordinates():
  g_mn = _power_law()
  index_r = Coordinates(largest=True)(g_mn, jnp.zeros(7), KEY)
  norms = np.sum(np.square(g_mn), axis=1)
  assert set(np.asarray(index_r)) == set(np.argsort(-norms)[:7])


@each('side', ['std', 'right', 'full'], quick=['std', 'full'])
def test_coordinates_are_a_selection(side):
  params = {'w': _power_law(13, 17)}
  tx = galore(
    optax.sgd(1.0), rank=5, scale=1.0, side=side, subspace=Coordinates()
  )
  state = tx.init(params)
  updates, state = jax.jit(tx.update)(params, state)
  kept = jnp.abs(updates['w']) > 0
  expected = {'std': 5 * 17, 'right': 13 * 5, 'full': 25}[side]
  assert int(kept.sum()) == expected
  chex.assert_trees_all_equal(updates['w'], jnp.where(kept, -params['w'], 0))
  assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(state.basis))


def test_a_random_subspace_takes_a_seed_and_changes_at_gap():
  params = {'w': _power_law(13, 17)}
  tx = galore(optax.sgd(1.0), rank=5, gap=2, scale=1.0, subspace='random')
  state = tx.init(params)
  assert state.basis['w'].nbytes == 4  # the state stores only a seed
  step, seen = jax.jit(tx.update), []
  for _ in range(4):
    updates, state = step(params, state)
    seen.append(updates['w'])
  chex.assert_trees_all_equal(seen[0], seen[1])
  chex.assert_trees_all_equal(seen[2], seen[3])
  assert not np.allclose(seen[1], seen[2])
