"""Every preset raises a helpful error for a wrong option name or value.

The error has the name of the option, the rule and the value, or for a wrong
name the list of all options.
"""

import inspect
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from galore_optax.options import THEIRS
from tests.galore_optax import every
from tests.galore_optax.presets import test_contract, test_groups

# Every function of the package whose first parameter is `learning_rate`.
PRESETS = [
  function
  for name, function in sorted(vars(go).items())
  if inspect.isfunction(function)
  and next(iter(inspect.signature(function).parameters), '') == 'learning_rate'
]
BOTH = [*PRESETS, go.galore]
every_preset = pytest.mark.parametrize(
  'preset', PRESETS, ids=lambda preset: preset.__name__
)
presets_and_galore = pytest.mark.parametrize(
  'preset', BOTH, ids=lambda preset: preset.__name__
)


def call(preset, **options):
  """Calls a preset with a valid learning rate, or `galore` without one."""
  first = {} if preset is go.galore else {'learning_rate': 0.1}
  return preset(**first | options)


def options(preset):
  return list(inspect.signature(preset).parameters)


def test_all_presets_are_found():
  assert {*PRESETS} == {*every.PRESETS.values()}


def test_all_presets_have_the_tests_of_the_contract_and_of_groups():
  names = {preset.__name__ for preset in PRESETS}
  for cases in (test_contract.PRESETS, test_groups.PRESETS):
    assert names <= {re.split('[-,]', name)[0] for name in cases}


def refusal(preset, name, value=None):
  """Returns the message of the error for a wrong option name."""
  with pytest.raises(TypeError) as caught:
    call(preset, **{name: value})
  message = str(caught.value)
  assert '\n' not in message and name in message
  # The message ends with the list of all options.
  listing = message.split(f'Options of {preset.__name__}(): ')[1]
  assert listing.split(', ') == options(preset)
  return message


@presets_and_galore
def test_a_name_of_a_reference_or_of_nobody_is_refused(preset):
  names = options(preset)
  for theirs, ours in THEIRS.items():
    if theirs not in names:
      message = refusal(preset, theirs)
      if ours in names:
        assert message.startswith(f'{theirs} is called {ours} here')
  for name in ('nonsense', 'option', 'args', 'kwargs', 'self'):
    refusal(preset, name)


@presets_and_galore
def test_a_near_miss_is_told_the_name(preset):
  for name in options(preset):
    for miss in (name + 's', name[:-1] + '_', name.replace('_', '')):
      if miss in options(preset) or miss in THEIRS or len(name) < 4:
        continue
      assert f'did you mean {name!r}?' in refusal(preset, miss)


SET_THEMSELVES = {
  go.galore_adamw: ['inner'],
  go.galore_adamw_8bit: ['inner'],
  go.galore_adafactor: ['inner'],
  go.galore_muon: ['inner'],
  go.fira: ['residual'],
  go.apollo: ['residual', 'subspace'],
  go.apollo_mini: ['residual', 'subspace', 'rank', 'channels'],
  go.frugal: ['rank', 'scale', 'side', 'moments', 'axes'],
}


@every_preset
def test_an_option_that_a_preset_sets_itself_is_refused(preset):
  for name in SET_THEMSELVES.get(preset, ()):
    assert f'{preset.__name__}() sets {name} itself' in refusal(preset, name)
  # Each option of `galore` is an option of the preset, or it is rejected. It
  # never reaches `galore` twice.
  for name in options(go.galore):
    if name not in options(preset):
      refusal(preset, name)


def test_an_option_of_the_inner_is_no_option_of_galore():
  for name in ('b1', 'weight_decay', 'eps'):
    assert 'is an option of its inner' in refusal(go.galore, name)


# Values that are invalid for every option.
NEVER = [object(), 1j, (0.5, 0.5, 0.5), {1: 2}, [None], b'blocks', float('nan')]
# Options that are regexes, so that every string is valid.
TEXTS = {'targets', 'blocks'}
NOT_A_NUMBER = ['0.1', [0.1], {'a': 0.1}, True]
NAMES = {'side', 'order', 'complement', 'residual', 'subspace', 'moments'}
NAMES |= {'inner', 'targets', 'blocks', 'axes'}


def defaults(preset):
  """Yields the name and the default of each option of a preset."""
  for name, parameter in inspect.signature(preset).parameters.items():
    yield name, parameter.default


def check_refused(preset, name, value):
  with pytest.raises(ValueError) as caught:
    call(preset, **{name: value})
  message = str(caught.value)
  assert message.startswith(f'{name} must be'), (name, value, message)
  assert message.endswith(f'got {value!r}') and '\n' not in message


@presets_and_galore
def test_a_value_of_a_wrong_type_is_refused(preset):
  for name, default in defaults(preset):
    for value in NEVER:
      check_refused(preset, name, value)
    if name not in TEXTS:
      check_refused(preset, name, 'no such text')
    if isinstance(default, tuple):
      for value in (1e-30, (1e-30,), ('a', 'b'), (1e-30, None), (-1.0, 0.0)):
        check_refused(preset, name, value)
    if isinstance(default, bool):
      for value in (0, 1, 0.5, None):
        check_refused(preset, name, value)
    elif name not in NAMES:
      for value in NOT_A_NUMBER:
        check_refused(preset, name, value)
    if name in NAMES:
      for value in (0.5, 3, True):
        check_refused(preset, name, value)


@presets_and_galore
def test_a_class_is_no_instance(preset):
  classes = {'subspace': go.Svd, 'residual': go.Sign, 'moments': go.Rotate}
  classes |= {'inner': optax.adam, 'gap': go.Staggered}
  for name, value in classes.items():
    if name in options(preset):
      check_refused(preset, name, value)


@presets_and_galore
def test_the_defaults_are_accepted(preset):
  given = {
    name: default
    for name, default in defaults(preset)
    if default is not inspect.Parameter.empty
  }
  assert call(preset, **given)


def test_an_array_where_a_number_is_compiled_in_names_static_args():
  size = jnp.int32(4)
  for preset, name in [
    (go.badam, 'switch_every'),
    (go.badam, 'start'),
    (go.galore_adamw_8bit, 'basis_bits'),
    (go.galore_adamw_8bit, 'block_size'),
    (go.fira, 'bits'),
    (go.frugal, 'density'),
  ]:
    with pytest.raises(ValueError, match=f'{name} must be .* static_args'):
      call(preset, **{name: size})


def test_numbers_may_be_traced():
  @jax.jit
  def update(numbers, g):
    tx = go.adalomo(0.1, eps=(numbers[0], numbers[1]), clip_norm=numbers[2])
    return tx.update(g, tx.init(g), g)[0]

  g = {'w': jnp.ones((3, 5))}
  tx = go.adalomo(0.1, eps=(1e-20, 1e-2), clip_norm=0.5)
  want, _ = tx.update(g, tx.init(g), g)
  got = update(jnp.array([1e-20, 1e-2, 0.5]), g)
  # XLA may replace a division by a constant with a multiplication, which
  # rounds differently.
  assert jnp.allclose(got['w'], want['w'], rtol=1e-5)


@pytest.mark.parametrize(
  'make, name',
  [
    (lambda x: go.Coordinates(largest=x), 'largest'),
    (lambda x: go.Coordinates(seed=x), 'seed'),
    (lambda x: go.Gaussian(seed=x), 'seed'),
    (lambda x: go.Randomized(oversample=x), 'oversample'),
    (lambda x: go.PowerIteration(steps=x), 'steps'),
    (lambda x: go.Lazy(threshold=x), 'threshold'),
    (lambda x: go.Lazy(memory=x), 'memory'),
    (lambda x: go.Packed('svd', bits=x), 'bits'),
    (lambda x: go.Packed(go.Svd), 'subspace'),
    (lambda x: go.Scaled(limit=x), 'limit'),
    (lambda x: go.Scaled(channels=x), 'channels'),
    (lambda x: go.Sign(x), 'learning_rate'),
    (lambda x: go.Rotate(b1=x), 'b1'),
    (lambda x: go.quantize_state(optax.sgd(1), elementwise=x), 'elementwise'),
    (lambda x: go.quantize_state(optax.adam(0.1), min_size=x), 'min_size'),
    (lambda x: go.quantize_bases(go.galore(optax.sgd(1)), bits=x), 'bits'),
    (lambda x: go.quantize_bases(go.galore(optax.sgd(1)), group=x), 'group'),
    (lambda x: go.layerwise(None, optax.sgd(1.0), clip_norm=x), 'clip_norm'),
    (lambda x: go.scale_by_galore_adam(eps=x), 'eps'),
    (lambda x: go.scale_by_galore_factored_rms(clip_threshold=x), 'clip_thres'),
  ],
)  # fmt: skip
def test_values_of_what_a_preset_takes_are_checked_too(make, name):
  for value in ('text', object(), (0.5,)):
    with pytest.raises(ValueError, match=f'^{name}\\w* must be .* got '):
      make(value)
