"""How an inner optimizer may use params, state and extra arguments."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore
from galore_optax.quantized.state import quantize_state
from galore_optax.trial import NeedsFunctionError, reaches, try_update
from tests.galore_optax.program import each, tree
from tests.rounding import distance, units

OPTIONS = {'rank': 3, 'gap': 2}
SHAPES = {'w': (7, 9), 'b': (5,)}


def first_update(tx, **extra):
  w = tree(SHAPES)
  state = tx.init(w)
  updates, state = jax.jit(tx.update)(tree(SHAPES, 5), state, w, **extra)
  return updates, state


def norm():
  return optax.snapshot('n', optax.tree.norm)


def adamw():
  return optax.adamw(0.1, weight_decay=0.3)


MEASURES = {
  'snapshot first': lambda: optax.chain(norm(), adamw()),
  'snapshot last': lambda: optax.chain(adamw(), norm()),
  'monitor': lambda: optax.chain(
    adamw(), optax.monitor({'n': optax.tree.norm})
  ),
  'average': lambda: optax.chain(
    adamw(),
    optax.monitor({'n': optax.measure_with_ema(optax.tree.norm, 0.9)}),
  ),
  'whole updates': lambda: optax.chain(
    adamw(), optax.snapshot('n', lambda updates: updates)
  ),
  'apply_if_finite': lambda: optax.apply_if_finite(
    optax.chain(adamw(), norm()), 3
  ),
  'masked': lambda: optax.chain(
    optax.masked(norm(), {'w': True, 'b': False}), adamw()
  ),
  'partition': lambda: optax.partition(
    {'a': optax.chain(adamw(), norm()), 'b': adamw()}, {'w': 'a', 'b': 'b'}
  ),
  'injected': lambda: optax.inject_hyperparams(
    lambda rate: optax.chain(optax.adamw(rate, weight_decay=0.3), norm())
  )(0.1),
  'jitted': lambda: jitted(optax.chain(adamw(), norm())),
}


def jitted(tx):
  return optax.GradientTransformation(tx.init, jax.jit(tx.update))


@each('name', MEASURES, quick=['snapshot first'])
def test_a_measurement_changes_nothing(name):
  measured = galore(MEASURES[name](), **OPTIONS)
  updates, _ = first_update(measured)
  want, _ = first_update(galore(adamw(), **OPTIONS))
  # The tolerance allows for different programs with projections that sum up to
  # nine terms, and for Adam's first step.
  assert distance({name: updates[name] for name in want}, want) < units(100)


def test_a_snapshot_measures_the_low_rank_gradient():
  tx = optax.chain(galore(**OPTIONS), norm(), optax.adam(1e-2))
  _, state = first_update(tx)
  low = tx.project(tree(SHAPES, 5), state)
  assert low['w'].shape == (3, 9)
  # The tolerance allows for a norm of about forty squares, each of a sum of up
  # to nine terms.
  np.testing.assert_allclose(
    optax.tree.get(state, 'n'), optax.tree.norm(low), rtol=units(50)
  )


class Kept(NamedTuple):
  count: jax.Array
  params: optax.Params


def pulled_back(at):
  """Adds the initial weights to the update at one step of the run."""

  def update(updates, state, params=None):
    pull = jax.tree.map(
      lambda w: jnp.where(state.count == at, w, 0), state.params
    )
    new = state._replace(count=state.count + 1)
    return optax.tree.add(updates, pull), new

  return optax.GradientTransformation(lambda w: Kept(jnp.int32(0), w), update)


def scaled_by_state():
  """Stores the norm of the weights, by which the next step may divide."""

  def update(updates, state, params=None):
    size = optax.tree.norm(params)
    by = jax.lax.cond(state > 1e9, lambda: 1 / state, lambda: jnp.ones(()))
    return jax.tree.map(lambda u: u * by, updates), size

  return optax.GradientTransformation(lambda _: jnp.float32(0), update)


@pytest.mark.parametrize(
  'make, where',
  [
    # The trial run at `init` does not reach step 7, so the error must follow
    # from the traced program.
    (lambda: pulled_back(at=7), r"its state.*\.params\['w'\] depends on them"),
    (lambda: jitted(pulled_back(at=7)), r"\.params\['w'\] depends on them"),
    (scaled_by_state, 'its state.* depends on them'),
    (optax.keep_params_nonnegative, 'its update of w depends on them'),
  ],
)
def test_state_that_an_update_reads_must_not_depend_on_weights(make, where):
  tx = galore(optax.chain(make(), optax.sgd(0.1)), **OPTIONS)
  with pytest.raises(ValueError, match=f'more than decoupled .*{where}'):
    tx.init(tree(SHAPES))


def loss(params):
  return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params))


NEED_FUNCTIONS = {
  'backtracking': (
    lambda: optax.scale_by_backtracking_linesearch(3),
    'value_fn',
  ),
  'zoom': (lambda: optax.scale_by_zoom_linesearch(3), 'value_fn'),
  'sophia': (lambda: optax.contrib.sophia(0.1), 'obj_fn'),
  'opaque sam': (
    lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
    'grad_fn',
  ),
}


@each('name', NEED_FUNCTIONS, quick=['backtracking', 'sophia'])
def test_an_inner_that_calls_the_loss_is_refused(name):
  make, function = NEED_FUNCTIONS[name]
  # Sam accepts only its own arguments, while a chain would pass all of them.
  inner = make()
  if name != 'opaque sam':
    inner = optax.chain(optax.sgd(0.1), inner)
  tx = galore(inner, **OPTIONS)
  with pytest.raises(ValueError, match=f'calls {function}, a function of the'):
    tx.init(tree(SHAPES))
  with pytest.raises(ValueError, match='elementwise=False'):
    quantize_state(make()).init(tree(SHAPES))


def test_an_error_of_an_inner_has_a_note():
  with pytest.raises(AttributeError, match='fast') as caught:
    galore(optax.lookahead(optax.adam(0.1), 5, 0.5), **OPTIONS).init(
      tree(SHAPES)
    )
  assert 'goes outside' in ' '.join(caught.value.__notes__)


@pytest.mark.parametrize('name', ['momo', 'momo_adam'])
def test_an_inner_that_takes_a_loss_is_tried_with_one(name):
  make = getattr(optax.contrib, name)
  with pytest.raises(ValueError, match='more than decoupled weight decay'):
    galore(make(0.1), **OPTIONS).init(tree(SHAPES))


def test_a_loss_that_no_weight_enters_is_fine():
  tx = galore(optax.polyak_sgd(), scale=1.0, **OPTIONS)
  updates, state = first_update(tx, value=jnp.float32(2.0))
  low = tx.project(tree(SHAPES, 5), state)
  step = min(1.0, 2.0 / float(optax.tree.norm(low, squared=True)))
  # The tolerance allows for a norm of about forty squares, each of a sum of up
  # to nine terms.
  np.testing.assert_allclose(updates['b'], -step * low['b'], rtol=units(50))


def test_the_remedy_of_the_message_works():
  w = tree(SHAPES)
  inner = galore(optax.adam(0.1), **OPTIONS)
  search = optax.scale_by_backtracking_linesearch(3)
  tx = optax.chain(inner, search)

  @jax.jit
  def update(state, w):
    value, g = jax.value_and_grad(loss)(w)
    return tx.update(g, state, w, value=value, grad=g, value_fn=loss)

  updates, _ = update(tx.init(w), w)
  assert loss(optax.apply_updates(w, updates)) < loss(w)
  for outside in (optax.keep_params_nonnegative(), optax.adaptive_grad_clip(1)):
    with pytest.raises(ValueError, match='goes outside'):
      galore(optax.chain(optax.adam(0.1), outside), **OPTIONS).init(w)
    first_update(optax.chain(inner, outside))


def test_extra_arguments_reach_inners_that_accept_them():
  def strict(*names):
    def update(updates, state, params=None, **given):
      if {*given} != {*names}:
        raise TypeError(f'takes {names}')
      return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)

  for names in ((), ('value',), ('value', 'grad', 'value_fn')):
    assert try_update(strict(*names), 1.0, (), None) == (1.0, ())
  with pytest.raises(TypeError, match='another'):
    try_update(strict('another'), 1.0, (), None)
  with pytest.raises(NeedsFunctionError, match='value_fn'):
    tx = optax.scale_by_backtracking_linesearch(3)
    w = {'w': jnp.ones(2)}
    try_update(tx, w, tx.init(w), w)


def test_dependencies_of_an_output():
  def f(x, y, z):
    a, b = jax.lax.cond(z > 0, lambda: (x, 2 * y), lambda: (3 * x, y))
    c, _ = jax.lax.scan(lambda c, _: (c + y, None), z, None, 3)
    return a, b, c, jax.jit(lambda x, y: (y, x))(x, y)

  jaxpr = jax.make_jaxpr(f)(1.0, 2.0, 3.0).jaxpr
  assert reaches(jaxpr, [True, False, False]) == [1, 0, 0, 0, 1]
  assert reaches(jaxpr, [False, True, False]) == [0, 1, 1, 1, 0]
  # The predicate of a `cond` affects both of its results.
  assert reaches(jaxpr, [False, False, True]) == [1, 1, 1, 0, 0]
