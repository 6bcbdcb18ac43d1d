"""Random parameters for the tests of models, without special values."""

import jax
import jax.numpy as jnp
import numpy as np


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
