"""GaLore with Adafactor, equal to the PyTorch reference.

Axes: r rows and n columns of a matrix, d size of a vector. Leading axes are
batch: the matrices, or vectors, of a stack are independent. A leaf is a stack
of vectors [..., d] if its path names a norm, scale or bias, and a stack of
matrices [..., r, n] otherwise (`paths.own_axes`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, edge, paths
from galore_optax.decay import rate_at
from galore_optax.galore import galore
from galore_optax.options import names_options
from galore_optax.plan import Plan
from galore_optax.precision import at_least_float32, rms
from galore_optax.presets.galore_options import GaloreOptions
from galore_optax.presets.inner import check_numbers
from galore_optax.projection import Projection, from_matrix, to_matrix
from galore_optax.stages import Galore, Stages


class FactoredState(NamedTuple):
  """State of `scale_by_galore_factored_rms`.

  The trees have the structure of the parameters. A matrix has a MaskedNode in
  `v`, and a vector has one in `v_row` and `v_col`.
  """

  count: jax.Array
  """[], int32: number of updates so far."""
  v_row: Any
  """[..., r], float32: moving average of each row's mean square."""
  v_col: Any
  """[..., n], float32: moving average of each column's mean square."""
  v: Any
  """[..., d], float32: moving average of each element's square."""


def scale_by_galore_factored_rms(
  *, decay_rate: float = 0.8, eps: float = 1e-30, clip_threshold: float = 1.0
) -> optax.GradientTransformation:
  """Rescales by a factored second moment, then clips the RMS of each matrix.

  It combines `optax.scale_by_factored_rms` and `optax.clip_by_block_rms`, with
  two differences. Matrices of every size are factored, and the matrices of a
  stack are independent.

  State: r + n float32 numbers for a matrix [r, n], d for a vector [d].

  Args:
    decay_rate: the decay rate of the moment is 1 - t^-decay_rate at step t = 1,
      2, ...
    eps: added to the square of each gradient.
    clip_threshold: largest RMS of a matrix or vector of the result; infinity
      for no limit.

  Example:
    >>> tx = scale_by_galore_factored_rms()
    >>> params = {'up': jnp.array([[3.0, -4.0]]), 'bias': jnp.array([2.0])}
    >>> updates, state = tx.update(params, tx.init(params))
    >>> updates['up'].round(4), state.v_row['up'].round(4), state.v['up']
    (Array([[ 1., -1.]], ...), Array([12.5], ...), MaskedNode())

  References:
    Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
  """
  checks.check_positive(decay_rate=decay_rate)
  checks.check_not_negative(eps=eps)
  rule = 'a number > 0, infinity for no limit'
  checks.check_above_zero(rule, clip_threshold=clip_threshold)

  def init_fn(params: optax.Params) -> FactoredState:
    leaves, treedef = jax.tree.flatten(params)
    moments = list(map(_initial_moments, paths.paths(params), leaves))
    v_row, v_col, v = _transpose(treedef, moments, 3)
    return FactoredState(jnp.zeros([], jnp.int32), v_row, v_col, v)

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, FactoredState]:
    count = jnp.asarray(optax.safe_increment(state.count))
    weight = count.astype(float) ** -decay_rate
    grads, treedef = jax.tree.flatten(updates)
    rows = zip(
      paths.paths(updates),
      grads,
      treedef.flatten_up_to(state.v_row),
      treedef.flatten_up_to(state.v_col),
      treedef.flatten_up_to(state.v),
      strict=True,
    )
    rescaled = [_rescale(*row, weight, eps, clip_threshold) for row in rows]
    updates, v_row, v_col, v = _transpose(treedef, rescaled, 4)
    return updates, FactoredState(count, v_row, v_col, v)

  return edge.at_edge(optax.GradientTransformation(init_fn, update_fn))


def _initial_moments(name: str, x: Any) -> tuple[Any, Any, Any]:
  """Returns the initial moments (v_row, v_col, v) of a leaf."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  none = optax.MaskedNode()
  if len(paths.own_axes(name, x.ndim)) < 2:
    return none, none, jnp.zeros(x.shape, dtype)
  *batch, r, n = x.shape
  return jnp.zeros((*batch, r), dtype), jnp.zeros((*batch, n), dtype), none


def _rescale(
  name: str,
  g: jax.Array,
  v_row: Any,
  v_col: Any,
  v: Any,
  weight: jax.Array,
  eps: float,
  clip_threshold: float,
) -> tuple[jax.Array, Any, Any, Any]:
  """Returns the rescaled gradient of a leaf, and its new v_row, v_col, v.

  `weight` is the weight of the new square in the moving averages.
  """
  u = at_least_float32(g)
  own_axes = paths.own_axes(name, g.ndim)
  squared = jnp.square(u) + eps
  weight = weight.astype(u.dtype)

  def average(old: jax.Array, new: jax.Array) -> jax.Array:
    return (1 - weight) * old + weight * new

  if len(own_axes) == 2:
    v_row = average(v_row, jnp.mean(squared, axis=-1))
    v_col = average(v_col, jnp.mean(squared, axis=-2))
    u *= jax.lax.rsqrt(v_row / v_row.mean(-1, keepdims=True))[..., None]
    u *= jax.lax.rsqrt(v_col)[..., None, :]
  else:
    v = average(v, squared)
    u *= jax.lax.rsqrt(v)
  u /= jnp.maximum(1.0, rms(u, own_axes) / clip_threshold)
  return u.astype(g.dtype), v_row, v_col, v


def _transpose(treedef: Any, rows: Sequence[Any], num: int) -> list[Any]:
  """Returns `num` trees from a row of `num` values for each leaf."""
  return [treedef.unflatten([row[i] for row in rows]) for i in range(num)]


@names_options(of=galore)
def galore_adafactor(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float | None = None,
  scale_parameter: bool = False,
  clip_threshold: float = 1.0,
  decay_rate: float = 0.8,
  eps: tuple[float, float] = (1e-30, 1e-3),
  weight_decay: float = 0.0,
  **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Adafactor, equal to the PyTorch reference's `GaLoreAdafactor`.

  The reference's option `relative_step` is False here. The second moment of the
  low-rank gradient is factored, and the RMS of the low-rank update is clipped.
  The step size multiplies before the first moment, and weight decay acts on the
  weight before the update. The matrices of a stack are independent. A leaf
  whose path names a norm, scale or bias is a vector, or a stack of vectors, and
  is not factored.

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, and r + o float32 numbers; r o more with `b1`.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay rate of the first moment; None for no first moment.
    scale_parameter: multiply the learning rate by the RMS of the whole weight.
    clip_threshold: largest RMS of the low-rank update before the step size.
    decay_rate: the decay rate of the second moment is 1 - t^-decay_rate at step
      t = 1, 2, ...
    eps: two numbers: the first is added to the square of each gradient, the
      second is the smallest RMS of a weight for `scale_parameter`.
    weight_decay: decoupled, times the step size, on every leaf.
    **options: options of `galore`: rank, gap, scale, side, subspace, ...

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
  check_numbers(learning_rate, weight_decay)
  if b1 is not None:
    checks.check_decay(b1=b1)
  checks.check_pair(eps=eps)
  checks.check_flag(scale_parameter=scale_parameter)
  inner = optax.chain(
    scale_by_galore_factored_rms(
      decay_rate=decay_rate, eps=eps[0], clip_threshold=clip_threshold
    ),
    _scale_by_step_size(),
    optax.identity() if b1 is None else optax.ema(b1, debias=False),
  )
  tx: Any = galore(inner, **options)

  return _with_step_sizes(
    tx.stages, learning_rate, scale_parameter, eps[1], weight_decay
  )


def _with_step_sizes(
  stages: Stages,
  learning_rate: optax.ScalarOrSchedule,
  scale_parameter: bool,
  floor: float,
  weight_decay: float,
) -> Galore:
  """Returns a `Galore` with a step size for each weight, and weight decay.

  The step size multiplies the update before the inner's momentum, but it
  depends on the whole weight, which the inner does not receive. It is passed to
  the inner as an extra argument.

  Args:
    stages: of a `galore` whose inner needs the extra argument `step_size`.
    learning_rate: a number, or a schedule of the step.
    scale_parameter: whether to multiply it by the RMS of the weight.
    floor: smallest RMS of a weight.
    weight_decay: decay rate, multiplied by the step size.
  """

  def step_sizes(state: Any, params: Any) -> Any:
    checks.check_params(params, 'a step that follows the weights')
    rate = rate_at(learning_rate, state.count)

    def step_size(plan: Plan, w: jax.Array) -> Any:
      return rate * _scale(plan, w, floor) if scale_parameter else rate * 1.0

    return jax.tree.map(step_size, plans_of(params), params)

  def plans_of(params: Any) -> Any:
    return jax.tree.structure(params).unflatten(stages.plan(params))

  def with_decay(updates: Any, params: Any, sizes: Any) -> Any:
    def of_leaf(plan: Plan, u: jax.Array, w: jax.Array, size: Any) -> jax.Array:
      return _decayed(plan, u, w, size, weight_decay)

    return jax.tree.map(of_leaf, plans_of(params), updates, params, sizes)

  def update(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    sizes = step_sizes(state, params)
    extra_args['step_size'] = sizes
    updates, state = stages.update(updates, state, None, **extra_args)
    return with_decay(updates, params, sizes), state

  def apply(
    low: Any,
    state: Any,
    params: Any = None,
    grads: Any = None,
    **extra_args: Any,
  ) -> tuple[Any, Any]:
    sizes = step_sizes(state, params)
    extra_args['step_size'] = sizes
    like = params if grads is None else grads
    updates, state = stages.apply(low, state, None, like, **extra_args)
    return with_decay(updates, params, sizes), state

  def with_keeper(f: Callable[[Any], Any]) -> Galore:
    changed = stages.with_keeper(f).stages
    return _with_step_sizes(
      changed, learning_rate, scale_parameter, floor, weight_decay
    )

  return Galore.of(
    dataclasses.replace(
      stages, update=update, apply=apply, with_keeper=with_keeper
    )
  )


def _scale_by_step_size() -> optax.GradientTransformationExtraArgs:
  """Multiplies the update of each matrix by minus its step size.

  Its update requires the extra argument `step_size`, a tree of step sizes.
  """

  def update_fn(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    *,
    step_size: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    if step_size is None:
      # `galore` tries its inner without extra arguments, and accepts an inner
      # that raises TypeError.
      raise TypeError('update needs the extra argument step_size')

    def scaled(u: jax.Array, size: Any) -> jax.Array:
      return jnp.asarray(-size, u.dtype) * u

    return jax.tree.map(scaled, updates, step_size), state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )


def _scale(plan: Plan, w: jax.Array, floor: float) -> jax.Array:
  """Returns the RMS of each matrix or vector of a weight, at least `floor`."""
  w = at_least_float32(w)
  if isinstance(plan, Projection):
    return jnp.maximum(rms(to_matrix(plan, w), (-2, -1)), floor)
  return jnp.maximum(rms(w, paths.own_axes(plan.path, w.ndim)), floor)


def _decayed(
  plan: Plan, u: jax.Array, w: jax.Array, size: Any, weight_decay: float
) -> jax.Array:
  """Returns an update with weight decay, scaled by the same step size."""
  if isinstance(plan, Projection):
    size = from_matrix(plan, jnp.broadcast_to(size, plan.matrix_shape))
  return u - (size * weight_decay * at_least_float32(w)).astype(u.dtype)
