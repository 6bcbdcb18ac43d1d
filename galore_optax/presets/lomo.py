"""LOMO and AdaLomo, which are designed for a layer-wise step.

LOMO is SGD without state. AdaLomo has a factored second moment. Neither trains
well without clipping, so both clip by default. In `layerwise` they clip by the
norm of the whole gradient too.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.checks import check_pair, check_params
from galore_optax.clipping import clipped
from galore_optax.options import names_options
from galore_optax.precision import at_least_float32, rms
from galore_optax.presets.adafactor import scale_by_galore_factored_rms
from galore_optax.presets.inner import check_numbers, with_decay_and_rate


@names_options()
def lomo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  clip_norm: float | None = 1.0,
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Stochastic gradient descent without state, clipped by the global norm.

  The new weight is w - lr (c g + weight_decay w), where g is the gradient and
  c = min(1, clip_norm / (norm + 1e-6)).

  Args:
    learning_rate: a number, or a schedule of the step.
    clip_norm: largest global norm of the gradient; None for no clipping.
    weight_decay: decoupled, times the learning rate.

  Example:
    >>> tx = lomo(0.5)
    >>> params = {'w': jnp.array([3.0, 4.0])}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(f'{optax.tree.norm(updates):.4f}')
    0.5000

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with
    Limited Resources <https://arxiv.org/abs/2306.09782>`_, 2023.
  """
  return clipped(with_decay_and_rate(learning_rate, weight_decay), clip_norm)


@names_options()
def adalomo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  clip_norm: float | None = 1.0,
  weight_decay: float = 0.0,
  decay_rate: float = 0.8,
  clip_threshold: float = 1.0,
  eps: tuple[float, float] = (1e-30, 1e-3),
) -> optax.GradientTransformationExtraArgs:
  """LOMO with a factored second moment and a step size for each weight.

  The gradient is divided by the root of a factored second moment. The RMS (root
  mean square) of the result is limited to `clip_threshold` for each weight. The
  step size is the learning rate times the RMS of the weight. The matrices of a
  stack are independent weights. A leaf whose path names a norm, scale or bias
  is a vector, or a stack of vectors, and is not factored.

  State of a weight [m, n]: m + n elements, float32.

  Args:
    learning_rate: a number, or a schedule of the step.
    clip_norm: largest global norm of the gradient; None for no clipping.
    weight_decay: decoupled, times the step size of the weight.
    decay_rate: the decay rate of the second moment is 1 - t^-decay_rate at
      update t = 1, 2, ...
    clip_threshold: largest RMS of an update before the step size.
    eps: two numbers: the first is added to the squared gradient, the second is
      the smallest RMS of a weight in the step size.

  Example:
    >>> tx = adalomo(0.1)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state[0].v_row['w'].shape, state[0].v_col['w'].shape
    ((4,), (6,))

  References:
    Lv et al., `AdaLomo: Low-memory Optimization with Adaptive Learning Rate
    <https://arxiv.org/abs/2310.10195>`_, 2023.
  """
  check_numbers(learning_rate, weight_decay)
  check_pair(eps=eps)
  rule = optax.chain(
    scale_by_galore_factored_rms(
      decay_rate=decay_rate, eps=eps[0], clip_threshold=clip_threshold
    ),
    scale_by_weight_rms(weight_decay=weight_decay, eps=eps[1]),
    optax.scale_by_learning_rate(learning_rate),
  )
  return clipped(rule, clip_norm)


def scale_by_weight_rms(
  *, weight_decay: float = 0.0, eps: float = 1e-3
) -> optax.GradientTransformation:
  """Adds weight decay, then multiplies by the RMS of each weight.

  Args:
    weight_decay: multiplies the weights that are added to the updates.
    eps: the smallest RMS.

  >>> tx = scale_by_weight_rms()
  >>> g, w = {'w': jnp.ones(2)}, {'w': jnp.array([1.0, 7.0])}
  >>> tx.update(g, tx.init(w), w)[0]['w'].round(4)
  Array([5., 5.], dtype=float32)
  """

  def scale_leaf(path: str, u: jax.Array, w: jax.Array) -> jax.Array:
    w = at_least_float32(w)
    total = at_least_float32(u) + weight_decay * w
    size = rms(w, paths.own_axes(path, w.ndim))
    return (jnp.maximum(eps, size) * total).astype(u.dtype)

  def scale(updates: optax.Updates, params: optax.Params | None) -> Any:
    check_params(params, 'AdaLomo')
    names = jax.tree.structure(updates).unflatten(paths.paths(updates))
    return jax.tree.map(scale_leaf, names, updates, params)

  return optax.stateless(scale)
