"""Finders: frozen dataclasses that compute the basis of one matrix.

`finder(g_mn, basis_rm, key)` returns the new basis as orthonormal rows [r, m],
where m is the projected side, or as indices [r] of coordinates. `basis_rm` is
the previous basis, or zeros before the first refresh. A finder is never called
with a non-finite gradient. The module `store`
defines how the state stores a basis.

Axes: m projected side, n other side, r rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from galore_optax.checks import (
  check_count,
  check_flag,
  check_integer,
  check_size,
)
from galore_optax.precision import norm
from galore_optax.subspace.polar import orthonormalise, random_rows

Subspace: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""A finder: `(g_mn, basis_rm, key) -> basis_rm`, or indices [r]."""

Name: TypeAlias = Literal[
  'svd', 'gram', 'randomized', 'power', 'random', 'coordinates'
]
"""The short name of a finder with its default options."""

SHIFT = 1e-5
"""`PowerIteration` does not resolve eigenvalues of `g g^T` below this share of
their sum."""


@dataclasses.dataclass(frozen=True)
class Svd:
  """The leading left singular vectors, by a singular value decomposition.

  The result is exact. Cost: O(m n min(m, n)) flops, and m n + min(m, n) (m + n)
  float32 numbers of scratch memory.

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> abs(Svd()(g_mn, jnp.zeros((1, 3)), jax.random.key(0))).round(3)
    Array([[0., 1., 0.]], dtype=float32)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
  """

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns the basis [r, m] of a gradient."""
    r = basis_rm.shape[0]
    # Only a rank above min(m, n) needs vectors outside the gradient's span.
    u, _, _ = jnp.linalg.svd(g_mn, full_matrices=r > min(g_mn.shape))
    return u[:, :r].T


@dataclasses.dataclass(frozen=True)
class Gram:
  """The leading left singular vectors, as eigenvectors of `g g^T`.

  They span the same subspace as those of `Svd`. Error: the product loses
  singular values below sqrt(eps) of the largest one (3e-4 in float32), so it is
  computed at the highest matmul precision. Cost: 2 m^2 n + O(m^3) flops, and
  m^2 float32 numbers of scratch memory.

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> abs(Gram()(g_mn, jnp.zeros((1, 3)), jax.random.key(0))).round(3)
    Array([[0., 1., 0.]], dtype=float32)
  """

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns the basis [r, m] of a gradient."""
    return _leading(g_mn, basis_rm.shape[0]).T


def _leading(x_mn: jax.Array, r: int) -> jax.Array:
  """Returns the leading left singular vectors [m, r], computed from `x x^T`."""
  gram_mm = jnp.matmul(x_mn, x_mn.T, precision='highest')
  # eigh returns eigenvalues in ascending order.
  return jnp.linalg.eigh(gram_mm)[1][:, ::-1][:, :r]


@dataclasses.dataclass(frozen=True)
class Randomized:
  """The leading left singular vectors of a random sketch of the gradient.

  The sketch is the product with a Gaussian matrix of r + oversample columns.
  Power iterations with a QR decomposition each sharpen it. Inside the sketch
  the truncation to r vectors is exact. Cost: 4 (1 + power_iterations) m n r
  flops and QR decompositions of [m, r].

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> abs(Randomized()(g_mn, jnp.zeros((1, 3)), jax.random.key(0))).round(3)
    Array([[0., 1., 0.]], dtype=float32)

  References:
    Halko, Martinsson and Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2009.
  """

  oversample: int = 8
  """Columns of the sketch in addition to the rank."""
  power_iterations: int = 1
  """Number of products with `g g^T`. More of them separate singular values
  that are close to each other."""

  def __post_init__(self) -> None:
    """Raises ValueError unless both options are integers >= 0."""
    check_size(**dataclasses.asdict(self))

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns the basis [r, m] of a gradient."""
    (m, n), r = g_mn.shape, basis_rm.shape[0]
    k = min(r + self.oversample, m)
    q_mk, _ = jnp.linalg.qr(g_mn @ jax.random.normal(key, (n, k), g_mn.dtype))
    for _ in range(self.power_iterations):
      q_mk, _ = jnp.linalg.qr(g_mn @ (g_mn.T @ q_mk))
    return jnp.matmul(q_mk, _leading(q_mk.T @ g_mn, r), precision='highest').T


@dataclasses.dataclass(frozen=True)
class PowerIteration:
  """One power step from the previous basis, computed by matrix products only.

  The basis is the polar factor of `P (g g^T + shift)`, where P is the previous
  basis. The polar factor is the closest orthonormal basis: if P spans an
  invariant subspace, each of its vectors is returned unchanged. No LAPACK or
  cuSOLVER routine runs, so XLA plans all scratch memory. The first refresh
  starts from random vectors and takes more steps. For a zero gradient the
  previous basis is returned. Cost: 4 m n r + 16 m r^2 + 64 r^3 flops a step.

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> key = jax.random.key(0)
    >>> abs(PowerIteration()(g_mn, jnp.zeros((1, 3)), key)).round(2)
    Array([[0., 1., 0.]], dtype=float32)

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024, takes
    the same step and orthonormalises it by another algorithm.
  """

  steps: int = 1
  """Number of power steps of a refresh."""
  first_steps: int = 4
  """Number of power steps of the first refresh."""

  def __post_init__(self) -> None:
    """Raises ValueError unless both numbers of steps are integers >= 1."""
    check_count(steps=self.steps, first_steps=self.first_steps)

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns the basis [r, m] of a gradient."""
    is_first = ~jnp.any(basis_rm)
    start_rm = jax.lax.cond(
      is_first,
      lambda: random_rows(key, basis_rm.shape, basis_rm.dtype),
      lambda: basis_rm,
    )
    # The shift bounds the condition number of the powered basis.
    shift = SHIFT * jnp.maximum(jnp.sum(jnp.square(g_mn)), 1)

    def step(_: Any, basis_rm: jax.Array) -> jax.Array:
      powered_rm = (basis_rm @ g_mn) @ g_mn.T + shift * basis_rm
      size = norm(powered_rm, (-2, -1))
      # The sum of squares of g bounds the norm of g g^T, so no singular value
      # is below SHIFT. Half of it allows for a basis that was stored in 4 bits.
      return orthonormalise(powered_rm / size, low=SHIFT / 2)

    count = jnp.where(is_first, self.first_steps, self.steps)
    return jax.lax.fori_loop(0, count, step, start_rm)


@dataclasses.dataclass(frozen=True)
class RandomOrthogonal:
  """A uniformly random subspace, computed from a seed and never stored.

  Cost at every update: 8 m r^2 + 20 r^3 flops if r is at most m / 2 and m is at
  least a few hundred; otherwise at most 16 m r^2 + 72 r^3 flops.

  Example:
    >>> basis_rm = RandomOrthogonal()(
    ...   jnp.zeros((5, 7)), jnp.zeros((2, 5)), jax.random.key(0))
    >>> abs(basis_rm @ basis_rm.T).round(4)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024.
  """

  seed: int = 0
  """Determines the subspaces."""
  stored: ClassVar[bool] = False
  """The state stores a seed instead of the basis."""

  def __post_init__(self) -> None:
    """Raises ValueError unless the seed is an integer."""
    check_integer(seed=self.seed)

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns a random basis [r, m]."""
    key = jax.random.fold_in(key, self.seed)
    return random_rows(key, basis_rm.shape, g_mn.dtype)


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """A selection of r coordinates of the projected side, stored as indices.

  Example:
    >>> g_mn = jnp.array([[1.], [3.], [2.]])
    >>> Coordinates(largest=True)(g_mn, jnp.zeros(2), jax.random.key(0))
    Array([1, 2], dtype=int32)

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """

  largest: bool = False
  """Whether to select the coordinates with the largest gradient norms. The
  default selects random coordinates."""
  seed: int = 0
  """Determines the random coordinates."""
  by_coordinates: ClassVar[bool] = True
  """The basis is indices instead of rows."""

  def __post_init__(self) -> None:
    """Raises ValueError unless `seed` is an integer and `largest` a bool."""
    check_integer(seed=self.seed)
    check_flag(largest=self.largest)

  def __call__(
    self, g_mn: jax.Array, basis_r: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns the indices [r] of the coordinates in ascending order."""
    m, r = g_mn.shape[0], basis_r.shape[0]
    order = jax.random.permutation(jax.random.fold_in(key, self.seed), m)
    if self.largest:
      order = jnp.argsort(-jnp.sum(jnp.square(g_mn), axis=1))
    return jnp.sort(order[:r]).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Gaussian(RandomOrthogonal):
  """Random normal rows of variance 1 / r, computed from a seed, never stored.

  They are not orthonormal; only `E[P^T P] = I` holds. That is enough to
  estimate norms, as APOLLO does, and no orthonormalisation is needed.

  Example:
    >>> key = jax.random.key(0)
    >>> Gaussian()(jnp.zeros((5, 7)), jnp.zeros((2, 5)), key).shape
    (2, 5)

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
  """

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    """Returns random rows [r, m]."""
    key = jax.random.fold_in(key, self.seed)
    rows_rm = jax.random.normal(key, basis_rm.shape, g_mn.dtype)
    return rows_rm / jnp.sqrt(basis_rm.shape[0])


NAMES: dict[str, Subspace] = {
  'svd': Svd(),
  'gram': Gram(),
  'randomized': Randomized(),
  'power': PowerIteration(),
  'random': RandomOrthogonal(),
  'coordinates': Coordinates(),
}
"""The short names that `galore(subspace=...)` accepts."""
assert set(NAMES) == set(get_args(Name))
