"""Presets work with `optax.inject_hyperparams`."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import Staggered, galore
from tests.galore_optax.every import PRESETS
from tests.galore_optax.program import tree

# Presets with the options of `galore`, b1 and weight decay, and their options
# that determine shapes.
STATIC = {
  preset: [x for x in ('rank', 'gap', 'block_size', 'min_size') if x in options]
  for preset in PRESETS.values()
  for options in [inspect.signature(preset).parameters]
  if options.keys() >= {'gap', 'scale', 'b1', 'weight_decay'}
}
GALORE, EIGHT_BITS, FIRA, APOLLO, MINI = (
  PRESETS[name]
  for name in ('Galore', 'Galore8bit', 'Fira', 'Apollo', 'ApolloMini')
)
FIXED = {
  FIRA: {'residual'},
  APOLLO: {'subspace', 'residual'},
  MINI: {'rank', 'subspace', 'residual'},
}
DEFAULTS = {
  APOLLO: {'rank': 256, 'scale': 1.0},
  MINI: {'scale': 128.0},
}
every_preset = pytest.mark.parametrize(
  'preset',
  [
    pytest.param(
      preset,
      marks=() if preset in (GALORE, FIRA) else pytest.mark.slow,
    )
    for preset in STATIC
  ],
  ids=lambda preset: preset.__name__,
)


SHAPES = {'w': (12, 400), 'b': (6,)}


def injected(preset, *args, **options):
  factory = optax.inject_hyperparams(preset, static_args=STATIC[preset])
  return factory(*args, **sizes(preset), **options)


def sizes(preset):
  """Returns the rank and the gap of the tests, if the preset has them."""
  both = {'rank': 11, 'gap': 2}
  return {name: both[name] for name in both if name in STATIC[preset]}


@every_preset
def test_the_signature_names_the_options_of_galore(preset):
  named = inspect.signature(preset).parameters
  _, *options = inspect.signature(galore).parameters.values()
  for option in options:
    if option.name in FIXED.get(preset, ()):
      assert option.name not in named
    else:
      default = DEFAULTS.get(preset, {}).get(option.name, option.default)
      assert named[option.name].default == default
  kinds = {parameter.kind for parameter in named.values()}
  assert inspect.Parameter.VAR_KEYWORD not in kinds


NUMBERS = {
  'learning_rate': 0.1,
  'b1': 0.9,
  'scale': 0.25,
  'weight_decay': 0.1,
}


@every_preset
def test_schedules_are_the_numbers_of_each_step(preset):
  """Compares with a new transformation at each step, built with its numbers."""
  schedules = {
    'learning_rate': lambda count: 0.1 / (count + 1),
    'b1': lambda count: 0.5 + 0.1 * count,
    'scale': lambda count: 0.25 * (count + 1),
    'weight_decay': lambda count: 0.3 * count,
  }
  tx, params = injected(preset, **schedules), tree(SHAPES)
  state, step = tx.init(params), jax.jit(tx.update)

  @jax.jit
  def by_hand(numbers, g, state):
    return preset(**numbers, **sizes(preset)).update(g, state, params)

  for i in range(4):
    numbers = {name: f(i) for name, f in schedules.items()}
    want, _ = by_hand(numbers, tree(SHAPES, 10 + i), state.inner_state)
    updates, state = step(tree(SHAPES, 10 + i), state, params)
    # An injected b2 is a float32 array, and the other b2 is a Python float, so
    # `1 - b2` and nu differ by 5e-5. A moment halfway between two 8-bit codes
    # may be rounded to another code.
    chex.assert_trees_all_close(updates, want, rtol=1e-3, atol=1e-5)
    for name, number in numbers.items():
      np.testing.assert_allclose(state.hyperparams[name], number, rtol=1e-6)


@every_preset
def test_numbers_change_between_steps_and_nothing_is_compiled_again(preset):
  tx, params = injected(preset, **NUMBERS), tree(SHAPES)
  update = jax.jit(chex.assert_max_traces(tx.update, n=1))
  chex.clear_trace_counter()
  _, state = update(tree(SHAPES, 3), tx.init(params), params)

  def step_with(**numbers):
    arrays = {name: jnp.float32(number) for name, number in numbers.items()}
    changed = state._replace(hyperparams=state.hyperparams | arrays)
    return update(tree(SHAPES, 4), changed, params)[0]

  before = step_with()
  halves = {name: number / 2 for name, number in NUMBERS.items()}
  for name, number in halves.items():
    moved = jnp.abs(step_with(**{name: number})['w'] - before['w'])
    # Rounding errors are about 1e-6 of the update.
    assert np.max(moved) > 1e-3 * np.max(jnp.abs(before['w'])), name
  by_hand = jax.jit(preset(**halves, **sizes(preset)).update)
  want, _ = by_hand(tree(SHAPES, 4), state.inner_state, params)
  chex.assert_trees_all_close(step_with(**halves), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  ('preset', 'name'),
  [(p, n) for p in STATIC for n in ('rank', 'gap') if n in STATIC[p]],
)
def test_a_rank_or_gap_that_is_injected_raises(preset, name):
  static = {*STATIC[preset]} - {name}
  options = {} if preset is MINI else {'rank': 3}
  tx = optax.inject_hyperparams(preset, static_args=static)(0.1, **options)
  message = rf"{name} must be .* static_args=\('rank', 'gap'\)"
  with pytest.raises(ValueError, match=message):
    tx.init(tree(SHAPES))
  with pytest.raises(ValueError, match=message):
    jax.jit(tx.init)(tree(SHAPES))


def test_other_arrays_for_numbers_raise():
  with pytest.raises(ValueError, match=r'gap must be .* static_args'):
    galore(gap=Staggered(jnp.array(3)))
  with pytest.raises(ValueError, match=r'min_size must be .* static_args'):
    optax.inject_hyperparams(
      EIGHT_BITS, static_args=('rank', 'gap', 'block_size')
    )(0.1, rank=3).init(tree(SHAPES))


def test_codes_do_not_depend_on_an_injected_learning_rate():
  """Second moments have the unsigned code, also if `init` is traced."""
  make = lambda learning_rate: EIGHT_BITS(learning_rate, rank=4, min_size=0)
  params = {'w': jnp.ones((9, 13))}
  injected = optax.inject_hyperparams(make)(learning_rate=0.1)
  want = jax.tree.structure(jax.eval_shape(make(0.1).init, params))
  for init in (injected.init, lambda w: jax.eval_shape(injected.init, w)):
    assert jax.tree.structure(init(params).inner_state) == want
