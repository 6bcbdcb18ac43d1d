"""What the tests of models run: parameters that are no special case."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(model, std):
  """Random parameters of a model, norm scales and biases included."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  rng = np.random.default_rng(2)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == 'scale' else 0.0
    return jnp.asarray(rng.normal(mean, std, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)
