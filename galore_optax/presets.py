"""This module holds named methods, each a few lines of the algebra."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import adafactor, adam, step_size
from galore_optax.galore import galore


def galore_adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore with AdamW, equal to the PyTorch reference's `GaLoreAdamW`.

  It differs from `galore(optax.adamw(...))` in two places, as the reference
  does: eps sits before the bias correction, and weight decay acts on the
  weight that the update has already changed.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, times the learning rate, on every leaf.
    **options: those of `galore`: rank, gap, scale, side, subspace, ...

  Example:
    >>> tx = galore_adamw(0.01, rank=2, weight_decay=0.1)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
  """
  inner = optax.chain(
    adam.scale_by_galore_adam(b1=b1, b2=b2, eps=eps),
    optax.scale_by_learning_rate(learning_rate),
  )
  return optax.chain(
    galore(inner, **options),
    decay_updated_weights(learning_rate, weight_decay=weight_decay),
  )


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
    b1: decay of the first moment; None or 0 for none.
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
    >>> tx = galore_adafactor(0.01, rank=2, scale_parameter=True)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> state.inner[0].v_col['w'].shape
    (6,)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024;
    Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.
  """
  inner = optax.chain(
    adafactor.scale_by_galore_factored_rms(
      decay_rate=decay_rate, eps=eps[0], clip_threshold=clip_threshold
    ),
    step_size.scale_by_step_size(),
    optax.ema(b1, debias=False) if b1 else optax.identity(),
  )
  return step_size.galore_with_step_sizes(
    inner,
    learning_rate,
    parameter_floor=eps[1] if scale_parameter else None,
    weight_decay=weight_decay,
    **options,
  )


def decay_updated_weights(
  learning_rate: optax.ScalarOrSchedule, *, weight_decay: float
) -> optax.GradientTransformation:
  """Decays the weights that the update makes: w' = (w + u) (1 - lr decay).

  Args:
    learning_rate: a number, or a schedule of the step.
    weight_decay: the decay.

  Example:
    >>> tx = decay_updated_weights(0.5, weight_decay=0.5)
    >>> w = {'w': jnp.array(3.0)}
    >>> u, _ = tx.update({'w': jnp.array(1.0)}, tx.init(w), w)
    >>> w['w'] + u['w']
    Array(3., dtype=float32)
  """
  schedule: Callable[[Any], Any] = (
    learning_rate if callable(learning_rate) else lambda _: learning_rate
  )

  def init_fn(params: optax.Params) -> optax.ScaleByScheduleState:
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
    shrink = schedule(state.count) * weight_decay
    if params is None:
      raise ValueError('weight decay needs params: tx.update(g, state, params)')
    updates = jax.tree.map(
      lambda u, w: u - (shrink * (w + u)).astype(u.dtype), updates, params
    )
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count=count)

  return optax.GradientTransformation(init_fn, update_fn)
