"""Helpers of the optimizer tests: small odd-sized trees and a compiled loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Svd
from galore_optax.subspace.kept import Rows, keeping

SHAPES = {'tall': (13, 7), 'wide': (6, 11), 'square': (8, 8), 'vector': (5,)}
MATRICES = ('tall', 'wide', 'square')
# Bases found in float32 have orthonormal rows to this tolerance.
ORTHONORMAL = 1e-5


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def normal32(shape, seed=0):
  return jnp.asarray(normal(shape, seed), jnp.float32)


def gram(rows_rm):
  """Returns the products of all pairs of rows in float64.

  A GPU may round the factors of float32 products to 11 bits.
  """
  return np.float64(rows_rm) @ np.float64(rows_rm).T


def tree(shapes=SHAPES, seed=0, leading=(), dtype=None):
  return {
    name: jnp.asarray(normal((*leading, *shape), seed + i), dtype)
    for i, (name, shape) in enumerate(shapes.items())
  }


def each(names, cases, *, quick):
  """Parametrizes a test, and marks all cases slow except those in `quick`."""
  cases, quick = [*cases], [*quick]
  assert all(case in cases for case in quick)
  values = lambda case: case if isinstance(case, tuple) else (case,)
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
def trajectory(tx, params, grads):
  """Returns weights and states after each step, for gradients [T, ...].

  The loop is a `lax.scan`, so the state must keep its types.
  """

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), (params, state)

  return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


class Adam:
  """Adam for one weight in NumPy. It adds eps after the bias correction."""

  def __init__(self, b1=0.9, b2=0.999, eps=1e-8):
    self.b1, self.b2, self.eps = b1, b2, eps
    self.m = self.v = self.t = 0

  def __call__(self, g):
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

  def __call__(self, g_mn, basis_rm, key):
    basis_rm = Svd()(g_mn, basis_rm, key)
    r = basis_rm.shape[0]
    q_rr, _ = jnp.linalg.qr(jax.random.normal(key, (r, r)))
    return q_rr @ basis_rm


def find(finder, g_mn, basis_rm, key):
  """Returns the basis that a finder computes from a gradient.

  A `basis_rm` of zeros stands for a missing previous basis.
  """
  size = jnp.max(jnp.abs(g_mn))
  g_mn = g_mn / jnp.where(size > 0, size, 1)
  return Rows(finder).find(g_mn, basis_rm, key, ~jnp.any(basis_rm))


def rows_of(tx, finder, params, basis):
  """Returns the basis of each projected weight at each step, for a finder.

  Finders such as 'random' store only seeds; their rows [T, r, m], or indices,
  are computed from the seeds in `basis`.
  """
  keeper = keeping(finder)
  return {
    p.path: keeper.rows(
      basis[p.path], p.rank, p.matrix_shape[p.sides[0]], basis_dtype(params)
    )
    for p in tx.plan(params)
    if p.sides
  }


def basis_dtype(params):
  return jax.tree.leaves(params)[0].dtype
