"""A small model with a stack of layers, and runs of both kinds of step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax

L, D, F, V = 3, 6, 11, 13


class Residual:
  """A model with an embedding, layers `h + tanh(h W) U`, and a head.

  The activations contain the positions as an integer leaf, which has no
  gradient.
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


def run(step, *, steps=3, params=None, examples=4):
  params = make_params() if params is None else params
  state = step.init(params)
  step = jax.jit(step, donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, params)
  for i in range(steps):
    params, state, metrics = step(params, state, make_batch(i, examples))
  return params, state, metrics


def run_whole_tree(model, tx, *, steps=3, params=None):
  params = make_params() if params is None else params
  state = tx.init(params)
  step = whole_tree_step(model, tx)
  for i in range(steps):
    params, state, loss, grads = step(params, state, make_batch(i))
  return params, {'loss': loss, 'grads': grads}


def galore_rule(gap=2, **options):
  # The inner optimizer has momentum, which is linear in the gradient and does
  # not amplify rounding errors. Adam could flip the sign of an entry that is
  # nearly zero.
  return galore_optax.galore(
    optax.sgd(0.1, momentum=0.9),
    rank=3,
    gap=gap,
    scale=1.0,
    targets=['blocks/.*'],
    **options,
  )
