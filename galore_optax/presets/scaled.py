"""Methods that scale the gradient as Adam would: Fira, APOLLO, APOLLO-Mini."""

from typing import Any, Literal

import optax

from galore_optax import checks
from galore_optax.decay import decay_updated_weights
from galore_optax.galore import chain, galore
from galore_optax.options import names_options
from galore_optax.presets import inner as inner_lib
from galore_optax.presets.inner import Inner
from galore_optax.quantized.state import quantize_state
from galore_optax.residual import Scaled
from galore_optax.subspace.finders import Gaussian
from galore_optax.subspace.refresh import Staggered


@names_options('residual', of=galore)
def _scaled(
  learning_rate: optax.ScalarOrSchedule,
  rule: Any,
  *,
  gap: int | Staggered = 200,
  limit: float = 1.01,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  bits: Literal[8] | None = None,
  inner: Inner | None = None,
  **options: Any,
):
  """Returns `galore` around an inner, with the rule that `Scaled` makes."""
  inner_lib.check_numbers(learning_rate, weight_decay)
  checks.check_static(bits=bits)
  checks.require('8, or None for float32', lambda x: x in (8, None), bits=bits)
  alone = 'None beside an inner: give inner=quantize_state(...) alone'
  checks.require(alone, lambda x: not (x and inner is not None), bits=bits)
  restarts = options.get('moments') == 'reset'

  def correction(count):
    # A reset restarts the inner's counter.
    age = count % gap if restarts else count
    return inner_lib.bias_correction(b1, b2, age + 1)

  if inner not in ('lion', 'sgdm'):
    rule['correction'] = correction
  if inner is None:
    inner = inner_lib.scale_by_galore_adam(b1=b1, b2=b2, eps=eps)
    inner = quantize_state(inner) if bits else inner
  options = inner_lib.rotated_by(options, b1, b2) | dict(gap=gap)
  inner, residual = inner_lib.without_rate(inner), Scaled(limit=limit, **rule)
  return chain(
    galore(inner, residual=residual, **options),
    optax.scale_by_learning_rate(learning_rate),
    decay_updated_weights(learning_rate, weight_decay=weight_decay),
  )


@names_options(of=_scaled)
def fira(
  learning_rate: optax.ScalarOrSchedule,
  *,
  scale: float = 0.25,
  complement: Literal['exact', 'reference'] = 'exact',
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore's Adam, and the rest of the gradient scaled as Adam scaled its part.

  As in the reference's code, `scale` multiplies the projected part alone.

  State of a weight [i, o], i <= o: GaLore's, and one norm.

  Args:
    learning_rate: a number, or a schedule of the step.
    rank: number of basis vectors.
    gap: updates from one subspace to the next.
    scale: multiplies the part in the subspace.
    limit: largest growth of the rest's norm from one update to the next.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, on the weight that the update has changed.
    complement: the rest is G - P^T P G, as in the paper ('exact'), or
      G - scale P^T P G, as in the code that its figures are of ('reference').
    bits: of Adam's moments, 8; None for float32.
    inner: replaces Adam: 'lion', 'sgdm', or a transformation without a
      learning rate, its bias corrected as Adam's with b1 and b2.
    **options: others of `galore`.

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
  rule = dict(inside=1.0 if complement == 'exact' else scale)
  return _scaled(learning_rate, rule, scale=scale, **options)


@names_options('subspace', of=_scaled)
def apollo(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int | float = 256,
  scale: float = 1.0,
  channels: bool = True,
  seed: int = 0,
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
    bits: of Adam's moments, 8; None for float32.
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
  checks.check_flag(channels=channels)
  # Before its root is taken; a traced one is its maker's business.
  checks.check_not_negative(scale=scale)
  rule = dict(inside=0, channels=channels, scale=scale**0.5)
  options |= dict(rank=rank, scale=0.0, subspace=Gaussian(seed))
  return _scaled(learning_rate, rule, **options)


@names_options('rank', 'channels', of=apollo)
def apollo_mini(
  learning_rate: optax.ScalarOrSchedule, *, scale: float = 128.0, **options: Any
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
