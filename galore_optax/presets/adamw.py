"""This module holds named methods, each a few lines of the algebra."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from galore_optax import decay
from galore_optax.galore import galore, names_options
from galore_optax.paths import Targets
from galore_optax.presets import adafactor, adam, inners, step_size
from galore_optax.presets import badam as blocks_lib
from galore_optax.presets import frugal as split
from galore_optax.presets.inners import Inner
from galore_optax.presets.lomo import adalomo as adalomo
from galore_optax.presets.lomo import lomo as lomo
from galore_optax.presets.muon import galore_muon as galore_muon
from galore_optax.presets.scale import scale_sgd as scale_sgd
from galore_optax.presets.scaled import apollo as apollo
from galore_optax.presets.scaled import apollo_mini as apollo_mini
from galore_optax.presets.scaled import fira as fira
from galore_optax.quantized.state import quantize_state
from galore_optax.static import check_count
from galore_optax.subspace.finders import Subspace
from galore_optax.subspace.turns import Turns


@names_options()
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
  weight that the update has already changed. Under `optax.inject_hyperparams`
  rank, gap and any option that is callable belong in `static_args`.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, times the learning rate, on every leaf.
    **options: those of `galore`: rank, gap, scale, side, subspace, ...

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
  as_it_is = lambda inner: inner
  return _galore_adamw(
    as_it_is, learning_rate, b1, b2, eps, weight_decay, options
  )


@names_options()
def galore_adamw_8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
  block_size: int = 256,
  min_size: int = 4096,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """`galore_adamw` with its moments in blocks of 8 bits.

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, and 2 r o bytes of codes with 4 bytes for each block.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment before its bias correction.
    weight_decay: decoupled, on the weight that the update has changed.
    block_size: elements that share a float32 scale.
    min_size: moments with fewer elements stay float32.
    **options: those of `galore`.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = galore_adamw_8bit(0.01, rank=64)
    >>> params = {'w': jnp.ones((128, 512))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021.
  """
  in_8_bits = functools.partial(
    quantize_state, block_size=block_size, min_size=min_size
  )
  return _galore_adamw(
    in_8_bits, learning_rate, b1, b2, eps, weight_decay, options
  )


def _galore_adamw(
  store: Callable[[optax.GradientTransformation], optax.GradientTransformation],
  learning_rate: optax.ScalarOrSchedule,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  options: dict[str, Any],
) -> optax.GradientTransformationExtraArgs:
  """Returns `galore_adamw`, with the state of its Adam kept as `store` does."""
  inner = optax.chain(
    adam.scale_by_galore_adam(b1=b1, b2=b2, eps=eps),
    optax.scale_by_learning_rate(learning_rate),
  )
  return optax.chain(
    galore(store(inner), **options),
    decay.decay_updated_weights(learning_rate, weight_decay=weight_decay),
  )


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
  inner = optax.chain(
    adafactor.scale_by_galore_factored_rms(
      decay_rate=decay_rate, eps=eps[0], clip_threshold=clip_threshold
    ),
    step_size.scale_by_step_size(),
    optax.identity() if b1 is None else optax.ema(b1, debias=False),
  )
  return step_size.galore_with_step_sizes(
    inner,
    learning_rate,
    parameter_floor=eps[1] if scale_parameter else None,
    weight_decay=weight_decay,
    **options,
  )


def frugal(
  learning_rate: optax.ScalarOrSchedule,
  *,
  density: float = 0.25,
  gap: int = 200,
  subspace: str | Subspace = 'svd',
  inner: Inner = 'adam',
  residual: str = 'sign',
  residual_scale: float = 1.0,
  weight_decay: float = 0.0,
  targets: Targets = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam (or another inner) on a share of a weight, sign descent elsewhere.

  The state of the inner starts anew with each subspace. Density 1 is the inner
  alone and density 0 the residual rule alone, by structure.

  State of a weight [i, o], i <= o: an inner on density of its elements (Adam:
  2 density i o, float32), and for 'svd' a basis of density i^2, for 'columns',
  'rows' and 'entries' an int32 index of each coordinate.

  Args:
    learning_rate: a number, or a schedule of the step, for both parts.
    density: share of each target that the inner works on, in [0, 1]; rounded
      to whole directions, coordinates or layers, at least one (the reference
      truncates coordinates, perhaps to none).
    gap: updates from one subspace to the next.
    subspace: 'svd', 'random' or another one of `galore` (directions), 'columns'
      or 'rows' (inputs or outputs), 'entries', or 'blocks' (whole layers of
      stacks [L, in, out], in turns).
    inner: 'adam', 'lion', 'sgdm', or a transformation without a learning rate.
    residual: 'sign' or 'sgd'.
    residual_scale: multiplies the learning rate of the residual.
    weight_decay: decoupled, times the learning rate, on every leaf.
    targets: as in `galore`; other leaves are the inner's in full.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = frugal(0.01, density=0.25, subspace='columns')
    >>> params = {'w': jnp.ones((8, 6))}
    >>> updates, state = tx.update(params, tx.init(params), params)

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """
  return optax.chain(
    split.split(
      inners.without_rate(inner),
      density=density,
      gap=gap,
      subspace=subspace,
      residual=residual,
      residual_scale=residual_scale,
      targets=targets,
    ),
    decay.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )


def badam(
  learning_rate: optax.ScalarOrSchedule,
  *,
  switch_every: int = 100,
  order: str = 'random',
  inner: Inner = 'adam',
  weight_decay: float = 0.0,
  blocks: str = 'blocks/.*',
  train_rest: bool = False,
  master_weights: bool = False,
  start: int | None = None,
  seed: int = 0,
) -> blocks_lib.OneBlock:
  """Adam (or another inner) on one layer of a stack at a time.

  Its moments are those of one layer, and start anew with the next one. The
  position in the cycle follows from the step count, so a resumed run goes on.
  `layerwise` computes the weight gradient of the layer whose turn it is alone.

  State: the inner's for one layer, float32 (Adam: 8 bytes an element of the
  layer), with `master_weights` 4 bytes more.

  Args:
    learning_rate: a number, or a schedule of the step.
    switch_every: updates of a layer before the next one's turn.
    order: 'random' (a permutation, new in each cycle), 'ascending',
      'descending', or 'fixed': one layer for ever.
    inner: 'adam', 'lion', 'sgdm', or a transformation without a learning rate.
    weight_decay: decoupled, on what is trained.
    blocks: regex on the paths of the stacked leaves [L, ...].
    train_rest: train what is in no block (embedding, head, norm) too, at every
      step; it is frozen otherwise.
    master_weights: keep a float32 copy of the layer whose turn it is; for
      bfloat16 weights.
    start: the first layer; default the last for 'descending', else layer 0.
      A random order has none.
    seed: of the random order.

  Example:
    >>> import jax.numpy as jnp
    >>> tx = badam(0.01, order='ascending')
    >>> params = {'blocks': {'w': jnp.ones((4, 3, 5))}, 'head': jnp.ones(3)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(abs(updates['blocks']['w']).sum((1, 2)) > 0, updates['head'])
    [ True False False False] [0. 0. 0.]

  References:
    Luo et al., `BAdam <https://arxiv.org/abs/2404.02827>`_, 2024.
  """
  check_count(switch_every=switch_every)
  rule = functools.partial(
    blocks_lib.with_turns,
    inners.without_rate(inner),
    learning_rate,
    weight_decay=weight_decay,
    master_weights=master_weights,
  )
  return blocks_lib.one_block(
    rule(restart_every=None if order == 'fixed' else switch_every),
    rule(restart_every=None) if train_rest else None,
    turns=Turns(order, seed, start),
    switch_every=switch_every,
    blocks=blocks,
  )
