"""SCALE against a float64 oracle of its formulas, and how it finds the head."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Elsewhere, layerwise, scale_sgd
from galore_optax.layerwise.stack import in_layer_stack
from galore_optax.paths import heads
from tests.galore_optax.layerwise.test_step import (
  Residual,
  make_params,
  run,
  run_whole_tree,
)
from tests.galore_optax.program import Adam, each, normal, trajectory
from tests.rounding import assert_close, assert_same_program

STEPS = 5
SHAPES = {
  'blocks/mlp_norm/scale': (3, 7),
  'blocks/up/kernel': (3, 7, 11),
  'embed/embedding': (13, 7),
  'lm_head/bias': (13,),
  'lm_head/kernel': (7, 13),
}
VECTORS = ('blocks/mlp_norm/scale', 'lm_head/bias')
TIED = {k: v for k, v in SHAPES.items() if 'head' not in k}


def draw(shapes, seed, leading=()):
  return {
    k: normal((*leading, *v), seed + i)
    for i, (k, v) in enumerate(shapes.items())
  }


def nested(tree):
  """Returns the nested tree {'a': {'b': x}} for {'a/b': x}."""
  out = {}
  for path, x in tree.items():
    *parents, name = path.split('/')
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = jnp.asarray(x)
  return out


def rate(t):
  """Returns a warm-up from zero in binary fractions.

  optax rounds schedules to float32, which represents binary fractions exactly.
  """
  return t / 16


def unit(g):
  """Divides each column of each matrix by its RMS, in a plain loop."""
  out = np.empty_like(g)
  for index in np.ndindex(g.shape[:-2]):
    for j in range(g.shape[-1]):
      column = g[index][:, j]
      out[index][:, j] = column / max(np.sqrt(np.mean(column**2)), 1e-8)
  return out


def oracle(weights, grads, head, *, momentum, decay, vector_rate):
  w = {k: x.copy() for k, x in weights.items()}
  m, adam = np.zeros_like(w[head]), {k: Adam() for k in VECTORS}
  trail = []
  for t in range(STEPS):
    for k in w:
      g = grads[k][t]
      if k in VECTORS:
        lr, u = vector_rate(t), adam[k](g)
      else:
        if k == head:
          g = m = momentum * m + (1 - momentum) * g
        lr, u = rate(t), unit(g)
      w[k] = w[k] * (1 - lr * decay) - lr * u
    trail.append(dict(w))
  return {k: np.stack([x[k] for x in trail]) for k in w}


@pytest.mark.parametrize(
  'shapes, head, vector_rate',
  [
    (SHAPES, 'lm_head/kernel', None),
    (SHAPES, 'lm_head/kernel', lambda t: 0.25),
    (TIED, 'embed/embedding', None),
  ],
)
def test_it_is_the_papers_rule(shapes, head, vector_rate):
  weights, grads = draw(shapes, 0), draw(shapes, 10, (STEPS,))
  # One column has a zero gradient, and one has an RMS below the floor of the
  # division.
  grads['blocks/up/kernel'][2, 1, :, 4:6] *= [0.0, 1e-9]
  # The gradient of this column is above the floor, but its moving average is
  # below. Only there would a bias correction change the result.
  grads[head][..., 3] *= 2e-8
  options = {'momentum': 0.75, 'decay': 0.5}
  want = oracle(
    weights, grads, head, vector_rate=vector_rate or rate, **options
  )
  with jax.enable_x64(True):
    tx = scale_sgd(
      rate,
      momentum=0.75,
      weight_decay=0.5,
      vector_learning_rate=vector_rate and vector_rate(0),
    )
    ours, _ = trajectory(tx, nested(weights), nested(grads))
    # The tolerance allows for rounding in a few float64 steps.
    chex.assert_trees_all_close(ours, nested(want), rtol=1e-12, atol=1e-12)


def test_the_defaults_are_those_of_the_paper():
  weights, grads = nested(draw(SHAPES, 0)), nested(draw(SHAPES, 10, (STEPS,)))
  explicit = {'momentum': 0.9, 'weight_decay': 0.0}
  short, long = (
    scale_sgd(0.125),
    scale_sgd(0.125, vector_learning_rate=0.125, **explicit),
  )
  assert_same_program(
    (functools.partial(trajectory, short), weights, grads),
    (functools.partial(trajectory, long), weights, grads),
  )


def _times_powers(x):
  """Multiplies the columns by different powers of two."""
  powers = jnp.exp2(jnp.arange(x.shape[-1]) - 3.0)
  return x * powers.reshape((1,) * (x.ndim - 1) + (-1,))


def test_the_size_of_a_column_does_not_matter():
  g = nested(draw(SHAPES, 0))
  tx = scale_sgd(0.1)
  update = jax.jit(lambda g: tx.update(g, tx.init(g), g)[0])
  # Powers of two scale exactly. The head is included, because its first
  # momentum is proportional to its gradient.
  scaled = jax.tree.map(
    lambda x: x if x.ndim < 2 else _times_powers(x),
    g,
  )
  scaled['blocks']['mlp_norm'] = g['blocks']['mlp_norm']
  chex.assert_trees_all_equal(update(scaled), update(g))


def test_which_leaf_is_the_head():
  assert heads({'unembed': {'kernel': 0}, 'wte': 0}) == [True, False]
  assert heads({'blocks': {'up': 0}, 'wte': 0}) == [False, True]
  # The first tree is a part of an untied model. In the second, another rule
  # trains the head. In both, the embedding must not be treated as a tied head.
  for hole in (Elsewhere(), optax.MaskedNode()):
    assert heads({'embed': 0, 'lm_head': {'kernel': hole}}) == [False]


def test_state_is_one_momentum_of_the_head():
  params = optax.tree.cast(nested(draw(SHAPES, 0)), jnp.bfloat16)
  tx, shapes = scale_sgd(lambda t: 0.1), jax.eval_shape(lambda: params)
  state = tx.init(shapes)
  moments = [x for x in jax.tree.leaves(state) if x.ndim]
  assert {x.dtype for x in moments} == {jnp.dtype('float32')}
  assert sum(x.size for x in moments) == 7 * 13 + 2 * (3 * 7 + 13)
  updates, _ = jax.eval_shape(tx.update, shapes, state, shapes)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_without_decay_it_needs_no_params():
  g = nested(draw(SHAPES, 0))
  tx = scale_sgd(0.1)
  tx.update(g, tx.init(g))


@each('tied', [False, True], quick=[True])
def test_layer_by_layer_it_is_the_whole_tree(tied):
  params = make_params()
  if tied:
    del params['head']
  model, tx = Residual(tied), scale_sgd(0.1, weight_decay=0.1)
  ours, state, _ = run(layerwise(model, tx), params=params)
  want, _ = run_whole_tree(model, tx, params=params)
  # The tolerance allows for different fusion in the two programs. Dividing a
  # column of small entries by its RMS amplifies the difference.
  chex.assert_trees_all_close(ours, want, rtol=1e-4, atol=1e-5)
  sizes = {
    name: sum(
      x.size for x in jax.tree.leaves(inner) if x.ndim > in_layer_stack(name)
    )
    for name, inner in state.inner.items()
  }
  head = 'embed/table' if tied else 'head/w'
  assert {k: size for k, size in sizes.items() if size} == {
    head: params['embed']['table'].size,
    'norm/scale': 2 * params['norm']['scale'].size,
  }


def test_numbers_may_be_injected_and_scheduled():
  weights, grads = nested(draw(SHAPES, 0)), nested(draw(SHAPES, 10, (STEPS,)))
  options = {'momentum': 0.75, 'weight_decay': 0.5, 'vector_learning_rate': 0.1}
  tx = optax.inject_hyperparams(scale_sgd)(rate, **options)
  ours, state = trajectory(tx, weights, grads)
  want, _ = trajectory(scale_sgd(rate, **options), weights, grads)
  # The tolerance allows for rounding, because hyperparameters are arrays in one
  # program and constants in the other. Each of five steps rounds about ten
  # times and sums up to 13 squares.
  assert_close(ours, want, operations=STEPS * (10 + 13))
  assert {*state.hyperparams} == {'learning_rate', *options}


@pytest.mark.parametrize(
  'name, bad',
  [
    ('learning_rate', -0.1),
    ('learning_rate', np.inf),
    ('momentum', 1.0),
    ('momentum', np.float32(-0.5)),
    ('weight_decay', np.nan),
    ('vector_learning_rate', -1),
  ],
)
def test_a_number_out_of_range_is_named(name, bad):
  with pytest.raises(ValueError, match=f'{name} must be'):
    scale_sgd(**{'learning_rate': 0.1, name: bad})
