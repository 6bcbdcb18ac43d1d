"""This module holds Adafactor as the GaLore reference computes it.

Axes: r rows and n columns of a matrix, d size of a vector. Leading axes are
batch: each matrix, or vector, of a stack is one of its own. A leaf is a stack
of vectors [..., d] if its path names a norm, scale or bias, and a stack of
matrices [..., r, n] otherwise (`selection.own_axes`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths as selection
from galore_optax.precision import full
from galore_optax.presets.step_size import rms


class FactoredState(NamedTuple):
  """The state of `scale_by_galore_factored_rms`; MaskedNode for the unused."""

  count: jax.Array
  """[], int32: updates done so far."""
  v_row: Any
  """Mean square of each row of a matrix: [..., r], float32."""
  v_col: Any
  """Mean square of each column of a matrix: [..., n], float32."""
  v: Any
  """Square of each element of a vector: [..., d], float32."""


def scale_by_galore_factored_rms(
  *,
  decay_rate: float = 0.8,
  eps: float = 1e-30,
  clip_threshold: float = 1.0,
) -> optax.GradientTransformation:
  """Rescales by a factored second moment, then clips the RMS of each matrix.

  `optax.scale_by_factored_rms` and `optax.clip_by_block_rms`, but every matrix
  is factored, however small, and a stack of matrices equals a loop over them.
  State: r + n floats for a matrix [r, n], d for a vector [d].

  Args:
    decay_rate: at step t = 1, 2, ... the moment decays by 1 - t^-decay_rate.
    eps: added to the square of each gradient.
    clip_threshold: largest RMS of the result; infinity for no limit.

  Example:
    >>> tx = scale_by_galore_factored_rms()
    >>> params = {'up': jnp.array([[3.0, -4.0]]), 'bias': jnp.array([2.0])}
    >>> updates, state = tx.update(params, tx.init(params))
    >>> updates['up'], state.v_row['up'], state.v['up']
    (Array([[ 1., -1.]], ...), Array([12.5], ...), MaskedNode())

  References:
    Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
  """

  def init_fn(params: optax.Params) -> FactoredState:
    def zeros(shape_of, *, factored: bool):
      return jax.tree_util.tree_map_with_path(
        lambda path, x: (
          jnp.zeros(shape_of(x.shape), jnp.promote_types(x.dtype, jnp.float32))
          if _is_matrix(_name(path), x) == factored
          else optax.MaskedNode()
        ),
        params,
      )

    return FactoredState(
      count=jnp.zeros([], jnp.int32),
      v_row=zeros(lambda shape: shape[:-1], factored=True),
      v_col=zeros(lambda shape: shape[:-2] + shape[-1:], factored=True),
      v=zeros(lambda shape: shape, factored=False),
    )

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, FactoredState]:
    del params
    count = jnp.asarray(optax.safe_increment(state.count))
    weight = count.astype(float) ** -decay_rate
    grads, treedef = jax.tree.flatten(updates)
    moments = zip(*map(treedef.flatten_up_to, state[1:]), strict=True)
    results = [
      _rescale(name, g, v, weight, eps, clip_threshold)
      for name, g, v in zip(
        selection.paths(updates), grads, moments, strict=True
      )
    ]
    new_grads = treedef.unflatten([u for u, _ in results])
    v_row, v_col, v = (
      treedef.unflatten([moment[field] for _, moment in results])
      for field in range(3)
    )
    return new_grads, FactoredState(count, v_row, v_col, v)

  return optax.GradientTransformation(init_fn, update_fn)


def _rescale(name, g, moments, weight, eps, clip_threshold):
  """Returns the rescaled gradient of a leaf and its (v_row, v_col, v)."""
  u = full(g)
  squared = jnp.square(u) + eps
  weight = weight.astype(u.dtype)
  average = lambda old, new: (1 - weight) * old + weight * new
  v_row, v_col, v = moments
  if _is_matrix(name, g):
    v_row = average(v_row, jnp.mean(squared, axis=-1))
    v_col = average(v_col, jnp.mean(squared, axis=-2))
    relative_row = v_row / jnp.mean(v_row, axis=-1, keepdims=True)
    u *= jax.lax.rsqrt(relative_row)[..., None]
    u *= jax.lax.rsqrt(v_col)[..., None, :]
  else:
    v = average(v, squared)
    u *= jax.lax.rsqrt(v)
  u /= jnp.maximum(
    1.0, rms(u, selection.own_axes(name, g.ndim)) / clip_threshold
  )
  return u.astype(g.dtype), (v_row, v_col, v)


def _is_matrix(name: str, x: Any) -> bool:
  return len(selection.own_axes(name, x.ndim)) == 2


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
