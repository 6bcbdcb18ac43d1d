"""What happens to the gradient outside the subspace.

A rule is a frozen dataclass with two methods: `init(plan)` returns its state
for one weight, `()` if it has none, and calling it returns what is added to the
update, and the new state. It carries what it needs, a learning rate included.

Axes: i input, o output; m projected side, r rank; leading axes are batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.decay import rate_at
from galore_optax.precision import norm
from galore_optax.projection import Basis, Projection, to_matrix


class Split(NamedTuple):
  """One weight's gradient, split by the subspace, and the inner's answer."""

  g_io: jax.Array  # the gradient as a stack of matrices [..., i, o], float32
  basis: Basis  # the basis that split it
  low: jax.Array  # the projected gradient [..., r, n]
  inner_update: jax.Array  # what the inner made of `low`
  count: jax.Array  # [], int32: updates done before


# What is added to an update [..., i, o], and the new state.
Added: TypeAlias = tuple[jax.Array, Any]


class Residual(Protocol):
  """How the rest of a gradient changes the weight."""

  def init(self, plan: Projection) -> Any:
    """Returns the state for one weight."""

  def __call__(self, plan: Projection, split: Split, state: Any) -> Added:
    """Returns what is added to the update [..., i, o], and the state."""
    ...


def outside(plan: Projection, split: Split, share: float = 1.0) -> jax.Array:
  """Returns the gradient less a share of its projection: [..., i, o]."""
  inside = plan.unproject(share * split.low, split.basis)
  return split.g_io - to_matrix(plan, inside)


@dataclasses.dataclass(frozen=True)
class Sgd:
  """Plain gradient descent on the rest.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(
    ...   optax.adam(1e-3), rank=2, residual=Sgd(1e-3), moments='reset')

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """

  learning_rate: optax.ScalarOrSchedule  # a number, or a schedule of the step

  def __post_init__(self) -> None:
    """Raises ValueError for what is no learning rate."""
    checks.check_learning_rate(learning_rate=self.learning_rate)

  def init(self, plan: Projection) -> Any:
    """Returns no state."""
    return ()

  def direction(self, rest_io: jax.Array) -> jax.Array:
    """Returns the rest as it is."""
    return rest_io

  def __call__(self, plan: Projection, split: Split, state: Any) -> Added:
    """Returns the direction of the rest, down."""
    rest_io = self.direction(outside(plan, split))
    return -rate_at(self.learning_rate, split.count) * rest_io, state


@dataclasses.dataclass(frozen=True)
class Sign(Sgd):
  """Descent along the sign of the rest.

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """

  def direction(self, rest_io: jax.Array) -> jax.Array:
    """Returns the sign."""
    return jnp.sign(rest_io)


@dataclasses.dataclass(frozen=True)
class Scaled:
  """The gradient, or its rest, scaled as the inner scaled the projection.

  The factor is |inner update| / |projected gradient|, for each channel of the
  side that is not projected or for the whole matrix. The norm of what comes
  out grows by at most `limit` from one update to the next. The papers measure
  it before the learning rate, which comes after the stage, and before the bias
  correction of the inner, which is told. State: one number a matrix.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, scales the
    rest by channel; Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_,
    2024, scales the whole gradient by channel, APOLLO-Mini by matrix.
  """

  # Share of the projection that is taken off the gradient: 1 is the exact
  # complement, 0 the whole gradient.
  inside: float = 1.0
  # A factor for each channel rather than one for the matrix.
  channels: bool = True
  scale: float = 1.0  # multiplies the update
  limit: float = 1.01  # largest growth of the update's norm, above 1
  # `(updates done) -> factor` of the inner's bias correction; or None.
  correction: Callable[[jax.Array], Any] | None = None

  def __post_init__(self) -> None:
    """Raises ValueError for a limit that lets nothing grow."""
    checks.check_not_negative(scale=self.scale, inside=self.inside)
    checks.check_flag(channels=self.channels)
    rule = 'a number >= 1, the growth of a norm'
    checks.check_least(1, rule, limit=self.limit)

  def init(self, plan: Projection) -> Any:
    """Returns the norm [...] of the last update: none yet, so no limit."""
    # Not of weak type: the state of a second update would be of another.
    return jnp.full(plan.batch, jnp.inf, float)

  def __call__(self, plan: Projection, split: Split, state: Any) -> Added:
    """Returns the scaled gradient or rest, its norm's growth limited."""
    # Of 'full' a channel is on no side: one factor for the matrix.
    by_channel = self.channels and len(plan.sides) == 1
    axes = (-2,) if by_channel else (-2, -1)
    gain = 1.0 if self.correction is None else self.correction(split.count)
    factor = norm(split.inner_update, axes) / gain
    factor = factor / (norm(split.low, axes) + TINY)
    if by_channel and plan.sides == (-1,):
      factor = jnp.swapaxes(factor, -2, -1)
    all_of_it = checks.is_zero(self.inside)
    what_io = split.g_io if all_of_it else outside(plan, split, self.inside)
    scaled_io = factor * what_io
    size = norm(scaled_io, (-2, -1))
    # After a zero gradient a bound of zero would hold for ever.
    last = jnp.where(state > 0, state, jnp.inf)[..., None, None]
    # 0 / 0 of a zero update is no bound.
    shrink = jnp.minimum(self.limit * last / jnp.where(size > 0, size, 1), 1)
    return self.scale * gain * shrink * scaled_io, (shrink * size)[..., 0, 0]


TINY = 1e-8  # added to norms that are divided by
