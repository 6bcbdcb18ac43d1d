"""This module holds `galore`: project, an inner transformation, unproject.

The two spellings are one transformation::

  tx = optax.chain(galore(rank=512, gap=200), optax.adamw(lr))
  tx = galore(optax.adamw(lr), rank=512, gap=200)

`optax.chain` hands every stage the same params, so a stage cannot shrink the
state of the next one. Hence `galore()` without an inner is a `Stage`, and
`chain` here, which importing `galore_optax` makes `optax.chain`, gives the
stage everything after it as its inner.

What works, each proved by a test:

| as | works | raises |
| --- | --- | --- |
| inner | sgd, momentum, nesterov, sign_sgd, lion | lbfgs (needs `value`) |
| | adam, adamw, amsgrad, radam, nadam, adabelief | lamb, lars (trust ratio) |
| | rmsprop, adagrad, adan, factored rms | adafactor scaled by parameters |
| | adafactor without parameter scale | decay that enters a momentum |
| inside the inner | masks, partition, schedules, clipping | |
| | inject_hyperparams, MultiSteps, apply_if_finite | |
| around | masked, partition, MultiSteps, named_chain | flatten (no matrix) |
| | inject_hyperparams, apply_if_finite | |
| | lookahead, contrib.schedule_free | |
| users | flax TrainState, nnx.Optimizer, equinox modules | |
| | FrozenDict, Haiku's dicts with '/' in keys | |
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import optax

from galore_optax import transform
from galore_optax.accumulation import first_of_chain
from galore_optax.options import Options
from galore_optax.paths import Targets
from galore_optax.projection import Axes, Projection
from galore_optax.residual import Residual
from galore_optax.subspace.finders import Subspace
from galore_optax.subspace.refresh import Staggered

Preset = TypeVar('Preset', bound=Callable)

_optax_chain = getattr(optax.chain, '__wrapped__', optax.chain)


class Stage(optax.GradientTransformationExtraArgs):
  """A `galore` that still lacks its inner: `chain` gives it what follows."""

  options: Options

  def __new__(cls, options: Options) -> 'Stage':
    """Returns a stage; called directly, it raises TypeError."""
    stage = super().__new__(cls, _no_inner, _no_inner)
    stage.options = options
    return stage


def galore(
  inner: optax.GradientTransformation | None = None,
  *,
  rank: int | float = 128,
  gap: int | Staggered = 200,
  scale: float = 0.25,
  side: str = 'std',
  subspace: str | Subspace = 'svd',
  residual: str | Residual | None = None,
  moments: str = 'keep',
  targets: Targets = None,
  axes: Mapping[str, Axes] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on gradients projected to a low-rank subspace.

  The gradient of each selected weight is projected onto the leading singular
  vectors of a recent one, the inner makes an update of it (its moments have
  the low-rank shape), and the update is projected back. Weight decay of the
  inner acts on the whole weight, exactly and unscaled. Leaves that are not
  selected go through the inner at full rank. Moments are float32 at least.

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, and what the inner keeps for r o elements (Adam: 2 r o, float32).

  Args:
    inner: any transformation that reads `params` for decoupled weight decay
      alone (the module has a table). Default: what follows in `optax.chain`.
    rank: number r of basis vectors; a float in (0, 1] is a share of the
      projected side.
    gap: updates from one refresh of the basis to the next, the first at 0; or
      `Staggered(updates)`, where matrices take turns.
    scale: multiplies the update that is projected back, nothing else.
    side: 'std' projects the shorter side (ties: input), 'reverse_std' the
      longer (ties: output), 'left' the input, 'right' the output, 'full' both.
    subspace: how a basis is found, in float32 at least: 'svd', 'gram',
      'randomized', 'power', 'random', 'coordinates', or a finder with its own
      options, of `galore_optax.subspace`. The default is exact and reads no
      basis but this gradient's, as the paper's code; 'power' is 10 to 20 times
      cheaper at 99.8% or more of the energy, 'gram' 3 to 5 times at all of it
      (tests.bench.subspace).
    residual: what becomes of the gradient outside the subspace: None drops it,
      'sgd', 'sign' (FRUGAL), 'fira', 'apollo', or a rule with its own options,
      of `galore_optax.residual`.
    moments: what a refresh does to the inner state of projected leaves:
      'keep' leaves it, 'reset' zeroes it and restarts its counters, 'rotate'
      carries it to the new basis.
    targets: regexes that match whole paths ('blocks/attention/q/kernel'), or
      a predicate `(path, leaf) -> bool`. Default: leaves whose last two axes
      are larger than rank, but for embeddings, heads, norms, scales, biases.
    axes: input and output axes by a regex on the path for kernels that are
      not [..., in, out]: `{'.*/query/kernel': (0, (1, 2))}` for [d, heads,
      head_dim]. Other axes are batch: each index has a basis of its own.

  Returns:
    The transformation; without `inner`, a stage for `optax.chain`. Extra args
    of `update` go to the inner.

  Raises:
    ValueError: an option out of range; at `init`, a target that matches
      nothing or does not fit the rank, no leaf selected, or an inner that
      reads `params` in another way (LAMB's trust ratio).

  Example:
    >>> import jax.numpy as jnp
    >>> tx = optax.chain(galore(rank=2, gap=10), optax.adamw(0.1))
    >>> tx.init({'w': jnp.ones((4, 6))})[0].inner[0][0].mu['w'].shape
    (2, 6)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
  """
  options = Options(
    rank, gap, scale, side, subspace, residual, moments, targets, axes
  )
  if inner is None:
    return Stage(options)
  return transform.projected(inner, options)


def projections_of(tree: Any, **options: Any) -> list[Projection | None]:
  """Returns how a `galore` with these options projects each leaf of a tree.

  >>> import jax.numpy as jnp
  >>> (p,) = projections_of({'w': jnp.ones((4, 6))}, rank=2)
  >>> p.low_shape
  (2, 6)
  """
  stage = galore(**options)
  assert isinstance(stage, Stage)
  return stage.options.projections(tree)


def names_options(
  *fixed: str, of: Callable[..., Any] = galore
) -> Callable[[Preset], Preset]:
  """Names the options of `galore` where a preset hands on `**options`.

  `help` lists them, and `optax.inject_hyperparams` can pass them: it goes by
  the signature, and would pass `options={}`.

  Args:
    *fixed: options that the preset sets itself, beside those it takes.
    of: what the preset hands them on to.

  Returns:
    A decorator of functions whose last parameter is `**options`.

  Example:
    >>> @names_options('side')
    ... def preset(learning_rate, **options):
    ...   return galore(optax.sgd(learning_rate), side='left', **options)
    >>> names = inspect.signature(preset).parameters
    >>> names['rank'], 'side' in names
    (<Parameter "rank: int | float = 128">, False)
  """

  def named(preset: Preset) -> Preset:
    signature = inspect.signature(preset)
    *own, _ = signature.parameters.values()
    taken = {parameter.name for parameter in own} | {*fixed}
    _, *options = inspect.signature(of).parameters.values()
    own += [option for option in options if option.name not in taken]
    vars(preset)['__signature__'] = signature.replace(parameters=own)
    return preset

  return named


@functools.wraps(_optax_chain)
def chain(
  *args: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """`optax.chain`, in which what follows a `galore` stage is its inner."""
  for position, stage in enumerate(args):
    before, after = args[:position], args[position + 1 :]
    if isinstance(stage, Stage) and after:
      if any(isinstance(other, Stage) for other in after):
        raise ValueError(
          'a chain takes one galore stage, got another after it; for several'
          ' ranks use optax.partition with a chain for each'
        )
      stage = transform.projected(_optax_chain(*after), stage.options)
      return chain(*before, stage)
  whole = _optax_chain(*args)
  return first_of_chain(whole, args[0]) if args else whole


def _no_inner(*args: Any, **kwargs: Any) -> Any:
  del args, kwargs
  raise TypeError(
    'galore(...) has no inner transformation. Write'
    ' optax.chain(galore(rank=512), optax.adamw(lr)), with optax.chain looked'
    ' up after `import galore_optax` (or galore_optax.chain), or'
    ' galore(optax.adamw(lr), rank=512)'
  )
