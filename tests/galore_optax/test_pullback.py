"""A backward pass in pieces equals the one in one piece."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.layerwise.pullback import pull_back


def arguments():
  draw = np.random.default_rng(0).normal
  leaf = lambda *shape: jnp.asarray(draw(size=shape), jnp.float32)
  params = [leaf(3, 5), leaf(2), leaf(4, 5), leaf(5, 5)]
  return params, {'h': leaf(4, 3)}, {'h': leaf(4, 3)}


def f(params, x):
  w, unused, b, shared = params
  del unused
  return {'h': x['h'] + jnp.tanh((x['h'] @ w + b) @ shared @ shared) @ w.T}


def test_gradients_are_those_of_vjp_and_weights_are_read_before_changed():
  params, x, dy = arguments()

  @jax.jit
  def in_pieces(params):
    visit = lambda carry, i, grad: [
      p - grad if j == i else p for j, p in enumerate(carry)
    ]
    return pull_back(
      f,
      x,
      dy,
      params,
      num_params=4,
      read=lambda carry, i: carry[i],
      visit=visit,
    )

  @jax.jit
  def at_once(params):
    grads, dx = jax.vjp(f, params, x)[1](dy)
    return dx, jax.tree.map(jnp.subtract, params, grads)

  # The same operations in the same order.
  chex.assert_trees_all_equal(in_pieces(params), at_once(params))


def test_the_gradient_of_an_added_parameter_is_the_cotangent():
  x, dy = jnp.ones(3), jnp.arange(3.0)
  dx, carry = pull_back(
    lambda params, x: x + params[0],
    x,
    dy,
    jnp.zeros(3),
    num_params=1,
    read=lambda carry, i: carry,
    visit=lambda carry, i, grad: carry + grad,
  )
  chex.assert_trees_all_equal((dx, carry), (dy, dy))
