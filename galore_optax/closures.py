"""Replaces the arrays that a function reads from its closure.

A function cannot read an array whose type does not fit the mesh inside of the
function. `sharding` therefore makes such arrays arguments.
"""

import copy
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax


def with_arrays(x: Any, replace: Callable[[jax.Array], jax.Array]) -> Any:
  """Returns a function with the arrays of its closure replaced.

  It rebuilds functions, methods, partial functions, tuples, lists, dicts and
  dataclasses that contain an array. It returns all other objects unchanged,
  such as a jitted function.

  Args:
    x: the function, or an object that it contains.
    replace: returns the replacement of an array.

  Example:
    >>> def times(rate):
    ...   return lambda x: rate * x
    >>> f = with_arrays(times(jax.numpy.ones(1)), lambda rate: rate + 1)
    >>> f(3)
    Array([6.], dtype=float32)
  """
  # By id: the object, which must not be freed before the end, and its copy.
  copies: dict[int, tuple[Any, Any]] = {}

  def copied(x: Any) -> Any:
    if isinstance(x, jax.Array):
      return replace(x)
    if id(x) not in copies:
      # A function that refers to itself keeps referring to the original.
      copies[id(x)] = x, x
      copies[id(x)] = x, rebuilt(x)
    return copies[id(x)][1]

  def rebuilt(x: Any) -> Any:
    parts = _parts(x)
    new = {name: copied(part) for name, part in parts.items()}
    if all(new[name] is part for name, part in parts.items()):
      return x
    return _rebuilt(x, new)

  return copied(x)


def _parts(x: Any) -> dict[Any, Any]:
  """Returns the objects that a function or a container consists of."""
  if isinstance(x, types.FunctionType):
    cells = dict(enumerate(map(_contents, x.__closure__ or ())))
    return cells | {'defaults': x.__defaults__, 'by_name': x.__kwdefaults__}
  if isinstance(x, types.MethodType):
    return {'f': x.__func__, 'owner': x.__self__}
  if isinstance(x, functools.partial):
    return {'f': x.func, 'args': x.args, 'by_name': x.keywords}
  if isinstance(x, dict):
    return x
  if isinstance(x, list):
    return dict(enumerate(x))
  if isinstance(x, tuple):
    # A subclass of a named tuple, such as `Galore`, may have attributes.
    return dict(enumerate(x)) | {'vars': getattr(x, '__dict__', None)}
  is_data = dataclasses.is_dataclass(x) and not isinstance(x, type)
  return {'vars': getattr(x, '__dict__', None)} if is_data else {}


def _rebuilt(x: Any, parts: dict[Any, Any]) -> Any:
  """Returns a copy of `x` that consists of other parts; inverts `_parts`."""
  if isinstance(x, types.FunctionType):
    closure = tuple(
      cell if parts[i] is _contents(cell) else types.CellType(parts[i])
      for i, cell in enumerate(x.__closure__ or ())
    )
    new: Any = types.FunctionType(
      x.__code__, x.__globals__, x.__name__, parts['defaults'], closure
    )
    new.__kwdefaults__ = parts['by_name']
    return new
  if isinstance(x, types.MethodType):
    return types.MethodType(parts['f'], parts['owner'])
  if isinstance(x, functools.partial):
    return functools.partial(parts['f'], *parts['args'], **parts['by_name'])
  if isinstance(x, dict):
    new = copy.copy(x)
    new.update(parts)
    return new
  if isinstance(x, list):
    return [*parts.values()]
  attributes = parts['vars'] or {}
  if isinstance(x, tuple):
    new = tuple.__new__(type(x), [parts[i] for i in range(len(x))])
  else:
    new = copy.copy(x)
  # This also sets the fields of a frozen dataclass.
  if attributes:
    vars(new).update(attributes)
  return new


def _contents(cell: types.CellType) -> Any:
  """Returns the value of a cell of a closure, None if it is empty."""
  try:
    return cell.cell_contents
  except ValueError:
    return None
