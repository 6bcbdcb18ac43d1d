"""`Staggered` matrices refresh at different steps."""

import chex
import jax
import numpy as np
import optax
import pytest

from galore_optax import Staggered, galore
from tests.galore_optax.program import each
from tests.rounding import assert_close

SHAPES = {'down': (4, 11, 7), 'q': (4, 7, 7), 'up': (4, 7, 11), 'w': (9, 8)}


def _grads(t):
  rng = np.random.default_rng(t)
  return {k: np.float32(rng.normal(size=s)) for k, s in SHAPES.items()}


def _changes(gap, steps):
  """Returns [steps, matrices]: whether each matrix has a new basis."""
  tx = galore(optax.sgd(1.0), rank=2, gap=gap)
  state, step, rows = jax.jit(tx.init)(_grads(0)), jax.jit(tx.update), []
  old = jax.device_get(state.basis)
  for t in range(steps):
    _, state = step(_grads(t), state)
    new = jax.device_get(state.basis)
    changed = jax.tree.map(lambda o, n: np.any(o != n, axis=(-2, -1)), old, new)
    rows.append(np.concatenate([*map(np.atleast_1d, changed.values())]))
    old = new
  return np.stack(rows)


def test_all_at_step_0_then_each_every_gap():
  gap = 40
  changes = _changes(Staggered(gap), 2 * gap + 1)
  assert changes[0].all()
  later = changes[1:]
  # Thirteen matrices refresh in forty steps. Spacing them by the golden ratio
  # avoids collisions.
  assert later.sum(axis=1).max() == 1
  for unit in later.T:
    (turns,) = np.nonzero(unit)
    assert len(turns) == 2 and turns[1] - turns[0] == gap


def test_an_integer_gap_finds_all_at_once():
  changes = _changes(3, 7)
  chex.assert_trees_all_equal(changes.all(axis=1), np.arange(7) % 3 == 0)
  chex.assert_trees_all_equal(changes.any(axis=1), np.arange(7) % 3 == 0)


@each('subspace', ['coordinates', 'random'], quick=['coordinates'])
def test_one_layer_at_a_time_is_the_stack(subspace):
  """A layer-wise step passes one layer and its index.

  The layer then refreshes at the same steps as in the whole stack.
  """
  inner = optax.sgd(0.1, momentum=0.9)
  tx = galore(inner, rank=2, gap=Staggered(5), subspace=subspace)
  whole = {k: SHAPES[k] for k in ('down', 'q', 'up')}
  pick = lambda t: {k: _grads(t)[k] for k in whole}
  layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  state, step = jax.jit(tx.init)(pick(0)), jax.jit(tx.update)
  init = jax.jit(tx.init)
  layers = [init(layer(pick(0), i)) for i in range(4)]
  one = jax.jit(lambda g, s, i: tx.update(g, s, layer=i))
  for t in range(7):
    updates, state = step(pick(t), state)
    for i in range(4):
      u, layers[i] = one(layer(pick(t), i), layers[i], i)
      # The tolerance allows for rounding: a product of a stack and one of a
      # single matrix may sum their 11 terms in a different order. Momentum
      # accumulates the errors of seven steps.
      assert_close(u, layer(jax.device_get(updates), i), operations=7 * 11)


def test_a_shared_counter_cannot_restart_in_turns():
  with pytest.raises(ValueError, match='take turns'):
    galore(optax.adam(0.1), gap=Staggered(5), moments='reset')
