"""optimistix: `OptaxMinimiser`, which turns the transformation into a pytree.

It opens the closures of `init` and `update` to find the arrays in them, so they
must not refer to themselves.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import optimistix
import pytest

import galore_optax as go
from tests.galore_optax.program import normal32
from tests.peers import steps

pytestmark = pytest.mark.peers

X, Y = normal32((16, 7), 8), normal32((16, 5), 9)
PARAMS = {
  'up': normal32((7, 11)) / 3,
  'bias': jnp.zeros((11,)),
  'down': normal32((11, 5), 1) / 3,
}


def loss(params, args):
  x, y = args
  h = jnp.tanh(x @ params['up'] + params['bias'][None])
  return jnp.mean((h @ params['down'] - y) ** 2)


MAKERS = {
  'chain': lambda: optax.chain(go.galore(rank=3, gap=10), optax.adamw(0.03)),
  'schedule': lambda: go.galore_adamw(
    optax.cosine_decay_schedule(0.1, 100), rank=3, gap=10
  ),
  '8bit': lambda: go.galore_adamw_8bit(
    0.1, rank=3, gap=10, min_size=30, block_size=33
  ),
  'adafactor': lambda: go.galore_adafactor(0.1, rank=3, gap=10),
  'muon': lambda: go.galore_muon(0.1, rank=3, gap=10),
  'frugal': lambda: go.frugal(0.01, density=0.5, gap=10),
  'fira': lambda: go.fira(0.03, rank=3, gap=10),
  'apollo': lambda: go.apollo(0.03, rank=3, gap=10),
}


@pytest.mark.parametrize('name', MAKERS)
def test_minimise(name):
  solver = optimistix.OptaxMinimiser(MAKERS[name](), rtol=0.0, atol=0.0)
  found = optimistix.minimise(
    loss, solver, PARAMS, args=(X, Y), max_steps=40, throw=False
  )
  assert loss(found.value, (X, Y)) < 0.6 * loss(PARAMS, (X, Y))
  bases = steps.bases(found.state.opt_state)
  assert bases.keys() <= {'up', 'down'} and (bases or name == 'apollo')


def test_a_step_is_that_of_optax():
  tx = go.galore_adamw(0.03, weight_decay=0.1, rank=3, gap=10)
  solver = optimistix.OptaxMinimiser(tx, rtol=0.0, atol=0.0)

  def with_aux(params, args):
    return loss(params, args), None

  @eqx.filter_jit
  def by_optimistix(solver, params):
    f = jax.ShapeDtypeStruct((), jnp.float32)
    state = solver.init(with_aux, params, (X, Y), {}, f, None, frozenset())
    params, state, _ = solver.step(
      with_aux, params, (X, Y), {}, state, frozenset()
    )
    return params, state.opt_state

  @jax.jit
  def by_optax(params):
    grads = jax.grad(loss)(params, (X, Y))
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state

  steps.assert_equal_leaves(by_optimistix(solver, PARAMS), by_optax(PARAMS))
