"""In which precision updates are computed: float32 at least.

A second moment in bfloat16 never decays (0.999 of it rounds to itself), and
optax keeps moments in the type of the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
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


def in_float32(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
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

  def update_fn(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, Any]:
    wide, state = tx.update(_full(updates), state, _full(params), **extra_args)
    return optax.tree.cast_like(wide, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: tx.init(_full(params)), update_fn
  )


def _full(tree: Any) -> Any:
  return jax.tree.map(full, tree)


def rms(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  """Returns the root mean square over `axes`, which are kept.

  >>> rms(jnp.array([[3.0, -3.0], [1.0, -7.0]]), (-1,))
  Array([[3.],
         [5.]], dtype=float32)
  """
  return jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
