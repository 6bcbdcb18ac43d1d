"""Exact properties of `galore`, then a float64 oracle of its equations."""

from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore
from galore_optax.projection import Side
from tests.galore_optax.program import each, normal, tree

# 'both' is another name of 'full'; test_plan.py compares the two.
SIDES = tuple(side for side in get_args(Side) if side != 'both')

SHAPES = {'tall': (47, 19), 'wide': (21, 53), 'square': (29, 29)}


@jax.jit(static_argnums=0)
def trajectory(tx, params, grads):
  """Returns the updates for gradients [T, ...], and the last state.

  The loop is a `lax.scan`, so the state must keep its types.
  """

  def step(carry, g):
    params, state = carry
    updates, state = tx.update(g, state, params)
    return (optax.apply_updates(params, updates), state), updates

  (_, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
  return updates, state


def assert_projected(state, *names):
  """Asserts that leaves are projected.

  Otherwise a test could pass at full rank by mistake.
  """
  for name in names:
    assert not isinstance(state.basis[name], optax.MaskedNode), name


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def close(one, other, rtol=1e-11):
  # The tolerance allows for a few dozen float64 sums of a few dozen terms.
  chex.assert_trees_all_close(one, other, rtol=rtol, atol=rtol)


@each('side', SIDES, quick=['full'])
def test_low_rank_gradients_lose_nothing_under_sgd(side):
  r, steps = 5, 4
  grads = {
    name: jnp.asarray(normal((steps, m, r), 1) @ normal((steps, r, n), 2))
    for name, (m, n) in SHAPES.items()
  }
  params, inner = tree(SHAPES), optax.sgd(0.3)
  tx = galore(inner, rank=r, gap=1, scale=1.0, side=side)
  ours, state = trajectory(tx, params, grads)
  assert_projected(state, *SHAPES)
  close(ours, trajectory(inner, params, grads)[0])


@pytest.mark.parametrize(
  'inner',
  [
    pytest.param(optax.sgd(0.3, 0.9), marks=pytest.mark.slow),
    optax.trace(0.8, True),
  ],
)
def test_gradients_in_one_subspace_lose_nothing_under_momentum(inner):
  # All steps share one subspace, because momentum is stored in the coordinates
  # of a basis. It is on the left side for wide and on the right side for tall.
  r, steps = 5, 6
  grads = {
    'wide': jnp.asarray(normal((21, r)) @ normal((steps, r, 53), 1)),
    'tall': jnp.asarray(normal((steps, 47, r), 2) @ normal((r, 19), 3)),
  }
  params = tree({'wide': (21, 53), 'tall': (47, 19)})
  tx = galore(inner, rank=r, gap=100, scale=1.0)
  ours, state = trajectory(tx, params, grads)
  assert_projected(state, 'wide', 'tall')
  close(ours, trajectory(inner, params, grads)[0])


@each('side', SIDES, quick=['std'])
def test_full_rank_with_a_stateless_inner_is_the_inner(side):
  params, grads = tree(SHAPES), tree(SHAPES, leading=(3,), seed=7)
  for name, shape in SHAPES.items():
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3))
    tx = galore(
      inner, rank=min(shape), gap=2, scale=1.0, side=side, targets=name
    )
    ours, state = trajectory(tx, params, grads)
    assert_projected(state, name)
    want = trajectory(inner, params, grads)[0]
    if (side == 'full' and len(set(shape)) == 2) or _longer(side, shape):
      # On the longer side, min(m, n) vectors span only the gradient of the
      # refresh, so only the first update is exact.
      ours, want = (jax.tree.map(lambda x: x[0], t) for t in (ours, want))
    close(ours, want, 1e-10)


def _longer(side, shape):
  i, o = shape
  return (
    side == 'reverse_std'
    or (side == 'left' and i > o)
    or (side == 'right' and o > i)
  )


def test_a_stack_is_a_loop_over_its_layers():
  shapes = {'a': (2, 11, 7), 'experts': (2, 2, 7, 11), 'square': (2, 9, 9)}
  params, grads = tree(shapes), tree(shapes, 5, (7,))
  tx = galore(optax.adamw(0.1, weight_decay=0.1), rank=4, gap=3)
  ours, state = trajectory(tx, params, grads)
  assert_projected(state, *shapes)

  for name, shape in shapes.items():
    flat_p = params[name].reshape(-1, *shape[-2:])
    flat_g = grads[name].reshape(7, -1, *shape[-2:])
    # All layers of a stack run the same program.
    each = [
      trajectory(tx, {'w': w}, {'w': flat_g[:, i]})[0]['w']
      for i, w in enumerate(flat_p)
    ]
    stacked = np.stack(each, 1)
    close(ours[name], stacked.reshape(ours[name].shape))


@each(
  'side, mirrored',
  [('std', 'std'), ('reverse_std', 'reverse_std')]
  + [('left', 'right'), ('full', 'full')],
  quick=[('std', 'std')],
)
def test_a_transposed_weight_has_the_transposed_update(side, mirrored):
  # Square weights are excluded, because 'std' and 'reverse_std' project the
  # same axis of a square weight and of its transpose.
  shapes = (
    SHAPES
    if side in ('left', 'right', 'full')
    else {k: v for k, v in SHAPES.items() if k != 'square'}
  )
  params, grads = tree(shapes), tree(shapes, 9, (6,))
  flip = lambda t: jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), t)
  make = lambda side: galore(optax.adamw(0.1), rank=5, gap=2, side=side)
  ours, state = trajectory(make(side), params, grads)
  assert_projected(state, *shapes)
  want, _ = trajectory(make(mirrored), flip(params), flip(grads))
  # With two sides, a refresh makes the low-rank gradient diagonal. Its
  # off-diagonal entries are rounding errors of 1e-15, which Adam divides by an
  # eps of 1e-8.
  close(ours, flip(want), 1e-6 if side == 'full' else 1e-11)


def test_axes_say_which_matrix_a_kernel_is():
  # Kernels of attention: inputs [d, heads, head_dim], output [heads, head_dim,
  # d], and a stack of inputs.
  axes = {'q|stack': (-3, (-2, -1)), 'out': ((0, 1), 2)}
  shapes = {'q': (13, 3, 5), 'out': (3, 5, 13), 'stack': (2, 13, 3, 5)}
  matrix = {'q': (13, 15), 'out': (15, 13), 'stack': (2, 13, 15)}
  params, grads = tree(shapes), tree(shapes, 3, (5,))
  options = {'rank': 4, 'gap': 2, 'targets': '.*'}
  inner = optax.adamw(0.1)
  ours, state = trajectory(galore(inner, axes=axes, **options), params, grads)
  assert state.basis['q'].shape == (4, 13)
  assert state.basis['out'].shape == (4, 13)
  assert state.basis['stack'].shape == (2, 4, 13)
  flat = lambda t, lead=(): {
    k: x.reshape(*lead, *matrix[k]) for k, x in t.items()
  }
  want, _ = trajectory(
    galore(inner, **options), flat(params), flat(grads, (5,))
  )
  close(flat(ours, (5,)), want)


def test_axes_may_be_interleaved_with_batch_axes():
  params = {'w': jnp.asarray(normal((11, 2, 7)))}
  grads = {'w': jnp.asarray(normal((4, 11, 2, 7), 1))}
  tx = galore(optax.adam(0.1), rank=3, gap=2, axes={'w': (0, 2)})
  ours, state = trajectory(tx, params, grads)
  assert state.basis['w'].shape == (2, 3, 7)
  flip = lambda t, a: {'w': jnp.swapaxes(t['w'], a, a + 1)}
  plain = galore(optax.adam(0.1), rank=3, gap=2)
  want, _ = trajectory(plain, flip(params, 0), flip(grads, 1))
  close(flip(ours, 1), want)


@pytest.mark.parametrize(
  'side, shape, basis, low',
  [
    ('std', (9, 15), (4, 9), (4, 15)),
    ('std', (15, 9), (4, 9), (4, 15)),
    ('std', (9, 9), (4, 9), (4, 9)),
    ('reverse_std', (9, 15), (4, 15), (4, 9)),
    ('reverse_std', (15, 9), (4, 15), (4, 9)),
    ('reverse_std', (9, 9), (4, 9), (4, 9)),
    ('left', (15, 9), (4, 15), (4, 9)),
    ('right', (9, 15), (4, 15), (4, 9)),
    ('full', (9, 15), ((4, 9), (4, 15)), (4, 4)),
  ],
)
def test_shapes_of_each_side(side, shape, basis, low):
  tx = galore(optax.adam(0.1), rank=4, side=side)
  state = jax.eval_shape(tx.init, {'w': jnp.zeros((2, *shape))})
  shapes = jax.tree.map(lambda x: x.shape[1:], state.basis['w'])
  assert shapes == basis
  assert state.inner[0].mu['w'].shape == (2, *low)
  assert state.inner[0].nu['w'].shape == (2, *low)


@pytest.mark.parametrize('side, rank', [('std', 5), ('reverse_std', 8)])
def test_rank_may_be_a_share_of_the_projected_side(side, rank):
  tx = galore(optax.adam(0.1), rank=0.5, side=side)
  state = tx.init({'w': jnp.zeros((10, 15))})
  assert state.basis['w'].shape[0] == rank


@each(
  'side, subspace',
  [(side, 'svd') for side in SIDES] + [('reverse_std', 'gram')],
  quick=[('reverse_std', 'gram')],
)
def test_rank_may_be_the_whole_shorter_side(side, subspace):
  # The PyTorch reference crashes for 'reverse_std' with a wide weight of this
  # rank.
  params = tree({'tall': (11, 7), 'wide': (7, 11), 'square': (7, 7)})
  grads = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
  tx = galore(
    optax.sgd(1.0),
    rank=7, gap=1, scale=1.0, side=side, subspace=subspace, targets='.*',
  )  # fmt: skip
  updates, state = trajectory(tx, params, grads)
  assert_projected(state, *params)
  # Gram's vectors on the longer side have errors of the square root of eps.
  close(updates, jax.tree.map(jnp.negative, grads), 1e-6)


def test_scale_multiplies_only_updates_of_projected_leaves():
  params = tree(SHAPES) | {'bias': jnp.asarray(normal(7))}
  grads = tree(SHAPES, leading=(3,), seed=4) | {
    'bias': jnp.asarray(normal((3, 7)))
  }
  run = lambda scale: trajectory(
    galore(optax.adam(0.1), rank=5, gap=2, scale=scale), params, grads
  )[0]
  one, quarter = run(1.0), run(0.25)
  close(quarter['bias'], one['bias'])
  for name in SHAPES:
    close(quarter[name], 0.25 * one[name])


def oracle(params, grads, *, rank, gap, scale, side, lr, decay, reset):
  """GaLore with AdamW in NumPy for one weight, from the equations."""
  w, updates = params.copy(), []
  i, o = w.shape
  left = {'std': i <= o, 'reverse_std': i > o, 'left': True, 'right': False}
  sides = (
    ('left', 'right')
    if side == 'full'
    else (('left',) if left[side] else ('right',))
  )
  p = {s: np.eye(i if s == 'left' else o) for s in ('left', 'right')}
  old = {s: None for s in sides}
  mu = nu = 0.0
  t = 0
  for count, g in enumerate(grads):
    if count % gap == 0:
      u, _, vh = np.linalg.svd(g)
      for s, basis in (('left', u.T[:rank]), ('right', vh[:rank])):
        if s in sides:
          if old[s] is None:
            peak = np.abs(basis).argmax(1)
            sign = np.sign(basis[np.arange(rank), peak])
          else:
            sign = np.sign((basis * old[s]).sum(1))
          old[s] = p[s] = basis * sign[:, None]
      if reset:
        mu, nu, t = 0.0, 0.0, 0
    low = g
    low = p['left'] @ low if 'left' in sides else low
    low = low @ p['right'].T if 'right' in sides else low
    t += 1
    mu = 0.9 * mu + 0.1 * low
    nu = 0.999 * nu + 0.001 * low**2
    u = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.999**t)) + 1e-8)
    u = p['left'].T @ u if 'left' in sides else u
    u = u @ p['right'] if 'right' in sides else u
    updates.append(-lr(count) * (scale * u + decay * w))
    w = w + updates[-1]
  return np.stack(updates)


@each(
  'side, moments',
  [(side, 'keep') for side in SIDES] + [('std', 'reset'), ('full', 'reset')],
  quick=[('std', 'keep'), ('full', 'reset')],
)
def test_three_refreshes_follow_the_equations(side, moments):
  lr = optax.linear_schedule(0.0, 0.1, 20)
  inner = optax.adamw(lr, weight_decay=0.2)
  options = {'rank': 5, 'gap': 15, 'scale': 0.25, 'side': side}
  params, grads = tree(SHAPES), tree(SHAPES, leading=(50,), seed=11)
  ours, state = trajectory(
    galore(inner, moments=moments, **options), params, grads
  )
  assert_projected(state, *SHAPES)
  for name in SHAPES:
    want = oracle(
      np.array(params[name]),
      np.array(grads[name]),
      lr=lambda count: 0.1 * min(count / 20, 1),
      decay=0.2,
      reset=moments == 'reset',
      **options,
    )
    # optax computes schedules and bias corrections in float32, which has an
    # error of 2e-5 in 1 - 0.999^t.
    close(ours[name], want, 1e-4)
