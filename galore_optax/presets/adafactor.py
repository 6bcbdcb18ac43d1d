"""GaLore with Adafactor, as its PyTorch reference computes it.

Axes: r rows and n columns of a matrix, d size of a vector. Leading axes are
batch: each matrix, or vector, of a stack is one of its own. A leaf is a stack
of vectors [..., d] if its path names a norm, scale or bias, and a stack of
matrices [..., r, n] otherwise (`paths.own_axes`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.checks import (
  check_decay,
  check_learning_rate,
  check_not_negative,
  check_positive,
)
from galore_optax.decay import rate_at
from galore_optax.galore import galore, names_options, with_apply
from galore_optax.plan import Plan
from galore_optax.precision import full, rms
from galore_optax.projection import Projection


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

  check_positive(decay_rate=decay_rate)
  check_not_negative(eps=eps)
  if isinstance(clip_threshold, float | int) and not clip_threshold > 0:
    raise ValueError(f'clip_threshold must be > 0, got {clip_threshold!r}')

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
      for name, g, v in zip(paths.paths(updates), grads, moments, strict=True)
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
  u /= jnp.maximum(1.0, rms(u, paths.own_axes(name, g.ndim)) / clip_threshold)
  return u.astype(g.dtype), (v_row, v_col, v)


def _is_matrix(name: str, x: Any) -> bool:
  return len(paths.own_axes(name, x.ndim)) == 2


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


@names_options()
def galore_adafactor(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float | None = None,
  scale_parameter: bool = False,
  clip_threshold: float = 1.0,
  decay_rate: float = 0.8,
  eps: tuple[float, float] = (1e-30, 1e-3),
  weight_decay: float = 0.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Adafactor, equal to the PyTorch reference's `GaLoreAdafactor`.

  (With its `relative_step=False`.) The second moment is factored, and the RMS
  of the update clipped, in the low-rank space; the step size enters before the
  first moment, and weight decay acts on the weight before the update. Each
  matrix of a stack is one of its own; a leaf whose path names a norm, scale or
  bias is a vector, or a stack of vectors, and is not factored.

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, and r + o floats, with `b1` r o more.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment; None for none.
    scale_parameter: multiply the learning rate by the RMS of the whole weight.
    clip_threshold: largest RMS of the low-rank update before the step size.
    decay_rate: at step t = 1, 2, ... the second moment decays by
      1 - t^-decay_rate.
    eps: added to the square of each gradient; least scale of a parameter.
    weight_decay: decoupled, times the step size, on every leaf.
    **options: those of `galore`: rank, gap, scale, side, subspace, ...

  Returns:
    The transformation. Its `update` needs params.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = galore_adafactor(0.01, rank=2, scale_parameter=True)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state.inner[0].v_col['w'].shape
    (6,)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024;
    Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
  """
  check_learning_rate(learning_rate=learning_rate)
  check_not_negative(weight_decay=weight_decay)
  if b1 is not None:
    check_decay(b1=b1)
  tx: Any = galore(
    optax.chain(
      scale_by_galore_factored_rms(
        decay_rate=decay_rate, eps=eps[0], clip_threshold=clip_threshold
      ),
      _scale_by_step_size(),
      optax.identity() if b1 is None else optax.ema(b1, debias=False),
    ),
    **options,
  )
  floor = eps[1] if scale_parameter else None

  def with_steps(apply: Callable) -> Callable:
    # The step size of each weight acts before the inner's momentum, where only
    # the low-rank gradient is seen: it is handed through as an extra arg.
    def apply_fn(low, state, params=None, grads=None, **extra_args):
      if params is None:
        raise ValueError(
          'weight decay and the scale of parameters need params:'
          ' tx.update(g, state, params)'
        )
      rate = rate_at(learning_rate, state.count)
      leaves, treedef = jax.tree.flatten(params)
      plans = tx.plan(params)
      pairs = zip(plans, leaves, strict=True)
      sizes = [rate * _weight_scale(p, w, floor) for p, w in pairs]
      seen = [_as_seen(p, x) for p, x in zip(plans, sizes, strict=True)]
      updates, state = apply(
        low,
        state,
        None,
        params if grads is None else grads,
        step_size=treedef.unflatten(seen),
        **extra_args,
      )
      updates = jax.tree.map(
        lambda u, size, w: u - (size * weight_decay * w).astype(u.dtype),
        updates,
        treedef.unflatten(sizes),
        params,
      )
      return updates, state

    return apply_fn

  return with_apply(tx, with_steps)


def _scale_by_step_size() -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus `update(..., step_size=tree)`, a number a matrix."""

  def update_fn(updates, state, params=None, *, step_size, **extra_args):
    del params, extra_args
    updates = jax.tree.map(
      lambda u, size: jnp.asarray(-size, u.dtype) * u, updates, step_size
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )


def _weight_scale(plan: Plan, w: jax.Array, floor: float | None) -> jax.Array:
  """Returns the RMS of each matrix or vector of a leaf, axes kept."""
  w = full(w)
  if floor is None:
    return jnp.ones((1,) * w.ndim, w.dtype)
  own = paths.own_axes(plan.path, w.ndim)
  if isinstance(plan, Projection):
    own = sum(plan.axes, ())
  return jnp.maximum(rms(w, own), floor)


def _as_seen(plan: Plan, size: jax.Array) -> jax.Array:
  """Returns a scale of a weight as the inner sees the weight: [..., 1, 1]."""
  if not isinstance(plan, Projection):
    return size
  return size.transpose(plan.batch_axes + sum(plan.axes, ())).reshape(
    *[size.shape[axis] for axis in plan.batch_axes], 1, 1
  )
