"""A model of many matrices costs as much as one with a few of each kind."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import decay, galore, trial
from galore_optax.quantized import array
from galore_optax.quantized.state import quantize_state
from tests.galore_optax.every import build, maker
from tests.galore_optax.program import normal32

SHAPES = {'q': (8, 8), 'up': (8, 20), 'down': (20, 8)}


def model(layers, dtype=jnp.float32, shapes=SHAPES):
  return {
    f'layer_{i}': {
      name: jnp.ones(shape, dtype) for name, shape in shapes.items()
    }
    for i in range(layers)
  }


def counting(inner):
  """Returns an inner, and the list of its calls."""
  calls = []

  def init(params):
    calls.append('init')
    return inner.init(params)

  def update(updates, state, params=None):
    calls.append('update')
    return inner.update(updates, state, params)

  return optax.GradientTransformation(init, update), calls


def test_an_inner_is_tried_once_for_a_tree():
  inner, calls = counting(optax.adamw(0.1))
  tx, params = galore(inner, rank=2), model(8)
  tx.init(params)
  assert calls == ['init', 'update', 'init']
  # Other shapes of the same kinds, and abstract ones, need no further trial.
  calls.clear()
  tx.init(params)
  jax.eval_shape(tx.init, params)
  tx.init(model(8, shapes={'q': (9, 9), 'up': (9, 12), 'down': (12, 9)}))
  galore_optax.describe(tx, params)
  assert calls == ['init'] * 4
  tx.init(model(8, jnp.float16))
  tx.init(model(2))
  assert calls.count('update') == 1


@pytest.mark.parametrize(
  'make',
  [
    maker('Galore', rank=2),
    maker('GaloreAdafactor', rank=2),
    maker('GaloreMuon', rank=2),
    maker('Apollo', rank=2),
    lambda: galore(quantize_state(optax.adam(0.1)), rank=2),
  ],
  ids=['adamw', 'adafactor', 'muon', 'apollo', '8 bits'],
)
def test_the_trial_computes_each_kind_of_leaf_once(make, monkeypatch):
  apply, count = trial._apply, []

  def counted(*args):
    count.append(1)
    return apply(*args)

  monkeypatch.setattr(trial, '_apply', counted)
  numbers = []
  for layers in (1, 6):
    count.clear()
    make().init(model(layers))
    numbers.append(len(count))
  assert numbers[0] == numbers[1] > 0


def lamb_for(chosen):
  """Scales the update of one path by the norm of its weight."""

  def update(updates, state, params):
    def of_leaf(path, u, w):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      return u * jnp.linalg.norm(w) if name == chosen else u

    return jax.tree_util.tree_map_with_path(of_leaf, updates, params), state

  return optax.GradientTransformation(lambda params: (), update)


def test_an_inner_that_treats_one_path_in_another_way_is_found():
  inner = optax.chain(lamb_for('layer_17/up'), optax.sgd(0.1))
  with pytest.raises(ValueError, match='its update of layer_17/up depends on'):
    galore(inner, rank=2).init(model(32))
  galore(optax.chain(lamb_for('none'), optax.sgd(0.1)), rank=2).init(model(3))


def test_a_trial_of_another_structure_is_not_remembered():
  inner = optax.chain(lamb_for('layer_17/up'), optax.sgd(0.1))
  tx = galore(inner, rank=2)
  tx.init(model(3))
  with pytest.raises(ValueError, match='its update of layer_17/up depends on'):
    tx.init(model(32))


def test_a_norm_over_all_leaves_is_computed_over_all():
  x = jnp.ones((2, 2))
  tree = [x, x, 3 * x]
  norm = trial.Traced(optax.tree.norm, tree)
  np.testing.assert_allclose(norm(tree), np.sqrt(44))


def test_equal_operations_are_one_object():
  x, y = jnp.ones(2), jnp.zeros(2)

  @jax.jit
  def body(w):
    return jnp.where(w > 0, jnp.sin(w), 0.0)

  def f(tree):
    return [body(w) + 1 for w in tree], jax.lax.optimization_barrier(tree)

  (a, b, c), _ = trial.Traced(f, [x, x, y])([x, x, y])
  assert a is b and a is not c
  np.testing.assert_array_equal(a, np.sin(np.ones(2, np.float32)) + 1)


def test_literals_of_equal_value_and_another_type_differ():
  def f(x):
    return x * 0.0, x * -0.0, x + jnp.float32(1), jnp.int32(1) + 0 * x[0]

  found = trial.Traced(f, jnp.ones(2))(jnp.ones(2))
  want = f(jnp.ones(2))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_array_equal(np.signbit(a), np.signbit(b))
    np.testing.assert_array_equal(a, b)


def lowered(tx, params):
  shapes = jax.eval_shape(tx.init, params)
  return jax.jit(tx.update).lower(params, shapes, params).as_text()


def test_a_random_basis_is_compiled_once_for_a_shape():
  numbers = [
    len(re.findall('erf_inv', lowered(build('Apollo', rank=2), p)))
    for p in (model(1), model(2))
  ]
  assert numbers[0] == numbers[1] > 0


def test_an_8_bit_update_is_compiled_once_for_a_shape():
  tx = galore(quantize_state(optax.sgd(0.1, 0.9), min_size=0), rank=4)
  shapes = {'up': (8, 20)}
  numbers = [
    len(re.findall('call @quantize_rows', lowered(tx, model(n, shapes=shapes))))
    for n in (9, 10)
  ]
  assert numbers[0] == numbers[1] > 0


def test_leaves_that_share_a_loop_are_updated_as_alone():
  params = {f'w{i}': normal32((24, 40), i) for i in range(9)}
  grads = {k: 0.1 * x for k, x in params.items()}
  tx = quantize_state(optax.adamw(0.1, weight_decay=0.1), min_size=0)
  step = jax.jit(tx.update)
  together, state = step(grads, tx.init(params), params)
  for k in params:
    # All have the same key, so that one program updates each of them.
    one = {'w': params[k]}
    alone, of_one = step({'w': grads[k]}, tx.init(one), one)
    np.testing.assert_array_equal(together[k], alone['w'])
    np.testing.assert_array_equal(state[0].nu[k].codes, of_one[0].nu['w'].codes)


def test_initial_codes_are_those_of_the_initial_moments():
  def init(params):
    ones = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)
    ramp = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype), params)
    return optax.TraceState({'a': ones, 'b': ramp})

  params = {'w': jnp.ones(300)}
  moments = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
  tx = quantize_state(moments, min_size=0, elementwise=False)
  state = tx.init(params).trace
  want = init(params).trace
  for name in ('a', 'b'):
    found, expected = state[name]['w'], array.quantize(want[name]['w'])
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_kinds_are_all_that_a_trial_reads():
  plans = galore(optax.sgd(0.1), rank=2).plan
  shapes = {'q': (9, 9), 'up': (9, 12), 'down': (12, 9)}
  a, b = model(2), model(2, shapes=shapes)
  assert decay.kinds(plans(a), a) == decay.kinds(plans(b), b)
  small = model(2, shapes=shapes | {'down': (12, 2)})
  assert decay.kinds(plans(a), a) != decay.kinds(plans(small), small)
