"""Layer-wise = whole tree, on the same gradients."""


import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.layerwise import layerwise

L, D, F, V = 5, 6, 11, 13


class Residual:
  """h + tanh(h W) U, entered by an embedding, read by a head.

  Positions ride along as an integer leaf.
  """

  def __init__(self, tied=False):
    self.tied = tied

  def embed(self, params, batch):
    h = params['embed']['table'][batch['tokens']]
    return {'h': h, 'positions': batch['positions']}

  def block(self, layer_params, x):
    h = x['h'] + 0.1 * x['positions'][..., None].astype(x['h'].dtype)
    h = h + jnp.tanh(h @ layer_params['w']) @ layer_params['u']
    return {**x, 'h': h}

  def loss(self, params, x, batch):
    head = params['embed']['table'].T if self.tied else params['head']['w']
    logits = (x['h'] * params['norm']['scale'][None, None]) @ head
    nll = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['targets']
    )
    return jnp.mean(nll), {'nll': jnp.sum(nll)}

  def __call__(self, params, batch):
    x = self.embed(params, batch)
    x, _ = jax.lax.scan(
      lambda x, p: (self.block(p, x), None), x, params['blocks']
    )
    return self.loss(params, x, batch)


def make_params(seed=0, dtype=jnp.float32):
  draw = np.random.default_rng(seed).normal
  leaf = lambda *shape: jnp.asarray(draw(size=shape) * 0.3, dtype)
  return {
    'embed': {'table': leaf(V, D)},
    'blocks': {'w': leaf(L, D, F), 'u': leaf(L, F, D)},
    'norm': {'scale': leaf(D)},
    'head': {'w': leaf(D, V)},
  }


def make_batch(seed=0, examples=4):
  draw = np.random.default_rng(seed + 100)
  tokens = draw.integers(0, V, size=(examples, 8))
  return {
    'tokens': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'positions': jnp.tile(jnp.arange(7), (examples, 1)),
  }


def whole_tree_step(model, tx):
  tx = optax.with_extra_args_support(tx)

  @jax.jit
  def step(params, state, batch):
    (loss, _), grads = jax.value_and_grad(model, has_aux=True)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, grads

  return step


def run_both(model, tx, *, steps=4, params=None, **options):
  params = params or make_params()
  step = layerwise(model, tx, **options)
  whole, state, whole_state = params, step.init(params), tx.init(params)
  step, whole_step = jax.jit(step), whole_tree_step(model, tx)
  for i in range(steps):
    batch = make_batch(i)
    params, state, metrics = step(params, state, batch)
    whole, whole_state, loss, grads = whole_step(whole, whole_state, batch)
  return (params, metrics), (whole, {'loss': loss, 'grads': grads})


RULES = {
  'sgd': lambda: optax.sgd(0.1),
  'adamw': lambda: optax.adamw(optax.linear_schedule(0.1, 0.01, 4)),
  'lion': lambda: optax.lion(0.01),
}


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('tied', [False, True])
def test_equals_the_whole_tree_step(rule, tied):
  layer, whole = run_both(Residual(tied), RULES[rule]())
  if tied:
    # The embedding's two gradients are added in another order.
    chex.assert_trees_all_close(layer[0], whole[0], rtol=1e-5, atol=1e-6)
  else:
    chex.assert_trees_all_equal(layer[0], whole[0])
  assert layer[1]['loss'] == whole[1]['loss']
