"""All descriptions of a preset's options agree.

A type checker reads annotations and the TypedDict in `Unpack`. `help`,
`optax.inject_hyperparams` and `train.optimizers.registry` read the signature.
"""

import dataclasses
import inspect
import pydoc
import re
import typing

import jax
import optax
import pytest

from galore_optax import Elsewhere
from train.optimizers import registry

PRESETS = {
  name: row.preset
  for name, row in registry.METHODS.items()
  if row.preset.__module__.startswith('galore_optax')
}

# Options with a float for default that `inject_hyperparams` cannot trace.
STATIC = {'density'}

# A part of a model, in which no preset projects or quantizes a weight. `init`
# then skips most checks that compile programs.
PARAMS = {
  'blocks': {'norm': jax.ShapeDtypeStruct((2, 8), 'float32')},
  'head': Elsewhere(),
}


def declared_types(preset):
  """Returns the type of each option, as a type checker reads it."""
  function = inspect.unwrap(preset)
  hints = typing.get_type_hints(function)
  types = {}
  for name, parameter in inspect.signature(function).parameters.items():
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
      (typed_dict,) = typing.get_args(hints[name])
      forwarded = typing.get_type_hints(typed_dict)
      assert types.keys().isdisjoint(forwarded)
      types |= forwarded
    else:
      types[name] = hints[name]
  return types


@pytest.mark.parametrize('name', PRESETS)
def test_all_descriptions_of_the_options_agree(name):
  preset = PRESETS[name]
  types = declared_types(preset)
  first, *options = inspect.signature(preset).parameters.values()
  assert first.name == 'learning_rate'
  assert {x.kind for x in options} == {inspect.Parameter.KEYWORD_ONLY}
  assert {x.name: x.annotation for x in (first, *options)} == types

  page = pydoc.render_doc(preset, renderer=pydoc.plaintext)
  heading = page.split('\n\n', 1)[1].split(inspect.getdoc(preset)[:9])[0]
  assert re.findall(r'(\w+): ', heading) == [first.name, *names(options)]

  # Config fields: all options but those that no command line can express.
  fields = dataclasses.fields(registry.options_class(name, preset))
  expressible = [
    x
    for x in options
    if registry.command_line_type(types[x.name])
    and x.name not in registry.CONFIG_SETS
  ]
  assert names(fields) == names(expressible)
  for field, option in zip(fields, expressible, strict=True):
    kind, *_ = typing.get_args(field.type)
    assert kind == registry.command_line_type(types[option.name])
    assert field.default == option.default

  floats = {x.name for x in options if isinstance(x.default, float)}
  injected = {first.name, *floats} - STATIC
  tx = optax.inject_hyperparams(preset, static_args=types.keys() - injected)
  state = jax.eval_shape(tx(0.1).init, PARAMS)
  assert state.hyperparams.keys() == injected


def names(values):
  return [value.name for value in values]
