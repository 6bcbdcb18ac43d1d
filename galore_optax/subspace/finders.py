"""How the basis of one matrix is found, each way a frozen dataclass.

`finder(g_mn, basis_rm, key)` returns the new basis as orthonormal rows [r, m],
where m is the side that is projected, or as indices [r] of coordinates.
`basis_rm` is the previous basis, zeros where there is none. A gradient that is
not finite reaches no finder: the previous basis is kept. What the state keeps
of a basis, and how, is in `kept`.

Axes: m projected side, n other side, r rank.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from galore_optax.checks import (
  check_count,
  check_flag,
  check_integer,
  is_integer,
  require,
)
from galore_optax.precision import norm
from galore_optax.subspace.polar import orthonormalise, random_rows

# A finder.
Subspace: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The short name of a finder with its default options.
Name: TypeAlias = Literal[
  'svd', 'gram', 'randomized', 'power', 'random', 'coordinates'
]
# Eigenvalues of `g g^T` below this share of their sum are not resolved.
SHIFT = 1e-5


@dataclasses.dataclass(frozen=True)
class Svd:
  """The leading left singular vectors, by a singular value decomposition.

  Exact. Cost: O(m n min(m, n)) flops, and m n + min(m, n) (m + n) floats of
  scratch, in float32.

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> abs(Svd()(g_mn, jnp.zeros((1, 3)), jax.random.key(0))).round(3)
    Array([[0., 1., 0.]], dtype=float32)

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024.
  """

  def __call__(self, g_mn, basis_rm, key):
    """Returns the basis [r, m] of a gradient."""
    r = basis_rm.shape[0]
    # Only a rank above min(m, n) needs the vectors that span no gradient.
    u, _, _ = jnp.linalg.svd(g_mn, full_matrices=r > min(g_mn.shape))
    return u[:, :r].T


@dataclasses.dataclass(frozen=True)
class Gram:
  """The leading left singular vectors, as eigenvectors of `g g^T`.

  The span is Svd's. Error: squaring loses singular values below sqrt(eps) of
  the largest (3e-4 in float32), so the product is summed at the highest matmul
  precision. Cost: 2 m^2 n + O(m^3) flops, m^2 floats of scratch.

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> abs(Gram()(g_mn, jnp.zeros((1, 3)), jax.random.key(0))).round(3)
    Array([[0., 1., 0.]], dtype=float32)
  """

  def __call__(self, g_mn, basis_rm, key):
    """Returns the basis [r, m] of a gradient."""
    return _leading(g_mn, basis_rm.shape[0]).T


def _leading(x_mn: jax.Array, r: int) -> jax.Array:
  """Returns the leading left singular vectors [m, r], by `x x^T`."""
  gram_mm = jnp.matmul(x_mn, x_mn.T, precision='highest')
  # Eigenvalues ascend.
  return jnp.linalg.eigh(gram_mm)[1][:, ::-1][:, :r]


@dataclasses.dataclass(frozen=True)
class Randomized:
  """The leading left singular vectors of a random sketch of the gradient.

  A Gaussian sketch of r + oversample columns, power iterations with a QR
  each, and an exact truncation to r inside the sketch. Cost: 4 (1 +
  power_iterations) m n r flops and QRs of [m, r].

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> abs(Randomized()(g_mn, jnp.zeros((1, 3)), jax.random.key(0))).round(3)
    Array([[0., 1., 0.]], dtype=float32)

  References:
    Halko, Martinsson and Tropp, `Finding structure with randomness
    <https://arxiv.org/abs/0909.4061>`_, 2009.
  """

  oversample: int = 8  # Columns of the sketch beyond the rank.
  power_iterations: int = 1  # Products with `g g^T`: a sharper spectrum.

  def __post_init__(self) -> None:
    """Raises ValueError for fewer than no columns or products."""
    known = lambda x: is_integer(x) and x >= 0
    require('an integer >= 0', known, **dataclasses.asdict(self))

  def __call__(self, g_mn, basis_rm, key):
    """Returns the basis [r, m] of a gradient."""
    (m, n), r = g_mn.shape, basis_rm.shape[0]
    k = min(r + self.oversample, m)
    q_mk, _ = jnp.linalg.qr(g_mn @ jax.random.normal(key, (n, k), g_mn.dtype))
    for _ in range(self.power_iterations):
      q_mk, _ = jnp.linalg.qr(g_mn @ (g_mn.T @ q_mk))
    return jnp.matmul(q_mk, _leading(q_mk.T @ g_mn, r), precision='highest').T


@dataclasses.dataclass(frozen=True)
class PowerIteration:
  """One power step from the previous basis, by matrix products alone.

  The basis is the polar factor of `(g g^T + shift) P`, so it turns no more
  than the gradient asks for: an invariant subspace comes back vector for
  vector. No solver runs, so nothing is allocated that a compiler does not
  plan. The first refresh starts from random vectors and takes more steps. A
  zero gradient returns the previous basis. Cost: 4 m n r + 16 m r^2 + 64 r^3
  flops a step.

  Example:
    >>> g_mn = jnp.diag(jnp.array([1., 3., 2.]))[:, :2]
    >>> key = jax.random.key(0)
    >>> abs(PowerIteration()(g_mn, jnp.zeros((1, 3)), key)).round(2)
    Array([[0., 1., 0.]], dtype=float32)

  References:
    The step with another orthonormalisation: Robert et al., `LDAdam
    <https://arxiv.org/abs/2410.16103>`_, 2024.
  """

  steps: int = 1  # Power steps of a refresh.
  first_steps: int = 4  # Power steps of the first refresh.

  def __post_init__(self) -> None:
    """Raises ValueError for a refresh without a step."""
    check_count(steps=self.steps, first_steps=self.first_steps)

  def __call__(self, g_mn, basis_rm, key):
    """Returns the basis [r, m] of a gradient."""
    cold = ~jnp.any(basis_rm)
    draw = lambda: random_rows(key, basis_rm.shape, basis_rm.dtype)
    start_rm = jax.lax.cond(cold, draw, lambda: basis_rm)
    # It bounds the condition number of what is orthonormalised.
    shift = SHIFT * jnp.maximum(jnp.sum(jnp.square(g_mn)), 1)

    def step(_, basis_rm):
      powered_rm = (basis_rm @ g_mn) @ g_mn.T + shift * basis_rm
      # The norm of g g^T is no more than the sum of squares; half is for a
      # basis that was stored in few digits.
      size = norm(powered_rm, (-2, -1))
      return orthonormalise(powered_rm / size, low=SHIFT / 2)

    count = jnp.where(cold, self.first_steps, self.steps)
    return jax.lax.fori_loop(0, count, step, start_rm)


@dataclasses.dataclass(frozen=True)
class RandomOrthogonal:
  """A uniformly random subspace; it is made from a seed and never stored.

  Cost: 8 m r^2 + 20 r^3 flops at every update where r is up to m / 2, of some
  hundreds, and no more than 16 m r^2 + 72 r^3 elsewhere.

  Example:
    >>> basis_rm = RandomOrthogonal()(
    ...   jnp.zeros((5, 7)), jnp.zeros((2, 5)), jax.random.key(0))
    >>> abs(basis_rm @ basis_rm.T).round(4)
    Array([[1., 0.],
           [0., 1.]], dtype=float32)

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024.
  """

  seed: int = 0  # Another seed, other subspaces.
  stored: ClassVar[bool] = False

  def __post_init__(self) -> None:
    """Raises ValueError for a seed that is no integer."""
    check_integer(seed=self.seed)

  def __call__(self, g_mn, basis_rm, key):
    """Returns a random basis [r, m]."""
    key = jax.random.fold_in(key, self.seed)
    return random_rows(key, basis_rm.shape, g_mn.dtype)


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """Some coordinates of the projected side, stored as r indices.

  Example:
    >>> g_mn = jnp.array([[1.], [3.], [2.]])
    >>> Coordinates(largest=True)(g_mn, jnp.zeros(2), jax.random.key(0))
    Array([1, 2], dtype=int32)

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024.
  """

  largest: bool = False  # Where the gradient is, rather than random ones.
  seed: int = 0  # Another seed, other coordinates.
  by_coordinates: ClassVar[bool] = True

  def __post_init__(self) -> None:
    """Raises ValueError unless seed is an integer and largest a flag."""
    check_integer(seed=self.seed)
    check_flag(largest=self.largest)

  def __call__(self, g_mn, basis_r, key):
    """Returns the indices [r] of the coordinates, ascending."""
    m, r = g_mn.shape[0], basis_r.shape[0]
    order = jax.random.permutation(jax.random.fold_in(key, self.seed), m)
    if self.largest:
      order = jnp.argsort(-jnp.sum(jnp.square(g_mn), axis=1))
    return jnp.sort(order[:r]).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Gaussian(RandomOrthogonal):
  """Random normal rows of variance 1 / r, from a seed and never stored.

  They are orthonormal in the mean alone: `E[P^T P] = I`, which is enough to
  measure norms by, as APOLLO does, and costs nothing.

  Example:
    >>> key = jax.random.key(0)
    >>> Gaussian()(jnp.zeros((5, 7)), jnp.zeros((2, 5)), key).shape
    (2, 5)

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
  """

  def __call__(self, g_mn, basis_rm, key):
    """Returns random rows [r, m]."""
    key = jax.random.fold_in(key, self.seed)
    rows_rm = jax.random.normal(key, basis_rm.shape, g_mn.dtype)
    return rows_rm / jnp.sqrt(basis_rm.shape[0])


_BY_NAME = Svd(), Gram(), Randomized(), PowerIteration(), RandomOrthogonal()
NAMES = dict(zip(get_args(Name), (*_BY_NAME, Coordinates()), strict=True))
"""The short names that `galore(subspace=...)` takes."""
