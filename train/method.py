"""The optimizers that a config can name: `from train.method import Galore`.

A class such as `Galore(rank=64)` holds the options of a preset. Python makes
these classes from the rows of `train.optimizers.registry`. `method.pyi`, which
`python -m train.optimizers.stub` writes, declares them for type checkers and
editors.
"""

import functools
import operator
from typing import Any

from train.optimizers.baselines import adam_8bit, adamw, optax_galore
from train.optimizers.growth import limit_growth
from train.optimizers.registry import CLASSES, METHODS, VARIANTS

__all__ = [
  'CLASSES',
  'METHODS',
  'VARIANTS',
  'Optimizer',
  'adam_8bit',
  'adamw',
  'limit_growth',
  'optax_galore',
]

Optimizer = functools.reduce(operator.or_, CLASSES.values())
"""The type of `Config.optimizer`: any of the classes."""


def __getattr__(name: str) -> type[Any]:
  """Returns the class of options with a name.

  >>> from train.method import Galore
  >>> Galore(rank=64).rank
  64
  """
  if name in CLASSES:
    return CLASSES[name]
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  """Returns the names of the module, those of the classes included."""
  return sorted({*globals(), *CLASSES})
