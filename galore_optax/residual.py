"""Residual rules: updates from the gradient outside the subspace.

A rule is a frozen dataclass with two methods. `init(plan)` returns its state
for one weight, or `()`. Calling it returns an array that is added to the
update, and the new state. Options such as its learning rate are fields.

Axes: i input, o output; m projected side, r rank.
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
  """The gradient of one weight, its projection, and the inner's update."""

  g_io: jax.Array
  """The whole gradient as a stack of matrices [..., i, o], float32."""
  basis: Basis
  """The basis of each projected side."""
  low: jax.Array
  """The projected gradient [..., r, n]."""
  inner_update: jax.Array
  """The update [..., r, n] that the inner optimizer returned for `low`."""
  count: jax.Array
  """[], int32: number of earlier updates."""


Added: TypeAlias = tuple[jax.Array, Any]
"""An array [..., i, o] to add to the update, and the rule's new state."""


class Residual(Protocol):
  """A rule for the gradient outside the subspace."""

  def init(self, plan: Projection) -> Any:
    """Returns the state for one weight."""
    ...

  def __call__(self, plan: Projection, split: Split, state: Any) -> Added:
    """Returns an array [..., i, o] to add to the update, and the new state."""
    ...


def is_rule_or_none(residual: Any) -> bool:
  """Whether a value is None, or an instance with the methods of `Residual`.

  >>> is_rule_or_none(Sgd(0.1)), is_rule_or_none(Sgd), is_rule_or_none('sgd')
  (True, False, False)
  """
  if residual is None:
    return True
  methods = residual, getattr(residual, 'init', None)
  return all(map(callable, methods)) and not isinstance(residual, type)


def outside(plan: Projection, split: Split, share: float = 1.0) -> jax.Array:
  """Returns the gradient minus `share` times its projection: [..., i, o]."""
  inside = plan.unproject(share * split.low, split.basis)
  return split.g_io - to_matrix(plan, inside)


def growth_factor(size: jax.Array, last: jax.Array, limit: Any) -> jax.Array:
  """Returns the factor in [0, 1] that keeps a norm at most at `limit * last`.

  Args:
    size: the norm. If it is zero, the factor is finite.
    last: the previous norm. Zero and infinity do not limit: a bound of zero
      after one zero gradient would never end.
    limit: the largest ratio of the two norms.

  >>> growth_factor(jnp.float32(4), jnp.float32(1), 2).item()
  0.5
  """
  bounded = jnp.minimum(limit * last / jnp.where(size > 0, size, 1), 1)
  return jnp.where(last > 0, bounded, 1)


@dataclasses.dataclass(frozen=True)
class Sgd:
  """Gradient descent on the gradient outside the subspace.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(
    ...   optax.adam(1e-3), rank=2, residual=Sgd(1e-3), moments='reset')

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """

  learning_rate: optax.ScalarOrSchedule
  """A number, or a schedule of the step."""

  def __post_init__(self) -> None:
    """Raises ValueError for a learning rate that is negative or not finite."""
    checks.check_learning_rate(learning_rate=self.learning_rate)

  def init(self, plan: Projection) -> Any:
    """Returns an empty state."""
    return ()

  def direction(self, rest_io: jax.Array) -> jax.Array:
    """Returns the gradient outside the subspace unchanged."""
    return rest_io

  def __call__(self, plan: Projection, split: Split, state: Any) -> Added:
    """Returns minus the learning rate times the direction, and the state."""
    rest_io = self.direction(outside(plan, split))
    return -rate_at(self.learning_rate, split.count) * rest_io, state


@dataclasses.dataclass(frozen=True)
class Sign(Sgd):
  """Descent along the sign of the gradient outside the subspace.

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """

  def direction(self, rest_io: jax.Array) -> jax.Array:
    """Returns the sign of each entry."""
    return jnp.sign(rest_io)


@dataclasses.dataclass(frozen=True)
class Scaled:
  """The gradient, or the part outside, scaled as the inner scaled the rest.

  The factor is |inner update| / |projected gradient|, for each channel of the
  side that is not projected, or for the whole matrix. The norm of the scaled
  array grows at most by the factor `limit` from one update to the next. The
  papers measure this norm before the learning rate and before the inner's bias
  correction. The learning rate comes after this stage, and `correction`
  removes the bias correction. State: one number for each matrix.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, scales the
    part outside by channel; Zhu et al., `APOLLO
    <https://arxiv.org/abs/2412.05270>`_, 2024, scales the whole gradient by
    channel, and APOLLO-Mini scales it by matrix.
  """

  inside: float = 1.0
  """Share of the projection that is subtracted from the gradient: 1 leaves the
  exact complement, 0 leaves the whole gradient."""
  channels: bool = True
  """Whether each channel has a factor; otherwise each matrix has one."""
  scale: float = 1.0
  """Multiplies the result."""
  limit: float = 1.01
  """Largest ratio of the norms of two consecutive results, at least 1."""
  correction: Callable[[jax.Array], Any] | None = None
  """`(number of updates) -> factor` of the inner's bias correction, or None."""

  def __post_init__(self) -> None:
    """Raises ValueError for a limit below 1 or another option out of range."""
    checks.check_not_negative(scale=self.scale, inside=self.inside)
    checks.check_flag(channels=self.channels)
    rule = 'a number >= 1, the growth of a norm'
    checks.check_least(1, rule, limit=self.limit)

  def init(self, plan: Projection) -> Any:
    """Returns the norm [...] of the last result; zero does not limit."""
    # Infinity would not limit either, but `jax_debug_infs` raises for it.
    return jnp.zeros(plan.batch, float)

  def __call__(self, plan: Projection, split: Split, state: Any) -> Added:
    """Returns the scaled gradient with limited growth, and its norm."""
    # If both sides are projected, there is no other side with channels.
    by_channel = self.channels and len(plan.sides) == 1
    axes = (-2,) if by_channel else (-2, -1)
    gain = 1.0 if self.correction is None else self.correction(split.count)
    factor = norm(split.inner_update, axes) / gain
    factor = factor / (norm(split.low, axes) + TINY)
    if by_channel and plan.sides == (-1,):
      factor = jnp.swapaxes(factor, -2, -1)
    unscaled_io = split.g_io
    if not checks.is_zero(self.inside):
      unscaled_io = outside(plan, split, self.inside)
    scaled_io = factor * unscaled_io
    size = norm(scaled_io, (-2, -1))
    shrink = growth_factor(size, state[..., None, None], self.limit)
    return self.scale * gain * shrink * scaled_io, (shrink * size)[..., 0, 0]


TINY = 1e-8
"""Added to norms before a division by them."""
