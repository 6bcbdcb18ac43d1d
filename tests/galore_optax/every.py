"""Every preset, for tests of statements that hold for all of them.

`train.method.METHODS` is the only list of presets. Tests name a preset by its
class there, such as 'Galore8bit'. A new preset is in these tests at once.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import optax

from train.method import METHODS

PRESETS = {
  name: row.preset
  for name, row in METHODS.items()
  if row.preset.__module__.startswith('galore_optax')
}
"""All presets, by the names of their classes."""

PROJECTING = tuple(
  name
  for name, preset in PRESETS.items()
  if {'rank', 'density'} & inspect.signature(preset).parameters.keys()
)
"""Presets with an option for the number of basis vectors."""


def build(
  name: str, learning_rate: Any = 0.1, **options: Any
) -> optax.GradientTransformation:
  """Builds a preset, given by the name of its class."""
  return PRESETS[name](learning_rate, **options)


def maker(
  name: str, **options: Any
) -> Callable[[], optax.GradientTransformation]:
  """Returns a function that builds a preset."""
  return functools.partial(build, name, **options)


def makers(
  **options: Any,
) -> dict[str, Callable[[], optax.GradientTransformation]]:
  """Returns a function for each preset that builds it.

  Options that a preset does not have are left out.
  """
  found = {}
  for name, preset in PRESETS.items():
    names = options.keys() & inspect.signature(preset).parameters
    found[name] = maker(name, **{key: options[key] for key in names})
  return found
