"""This module holds what happens to the gradient outside the subspace.

A rule is a frozen dataclass with two methods: `init(projection)` returns its
state for one weight, `()` if it has none, and calling it returns what is added
to the update, and the new state.

Axes: i input, o output; m projected side, r rank; leading axes are batch.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from galore_optax import projection as projection_lib
from galore_optax.projection import Basis, Projection


class Split(NamedTuple):
  """One weight's gradient, split by the subspace, and the inner's answer."""

  g_io: jax.Array
  """The gradient as a stack of matrices [..., i, o]."""
  basis: Basis
  """The basis that split it."""
  low: jax.Array
  """The projected gradient."""
  inner_update: jax.Array
  """What the inner made of `low`."""
  response: jax.Array
  """[]: what the inner makes of a constant gradient of one: minus the learning
  rate for an optimizer, one for a `scale_by_...`."""
  gain: jax.Array
  """[]: the same, times its bias correction at this step, times a constant."""


class Residual(Protocol):
  """How the rest of a gradient changes the weight."""

  def init(self, projection: Projection) -> Any:
    """Returns the state for one weight."""
    ...

  def __call__(
    self, projection: Projection, split: Split, state: Any
  ) -> tuple[jax.Array, Any]:
    """Returns what is added to the update [..., i, o], and the state."""
    ...


def outside(projection: Projection, split: Split) -> jax.Array:
  """Returns the gradient less its projection: [..., i, o], float32."""
  inside = projection_lib.unproject(projection, split.low, split.basis)
  return split.g_io - projection_lib.to_matrix(projection, inside)


@dataclasses.dataclass(frozen=True)
class Sgd:
  """Plain gradient descent on the rest, at the inner's learning rate.

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """

  scale: float = 1.0
  """Multiplies the learning rate."""
  follow: bool = True
  """Whether the inner has a learning rate; if not, it follows the stage."""

  def init(self, projection: Projection) -> Any:
    """Returns no state."""
    del projection
    return ()

  def direction(self, rest_io: jax.Array) -> jax.Array:
    """Returns the rest as it is."""
    return rest_io

  def __call__(
    self, projection: Projection, split: Split, state: Any
  ) -> tuple[jax.Array, Any]:
    """Returns the scaled direction of the rest."""
    rest_io = self.direction(outside(projection, split))
    rate = split.response if self.follow else 1.0
    return self.scale * rate * rest_io, state


@dataclasses.dataclass(frozen=True)
class Sign(Sgd):
  """The sign of the rest, at the inner's learning rate.

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
  out grows by at most `limit` from one update to the next, measured before the
  inner's bias correction and learning rate, as the papers do, whatever they
  are made of. State: one number a matrix.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, scales the
    rest by channel; Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_,
    2024, scales the whole gradient by channel, APOLLO-Mini by matrix.
  """

  whole: bool = False
  """Scale the whole gradient rather than its rest."""
  channels: bool = True
  """A factor for each channel rather than one for the matrix."""
  scale: float = 1.0
  """Multiplies the update."""
  limit: float = 1.01
  """Largest growth of the update's norm."""

  def init(self, projection: Projection) -> Any:
    """Returns the norm [...] of the last update: none yet, so no limit."""
    # Not of weak type: the state of a second update would be of another.
    return jnp.full(projection.matrix_shape[:-2], jnp.inf, float)

  def __call__(
    self, projection: Projection, split: Split, state: Any
  ) -> tuple[jax.Array, Any]:
    """Returns the scaled gradient or rest, its norm's growth limited."""
    axes = projection.sides if self.channels else (-2, -1)
    factor = _norm(split.inner_update, axes) / (_norm(split.low, axes) + TINY)
    what_io = split.g_io if self.whole else outside(projection, split)
    gain = jnp.abs(split.gain)
    # At a learning rate of zero nothing moves, and no norm can be told.
    moves = gain > 0
    unit_io = factor / jnp.where(moves, gain, 1) * what_io
    norm = _norm(unit_io, (-2, -1))
    last = state[..., None, None]
    # After a zero gradient a bound of zero would hold for ever.
    last = jnp.where(last > 0, last, jnp.inf)
    shrink = jnp.minimum(self.limit * last / norm, 1)
    update_io = self.scale * split.gain * shrink * unit_io
    new = jnp.where(moves, (shrink * norm)[..., 0, 0], state)
    return update_io, new


TINY = 1e-8
"""Added to norms that are divided by."""

RESIDUALS: dict[str, Residual] = {
  'sgd': Sgd(),
  'sign': Sign(),
  'fira': Scaled(),
  'apollo': Scaled(whole=True),
}
"""The short names that `galore(residual=...)` takes."""


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
