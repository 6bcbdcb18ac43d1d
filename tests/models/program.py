"""Parameters, pieces and a toy training, for the tests of models."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import galore
from models import lowrank

# A compiled function takes less time than its operations one by one, each of
# which would be compiled for each shape.
adapt = jax.jit(lowrank.adapt, static_argnums=1)
merge = jax.jit(lowrank.merge, static_argnums=1)


def drawn(model, std):
  """Returns random parameters of a model, also norm scales and biases.

  Args:
    model: The model, as pure functions.
    std: Standard deviation; the mean is 1 for norm scales and 0 otherwise.
  """
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(2)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def loss_of_pieces(model, params, batch):
  """Returns the loss and the sums of a stacked model, computed in pieces."""
  x = jax.jit(model.embed)({'embed': params['embed']}, batch)
  block = jax.jit(model.block)
  for layer in range(model.config.num_layers):
    x = block(jax.tree.map(operator.itemgetter(layer), params['blocks']), x)
  last = {
    name: part
    for name, part in params.items()
    if name not in ('embed', 'blocks')
  }
  return jax.jit(model.loss)(last, x, batch)


def trained_on_two_images(config, num_rows):
  """Trains a diffusion model for 200 steps of GaLore on an image of each class.

  Args:
    config: The model, with two classes.
    num_rows: Number of images in a batch.

  Returns:
    The parameters, the losses and the two images, whose pixels are -1 or 1.
  """
  layers = config.layers()
  rng = np.random.default_rng(5)
  images = rng.integers(0, 2, (2, *config.image_shape)) * 2 - 1
  tx = galore(optax.adam(1e-2), rank=4, gap=20, scale=1.0)

  @jax.jit
  def step(params, state, batch):
    (loss, _), grads = jax.value_and_grad(layers, has_aux=True)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  params = jax.jit(layers.init)(jax.random.key(0))
  state = tx.init(params)
  losses = []
  for _ in range(200):
    labels = rng.integers(0, 2, num_rows, dtype=np.int32)
    batch = {
      'inputs': np.float32(images[labels]),
      'labels': labels,
      'noise': rng.integers(0, 2**32, (num_rows, 2), dtype=np.uint32),
      'weights': np.ones(num_rows, np.float32),
    }
    params, state, loss = step(params, state, batch)
    losses.append(float(loss))
  return params, losses, images
