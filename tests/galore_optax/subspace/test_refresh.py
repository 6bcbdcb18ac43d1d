"""When a refresh happens, how often it computes bases, and which it keeps."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Svd, galore
from tests.galore_optax.program import ORTHONORMAL, each, gram, random_gradients
from tests.rounding import units

SHAPES = {'stack': (3, 7, 9), 'tall': (11, 5)}


def stacked_gradients(steps):
  shapes = {
    name: jax.ShapeDtypeStruct((steps, *shape), jnp.float32)
    for name, shape in SHAPES.items()
  }
  return next(random_gradients(shapes, 1, seed=0))


def trail_of_states(tx, grads):
  """Returns the stacked states of all steps, and the updates."""
  params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), grads)

  def step(state, g):
    updates, state = tx.update(g, state)
    return state, (state, updates)

  return jax.jit(lambda: jax.lax.scan(step, tx.init(params), grads)[1])()


@each('subspace', ['svd', 'gram'], quick=['svd'])
def test_bases_change_at_0_gap_and_2_gap_and_only_there(subspace):
  tx = galore(optax.adam(0.1), rank=4, gap=3, subspace=subspace)
  states, _ = trail_of_states(tx, stacked_gradients(8))
  for name in SHAPES:
    basis = np.asarray(states.basis[name])
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(basis)]
    assert same == [True, True, False, True, True, False, True]
  np.testing.assert_array_equal(states.count, np.arange(1, 9))
  assert not np.any(states.skipped)


def test_a_basis_spans_the_gradient_of_its_own_step():
  grads = stacked_gradients(4)
  tx = galore(optax.sgd(1.0), rank=4, gap=3)
  states, _ = trail_of_states(tx, grads)
  for step in (0, 3):
    g = np.asarray(grads['tall'][step])
    _, _, vh = np.linalg.svd(g)
    basis = np.asarray(states.basis['tall'][step])
    np.testing.assert_allclose(gram(basis), np.eye(4), atol=ORTHONORMAL)
    want = vh[:4].T @ vh[:4]
    # The tolerance allows for the error of a subspace, which is eps divided by
    # the distance between the singular values inside and outside of it.
    np.testing.assert_allclose(basis.T @ basis, want, atol=units(100))


def jaxprs(eqn):
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(item, 'jaxpr', item)
      if hasattr(inner, 'eqns'):
        yield inner


def find(jaxpr, name, inside=()):
  """Yields each equation of a primitive, and the primitives that contain it."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == name:
      yield eqn, inside
    for inner in jaxprs(eqn):
      yield from find(inner, name, (*inside, eqn.primitive.name))


def test_one_cond_guards_every_decomposition_and_a_stack_is_mapped():
  params = {k: jnp.zeros(s) for k, s in SHAPES.items()}
  tx = galore(optax.adamw(0.1), rank=4, gap=3)
  state = tx.init(params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  svds = list(find(jaxpr, 'svd'))
  assert {eqn.invars[0].aval.shape for eqn, _ in svds} == {(7, 9), (5, 11)}
  for eqn, inside in svds:
    assert inside.count('cond') == 1
    # A `scan` handles one layer at a time, so that the workspace has the size
    # of one matrix.
    assert ('scan' in inside) == (eqn.invars[0].aval.shape == (7, 9))
  conds = [eqn for eqn, inside in find(jaxpr, 'cond') if not inside]
  assert len(conds) == 1
  assert conds[0].invars[0].aval.shape == ()
  # State that a refresh does not change is not passed through the `cond`, which
  # would copy it.
  assert len(conds[0].outvars) < len(jax.tree.leaves(state))


def test_the_compiled_step_has_one_conditional_and_no_solver_outside_it():
  params = {'w': jnp.zeros((7, 9))}
  tx = galore(optax.sgd(0.1), rank=4, gap=3)
  text = jax.jit(tx.update).lower(params, tx.init(params)).compile().as_text()
  assert text.count(' conditional(') == 1
  entry = text[text.index('\nENTRY ') :]
  assert 'gesdd' in text
  assert 'gesdd' not in entry


@dataclasses.dataclass(frozen=True)
class Flipped:
  """The exact basis with random signs, as another LAPACK might return them."""

  seed: int

  def __call__(self, g_mn, basis_rm, key):
    rows_rm = Svd()(g_mn, basis_rm, key)
    key = jax.random.fold_in(key, self.seed)
    sign_r1 = jax.random.rademacher(key, (rows_rm.shape[0], 1), g_mn.dtype)
    return rows_rm * sign_r1


@each('side', ['std', 'full'], quick=['std'])
def test_a_trajectory_does_not_depend_on_the_signs_of_a_decomposition(side):
  grads = stacked_gradients(5)
  run = lambda finder: trail_of_states(
    galore(optax.adam(0.1), rank=4, gap=2, side=side, subspace=finder), grads
  )
  (states, updates), (other_states, other) = run(Flipped(1)), run(Flipped(2))
  # Make sure that the two finders do return different signs.
  g, none, key = jnp.eye(7, 9), jnp.zeros((4, 7)), jax.random.key(0)
  assert np.any(Flipped(1)(g, none, key) != Flipped(2)(g, none, key))
  chex.assert_trees_all_equal(updates, other)
  chex.assert_trees_all_equal(states, other_states)


def test_signs_follow_the_previous_basis():
  grads = stacked_gradients(2)
  tx = galore(optax.sgd(1.0), rank=4, gap=1)
  states, _ = trail_of_states(tx, grads)
  for name in SHAPES:
    first, second = np.asarray(states.basis[name], np.float64)
    peak = np.take_along_axis(
      first, np.abs(first).argmax(-1)[..., None], axis=-1
    )
    assert np.all(peak > 0)
    assert np.all((first * second).sum(-1) >= 0)


@each('bad', [np.nan, np.inf], quick=[np.inf])
@pytest.mark.parametrize('side, bases', [('std', 1), ('full', 2)])
def test_a_gradient_that_is_not_finite_keeps_the_basis_of_its_matrix(
  bad, side, bases
):
  grads = stacked_gradients(5)
  grads['stack'] = grads['stack'].at[2, 1, 0, 0].set(bad)
  tx = galore(optax.sgd(1.0), rank=4, gap=2, side=side)
  states, _ = trail_of_states(tx, grads)
  for basis in jax.tree.leaves(states.basis['stack']):
    before, after, later = np.asarray(basis)[[1, 2, 4]]
    np.testing.assert_array_equal(before[1], after[1])
    assert np.all(np.any(before[[0, 2]] != after[[0, 2]], axis=(-1, -2)))
    assert np.all(np.any(after != later, axis=(-1, -2)))
    assert np.all(np.isfinite(basis))
  tall = jax.tree.leaves(states.basis['tall'])[0]
  assert np.any(tall[1] != tall[2])
  np.testing.assert_array_equal(states.skipped, [0, 0, bases, bases, bases])


def test_a_first_gradient_that_is_not_finite_leaves_a_valid_basis():
  grads = jax.tree.map(lambda g: g.at[0].set(jnp.nan), stacked_gradients(3))
  tx = galore(optax.sgd(1.0), rank=4, gap=2)
  states, _ = trail_of_states(tx, grads)
  np.testing.assert_array_equal(states.skipped, [4, 4, 4])
  for basis in states.basis.values():
    rows = np.asarray(basis[0])
    np.testing.assert_allclose(
      rows @ np.swapaxes(rows, -1, -2),
      np.broadcast_to(np.eye(4), (*rows.shape[:-2], 4, 4)),
      atol=ORTHONORMAL,
    )


def test_a_basis_that_a_finder_could_not_find_is_kept():
  broken = lambda g_mn, basis_rm, key: jnp.full_like(basis_rm, jnp.nan)
  tx = galore(optax.sgd(1.0), rank=4, gap=1, subspace=broken)
  states, updates = trail_of_states(tx, stacked_gradients(2))
  np.testing.assert_array_equal(states.skipped, [4, 8])
  assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


@pytest.mark.parametrize('size', [1e-30, 1e30])
def test_bases_do_not_depend_on_the_size_of_a_gradient(size):
  # Squares of such entries leave float32's range. Scaling by powers of two is
  # exact.
  size = 2.0 ** np.round(np.log2(size))
  grads = stacked_gradients(1)
  run = lambda grads: (
    trail_of_states(galore(optax.sgd(1.0), rank=4, subspace='gram'), grads)[
      0
    ].basis
  )
  want = run(grads)
  ours = run(jax.tree.map(lambda g: g * np.float32(size), grads))
  # The tolerance allows for two programs that decompose the same matrix. The
  # error of a singular vector is eps divided by its distance from the next
  # singular value.
  chex.assert_trees_all_close(ours, want, atol=units(100))
