"""In which precision updates are computed: float32 at least.

A second moment in bfloat16 never decays (0.999 of it rounds to itself), and
optax keeps moments in the type of the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def full(x: Any) -> Any:
  """Returns an array, abstract or not, in float32 at least.

  >>> full(jnp.ones(1, jnp.bfloat16)).dtype
  dtype('float32')
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype)
  return x.astype(dtype)


def in_float32(tx: Any) -> optax.GradientTransformationExtraArgs:
  """Runs a transformation on float32 copies, so that its moments are float32.

  Args:
    tx: the transformation.

  Returns:
    The same; its updates have the dtype of the gradients.

  Example:
    >>> tx = in_float32(optax.trace(0.9))
    >>> g = jnp.ones(1, jnp.bfloat16)
    >>> updates, state = tx.update(g, tx.init(g))
    >>> updates.dtype, state.trace.dtype
    (dtype(bfloat16), dtype('float32'))
  """
  tx = optax.with_extra_args_support(tx)

  def update_fn(updates, state, params=None, **extra_args):
    new, state = tx.update(wide(updates), state, wide(params), **extra_args)
    return optax.tree.cast_like(new, updates), state

  init_fn = lambda params: tx.init(wide(params))
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the root mean square over `axes`, which are kept.

  >>> rms(jnp.array([[3.0, -3.0], [1.0, -7.0]]), (-1,)).round(4)
  Array([[3.],
         [5.]], dtype=float32)
  """
  return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the root of the sum of squares over `axes`, which are kept.

  Library norms are not used for arrays with the shape of a weight: some
  versions of JAX over-count `jnp.linalg.norm` of a sharded matrix on GPUs.

  >>> norm(jnp.array([[3.0, 4.0], [0.0, -2.0]]), (-1,)).round(4)
  Array([[5.],
         [2.]], dtype=float32)
  """
  return jnp.sqrt(jnp.sum(jnp.square(full(x)), axis=axes, keepdims=True))


def close(x: Any, y: Any) -> bool:
  """Whether two arrays agree, to 1e-4 of the largest number in them.

  >>> close(jnp.array([1e-6, 1.0]), jnp.array([0.0, 1.0]))
  True
  """
  if x.shape != y.shape or not jnp.issubdtype(x.dtype, jnp.number):
    return x.shape == y.shape
  x, y = np.asarray(full(x)), np.asarray(full(y))
  atol = 1e-4 * np.max(np.abs(np.nan_to_num(x)), initial=0)
  return np.allclose(x, y, rtol=1e-4, atol=atol, equal_nan=True)


def wide(tree: Any) -> Any:
  """Returns a tree of arrays, abstract or not, in float32 at least.

  >>> wide({'w': jnp.ones(1, jnp.bfloat16)})
  {'w': Array([1.], dtype=float32)}
  """
  return jax.tree.map(full, tree)


def single(tree: Any, value: float) -> Any:
  """Returns arrays of one element, with the axes of those of a tree.

  >>> single({'w': jnp.ones((2, 3))}, 0.5)
  {'w': Array([[0.5]], dtype=float32)}
  """
  return jax.tree.map(lambda x: jnp.full((1,) * x.ndim, value, 'f'), tree)
