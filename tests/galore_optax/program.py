"""Helpers of the optimizer tests: small odd-sized trees and training loops."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Galore, Svd
from galore_optax.projection import Projection
from galore_optax.subspace.store import StoredRows, as_store

SHAPES = {'tall': (13, 7), 'wide': (6, 11), 'square': (8, 8), 'vector': (5,)}
MATRICES = ('tall', 'wide', 'square')
# Bases found in float32 have orthonormal rows to this tolerance.
ORTHONORMAL = 1e-5

Shape: TypeAlias = int | tuple[int, ...]
Finder: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Returns a basis for a gradient, the previous basis and a random key."""


def normal(shape: Shape, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


def normal32(shape: Shape, seed: int = 0) -> jax.Array:
  return jnp.asarray(normal(shape, seed), jnp.float32)


def gram(rows_rm: jax.typing.ArrayLike) -> np.ndarray:
  """Returns the products of all pairs of rows in float64.

  A GPU may round the factors of float32 products to 11 bits.
  """
  rows = np.asarray(rows_rm, np.float64)
  return rows @ rows.T


def tree(
  shapes: Mapping[str, tuple[int, ...]] = SHAPES,
  seed: int = 0,
  leading: tuple[int, ...] = (),
  dtype: jax.typing.DTypeLike | None = None,
) -> dict[str, jax.Array]:
  return {
    name: jnp.asarray(normal((*leading, *shape), seed + i), dtype)
    for i, (name, shape) in enumerate(shapes.items())
  }


def gradients(
  like: Any, i: int = 0, dtype: jax.typing.DTypeLike | None = None
) -> Any:
  """Returns the gradients of step `i`: sines of the leaves of a tree."""

  def sine(x: jax.Array) -> jax.Array:
    g = jnp.sin(x * (i + 2))
    return g if dtype is None else g.astype(dtype)

  return jax.tree.map(sine, like)


def random_gradients(like: Any, num: int, seed: int = 1) -> Iterator[Any]:
  """Yields gradients with the shapes and dtypes of the leaves of a tree."""
  rng = np.random.default_rng(seed)
  for _ in range(num):
    yield jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like
    )


class Step(NamedTuple):
  updates: optax.Updates
  params: optax.Params
  """The weights after the step."""
  state: optax.OptState


def run(
  tx: optax.GradientTransformation,
  params: optax.Params,
  grads: Iterable[Any],
  *,
  state: optax.OptState | None = None,
  apply: bool = True,
  jit: bool = True,
) -> list[Step]:
  """Returns each step of a Python loop. It compiles `tx.update` once.

  Args:
    tx: The transformation.
    params: The initial weights.
    grads: The gradients of each step, or functions that compute them from the
      weights at that step.
    state: The initial state. By default it is `tx.init(params)`.
    apply: Whether updates are added to the weights.
    jit: Whether `tx.update` is compiled.
  """
  state = tx.init(params) if state is None else state
  update, steps = jax.jit(tx.update) if jit else tx.update, []
  for g in grads:
    g = g(params) if callable(g) else g
    updates, state = update(g, state, params)
    if apply:
      params = optax.apply_updates(params, updates)
    steps.append(Step(updates, params, state))
  return steps


def each(
  names: str | Sequence[str], cases: Iterable[Any], *, quick: Iterable[Any]
) -> pytest.MarkDecorator:
  """Parametrizes a test, and marks all cases slow except those in `quick`."""
  cases, quick = [*cases], [*quick]
  assert all(case in cases for case in quick)

  def values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)

  return pytest.mark.parametrize(
    names,
    [
      pytest.param(
        *values(case), marks=() if case in quick else [pytest.mark.slow]
      )
      for case in cases
    ],
  )


@jax.jit(static_argnums=0)
def trajectory(
  tx: optax.GradientTransformation, params: optax.Params, grads: optax.Updates
) -> tuple[optax.Params, optax.OptState]:
  """Returns weights and states after each step, for gradients [T, ...].

  The loop is a `lax.scan`, so the state must keep its types.
  """

  def step(
    carry: tuple[optax.Params, optax.OptState], g: optax.Updates
  ) -> tuple[Any, Any]:
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, state)

  return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


class Adam:
  """Adam for one weight in NumPy. It adds eps after the bias correction."""

  def __init__(
    self, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
  ) -> None:
    self.b1, self.b2, self.eps = b1, b2, eps
    self.m = self.v = self.t = 0

  def __call__(self, g: np.ndarray) -> np.ndarray:
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * g
    self.v = self.b2 * self.v + (1 - self.b2) * g * g
    root = np.sqrt(self.v) / np.sqrt(1 - self.b2**self.t)
    return self.m / (1 - self.b1**self.t) / (root + self.eps)


@dataclasses.dataclass(frozen=True)
class Gauge:
  """A finder that rotates the basis of `Svd` randomly within its span.

  Results that depend only on the span must not change.
  """

  def __call__(
    self, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
  ) -> jax.Array:
    basis_rm = Svd()(g_mn, basis_rm, key)
    r = basis_rm.shape[0]
    q_rr, _ = jnp.linalg.qr(jax.random.normal(key, (r, r)))
    return q_rr @ basis_rm


def find(
  finder: Finder, g_mn: jax.Array, basis_rm: jax.Array, key: jax.Array
) -> jax.Array:
  """Returns the basis that a finder computes from a gradient.

  A `basis_rm` of zeros stands for a missing previous basis.
  """
  size = jnp.max(jnp.abs(g_mn))
  g_mn = g_mn / jnp.where(size > 0, size, 1)
  return StoredRows(finder).find(g_mn, basis_rm, key, ~jnp.any(basis_rm))


def rows_of(
  tx: Galore,
  finder: str | Finder,
  params: optax.Params,
  basis: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """Returns the basis of each projected weight at each step, for a finder.

  Finders such as 'random' store only seeds; their rows [T, r, m], or indices,
  are computed from the seeds in `basis`.
  """
  store = as_store(finder)
  return {
    p.path: store.rows(
      basis[p.path], p.rank, p.matrix_shape[p.sides[0]], basis_dtype(params)
    )
    for p in tx.plan(params)
    if isinstance(p, Projection)
  }


def basis_dtype(params: optax.Params) -> Any:
  return jax.tree.leaves(params)[0].dtype
