"""LOMO and AdaLomo: rules made for a layer-wise step.

LOMO is plain SGD that keeps nothing; AdaLomo keeps a factored second moment.
Both need clipping to learn, so both have it on. In `layerwise` the clipping
is by the norm of the whole gradient.
"""

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.checks import check_pair, check_params
from galore_optax.clipping import clipped
from galore_optax.options import names_options
from galore_optax.precision import full, rms
from galore_optax.presets.adafactor import scale_by_galore_factored_rms
from galore_optax.presets.inner import check_numbers, descend


@names_options()
def lomo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  clip_norm: float | None = 1.0,
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  """Stochastic gradient descent without state, clipped by the global norm.

  w' = w - lr (c g + weight_decay w), c = min(1, clip_norm / (norm + 1e-6)).

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
  return clipped(descend(learning_rate, weight_decay), clip_norm)


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
  """LOMO with an adaptive rate: factored RMS, normalised weight by weight.

  The update is the gradient over the root of a factored second moment, with a
  root mean square over the weight of at most `clip_threshold`; its step is the
  learning rate times the weight's own root mean square. Each matrix of a stack
  is a weight of its own; a leaf whose path names a norm, scale or bias is a
  vector, or a stack of them, and is not factored.

  Args:
    learning_rate: a number, or a schedule of the step.
    clip_norm: largest global norm of the gradient; None for no clipping.
    weight_decay: decoupled, times the rate of the weight.
    decay_rate: the second moment decays by 1 - t^-decay_rate at update t.
    clip_threshold: largest root mean square of an update before the rate.
    eps: added to the squared gradient; least root mean square of a weight.

  State of a weight [m, n]: m + n elements, float32.

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
  limits = dict(decay_rate=decay_rate, clip_threshold=clip_threshold)
  rule = optax.chain(
    scale_by_galore_factored_rms(eps=eps[0], **limits),
    scale_by_weight_rms(weight_decay=weight_decay, eps=eps[1]),
    optax.scale_by_learning_rate(learning_rate),
  )
  return clipped(rule, clip_norm)


def scale_by_weight_rms(*, weight_decay=0.0, eps=1e-3):
  """Adds decay, then multiplies by the RMS of each weight, at least eps.

  >>> tx = scale_by_weight_rms()
  >>> g, w = {'w': jnp.ones(2)}, {'w': jnp.array([1.0, 7.0])}
  >>> tx.update(g, tx.init(w), w)[0]['w'].round(4)
  Array([5., 5.], dtype=float32)
  """

  def by_weight(name, u, w):
    w = full(w)
    total = full(u) + weight_decay * w
    size = rms(w, paths.own_axes(name, w.ndim))
    return (jnp.maximum(eps, size) * total).astype(u.dtype)

  def scaled(updates, params):
    check_params(params, 'AdaLomo')
    names = jax.tree.structure(updates).unflatten(paths.paths(updates))
    return jax.tree.map(by_weight, names, updates, params)

  return optax.stateless(scaled)
