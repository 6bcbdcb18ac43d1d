"""A backward pass that is split into pieces equals a single backward pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.layerwise.passes import pull_back
from tests.rounding import assert_close


def arguments():
  draw = np.random.default_rng(0).normal
  leaf = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)
  shapes = {'w': (3, 5), 'unused': (2,), 'b': (4, 5), 'shared': (5, 5)}
  params = {name: leaf(*shape) for name, shape in shapes.items()}
  return params, {'h': leaf(4, 3)}, {'h': leaf(4, 3)}


def f(params, x):
  w, b, shared = params['w'], params['b'], params['shared']
  return {'h': x['h'] + jnp.tanh((x['h'] @ w + b) @ shared @ shared) @ w.T}


def test_gradients_are_those_of_vjp_and_weights_are_read_before_changed():
  params, x, dy = arguments()

  @jax.jit
  def in_pieces(params):
    return pull_back(
      lambda params, dy: jax.vjp(f, params, x)[1](dy),
      dy,
      params,
      names=params,
      read=dict.get,
      visit=lambda carry, name, grad: carry | {name: carry[name] - grad},
    )

  @jax.jit
  def at_once(params):
    grads, dx = jax.vjp(f, params, x)[1](dy)
    return dx, jax.tree.map(jnp.subtract, params, grads)

  # The two programs run the same operations. The tolerance allows for rounding
  # in four products of up to five terms.
  assert_close(in_pieces(params), at_once(params), operations=20)


def test_the_gradient_of_an_added_parameter_is_the_cotangent():
  x, dy = jnp.ones(3), jnp.arange(3.0)
  dx, carry = pull_back(
    lambda params, dy: jax.vjp(lambda p, x: x + p['b'], params, x)[1](dy),
    dy,
    jnp.zeros(3),
    names=['b'],
    read=lambda carry, name: carry,
    visit=lambda carry, name, grad: carry + grad,
  )
  # Sums of integers are exact.
  chex.assert_trees_all_equal((dx, carry), (dy, dy))
