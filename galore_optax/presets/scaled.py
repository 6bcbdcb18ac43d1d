"""Fira, APOLLO and APOLLO-Mini, which scale raw gradients as Adam would."""

import dataclasses
from typing import Literal, Unpack

import jax
import optax

from galore_optax import checks
from galore_optax.chain import chain
from galore_optax.decay import decay_updated_weights
from galore_optax.galore import galore
from galore_optax.options import names_options
from galore_optax.presets.galore_options import (
  ApolloMiniOptions,
  FiraOptions,
  ScaledGaloreOptions,
  ScaledOptions,
  with_rotate_decays,
)
from galore_optax.presets.inner import (
  Inner,
  bias_correction,
  check_numbers,
  require_no_learning_rate,
  scale_by_galore_adam,
)
from galore_optax.quantized.state import quantize_state
from galore_optax.residual import Scaled
from galore_optax.subspace.finders import Gaussian
from galore_optax.subspace.refresh import Staggered


@names_options(of=galore)
def _scaled(
  learning_rate: optax.ScalarOrSchedule,
  rule: Scaled,
  *,
  gap: int | Staggered = 200,
  limit: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  bits: Literal[8] | None = None,
  inner: Inner | None = None,
  **options: Unpack[ScaledGaloreOptions],
) -> optax.GradientTransformationExtraArgs:
  """Returns `galore` with a residual rule that scales as the inner optimizer.

  Args:
    learning_rate: a number, or a schedule of the step.
    rule: the residual rule; its `limit` and `correction` are replaced.
    gap: as in `fira`, which documents all other options too.
    limit: as in `fira`.
    b1: as in `fira`.
    b2: as in `fira`.
    eps: as in `fira`.
    weight_decay: as in `fira`.
    bits: as in `fira`.
    inner: as in `fira`.
    **options: other options of `galore`.
  """
  check_numbers(learning_rate, weight_decay)
  checks.check_static(bits=bits)
  if bits not in (8, None):
    raise ValueError(f'bits must be 8, or None for float32, got {bits!r}')
  if bits and inner is not None:
    rule_of_bits = 'None beside an inner: give inner=quantize_state(...) alone'
    raise ValueError(f'bits must be {rule_of_bits}, got {bits!r}')
  resets = options.get('moments') == 'reset'

  def adam_correction(count: jax.Array) -> jax.Array:
    # `moments='reset'` restarts the inner optimizer's counter at each refresh.
    # `galore` does not accept it together with `Staggered`.
    if resets and not isinstance(gap, Staggered):
      count = count % gap
    return bias_correction(b1, b2, count + 1)

  correction = None if inner in ('lion', 'sgdm') else adam_correction
  if inner is None:
    adam = scale_by_galore_adam(b1=b1, b2=b2, eps=eps)
    inner = quantize_state(adam) if bits else adam
  return chain(
    galore(
      require_no_learning_rate(inner),
      gap=gap,
      residual=dataclasses.replace(rule, limit=limit, correction=correction),
      **with_rotate_decays(options, b1, b2),
    ),
    optax.scale_by_learning_rate(learning_rate),
    decay_updated_weights(learning_rate, weight_decay=weight_decay),
  )


@names_options(of=_scaled)
def fira(
  learning_rate: optax.ScalarOrSchedule,
  *,
  scale: float = 0.25,
  complement: Literal['exact', 'reference'] = 'exact',
  **options: Unpack[FiraOptions],
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Adam, plus the rest of the gradient, scaled as Adam would.

  The rest is the gradient outside the subspace. Each of its channels is
  multiplied by the ratio of norms of Adam's update and the projected gradient.
  As in the reference's code, `scale` multiplies only the part in the subspace.

  State of a weight [i, o], i <= o: that of `galore_adamw`, and one norm.

  Args:
    learning_rate: a number, or a schedule of the step.
    rank: number of basis vectors.
    gap: number of updates between two refreshes of the subspace.
    scale: multiplies the part of the update in the subspace.
    limit: the largest factor by which the norm of the scaled rest may grow from
      one update to the next.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, times the learning rate, on the updated weight.
    complement: the rest is G - P^T P G, as in the paper ('exact'), or
      G - scale P^T P G, as in the code of the paper's experiments
      ('reference').
    bits: bits of an element of Adam's moments, 8; None for float32.
    inner: replaces Adam: 'lion', 'sgdm', or a transformation without a learning
      rate, which must have Adam's bias correction with b1 and b2.
    **options: other options of `galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = fira(0.01, rank=64, bits=8)
    >>> params = {'w': jnp.ones((128, 512))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024.
  """
  checks.check_not_negative(scale=scale)
  checks.check_one_of(('exact', 'reference'), complement=complement)
  rule = Scaled(inside=1.0 if complement == 'exact' else scale)
  return _scaled(learning_rate, rule, scale=scale, **options)


@names_options(of=_scaled)
def apollo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 256,
  scale: float = 1.0,
  channels: bool = True,
  seed: int = 0,
  **options: Unpack[ScaledOptions],
) -> optax.GradientTransformationExtraArgs:
  """Scales the raw gradient by channel, as Adam scales a random projection.

  The random basis is generated from a seed at every update. It is not stored,
  unlike in the reference.

  State of a weight [i, o], i <= o: two moments of r o elements, a seed, and one
  norm.

  Args:
    learning_rate: a number, or a schedule of the step.
    rank: number of rows of the random basis.
    gap: number of updates between two changes of the random basis.
    scale: the update is multiplied by the root of it, as in the reference.
    channels: whether each channel has a factor; otherwise the matrix has one.
    limit: the largest factor by which the norm of the update may grow from one
      update to the next.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, times the learning rate, on the updated weight.
    seed: seed of the random bases.
    bits: bits of an element of Adam's moments, 8; None for float32.
    inner: replaces Adam, as in `fira`.
    **options: other options of `galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = apollo(0.01, rank=2)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
  """
  checks.check_flag(channels=channels)
  # Checked here, because the root of a negative number is complex or NaN.
  checks.check_not_negative(scale=scale)
  return _scaled(
    learning_rate,
    Scaled(inside=0, channels=channels, scale=scale**0.5),
    rank=rank,
    scale=0.0,
    subspace=Gaussian(seed),
    **options,
  )


@names_options(of=apollo)
def apollo_mini(
  learning_rate: optax.ScalarOrSchedule,
  *,
  scale: float = 128.0,
  **options: Unpack[ApolloMiniOptions],
) -> optax.GradientTransformationExtraArgs:
  """APOLLO with a random basis of rank one and one factor for each matrix.

  State of a weight [i, o], i <= o: two moments of o elements, a seed, and one
  norm.

  Args:
    learning_rate: a number, or a schedule of the step.
    scale: the update is multiplied by the root of it.
    **options: other options of `apollo`.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = apollo_mini(0.01)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
  """
  return apollo(learning_rate, rank=1, scale=scale, channels=False, **options)
