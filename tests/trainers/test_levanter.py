"""The optimizer in Equinox programs such as Levanter (commit 9263f81).

Levanter's src/levanter/trainer_state.py filters the trainable arrays of a model
and passes a function and the loss to `update`. Its models have named arrays of
haliax; this test has arrays.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax as go
from tests.galore_optax.program import each
from tests.trainers import program


class Model(eqx.Module):
  """A callable module with an activation, a static number and a counter."""

  up: eqx.nn.Linear
  down: eqx.nn.Linear
  calls: jax.Array
  act: callable
  width: int = eqx.field(static=True)

  def __init__(self, key):
    keys = jax.random.split(key)
    self.up = eqx.nn.Linear(16, 24, key=keys[0])
    self.down = eqx.nn.Linear(24, 16, key=keys[1])
    self.calls = jnp.int32(0)
    self.act = jax.nn.silu
    self.width = 24

  def __call__(self, x):
    return self.down(self.act(self.up(x)))


METHODS = {
  'galore': program.line,
  'muon': lambda: go.galore_muon(1e-1, rank=program.RANK, gap=2),
  'frugal': lambda: go.frugal(1e-2, density=0.25, gap=2),
  'reset': lambda: go.galore(
    optax.adamw(1e-2), rank=program.RANK, gap=2, moments='reset'
  ),
}


def trainable(tree):
  return eqx.filter(tree, eqx.is_inexact_array)


def update(tx, grads, state, params, **extra):
  extra = extra or {'obj_fn': None, 'loss': jnp.float32(0)}
  return tx.update(grads, state, params=params, **extra)


@each('method', METHODS, quick=['galore'])
def test_training_lowers_the_loss(method):
  model, tx = Model(jax.random.key(0)), METHODS[method]()
  state = tx.init(trainable(model))
  program.assert_low_rank(state, trainable(model), tx)

  @eqx.filter_jit
  def step(model, state, x, y):
    def loss_fn(model):
      return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
    grads, params = trainable(grads), trainable(model)
    updates, state = update(tx, grads, state, params, obj_fn=loss_fn, loss=loss)
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    return eqx.apply_updates(model, updates), state, loss

  losses = []
  for x, y in program.data(steps=8):
    model, state, loss = step(model, state, x, y)
    losses.append(float(loss))
  program.assert_falls(losses)


@each('whole', [False, True], quick=[True])
def test_updates_are_bit_equal_to_those_of_dicts(whole):
  # `whole`: many programs pass the whole model as parameters.
  model, tx = Model(jax.random.key(0)), program.line()
  params, step = trainable(model), jax.jit(tx.update)
  states = [tx.init(params), tx.init(program.plain(params))]
  for i in range(3):
    grads = jax.tree.map(lambda x: jnp.sin(x * (i + 2)), params)  # noqa: B023
    if whole:
      updates, states[0] = eqx.filter_jit(tx.update)(grads, states[0], model)
    else:
      updates, states[0] = step(grads, states[0], params)
    wanted, states[1] = step(
      program.plain(grads), states[1], program.plain(params)
    )
    assert jax.tree.structure(updates) == jax.tree.structure(grads)
    found, wanted = program.by_path(updates), program.by_path(wanted)
    assert found.keys() == wanted.keys()
    for path, x in found.items():
      np.testing.assert_array_equal(x, wanted[path])
