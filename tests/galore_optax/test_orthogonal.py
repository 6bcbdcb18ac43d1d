"""Muon's Newton-Schulz iteration: a float64 oracle, optax, exact properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import orthogonal
from galore_optax.orthogonal import QUINTIC, apply_polynomials, orthogonalise
from galore_optax.presets.muon import scale_by_muon
from galore_optax.subspace.polar import orthonormalise
from tests.galore_optax.program import ORTHONORMAL, each, normal, normal32
from tests.rounding import units

# Rounding the normalized matrix to float32 has an error of 6e-8, which the five
# steps amplify by up to 3.4445^5 = 485, as they do the smallest singular
# values. The factor 2 allows for the products.
ROUNDING = 2 * 485 * 6e-8


def oracle(x):
  """Returns the five steps in float64, as in the author's code."""
  x = np.float64(x)
  if x.shape[0] > x.shape[1]:
    return oracle(x.T).T
  x = x / (np.linalg.norm(x) + 1e-8)
  for _ in range(5):
    a = x @ x.T
    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
  return x


def with_values(values, n):
  """Returns a matrix [m, n] with the given singular values."""
  m = len(values)
  u, _ = np.linalg.qr(normal((m, m)))
  v, _ = np.linalg.qr(normal((n, m), 1))
  return (u * values) @ v.T


MATRICES = {
  **{
    f'condition number 1e{k}': with_values(np.logspace(0, -k, 48), 112)
    for k in range(7)
  },
  'square, 1e6': with_values(np.logspace(0, -6, 64), 64),
  'one large value': with_values(np.r_[1.0, np.full(47, 1e-4)], 112),
  'rank 3': normal((48, 3)) @ normal((3, 112), 1),
  'rank 1': normal((48, 1)) @ normal((1, 112), 1),
  'random': normal((48, 112)),
  'square': normal((48, 48)),
  'one row': normal((1, 31)),
  'one column': normal((31, 1)),
  'one number': np.array([[-3.0]]),
  'small': 1e-12 * normal((48, 112)),
  'large': 1e15 * normal((48, 112)),
  'zero': np.zeros((48, 112)),
}


def distance(x, y):
  return np.linalg.norm(np.float64(x) - y, 2)


@pytest.mark.parametrize('name', MATRICES)
def test_it_is_the_five_steps(name):
  x = np.float32(MATRICES[name])
  want = oracle(x)
  assert np.any(want) == (name != 'zero')
  assert distance(orthogonalise(jnp.asarray(x)), want) < ROUNDING
  assert distance(orthogonalise(jnp.asarray(x.T)), want.T) < ROUNDING


def test_all_steps_in_one_gram_matrix_would_lose_digits(monkeypatch):
  x = np.float32(MATRICES['condition number 1e6'])
  monkeypatch.setattr(orthogonal, 'STEPS', 5)
  # The compiled function may have been traced before, with other steps.
  traced = orthogonalise.__wrapped__
  assert distance(traced(jnp.asarray(x)), oracle(x)) > 3 * ROUNDING


@each(
  'shape',
  [((3, 7, 11),), ((3, 11, 7),), ((2, 3, 5, 5),)],
  quick=[((3, 11, 7),)],
)
def test_a_stack_is_a_loop_over_its_matrices(shape):
  x = normal32(shape)
  flat = x.reshape(-1, *shape[-2:])
  want = jnp.stack([orthogonalise(one) for one in flat]).reshape(shape)
  # The tolerance allows for a batched product that sums in a different order.
  np.testing.assert_allclose(orthogonalise(x), want, atol=ROUNDING)


def test_a_zero_matrix_of_a_stack_stays_zero():
  x = normal32((2, 3, 5)).at[0].set(0.0)
  found = orthogonalise(x)
  assert not np.any(found[0]) and np.all(np.isfinite(found))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_the_dtype_comes_back_and_float32_is_used(dtype):
  x = normal32((5, 7)).astype(dtype)
  found = orthogonalise(x)
  assert found.dtype == dtype
  # The tolerance allows for rounding the result once, by at most half a unit in
  # the last of 8 bits.
  tolerance = 2**-8 if dtype == jnp.bfloat16 else ROUNDING
  np.testing.assert_allclose(
    np.float64(found), oracle(x), rtol=tolerance, atol=ROUNDING
  )


def test_in_float64_it_is_exact():
  with jax.enable_x64(True):
    x = MATRICES['condition number 1e6']
    # In float64, rounding errors are 1e-16 instead of 6e-8.
    assert distance(orthogonalise(jnp.asarray(x)), oracle(x)) < 1e-12


def test_it_is_no_polar_factor():
  """The iteration makes singular values only roughly one.

  `orthonormalise` computes an exact polar factor, with singular values of one.
  """
  x = with_values(np.linspace(0.3, 1.0, 24), 48)
  size = np.linalg.norm(x)
  rough = np.linalg.svd(orthogonalise(jnp.float32(x)), compute_uv=False)
  exact = np.linalg.svd(
    orthonormalise(jnp.float32(x / size), low=0.3 / size), compute_uv=False
  )
  assert np.all((0.68 < rough) & (rough < 1.21)) and np.ptp(rough) > 0.2
  np.testing.assert_allclose(exact, 1.0, atol=ORTHONORMAL)


def test_polynomials_act_on_singular_values_in_order():
  x = jnp.float32([[0.5, 0.0, 0.0], [0.0, 0.25, 0.0]])
  rules = [QUINTIC, (1.5, -0.5, 0.0), (1.0, 0.0, 0.25), (2.0, -1.0, 0.0)]
  want = np.array([0.5, 0.25])
  for a, b, c in rules:
    want = a * want + b * want**3 + c * want**5
  found = apply_polynomials(x, rules)
  # The tolerance allows for four polynomials of about ten roundings.
  np.testing.assert_allclose(np.diagonal(found), want, rtol=units(40))


def large_products(f, *args):
  """Returns the number of products with a factor or result of 91 columns.

  The input of the test has 91 columns, so these are the large products.
  """

  def count(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
      shapes = [x.aval.shape for x in (*eqn.invars, *eqn.outvars)]
      if eqn.primitive.name == 'dot_general':
        total += any(91 in shape for shape in shapes)
      inside = [getattr(x, 'jaxpr', None) for x in eqn.params.values()]
      total += sum(count(x) for x in inside if x is not None)
    return total

  return count(jax.make_jaxpr(f)(*args).jaxpr)


def test_a_matrix_is_multiplied_four_times():
  x = jnp.zeros((7, 91))
  assert large_products(orthogonalise, x) == 4
  assert large_products(orthogonalise, x.T) == 4
  assert large_products(lambda x: update(scale_by_muon(), x), x) == 4


def update(tx, g):
  return tx.update(g, tx.init(g))[0]


MATRIX = optax.contrib.MuonDimensionNumbers(-2, -1)


def theirs():
  return optax.contrib.scale_by_muon(
    beta=0.9,
    weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MATRIX, tree),
  )


@each(
  'shape', [((7, 13),), ((3, 13, 7),), ((2, 3, 6, 6),)], quick=[((3, 13, 7),)]
)
def test_a_trajectory_is_optaxs(shape):
  ours, want = scale_by_muon(beta=0.9), theirs()
  g = {'w': normal32(shape)}
  state, want_state = ours.init(g), want.init(g)
  chex.assert_trees_all_equal_structs(state, want_state)
  step, want_step = jax.jit(ours.update), jax.jit(want.update)
  for i in range(4):
    g = {'w': normal32(shape, i)}
    updates, state = step(g, state)
    want_updates, want_state = want_step(g, want_state)
    chex.assert_trees_all_close(updates, want_updates, atol=2 * ROUNDING)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, want_state)
    # The tolerance allows for rounding the momentum once; compilers contract
    # its sum differently.
    chex.assert_trees_all_close(state, want_state, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  'shape, share', [((512, 1376), 0.4), ((4, 256, 1024), 0.7)]
)
def test_temporaries_are_a_share_of_optaxs(shape, share):
  g = {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}

  def temporaries(tx):
    state = jax.eval_shape(tx.init, g)
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(g, state)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(scale_by_muon()) < share * temporaries(theirs())
