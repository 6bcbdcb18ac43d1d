"""The three stages of an update, and how often it runs its inner optimizer."""

import collections
import copy
import dataclasses
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import Galore, Staggered, galore
from galore_optax.plan import Planner
from tests.galore_optax.every import build, maker
from tests.galore_optax.program import each, gradients, normal32
from tests.rounding import assert_same_program, distance, units

PARAMS = {
  'up': normal32((3, 5, 9)),
  'down': normal32((11, 4), 1),
  'norm': normal32((3, 5), 2),
}


TXS = {
  'svd': lambda: galore(optax.adamw(0.1), rank=3, gap=2),
  'turns': lambda: galore(optax.adam(0.1), rank=3, gap=Staggered(3)),
  'rotate': lambda: galore(optax.adam(0.1), rank=3, gap=2, moments='rotate'),
  'chain': lambda: optax.chain(
    galore(optax.adam(0.1), rank=3, gap=2), optax.scale(0.5)
  ),
  'spelled as a chain': lambda: optax.chain(
    galore(rank=3, gap=2), optax.adam(0.1)
  ),
  'adafactor': maker('GaloreAdafactor', rank=3, gap=2),
  'packed': lambda: go.quantize_bases(build('Galore', rank=3, gap=2)),
}


@each('name', TXS, quick=['svd'])
def test_an_update_is_its_stages(name):
  tx = TXS[name]()
  assert isinstance(tx, Galore) and tx.linear

  def by_stages(g, state):
    state = tx.refresh(g, state)
    return tx.apply(tx.project(g, state), state, PARAMS, g)

  update = lambda g, state: tx.update(g, state, PARAMS)
  state = tx.init(PARAMS)
  if name == 'packed':
    # The stages dequantize each basis twice, and the update does so once.
    got, want = jax.jit(by_stages), jax.jit(update)
    updates = [f(gradients(PARAMS), state)[0] for f in (got, want)]
    assert distance(*updates) < units(1000)
  else:
    assert_same_program(
      (by_stages, gradients(PARAMS), state), (update, gradients(PARAMS), state)
    )

  @jax.jit
  def of_projections(g, state):
    state = tx.refresh(g, state)
    halves = [tx.project(optax.tree.scale(x, g), state) for x in (0.25, 0.75)]
    return tx.apply(optax.tree.add(*halves), state, PARAMS)

  whole = jax.jit(update)
  for i in range(3):
    want, after = whole(gradients(PARAMS, i), state)
    # Projection is linear, so a sum of projections replaces the gradient. The
    # tolerance allows for one more rounding, which Adam amplifies for entries
    # that nearly cancel.
    got, _ = of_projections(gradients(PARAMS, i), state)
    assert distance(got, want) < units(1000)
    state = after


def test_due_says_when_a_refresh_changes_a_basis():
  tx, seen = galore(optax.sgd(0.1), rank=3, gap=3), []
  state, step = tx.init(PARAMS), jax.jit(tx.update)
  for i in range(7):
    seen.append(bool(tx.due(state)))
    _, state = step(gradients(PARAMS, i), state)
  assert seen == [True, False, False, True, False, False, True]


def test_matrices_that_take_turns_are_due_one_by_one():
  tx, found = galore(optax.sgd(0.1), rank=3, gap=Staggered(8)), []
  state, step = tx.init(PARAMS), jax.jit(tx.update)
  is_due = jax.jit(tx.due)
  for i in range(17):
    due, before = bool(is_due(state)), jax.device_get(state.basis)
    _, state = step(gradients(PARAMS, i), state)
    after = jax.device_get(state.basis)
    same = jax.tree.map(np.array_equal, before, after)
    changed = not all(jax.tree.leaves(same))
    # A step must be due exactly if it changes the basis of some matrix.
    assert due == changed
    found.append(due)
  # All four matrices refresh at step 0. Afterwards each refreshes every eight
  # steps, at different steps.
  assert found[0] and 1 < sum(found[1:9]) <= 4


def test_a_residual_rule_reads_the_gradient_itself():
  tx = galore(optax.adam(0.1), rank=3, residual=go.Sign(0.1))
  assert not tx.linear


@pytest.mark.parametrize(
  'make, most',
  [
    (lambda inner: galore(inner, rank=3), 1),
    (lambda inner: build('Frugal', inner=inner), 2),
    (lambda inner: build('Fira', rank=3, inner=inner), 1),
    (lambda inner: build('Apollo', rank=3, inner=inner), 1),
  ],
  ids=['galore', 'Frugal', 'Fira', 'Apollo'],
)
def test_an_update_traces_its_inner_once_a_group(make, most):
  # Decay, learning rate and counters must all come from a single run of the
  # inner optimizer per group of leaves.
  traced, adam = [], optax.scale_by_adam()

  def update(updates, state, params=None):
    traced.append(1)
    return adam.update(updates, state, params)

  tx = make(optax.GradientTransformation(adam.init, update))
  state = tx.init(PARAMS)
  traced.clear()
  jax.make_jaxpr(tx.update)(gradients(PARAMS), state, PARAMS)
  assert len(traced) == most


@dataclasses.dataclass(frozen=True)
class CountingStore:
  """A store of bases that counts how often a basis is computed."""

  store: Any
  calls: collections.Counter

  def first(self, r: int, m: int, dtype: Any) -> Any:
    return self.store.first(r, m, dtype)

  def find(self, g_mn: Any, stored: Any, key: Any, first: Any) -> Any:
    return self.store.find(g_mn, stored, key, first)

  def rows(self, stored: Any, r: int, m: int, dtype: Any) -> Any:
    self.calls['rows'] += 1
    return self.store.rows(stored, r, m, dtype)


def test_plans_and_bases_are_made_once_an_update(monkeypatch):
  calls = collections.Counter()
  plan = Planner.__call__

  def counted(self: Planner, tree: Any) -> Any:
    calls['plans'] += 1
    return plan(self, tree)

  monkeypatch.setattr(Planner, '__call__', counted)
  tx = galore(optax.adamw(0.1), rank=3)
  tx = tx.with_keeper(lambda store: CountingStore(store, calls))
  state = tx.init(PARAMS)
  calls.clear()
  jax.eval_shape(tx.update, gradients(PARAMS), state, PARAMS)
  # Two leaves are projected.
  assert calls == {'plans': 1, 'rows': 2}


@pytest.mark.parametrize('name', ['svd', 'spelled as a chain', 'adafactor'])
def test_a_copy_is_the_transformation(name):
  tx = TXS[name]()
  same = copy.deepcopy(tx) if name == 'svd' else copy.copy(tx)
  assert isinstance(same, Galore) and same.linear
  assert same.plan(PARAMS) == tx.plan(PARAMS)


def test_a_copied_stage_takes_an_inner():
  tx = optax.chain(copy.copy(galore(rank=3)), optax.adam(0.1))
  assert isinstance(tx, Galore)


@each('name', TXS, quick=['svd', 'spelled as a chain'])
def test_arguments_have_the_names_of_optax(name):
  tx, g = TXS[name](), gradients(PARAMS)
  state = tx.init(params=PARAMS)
  ours = jax.eval_shape(
    lambda g, s, w: tx.update(updates=g, state=s, params=w), g, state, PARAMS
  )
  assert jax.tree.structure(ours) == jax.tree.structure((g, state))


def test_jax_rebuilds_a_transformation_from_its_functions():
  # A NamedTuple is a tree to JAX. Equinox, for example, splits all arguments of
  # a function into arrays and other leaves, and rebuilds them.
  tx = optax.chain(galore(rank=3), optax.adam(0.1))
  same = jax.tree.map(lambda x: x, tx)
  assert same.init is tx.init and same.update is tx.update
  jax.tree.map(lambda x: x, galore(rank=3))
  step = eqx.filter_jit(lambda tx, g: tx.update(g, tx.init(PARAMS), PARAMS))
  updates, _ = step(tx, gradients(PARAMS))
  assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)
