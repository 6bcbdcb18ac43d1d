"""Computation in float32, or in a wider dtype if the input has one.

optax stores moments in the dtype of the parameters. A second moment in bfloat16
never decays, because 0.999 times it rounds to the same number.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def at_least_float32(x: Any) -> Any:
  """Returns an array in float32, or in its own dtype if that is wider.

  The result for a `jax.ShapeDtypeStruct` is a `jax.ShapeDtypeStruct`.

  >>> at_least_float32(jnp.ones(1, jnp.bfloat16)).dtype
  dtype('float32')
  """
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype)
  return x.astype(dtype)


def in_float32(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Runs a transformation on float32 copies of gradients and parameters.

  Its moments are float32 too.

  Args:
    tx: the transformation.

  Returns:
    A transformation whose updates have the dtype of the gradients.

  Example:
    >>> tx = in_float32(optax.trace(0.9))
    >>> g = jnp.ones(1, jnp.bfloat16)
    >>> updates, state = tx.update(g, tx.init(g))
    >>> updates.dtype, state.trace.dtype
    (dtype(bfloat16), dtype('float32'))
  """
  tx = optax.with_extra_args_support(tx)

  def init_fn(params: optax.Params) -> optax.OptState:
    return tx.init(tree_at_least_float32(params))

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    grads = tree_at_least_float32(updates)
    weights = tree_at_least_float32(params)
    new, state = tx.update(grads, state, weights, **extra_args)
    return optax.tree.cast_like(new, updates), state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the root mean square over `axes`, which keep size one.

  >>> rms(jnp.array([[3.0, -3.0], [1.0, -7.0]]), (-1,)).round(4)
  Array([[3.],
         [5.]], dtype=float32)
  """
  return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the root of the sum of squares over `axes`, which keep size one.

  `jnp.linalg.norm` is not used for arrays with the shape of a weight. Some
  versions of JAX return too large a norm for a sharded matrix on GPUs.

  >>> norm(jnp.array([[3.0, 4.0], [0.0, -2.0]]), (-1,)).round(4)
  Array([[5.],
         [2.]], dtype=float32)
  """
  squared = jnp.square(at_least_float32(x))
  return jnp.sqrt(jnp.sum(squared, axis=axes, keepdims=True))


def allclose(x: Any, y: Any) -> bool:
  """Whether two arrays are equal up to 1e-4 of the largest entry of `x`.

  Only the shapes of arrays that are not numeric, such as keys, are compared.

  >>> allclose(jnp.array([1e-6, 1.0]), jnp.array([0.0, 1.0]))
  True
  """
  if x.shape != y.shape or not jnp.issubdtype(x.dtype, jnp.number):
    return x.shape == y.shape
  x, y = at_least_float32(np.asarray(x)), at_least_float32(np.asarray(y))
  atol = 1e-4 * np.max(np.abs(np.nan_to_num(x)), initial=0)
  return np.allclose(x, y, rtol=1e-4, atol=atol, equal_nan=True)


def tree_at_least_float32(tree: Any) -> Any:
  """Returns a tree with each array in float32, or in its dtype if wider.

  >>> tree_at_least_float32({'w': jnp.ones(1, jnp.bfloat16)})
  {'w': Array([1.], dtype=float32)}
  """
  return jax.tree.map(at_least_float32, tree)


def one_element(tree: Any, value: float) -> Any:
  """Returns a tree of one-element arrays with as many axes as those of `tree`.

  Leaves with the same number of axes are one array.

  >>> one_element({'w': jnp.ones((2, 3))}, 0.5)
  {'w': Array([[0.5]], dtype=float32)}
  """

  made: dict[int, jax.Array] = {}

  def filled(x: Any) -> jax.Array:
    if x.ndim not in made:
      made[x.ndim] = jnp.full((1,) * x.ndim, value, jnp.float32)
    return made[x.ndim]

  return jax.tree.map(filled, tree)
