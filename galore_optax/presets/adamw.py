"""GaLore with AdamW, with moments in float32 or in 8 bits."""

from typing import Any, Literal, Unpack

import optax

from galore_optax import checks
from galore_optax.chain import chain
from galore_optax.decay import decay_updated_weights
from galore_optax.galore import galore, quantize_bases
from galore_optax.options import names_options
from galore_optax.presets.galore_options import (
  GaloreOptions,
  with_rotate_decays,
)
from galore_optax.presets.inner import check_numbers, scale_by_galore_adam
from galore_optax.quantized.state import quantize_state


@names_options(of=galore)
def galore_adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
  """GaLore with AdamW, equal to the PyTorch reference's `GaLoreAdamW`.

  It differs from `galore(optax.adamw(...))` in two points, in which it follows
  the reference. eps is added before the bias correction, and weight decay acts
  on the updated weight. With `optax.inject_hyperparams`, list rank, gap and all
  callable options in `static_args`.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, times the learning rate, on every leaf.
    **options: options of `galore`: rank, gap, scale, side, subspace, ...

  Example:
    >>> import jax.numpy as jnp
    >>> tx = galore_adamw(0.01, rank=2, weight_decay=0.1)
    >>> params = {'w': jnp.ones((4, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> injected = optax.inject_hyperparams(
    ...   galore_adamw, static_args=('rank', 'gap'))
    >>> injected(0.01, rank=2).init(params).hyperparams['scale']
    Array(0.25, dtype=float32)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
  """
  check_numbers(learning_rate, weight_decay)
  adam = _adam(learning_rate, b1, b2, eps)
  options = with_rotate_decays(options, b1, b2)
  return _galore_adamw(adam, learning_rate, weight_decay, options)


@names_options(of=galore)
def galore_adamw_8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  block_size: int = 256,
  min_size: int = 4096,
  basis_bits: Literal[4, 8] | None = None,
  **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
  """`galore_adamw` with moments quantized to 8 bits in blocks.

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, 2 r o bytes of codes, and a scale of 4 bytes for each block.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, times the learning rate, on the updated weight.
    block_size: number of elements that share a float32 scale.
    min_size: moments with fewer elements stay float32.
    basis_bits: bits of an element of a stored basis; None stores it in the
      weight's dtype.
    **options: options of `galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = galore_adamw_8bit(0.01, rank=64)
    >>> params = {'w': jnp.ones((128, 512))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021.
  """
  checks.check_static(basis_bits=basis_bits)
  if basis_bits not in (4, 8, None):
    rule = '4, 8, or None for the dtype of the weight'
    raise ValueError(f'basis_bits must be {rule}, got {basis_bits!r}')
  check_numbers(learning_rate, weight_decay)
  adam = quantize_state(
    _adam(learning_rate, b1, b2, eps), block_size=block_size, min_size=min_size
  )
  options = with_rotate_decays(options, b1, b2)
  tx = _galore_adamw(adam, learning_rate, weight_decay, options)
  return tx if basis_bits is None else quantize_bases(tx, bits=basis_bits)


def _adam(
  learning_rate: optax.ScalarOrSchedule, b1: float, b2: float, eps: float
) -> optax.GradientTransformationExtraArgs:
  """Returns GaLore's Adam with a learning rate."""
  return optax.chain(
    scale_by_galore_adam(b1=b1, b2=b2, eps=eps),
    optax.scale_by_learning_rate(learning_rate),
  )


def _galore_adamw(
  adam: optax.GradientTransformationExtraArgs,
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float,
  options: GaloreOptions,
) -> optax.GradientTransformationExtraArgs:
  """Returns `galore` around Adam, followed by decay of the updated weights."""

  def update_without_params(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    # Adam does not use params. Withholding them makes the decay slope a
    # constant zero, which XLA folds.
    return adam.update(updates, state)

  inner = optax.GradientTransformationExtraArgs(
    adam.init, update_without_params
  )
  decay = decay_updated_weights(learning_rate, weight_decay=weight_decay)
  return chain(galore(inner, **options), decay)
