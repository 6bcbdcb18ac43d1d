"""Captured energy and overlap of bases agree with NumPy for every method."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Staggered, galore, quantize_bases
from models.llama import LlamaConfig
from tests.galore_optax.every import build
from tests.train.test_config import CONFIG
from train.config import Layerwise, WholeTree
from train.engine import step
from train.engine.task import task_of
from train.method import METHODS, AdamW
from train.method import Galore as Optimizer
from train.optimizers import subspace_metrics as subspace

SHAPES = {'v': (9, 7), 'w': (3, 6, 11)}


def gradients(number):
  random = np.random.default_rng(number)
  draw = lambda shape: random.normal(size=shape).astype(np.float32)
  return {name: draw(shape) for name, shape in SHAPES.items()}


def states(tx, number, gradients=gradients):
  """Returns the initial state, and the state after each update."""
  params = jax.tree.map(jnp.zeros_like, gradients(0))
  found = [tx.init(params)]
  update = jax.jit(tx.update)
  for i in range(number):
    found.append(update(gradients(i), found[-1], params)[1])
  return found


def rows(basis, m):
  basis = np.asarray(basis)
  return np.eye(m)[basis] if basis.dtype.kind == 'i' else np.float64(basis)


def expected(g_mn, new, old):
  m = len(g_mn)
  new_rm, old_rm, g_mn = rows(new, m), rows(old, m), np.float64(g_mn)
  energy = np.sum((new_rm @ g_mn) ** 2) / np.sum(g_mn**2)
  return energy, np.sum((new_rm @ old_rm.T) ** 2) / len(new_rm)


def check(noted, others, new, old, g):
  """Checks recorded numbers against NumPy.

  Args:
    noted: recorded energy, overlap and number of refreshes, [3, k].
    others: expected number of refreshes.
    new: bases [k, r, m], or indices [k, r], after the refresh.
    old: bases or indices before the refresh.
    g: gradients [k, m, n].
  """
  for i, g_mn in enumerate(g):
    # The tolerance allows for float32 sums.
    numbers = expected(g_mn, new[i], old[i])
    np.testing.assert_allclose(noted[:2, i], numbers, rtol=1e-5)
  assert (noted[2] == others).all()


@pytest.mark.parametrize('finder', ['svd', 'coordinates'])
def test_numbers_are_those_of_the_bases(finder):
  tx = subspace.watched(galore(optax.sgd(0.1), rank=3, gap=2, subspace=finder))
  _, first, between, second = states(tx, 3)
  found = subspace.health(second)
  g = gradients(2)
  basis = lambda state, name: state.basis[name].basis
  # The shorter side is projected: the columns of v and the rows of w.
  new, old = (np.array(basis(x, 'v'))[None] for x in (second, first))
  check(found['v'], 2, new, old, g['v'].T[None])
  check(found['w'], 2, basis(second, 'w'), basis(first, 'w'), g['w'])
  assert subspace.refreshes(found) == 2
  chex.assert_trees_all_equal(first.basis, between.basis)


def test_both_sides_have_numbers():
  tx = subspace.watched(galore(optax.sgd(0.1), rank=3, gap=1, side='full'))
  _, first, second = states(tx, 2)
  found, g = subspace.health(second), gradients(1)
  for side, g_kmn in enumerate([g['w'], np.swapaxes(g['w'], 1, 2)]):
    new, old = (x.basis['w'][side].basis for x in (second, first))
    check(found[f'w/{side}'], 2, new, old, g_kmn)


def test_before_and_at_the_first_refresh_there_is_no_overlap():
  tx = subspace.watched(galore(optax.sgd(0.1), rank=3, gap=2))
  before, first = states(tx, 1)
  assert (subspace.health(before)['w'].T == np.array([[-1, -1, 0]])).all()
  found = jax.device_get(subspace.health(first))
  assert (found['w'][1] == -1).all() and (found['w'][2] == 1).all()
  logged = subspace.by_number(found)
  assert logged.keys() == {'captured_energy'}
  assert len(logged['captured_energy']['w']) == 3


def test_a_gradient_that_is_not_finite_leaves_the_numbers():
  broken = lambda i: jax.tree.map(lambda g: g + [0, np.nan][i], gradients(0))
  tx = subspace.watched(galore(optax.sgd(0.1), rank=3, gap=1))
  _, first, second = states(tx, 2, broken)
  chex.assert_trees_all_equal(first.basis, second.basis)


def test_a_gradient_of_zeros_has_no_energy():
  zeros = lambda i: jax.tree.map(np.zeros_like, gradients(i))
  tx = subspace.watched(galore(optax.sgd(0.1), rank=3, gap=1))
  assert (subspace.health(states(tx, 1, zeros)[-1])['w'][0] == 0).all()


@pytest.mark.parametrize(
  'moments', [pytest.param('keep', marks=pytest.mark.slow), 'rotate']
)
def test_watching_changes_no_update(moments):
  tx = build('Galore', rank=3, gap=2, moments=moments)
  watched = subspace.watched(tx)
  params = jax.tree.map(np.zeros_like, gradients(0))
  plain, seen = tx.init(params), watched.init(params)
  update, watched_update = jax.jit(tx.update), jax.jit(watched.update)
  for i in range(4):
    ours, seen = watched_update(gradients(i), seen, params)
    theirs, plain = update(gradients(i), plain, params)
    chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.slow
def test_packed_bases_have_numbers_too():
  tx = quantize_bases(galore(optax.sgd(0.1), rank=3, gap=1), bits=8, group=8)
  exact = galore(optax.sgd(0.1), rank=3, gap=1)
  found, like = (
    subspace.health(states(subspace.watched(x), 2)[-1])['w']
    for x in (tx, exact)
  )
  # The tolerance allows for 8 bits per element of the basis.
  np.testing.assert_allclose(found, like, atol=0.03)


@pytest.mark.parametrize(
  'tx',
  [
    METHODS['Apollo'].preset(0.1, rank=3),
    galore(optax.sgd(0.1), rank=3, subspace='random'),
    quantize_bases(galore(optax.sgd(0.1), rank=3, subspace='random')),
    optax.adam(0.1),
  ],
)
def test_bases_that_ignore_gradients_are_not_watched(tx):
  state = jax.eval_shape(subspace.watched(tx).init, gradients(0))
  assert subspace.health(state) == {}


@pytest.mark.parametrize('name', ['Galore', 'Galore8bit', 'Frugal', 'Fira'])
def test_presets_are_watched(name):
  options = {'density': 0.5} if name == 'Frugal' else {'rank': 3}
  tx = subspace.watched(METHODS[name].preset(0.1, **options))
  state = jax.eval_shape(tx.init, gradients(0))
  noted = jax.eval_shape(subspace.health, state)
  assert {name: x.shape for name, x in noted.items()} == {
    'v': (3, 1),
    'w': (3, 3),
  }


def test_matrices_that_take_turns_count_once_a_gap():
  tx = subspace.watched(galore(optax.sgd(0.1), rank=3, gap=Staggered(3)))
  counts = [subspace.refreshes(subspace.health(x)) for x in states(tx, 7)]
  assert [counts[i] for i in (0, 1, 4, 7)] == [0, 1, 2, 3]


def config_of(update):
  model = LlamaConfig(
    vocab_size=31, width=8, mlp_width=12, num_heads=2, num_layers=2
  )
  return dataclasses.replace(
    CONFIG,
    model=model,
    optimizer=Optimizer(rank=3, gap=3),
    update=update,
    clip_norm=None,
    learning_rate=1e-3,
  )


def batch(number):
  random = np.random.default_rng(number)
  inputs, targets = random.integers(0, 31, (2, 2, 10), dtype=np.int32)
  return {
    'inputs': inputs,
    'targets': targets,
    'weights': np.ones((2, 10), np.float32),
    'positions': np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10)),
    'segments': np.ones((2, 10), np.int32),
  }


def run(update, number=5):
  """Returns the metrics of the first steps of a config."""
  config = config_of(update)
  init, one = step.build(config, task_of(config))
  state, found = jax.jit(init)(jax.random.key(0)), []
  for i in range(number):
    state, metrics = one(state, batch(i))
    found.append(jax.device_get(metrics))
  return found


@pytest.mark.slow
def test_a_step_hands_them_on_at_refreshes():
  whole, layers = run(WholeTree()), run(Layerwise())
  for found in whole, layers:
    assert [bool(x['refreshed']) for x in found] == [1, 0, 0, 1, 0]
  # The first gradients and subspaces are equal up to rounding. The second
  # subspaces belong to weights that have diverged for three steps.
  assert len(whole[0]['subspace']) == 7
  chex.assert_trees_all_close(
    whole[0]['subspace'], layers[0]['subspace'], rtol=1e-4
  )
  chex.assert_trees_all_close(
    whole[3]['subspace'], layers[3]['subspace'], atol=1e-2
  )
  for noted in whole[3]['subspace'].values():
    assert noted.shape == (3, 2) and (noted[:2] > 0).all()
    assert (noted[:2] < 1 + 1e-6).all()


def test_a_method_without_a_subspace_logs_nothing():
  config = dataclasses.replace(config_of(WholeTree()), optimizer=AdamW())
  init, one = step.build(config, task_of(config))
  shapes = jax.eval_shape(init, jax.random.key(0))
  metrics = jax.eval_shape(one, shapes, batch(0))[1]
  assert not {'subspace', 'refreshed'} & metrics.keys()
