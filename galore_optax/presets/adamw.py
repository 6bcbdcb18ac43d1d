"""GaLore with AdamW, with moments in float32 or in 8 bits."""

from typing import Any, Literal

import optax

from galore_optax import checks
from galore_optax.decay import decay_updated_weights
from galore_optax.galore import chain, galore, quantize_bases
from galore_optax.options import names_options
from galore_optax.presets import inner
from galore_optax.quantized.state import quantize_state


@names_options(of=galore)
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
  return _galore_adamw(learning_rate, b1, b2, eps, weight_decay, options, None)


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
  **options: Any,
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
  bits = '4, 8, or None for the dtype of the weight'
  checks.require(bits, lambda x: x in (4, 8, None), basis_bits=basis_bits)
  sizes = dict(block_size=block_size, min_size=min_size)
  tx = _galore_adamw(learning_rate, b1, b2, eps, weight_decay, options, sizes)
  return tx if basis_bits is None else quantize_bases(tx, bits=basis_bits)


def _galore_adamw(learning_rate, b1, b2, eps, weight_decay, options, sizes):
  """Returns GaLore with AdamW.

  `sizes` has the options of `quantize_state`; None keeps moments in float32.
  """
  inner.check_numbers(learning_rate, weight_decay)
  adam = optax.chain(
    inner.scale_by_galore_adam(b1=b1, b2=b2, eps=eps),
    optax.scale_by_learning_rate(learning_rate),
  )
  adam = adam if sizes is None else quantize_state(adam, **sizes)
  # Adam does not use params. Withholding them makes the decay slope a constant
  # zero, which XLA folds.
  blind = adam._replace(update=lambda g, s, *_, **__: adam.update(g, s))
  decay = decay_updated_weights(learning_rate, weight_decay=weight_decay)
  return chain(galore(blind, **inner.rotated_by(options, b1, b2)), decay)
