"""jaxopt: `OptaxSolver`, which passes its extra arguments to the update."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.galore_optax.program import normal32
from tests.peers import steps

with warnings.catch_warnings():
  # jaxopt warns that it is no longer maintained.
  warnings.simplefilter('ignore', DeprecationWarning)
  import jaxopt

pytestmark = pytest.mark.peers

X, Y = normal32((16, 7), 8), normal32((16, 5), 9)
PARAMS = {
  'up': normal32((7, 11)) / 3,
  'bias': jnp.zeros((11,)),
  'down': normal32((11, 5), 1) / 3,
}
STEPS = 30


def loss(params, x, y):
  h = jnp.tanh(x @ params['up'] + params['bias'][None])
  return jnp.mean((h @ params['down'] - y) ** 2)


@pytest.mark.parametrize(
  'make',
  [
    lambda: optax.chain(go.galore(rank=3, gap=10), optax.adamw(0.03)),
    lambda: go.galore_muon(0.1, rank=3, gap=10),
    lambda: go.frugal(0.01, density=0.5, gap=10),
  ],
  ids=['chain', 'muon', 'frugal'],
)
def test_run(make):
  """The solver's loop gives the weights of the same steps without it."""
  solver = jaxopt.OptaxSolver(loss, make(), maxiter=STEPS, tol=0)
  found, end = solver.run(PARAMS, X, Y)
  assert loss(found, X, Y) < 0.6 * loss(PARAMS, X, Y)
  assert steps.bases(end.internal_state).keys() == {'up', 'down'}
  params, state = PARAMS, solver.init_state(PARAMS, X, Y)
  for _ in range(STEPS):
    params, state = solver.update(params, state, X, Y)
  np.testing.assert_allclose(loss(params, X, Y), loss(found, X, Y), rtol=1e-3)


def test_a_step_is_that_of_optax():
  tx = go.galore_adamw(0.03, weight_decay=0.1, rank=3, gap=10)
  solver = jaxopt.OptaxSolver(loss, tx, maxiter=STEPS, jit=False)

  def by_jaxopt(params, state):
    params, state = solver.update(params, state, X, Y)
    return params, state.internal_state

  def by_optax(params, state):
    grads = jax.grad(loss)(params, X, Y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  first = solver.init_state(PARAMS, X, Y)
  found = by_jaxopt(PARAMS, first)
  expected = by_optax(PARAMS, tx.init(PARAMS))
  steps.assert_equal_leaves(found, expected)
