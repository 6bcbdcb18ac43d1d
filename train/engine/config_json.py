"""The JSON form of a configuration, and comparisons of two of them.

A run directory keeps its configuration as JSON. The key 'kind' of an object
holds the class of a dataclass.
"""

import dataclasses
import pkgutil
import types
import typing
from typing import Any

from train.config import CORPORA, MODELS, Config

OURS = ('galore_optax', 'models', 'train')
"""Packages whose classes are stored by name, without a module."""


def to_json(config: Any) -> dict[str, Any]:
  """Converts a dataclass to a dict; 'kind' holds its class, as `kind_of` does.

  >>> from train.data.corpus import Chitchat
  >>> to_json(Chitchat(holdout=0.1))
  {'kind': 'Chitchat', 'holdout': 0.1}
  """

  def as_json(value: Any) -> Any:
    if isinstance(value, tuple):
      return [*map(as_json, value)]
    return to_json(value) if dataclasses.is_dataclass(value) else value

  return {'kind': kind_of(type(config))} | {
    field.name: as_json(getattr(config, field.name))
    for field in dataclasses.fields(config)
  }


def kind_of(cls: type) -> str:
  """Returns the name of a class; 'module:class' if it is not one of ours.

  Raises:
    ValueError: no module defines the class, so that it cannot be found again.
  """
  module = cls.__module__
  if module.split('.')[0] in OURS:
    return cls.__name__
  if module == '__main__' or module.startswith('<'):
    raise ValueError(
      f'{cls.__name__} must be defined in a module that Python can import, '
      f'got {module}: move it from the config file to a module'
    )
  return f'{module}:{cls.__qualname__}'


def from_json(cls: type, data: dict[str, Any]) -> Any:
  """Builds a dataclass from the dict that `to_json` made.

  A missing field, which an older run did not write, takes its value from
  `cls.OLDER_RUNS`, or else its default.

  Raises:
    KeyError, TypeError: another version wrote the dict, with other classes or
      fields.
    ValueError: the dataclass rejects a value.
  """
  hints = typing.get_type_hints(cls)
  values = dict(getattr(cls, 'OLDER_RUNS', {}))

  def value_of(name: str, value: Any, hint: Any) -> Any:
    if isinstance(value, dict):
      return from_json(class_of(value['kind'], hint, name), value)
    if isinstance(value, list):
      items = next(iter(typing.get_args(hint)), None)
      return tuple(value_of(name, x, items) for x in value)
    return value

  for name, value in data.items():
    if name != 'kind':
      values[name] = value_of(name, value, hints.get(name))
  return cls(**values)


def class_of(kind: str, hint: Any, name: str) -> type:
  """Returns the class that `kind_of` names.

  Args:
    kind: the result of `kind_of`.
    hint: type of the field.
    name: name of the field, for the message.

  Raises:
    TypeError: the field does not accept the class, or it does not exist.
  """
  known = {cls.__name__: cls for cls in choices(hint)}
  if ':' in kind:
    try:
      found = pkgutil.resolve_name(kind)
    except (ImportError, AttributeError, ValueError) as error:
      raise TypeError(f'{name} is {kind!r}: {error}') from error
    if isinstance(found, type) and issubclass(found, bases(hint)):
      return found
  elif kind in known:
    return known[kind]
  raise TypeError(f'{name} must be of {", ".join(known)}, got {kind!r}')


def choices(hint: Any) -> list[type]:
  """Returns the dataclasses of ours that a field accepts.

  Args:
    hint: type of the field.
  """
  members: list[type] = [*filter(dataclasses.is_dataclass, bases(hint))]
  return members + [
    kind
    for kind in (*MODELS, *CORPORA)
    if kind not in members and issubclass(kind, bases(hint))
  ]


def bases(hint: Any) -> tuple[type, ...]:
  """Returns the classes among the members of a type.

  >>> bases(int | None)
  (<class 'int'>, <class 'NoneType'>)
  """
  members = typing.get_args(hint) if is_union(hint) else (hint,)
  return tuple(kind for kind in members if isinstance(kind, type))


def is_union(hint: Any) -> bool:
  """Whether a type is a union.

  >>> is_union(int | None), is_union(int)
  (True, False)
  """
  return isinstance(hint, types.UnionType)


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """Returns all values by dotted name; a nested class is named by its type.

  >>> from train.data.corpus import Chitchat
  >>> flatten(Chitchat(holdout=0.1), 'corpus.')
  {'corpus.holdout': 0.1}
  """
  flat = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      flat[prefix + field.name] = type(value).__name__
      flat |= flatten(value, f'{prefix}{field.name}.')
    else:
      flat[prefix + field.name] = value
  return flat


def differences(ours: Config, theirs: Config) -> dict[str, tuple[Any, Any]]:
  """Returns the values of both configs for each field in which they differ."""
  a = flatten(ours)
  b = flatten(theirs)
  missing = 'absent'
  return {
    name: (a.get(name, missing), b.get(name, missing))
    for name in a | b
    if a.get(name, missing) != b.get(name, missing)
  }
