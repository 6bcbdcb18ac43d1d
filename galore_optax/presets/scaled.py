"""This module holds the methods that scale the gradient as Adam would."""

from typing import Any

import optax

from galore_optax import decay
from galore_optax.galore import galore, names_options
from galore_optax.presets import adam, inners
from galore_optax.presets.inners import Inner
from galore_optax.residual import Scaled
from galore_optax.subspace.finders import Gaussian


@names_options('residual')
def fira(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 128,
  scale: float = 0.25,
  limit: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  inner: Inner | None = None,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore's Adam, and the rest of the gradient scaled as Adam scaled its part.

  The rest is the exact complement `G - P^T P G`, as in the paper; the
  reference's code subtracts `scale P^T P G`. As in the code, `scale`
  multiplies the projected part alone.

  State of a weight [i, o], i <= o: GaLore's, and one norm.

  Args:
    learning_rate: a number, or a schedule of the step.
    rank: number of basis vectors.
    scale: multiplies the part in the subspace.
    limit: largest growth of the rest's norm from one update to the next.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, on the weight that the update has changed.
    inner: replaces Adam: 'adam' (optax's), 'lion', 'sgdm', or a
      transformation without a learning rate. With moments in 8 bits:
      `quantize_state(scale_by_galore_adam())`.
    **options: others of `galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> from galore_optax import quantize_state, scale_by_galore_adam
    >>> tx = fira(0.01, rank=64, inner=quantize_state(scale_by_galore_adam()))
    >>> params = {'w': jnp.ones((128, 512))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024.
  """
  stage = _stage(
    *(inner, b1, b2, eps),
    rank=rank,
    scale=scale,
    residual=Scaled(limit=limit),
    **options,
  )
  return _optimizer(stage, learning_rate, weight_decay)


@names_options('subspace', 'residual')
def apollo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 256,
  gap: int = 200,
  scale: float = 1.0,
  channels: bool = True,
  limit: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  seed: int = 0,
  inner: Inner | None = None,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """The raw gradient, scaled by channel as Adam scales a random sketch of it.

  The sketch comes from a seed and is not stored (the reference stores it).
  State of a weight [i, o], i <= o: moments of rank o each, and one norm.

  Args:
    learning_rate: a number, or a schedule of the step.
    rank: rows of the sketch.
    gap: updates from one sketch to the next.
    scale: the update is multiplied by its root, as in the reference.
    channels: a factor for each channel; False has one for the matrix.
    limit: largest growth of the update's norm from one update to the next.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, on the weight that the update has changed.
    seed: of the sketches.
    inner: replaces Adam, as in `fira`.
    **options: others of `galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = apollo(0.01, rank=2)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
  """
  stage = _stage(
    *(inner, b1, b2, eps),
    rank=rank,
    gap=gap,
    scale=0.0,
    subspace=Gaussian(seed),
    residual=Scaled(
      whole=True, channels=channels, scale=scale**0.5, limit=limit
    ),
    **options,
  )
  return _optimizer(stage, learning_rate, weight_decay)


@names_options('rank', 'channels', of=apollo)
def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  *,
  scale: float = 128.0,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """APOLLO with a sketch of rank one and one factor for each matrix.

  State of a weight [i, o], i <= o: moments of o elements each, and one norm.

  Args:
    learning_rate: a number, or a schedule of the step.
    scale: the update is multiplied by its root.
    **options: others of `apollo`.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = apollo_mini(0.01)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
  """
  return apollo(learning_rate, rank=1, scale=scale, channels=False, **options)


def _stage(
  inner: Inner | None, b1: float, b2: float, eps: float, **options: Any
) -> optax.GradientTransformation:
  """Returns `galore` around the inner, GaLore's Adam where there is none."""
  if inner is None:
    inner = adam.scale_by_galore_adam(b1=b1, b2=b2, eps=eps)
  return galore(inners.without_rate(inner), **options)


def _optimizer(
  stage: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float,
) -> optax.GradientTransformationExtraArgs:
  return optax.chain(
    stage,
    optax.scale_by_learning_rate(learning_rate),
    decay.decay_updated_weights(learning_rate, weight_decay=weight_decay),
  )
