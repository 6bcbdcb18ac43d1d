"""The presets under `optax.inject_hyperparams`."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  Staggered,
  galore,
  galore_adafactor,
  galore_adamw,
  galore_adamw_8bit,
)

STATIC = {
  galore_adamw: ('rank', 'gap'),
  galore_adamw_8bit: ('rank', 'gap', 'block_size', 'min_size'),
  galore_adafactor: ('rank', 'gap'),
}
every_preset = pytest.mark.parametrize(
  'preset', STATIC, ids=lambda preset: preset.__name__
)


def normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def tree(seed=0):
  return {'w': normal((12, 400), seed), 'b': normal(6, seed + 1)}


def injected(preset, *args, **options):
  factory = optax.inject_hyperparams(preset, static_args=STATIC[preset])
  return factory(*args, rank=11, gap=2, **options)


@every_preset
def test_the_signature_names_the_options_of_galore(preset):
  named = inspect.signature(preset).parameters
  _, *options = inspect.signature(galore).parameters.values()
  assert [named[option.name] for option in options] == options
  assert named['rank'].default == 128
  assert named['gap'].default == 200
  assert named['scale'].default == 0.25
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
  """By hand: at each step a transformation with that step's numbers."""
  schedules = {
    'learning_rate': lambda count: 0.1 / (count + 1),
    'b1': lambda count: 0.5 + 0.1 * count,
    'scale': lambda count: 0.25 * (count + 1),
    'weight_decay': lambda count: 0.3 * count,
  }
  tx, params = injected(preset, **schedules), tree()
  state, step = tx.init(params), jax.jit(tx.update)

  @jax.jit
  def by_hand(numbers, g, state):
    return preset(**numbers, rank=11, gap=2).update(g, state, params)

  for i in range(4):
    numbers = {name: f(i) for name, f in schedules.items()}
    want, _ = by_hand(numbers, tree(10 + i), state.inner_state)
    updates, state = step(tree(10 + i), state, params)
    # b2 is a number here and a float32 there: 1 - b2 is 5e-5 off, and so is
    # nu; a code of 8 bits at a tie is another one.
    chex.assert_trees_all_close(updates, want, rtol=1e-3, atol=1e-5)
    for name, number in numbers.items():
      np.testing.assert_allclose(state.hyperparams[name], number, rtol=1e-6)


@every_preset
def test_numbers_change_between_steps_and_nothing_is_compiled_again(preset):
  tx, params = injected(preset, **NUMBERS), tree()
  update = jax.jit(chex.assert_max_traces(tx.update, n=1))
  chex.clear_trace_counter()
  _, state = update(tree(3), tx.init(params), params)

  def step_with(**numbers):
    arrays = {name: jnp.float32(number) for name, number in numbers.items()}
    changed = state._replace(hyperparams=state.hyperparams | arrays)
    return update(tree(4), changed, params)[0]

  before = step_with()
  halves = {name: number / 2 for name, number in NUMBERS.items()}
  for name, number in halves.items():
    moved = jnp.abs(step_with(**{name: number})['w'] - before['w'])
    assert np.max(moved) > 1e-3, name
  by_hand = jax.jit(preset(**halves, rank=11, gap=2).update)
  want, _ = by_hand(tree(4), state.inner_state, params)
  chex.assert_trees_all_close(step_with(**halves), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['rank', 'gap'])
@every_preset
def test_a_rank_or_gap_that_is_injected_raises(preset, name):
  static = {*STATIC[preset]} - {name}
  tx = optax.inject_hyperparams(preset, static_args=static)(0.1, rank=3)
  message = rf"{name} must be .* static_args=\('rank', 'gap'\)"
  with pytest.raises(ValueError, match=message):
    tx.init(tree())
  with pytest.raises(ValueError, match=message):
    jax.jit(tx.init)(tree())


def test_other_arrays_for_numbers_raise():
  with pytest.raises(ValueError, match=r'gap must be .* static_args'):
    galore(gap=Staggered(jnp.array(3)))
  with pytest.raises(ValueError, match=r'min_size must be .* static_args'):
    optax.inject_hyperparams(
      galore_adamw_8bit, static_args=('rank', 'gap', 'block_size')
    )(0.1, rank=3).init(tree())
