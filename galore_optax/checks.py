"""Checks of option values; an error names the option, the rule and the value.

An array is accepted as a number, and its value is not checked. It may be a
tracer, which is how `optax.inject_hyperparams` passes numbers. `check_static`,
`check_count` and `check_size` are for values that must be known at compile
time, so they reject arrays.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def is_number(number: Any) -> bool:
  """Whether a value is a real number of Python or NumPy; a bool is not.

  An array is not a number here, because it may be a tracer.

  >>> is_number(0.5), is_number(jax.numpy.zeros(()))
  (True, False)
  """
  return isinstance(number, numbers.Real) and not isinstance(number, bool)


def is_zero(number: object) -> bool:
  """Whether a value is a number of Python or NumPy that equals zero.

  The result for an array is False, because it may be a tracer.

  >>> is_zero(0.0), is_zero(jax.numpy.zeros(()))
  (True, False)
  """
  return is_number(number) and number == 0


def is_integer(number: Any) -> bool:
  """Whether a value is an integer of Python or NumPy; a bool is not.

  >>> is_integer(3), is_integer(3.0)
  (True, False)
  """
  return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def check_count(**counts: Any) -> None:
  """Raises ValueError unless each value is an integer >= 1.

  >>> check_count(microbatches=4)
  """
  check_static(**counts)
  for name, x in counts.items():
    if not is_integer(x) or x < 1:
      raise ValueError(f'{name} must be an integer >= 1, got {x!r}')


def check_size(**sizes: Any) -> None:
  """Raises ValueError unless each value is an integer >= 0.

  >>> check_size(min_size=0)
  """
  check_static(**sizes)
  for name, x in sizes.items():
    if not is_integer(x) or x < 0:
      raise ValueError(f'{name} must be an integer >= 0, got {x!r}')


def check_integer(**values: Any) -> None:
  """Raises ValueError unless each value is an integer or an array.

  >>> check_integer(seed=0)
  """
  for name, x in values.items():
    if not isinstance(x, jax.Array) and not is_integer(x):
      raise ValueError(f'{name} must be an integer, got {x!r}')


def check_static(**values: object) -> None:
  """Raises ValueError if a value is an array.

  For options on which the compiled program depends, such as a rank.

  >>> check_static(rank=4, gap=200)
  """
  rule = (
    'a Python number, as what is compiled depends on it; under'
    f' optax.inject_hyperparams it belongs in static_args={tuple(values)}'
  )
  for name, x in values.items():
    if isinstance(x, jax.Array):
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def check_flag(**values: object) -> None:
  """Raises ValueError unless each value is a boolean.

  >>> check_flag(scale_parameter=True)
  """
  check_static(**values)
  for name, x in values.items():
    if not isinstance(x, bool | np.bool_):
      raise ValueError(f'{name} must be True or False, got {x!r}')


def check_pair(**values: Any) -> None:
  """Raises ValueError unless each value is a pair of finite numbers >= 0.

  >>> check_pair(eps=(1e-30, 1e-3))
  """
  for name, x in values.items():
    if not _is_pair(x):
      rule = 'a pair of finite numbers >= 0, such as (1e-30, 1e-3)'
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def _is_pair(x: Any) -> bool:
  """Whether a value is a pair whose items are finite numbers >= 0 or arrays."""
  if not isinstance(x, tuple | list) or len(x) != 2:
    return False
  return all(
    isinstance(item, jax.Array)
    or (is_number(item) and math.isfinite(item) and item >= 0)
    for item in x
  )


def check_above_zero(rule: str, **values: Any) -> None:
  """Raises ValueError unless each value is a number > 0 or an array.

  Infinity is allowed.

  Args:
    rule: text of the error message after "must be".
    **values: values by the name of their option.

  >>> check_above_zero('positive, or infinity', clip_threshold=math.inf)
  """
  for name, x in values.items():
    known = isinstance(x, jax.Array) or (is_number(x) and x > 0)
    if not known:
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def check_least(least: float, rule: str, **values: Any) -> None:
  """Raises ValueError unless each value is a number >= `least` or an array.

  Infinity is allowed.

  Args:
    least: the smallest allowed value.
    rule: text of the error message after "must be".
    **values: values by the name of their option.

  >>> check_least(1, 'a number >= 1', limit=math.inf)
  """
  for name, x in values.items():
    known = isinstance(x, jax.Array) or (is_number(x) and x >= least)
    if not known:
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def check_one_of(known: tuple[str, ...], **values: object) -> None:
  """Raises ValueError unless each value is one of the strings in `known`.

  >>> check_one_of(('keep', 'reset'), moments='keep')
  """
  for name, x in values.items():
    if not isinstance(x, str) or x not in known:
      raise ValueError(f'{name} must be one of {", ".join(known)}, got {x!r}')


def check_not_negative(**values: Any) -> None:
  """Raises ValueError unless each value is a finite number >= 0 or an array.

  >>> check_not_negative(weight_decay=0.1)
  """
  _check_finite('a finite number >= 0', lambda x: x >= 0, values)


def check_positive(**values: Any) -> None:
  """Raises ValueError unless each value is a finite number > 0 or an array.

  >>> check_positive(decay_rate=0.8)
  """
  _check_finite('a finite number > 0', lambda x: x > 0, values)


def check_decay(**values: Any) -> None:
  """Raises ValueError unless each value is a decay rate in [0, 1) or an array.

  >>> check_decay(b1=0.9, b2=0.999)
  """
  _check_finite('in [0, 1), the share kept', lambda x: 0 <= x < 1, values)


def check_learning_rate(**rates: Any) -> None:
  """Raises ValueError unless each value is a learning rate.

  A learning rate is a schedule, a finite number >= 0, or an array.

  >>> check_learning_rate(learning_rate=lambda count: 0.1)
  """
  check_not_negative(**{k: x for k, x in rates.items() if not callable(x)})


def check_params(params: Any, what: str) -> None:
  """Raises ValueError if `params` is None.

  Args:
    params: the `params` argument of an update.
    what: the feature that needs them, for the error message.

  >>> check_params({'w': jax.numpy.ones(2)}, 'weight decay')
  """
  if params is None:
    raise ValueError(f'{what} needs params: tx.update(g, state, params)')


def require(rule: str, holds: Callable[[Any], Any], **values: Any) -> None:
  """Raises ValueError for each value that `holds` does not accept.

  Args:
    rule: text of the error message after "must be".
    holds: returns whether a value is valid.
    **values: values by the name of their option.

  >>> require('at least 1', lambda x: x >= 1, limit=1.01)
  """
  for name, x in values.items():
    if not holds(x):
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def _check_finite(
  rule: str, holds: Callable[[float], bool], values: dict[str, Any]
) -> None:
  """Raises ValueError unless each number is finite and `holds` accepts it."""
  for name, x in values.items():
    # Array values are not checked because they may be tracers.
    if isinstance(x, jax.Array):
      continue
    if not is_number(x) or not math.isfinite(x) or not holds(x):
      raise ValueError(f'{name} must be {rule}, got {x!r}')
