"""The backward pass visits every weight once, with the gradient of autodiff."""

import functools

import jax
import jax.numpy as jnp
import pytest

from galore_optax.layerwise import stack
from galore_optax.layerwise.passes import Passes
from tests.galore_optax.layerwise.program import (
  D,
  L,
  Residual,
  make_batch,
  make_params,
)
from tests.rounding import assert_close

# Number of terms in a loss or a gradient: 28 tokens through 3 layers.
SUMS = 28 * 3
WIDTH = 128


class Branches(Residual):
  """A layer that reads one weight twice, one as a bias, and one not at all."""

  def block(self, layer_params, x):
    w = layer_params['shared']
    h = super().block(layer_params, x)['h']
    return {
      **x,
      'h': h + jnp.tanh(h @ w) @ w.T + layer_params['bias'][None, None],
    }


def subtract_gradients(model, params, batch, microbatches=1, visited=None):
  """Returns the weights minus their gradients, and the norm of those."""
  tree = stack.Parts(params)
  weights = tree.weights(params)
  microbatch = stack.split_microbatches(batch, microbatches)
  passes = Passes(model, tree, lambda weight: weight, microbatch)
  saved, x = passes.forward(weights)

  def visit(entry, name, grad, layer, squares):
    if visited is not None:
      visited.append(name)
    old = stack.take(entry[0], layer)
    return (stack.put(entry[0], old - grad, layer),)

  entries = {name: (weight,) for name, weight in weights.items()}
  entries, norm, _ = passes.backward(saved, x, entries, visit)
  return tree.build({name: entry[0] for name, entry in entries.items()}), norm


def branching_params():
  params = make_params()
  params['blocks'] |= {
    'shared': 0.1 * jnp.ones((L, D, D)),
    'bias': jnp.zeros((L, D)),
    'unused': jnp.ones((L, 2)),
  }
  return params


@pytest.mark.parametrize('microbatches', [1, 2])
def test_gradients_are_those_of_autodiff_though_each_visit_writes(microbatches):
  model, params, batch = Branches(), branching_params(), make_batch()
  visited = []

  @jax.jit
  def layerwise(params):
    return subtract_gradients(model, params, batch, microbatches, visited)

  @jax.jit
  def whole(params):
    grads = jax.grad(model, has_aux=True)(params, batch)[0]
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    return jax.tree.map(jnp.subtract, params, grads), norm

  assert_close(layerwise(params), whole(params), SUMS)
  layer = [f'blocks/{x}' for x in ('bias', 'shared', 'u', 'unused', 'w')]
  assert visited == ['head/w', 'norm/scale', *layer, 'embed/table']


class Wide:
  """Layers with two large weights, and a batch of few numbers."""

  def embed(self, params, batch):
    return batch

  def block(self, layer_params, x):
    return jnp.tanh(x @ layer_params['w']) @ layer_params['u']

  def loss(self, params, x, batch):
    return jnp.mean(x**2), {}


def test_scratch_memory_holds_the_gradients_of_only_one_layer():
  def scratch(num_layers):
    stacked = jnp.ones((num_layers, WIDTH, WIDTH))
    params = {'blocks': {'w': stacked, 'u': stacked + 1}}
    step = functools.partial(subtract_gradients, Wide())
    step = jax.jit(step, donate_argnums=0)
    compiled = step.lower(params, jnp.ones((1, WIDTH))).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  gradient = 4 * WIDTH**2
  # The input of every layer is kept, but the gradients of only one layer.
  assert scratch(20) - scratch(4) < 0.2 * 16 * gradient
  assert scratch(4) < 6 * gradient
