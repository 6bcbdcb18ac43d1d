"""Moments are rotated into the new basis at a refresh."""

import jax
import numpy as np
import optax
import pytest

from galore_optax import Rotate, Staggered, galore
from tests.galore_optax.program import Gauge, each, normal32, run
from tests.rounding import assert_close

PARAMS = {
  'q': normal32((3, 11, 17)),
  't': normal32((19, 13)),
  'b': normal32((5,)),
}
GRADS = [
  {k: normal32(p.shape, 10 * t + i) for i, (k, p) in enumerate(PARAMS.items())}
  for t in range(8)
]


def updates_of(inner, grads=GRADS, **options):
  tx = galore(inner, rank=4, **options)
  trail = run(tx, PARAMS, grads, apply=False)
  return [step.updates for step in trail], trail[-1].state


@each('side', ['std', 'full'], quick=['std'])
@each('gap', [3, Staggered(3)], quick=[Staggered(3)])
def test_momentum_does_not_depend_on_the_gauge(side, gap):
  inner = optax.sgd(0.1, momentum=0.9)
  updates = lambda **options: updates_of(inner, gap=gap, side=side, **options)[
    0
  ]
  rotated = updates(moments='rotate')
  # The tolerance allows for rounding in eight steps with two sums of up to 19
  # terms each, and in three rotations.
  found = updates(moments='rotate', subspace=Gauge())
  assert_close(found, rotated, operations=8 * 2 * 19)
  kept = updates(moments='keep', subspace=Gauge())
  assert not np.allclose(kept[-1]['q'], rotated[-1]['q'], atol=1e-2)


def test_the_second_moment_follows_its_variance():
  """Compares with the rule of LDAdam in float64."""
  b1, b2, gap = 0.9, 0.99, 3
  inner = optax.scale_by_adam(b1, b2)
  tx = galore(inner, rank=4, gap=gap, moments=Rotate(b1, b2))
  trail = run(tx, PARAMS, GRADS[: gap + 1], apply=False)
  before, after = trail[-2].state, trail[-1].state
  c = np.float64(after.basis['t']) @ np.float64(before.basis['t']).T
  m, v = (np.float64(x['t']) for x in (before.inner.mu, before.inner.nu))
  w1, w2 = 1 - b1**gap, 1 - b2**gap
  v = w2 * abs(c**2 @ (v / w2 - (m / w1) ** 2) + (c @ m / w1) ** 2)
  low = np.float64(after.basis['t']) @ np.float64(GRADS[gap]['t']).T
  expected_m = b1 * (c @ m) + (1 - b1) * low
  expected_v = b2 * v + (1 - b2) * low**2
  # The tolerance allows for float32 sums of eight terms.
  np.testing.assert_allclose(after.inner.mu['t'], expected_m, atol=1e-6)
  np.testing.assert_allclose(after.inner.nu['t'], expected_v, atol=1e-6)


def test_moments_turn_by_products_of_the_highest_precision():
  # Rotations must request the highest precision, because GPUs use a lower
  # precision for float32 products by default.
  def products(moments):
    tx = galore(optax.adam(0.1), rank=4, moments=moments)
    state = jax.eval_shape(tx.init, PARAMS)
    return str(jax.make_jaxpr(tx.update)(PARAMS, state)).count('HIGHEST')

  # For each of the two matrices, the product C and the rotations of both
  # moments have precision HIGHEST.
  assert products('rotate') - products('keep') >= 2 * 3


def test_nothing_moves_when_the_basis_stays():
  # All gradients are equal, so the basis stays the same and C is the identity
  # up to rounding. A rotation may move the rounding error of a large entry to a
  # small one, which Adam divides by eps or more.
  eps, grads = 0.1, GRADS[:1] * 5
  inner = optax.adam(0.1, eps=eps)
  expected, _ = updates_of(inner, grads, gap=100)
  largest = max(np.linalg.norm(g, axis=-1).max() for g in grads[0].values())
  for moments in ('keep', 'rotate'):
    updates, _ = updates_of(inner, grads, gap=2, moments=moments)
    # The tolerance allows for two refreshes with sums of up to 17 terms each,
    # and for the division by eps.
    assert_close(updates, expected, operations=2 * 17 * largest / eps)


def test_schedules_inside_the_inner_go_on():
  schedule = optax.linear_schedule(0.1, 0.0, 100)
  adam = optax.inject_hyperparams(optax.adam)(schedule)
  _, state = updates_of(adam, gap=3, moments='rotate')
  assert int(state.inner.count) == len(GRADS)


@pytest.mark.parametrize(
  'inner', [optax.amsgrad(0.1), optax.adagrad(0.1)], ids=['amsgrad', 'adagrad']
)
def test_unknown_moments_raise(inner):
  with pytest.raises(ValueError, match='knows the moments mu, trace and nu'):
    galore(inner, rank=4, moments='rotate').init(PARAMS)
