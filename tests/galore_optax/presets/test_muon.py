"""`galore_muon`: limits, a float64 oracle, and which leaves it projects."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Galore, galore_muon
from tests.galore_optax.program import Adam, each, normal, trajectory

STEPS, RANK, GAP = 6, 3, 2
SHAPES = {
  'bias': (5,),
  'down': (3, 11, 7),
  'embed': (13, 7),
  'norm': (3, 7),
  'up': (3, 7, 11),
}
MATRICES = ('down', 'up')
MATRIX = optax.contrib.MuonDimensionNumbers(-2, -1)


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def draw(shapes, seed, leading=()):
  return {
    k: jnp.asarray(normal((*leading, *v), seed + i))
    for i, (k, v) in enumerate(shapes.items())
  }


def close(one, other, tol=1e-9):
  # The tolerance fits float64. Five quintic steps amplify small singular
  # values, and so rounding errors, 480 times.
  chex.assert_trees_all_close(one, other, rtol=tol, atol=tol)


def whole_muon(rate, **options):
  """Returns optax's Muon for every leaf, at full rank."""
  return optax.contrib.muon(
    rate,
    muon_weight_dimension_numbers=lambda tree: jax.tree.map(
      lambda _: MATRIX, tree
    ),
    **{'consistent_rms': 0.2} | options,
  )


class Muon:
  """Muon for one matrix [m, n], with a new basis every `GAP` steps."""

  def __init__(self, beta, rms):
    self.beta, self.rms, self.m, self.t = beta, rms, 0, 0

  def __call__(self, g):
    if self.t % GAP == 0:
      rows = np.linalg.svd(g, full_matrices=False)[0].T[:RANK]
      peaks = rows[np.arange(RANK), np.abs(rows).argmax(1)]
      said = np.sum(rows * self.rows, 1) if self.t else peaks
      self.rows = rows * np.sign(said)[:, None]
    low = self.rows @ g
    self.t += 1
    self.m = self.beta * self.m + (1 - self.beta) * low
    x = self.beta * self.m / (1 - self.beta ** (self.t + 1))
    x = x + (1 - self.beta) * low / (1 - self.beta**self.t)
    x = x / np.linalg.norm(x)
    for _ in range(5):
      a = x @ x.T
      x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return self.rows.T @ (self.rms * np.sqrt(max(x.shape)) * x)


def oracle(weights, grads, rate, adam_rate, *, scale, decay, beta, rms):
  w = {k: np.array(x) for k, x in weights.items()}
  rules = {
    k: [Muon(beta, rms) for _ in range(3)] if k in MATRICES else Adam()
    for k in w
  }
  trail = []
  for t in range(STEPS):
    for k in w:
      g = np.asarray(grads[k][t])
      lr = rate(t) if k in MATRICES else adam_rate
      if k == 'up':
        u = scale * np.stack([f(x) for f, x in zip(rules[k], g, strict=True)])
      elif k == 'down':
        u = scale * np.stack(
          [f(x.T).T for f, x in zip(rules[k], g, strict=True)]
        )
      else:
        u = rules[k](g)
      w[k] = w[k] - lr * u - lr * decay * w[k]
    trail.append(dict(w))
  return {k: np.stack([x[k] for x in trail]) for k in w}


def test_it_is_its_equations():
  weights, grads = draw(SHAPES, 0), draw(SHAPES, 10, (STEPS,))
  rate = lambda t: t / 16
  tx = galore_muon(
    rate,
    rank=RANK,
    gap=GAP,
    scale=0.5,
    beta=0.8,
    consistent_rms=0.3,
    weight_decay=0.25,
    adam_learning_rate=0.125,
  )
  ours, state = trajectory(tx, weights, grads)
  want = oracle(
    *(weights, grads, rate, 0.125), scale=0.5, decay=0.25, beta=0.8, rms=0.3
  )
  close(ours, want)
  assert state.basis['down'].shape == state.basis['up'].shape
  assert state.basis['up'].shape[1:] == (3, RANK, 7)


def test_defaults():
  parameters = inspect.signature(galore_muon).parameters
  defaults = {name: p.default for name, p in parameters.items()}
  # beta is Muon's default. The RMS factor gives steps of the size of AdamW's.
  # The scale is GaLore's default.
  assert [defaults[k] for k in ('beta', 'consistent_rms')] == [0.95, 0.2]
  assert defaults['scale'] == 0.25
  # Weight decay is off, and Adam uses the preset's learning rate.
  assert defaults['weight_decay'] == 0 and not defaults['adam_learning_rate']


@each('side', ['left', 'right', 'std'], quick=['left'])
def test_at_full_rank_in_one_basis_it_is_muon(side):
  # Newton-Schulz iteration commutes with rotations from either side.
  shapes = {'square': (2, 9, 9)}
  weights, grads = draw(shapes, 0), draw(shapes, 10, (STEPS,))
  options = {'rank': 9, 'gap': STEPS, 'scale': 1.0, 'side': side}
  tx = galore_muon(0.1, weight_decay=0.5, targets='.*', **options)
  ours, _ = trajectory(tx, weights, grads)
  want, _ = trajectory(whole_muon(0.1, weight_decay=0.5), weights, grads)
  close(ours, want)


def test_gradients_in_one_subspace_lose_nothing():
  # The RMS of a step equals that of full-rank Muon, for any rank.
  grads = {
    'down': jnp.asarray(normal((STEPS, 2, 17, RANK)) @ normal((RANK, 8), 1)),
    'up': jnp.asarray(normal((8, RANK), 2) @ normal((STEPS, 2, RANK, 17), 3)),
  }
  weights = draw({'down': (2, 17, 8), 'up': (2, 8, 17)}, 4)
  tx = galore_muon(0.1, rank=RANK, gap=STEPS, scale=1.0)
  ours, _ = trajectory(tx, weights, grads)
  # A low-rank gradient has rounding errors in its null space, which
  # Newton-Schulz amplifies 480 times.
  close(ours, trajectory(whole_muon(0.1), weights, grads)[0])


def test_a_stack_is_muons_and_not_adams():
  g = draw({'up': (3, 7, 11)}, 0)
  default = optax.contrib.muon(1.0)
  adam = jax.tree.leaves(default.init(g).inner_states['adam'])
  assert sum(x.size for x in adam) > 2 * 3 * 7 * 11
  tx = galore_muon(1.0, rank=RANK, gap=GAP, scale=1.0)
  state = tx.init(g)
  updates, state = jax.jit(tx.update)(g, state, g)
  adam = jax.tree.leaves(state.inner.inner_states['other'])
  assert max(x.size for x in adam) == 1
  # Muon moves all directions of the subspace equally. Adam does not.
  sizes = np.linalg.svd(updates['up'] / (0.2 * np.sqrt(11)), compute_uv=False)
  assert np.all((0.6 < sizes[:, :RANK]) & (sizes[:, :RANK] < 1.3))
  assert np.all(sizes[:, RANK:] < 1e-9)


def test_muon_trains_projected_leaves_of_any_axes():
  shapes = {'flat': (7, 11), 'heads': (7, 2, 5), 'lm_head': (7, 13)}
  shapes |= {'norm': (4, 7), 'spare': (9, 10)}
  muons = {'flat', 'heads', 'lm_head'}
  tx = galore_muon(
    0.1, rank=RANK, gap=GAP, targets=muons, axes={'heads': (0, (1, 2))}
  )
  state = tx.init(jax.eval_shape(lambda: draw(shapes, 0)))
  groups = state.inner.inner_states
  mu = {k: optax.tree.get(groups[k], 'mu') for k in ('projected', 'other')}
  held = {
    k: {name for name, x in tree.items() if isinstance(x, jax.Array)}
    for k, tree in mu.items()
  }
  assert held == {'projected': muons, 'other': {*shapes} - muons}
  assert {*mu['projected']['heads'].shape} == {RANK, 10}


def test_state_is_a_basis_and_one_momentum():
  shapes = {'down': (11, 7), 'up': (7, 11)}
  state = galore_muon(0.1, rank=RANK, gap=GAP).init(draw(shapes, 0))
  sizes = [x.size for x in jax.tree.leaves(state) if x.ndim]
  coefficients = 3
  assert sum(sizes) == 2 * RANK * (7 + 11) + coefficients
  assert 0 not in sizes


@each('moments', ['reset', 'rotate'], quick=['rotate'])
def test_moments_follow_the_basis(moments):
  g = draw({'norm': (5,), 'up': (7, 11)}, 0, (STEPS,))
  options = {'rank': 7, 'gap': 1, 'scale': 1.0, 'targets': 'up'}
  tx = galore_muon(0.1, moments=moments, **options)
  weights = draw({'norm': (5,), 'up': (7, 11)}, 1)
  ours, _ = trajectory(tx, weights, g)
  # Each basis spans the whole side. Rotated momentum is then the same as
  # full-rank momentum, and momentum that restarts at every step equals beta =
  # 0.
  beta = 0.95 if moments == 'rotate' else 0.0
  want, _ = trajectory(
    whole_muon(0.1, beta=beta), {'up': weights['up']}, {'up': g['up']}
  )
  close(ours['up'], want['up'])
  adam, _ = trajectory(
    optax.adam(0.1), {'norm': weights['norm']}, {'norm': g['norm']}
  )
  close(ours['norm'], adam['norm'])


def test_it_accumulates_projected_gradients():
  g = draw(SHAPES, 0)
  tx = galore_muon(0.1, rank=RANK, gap=GAP)
  assert isinstance(tx, Galore) and tx.linear

  @jax.jit
  def both(g, state):
    begun = tx.refresh(g, state)
    low = tx.project(g, begun)
    return tx.apply(low, begun, g)[0], tx.update(g, state, g)[0]

  close(*both(g, tx.init(g)))


def test_numbers_may_be_injected():
  weights, grads = draw(SHAPES, 0), draw(SHAPES, 10, (STEPS,))
  numbers = {'beta': 0.75, 'weight_decay': 0.5, 'consistent_rms': 0.25}
  numbers |= {'learning_rate': 0.125, 'scale': 0.5}
  sizes = {'rank': RANK, 'gap': GAP}
  tx = optax.inject_hyperparams(galore_muon, static_args=('rank', 'gap'))
  ours, state = trajectory(tx(**numbers, **sizes), weights, grads)
  close(ours, trajectory(galore_muon(**numbers, **sizes), weights, grads)[0])
  assert {*state.hyperparams} == {*numbers}


@pytest.mark.parametrize(
  'name, bad',
  [
    ('learning_rate', -0.1),
    ('learning_rate', np.inf),
    ('beta', 1.0),
    ('consistent_rms', -1),
    ('weight_decay', np.nan),
    ('adam_learning_rate', -1.0),
    ('rank', 0),
    ('gap', 0),
  ],
)
def test_a_number_out_of_range_is_named(name, bad):
  options = {'learning_rate': 0.1, 'rank': RANK, 'gap': GAP}
  with pytest.raises(ValueError, match=f'{name} must be'):
    galore_muon(**options | {name: bad})
