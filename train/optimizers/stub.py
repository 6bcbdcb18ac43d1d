"""Writes the stub of `train.method`: `python -m train.optimizers.stub`.

The stub declares the classes that `train.method` makes from presets, so that
type checkers and editors can check their options. After a change of
`train.optimizers.registry` or of a preset's options, write it again:

  python -m train.optimizers.stub > train/method.pyi
"""

import dataclasses
import types
import typing
from typing import Any, Literal

from train import method
from train.optimizers import registry

HEAD = '''"""The names of `train.method`.

`python -m train.optimizers.stub` writes this file. Do not edit it.
"""

import dataclasses
from typing import Literal, TypeAlias

import optax

'''

WIDTH = 80
"""Longest line of the stub."""


def stub() -> str:
  """Returns the text of train/method.pyi."""
  sections = [class_text(name) for name in registry.CLASSES]
  union = '\n  | '.join(registry.CLASSES)
  sections.append(f'Optimizer: TypeAlias = (\n  {union}\n)\n')
  return HEAD + exports() + '\n' + '\n'.join(sections)


def exports() -> str:
  """Returns imports of all other public names of `train.method`."""
  names = [name for name in vars(method)['__all__'] if name != 'Optimizer']
  modules = {name: defining_module(name) for name in names}
  order = sorted(names, key=lambda name: modules[name])
  return ''.join(
    f'from {modules[name]} import {name} as {name}\n' for name in order
  )


def defining_module(name: str) -> str:
  """Returns the module that defines a name; `train.optimizers.registry` for a
  table.

  >>> defining_module('adamw'), defining_module('METHODS')
  ('train.optimizers.baselines', 'train.optimizers.registry')
  """
  return getattr(getattr(method, name), '__module__', registry.__name__)


def class_text(name: str) -> str:
  """Returns the declaration of a class of options."""
  fields = dataclasses.fields(registry.CLASSES[name])
  lines = [
    '@dataclasses.dataclass(frozen=True)',
    f'class {name}:',
    f'  """Options of `{registry.METHODS[name].preset.__name__}`."""\n',
    *map(field_text, fields),
    '  def build(',
    '    self, learning_rate: optax.ScalarOrSchedule',
    '  ) -> optax.GradientTransformation: ...\n',
  ]
  return '\n'.join(lines)


def field_text(field: dataclasses.Field[Any]) -> str:
  """Returns the declaration of a field, over several lines if it is long."""
  kind, _ = typing.get_args(field.type)
  members = registry.union_members(kind)
  text = ' | '.join(map(type_text, members))
  line = f'  {field.name}: {text} = {field.default!r}'
  if len(line) <= WIDTH:
    return line
  before, _, rest = line.partition('[')
  inside, _, after = rest.partition(']')
  if len(inside) + 4 > WIDTH:
    inside = inside.replace(', ', ',\n    ') + ','
  return f'{before}[\n    {inside}\n  ]{after}'


def type_text(kind: Any) -> str:
  """Returns the source text of a type.

  >>> type_text(Literal['svd', 4]), type_text(types.NoneType), type_text(int)
  ("Literal['svd', 4]", 'None', 'int')
  >>> type_text(tuple[str, ...])
  'tuple[str, ...]'
  """
  if kind is types.NoneType:
    return 'None'
  if typing.get_origin(kind) is Literal:
    return f'Literal[{", ".join(map(repr, typing.get_args(kind)))}]'
  return kind.__name__ if isinstance(kind, type) else repr(kind)


if __name__ == '__main__':
  print(stub(), end='')
