"""Checks of what a user passes: each message has value, rule and remedy.

A traced number, as `optax.inject_hyperparams` passes it, is checked nowhere:
its value is not known.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def is_number(number: Any) -> bool:
  """Whether a number's value is known before a step is traced.

  >>> is_number(0.5), is_number(jax.numpy.zeros(()))
  (True, False)
  """
  return isinstance(number, numbers.Real) and not isinstance(number, bool)


def is_zero(number: object) -> bool:
  """Whether a number is known to be zero before a step is traced.

  >>> is_zero(0.0), is_zero(jax.numpy.zeros(()))
  (True, False)
  """
  return is_number(number) and number == 0


def is_integer(number: Any) -> bool:
  """Whether a number is an integer of Python or NumPy.

  >>> is_integer(3), is_integer(3.0)
  (True, False)
  """
  return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def check_count(**counts: Any) -> None:
  """Raises ValueError for what is no integer of one or more.

  >>> check_count(microbatches=4)
  """
  check_static(**counts)
  require('an integer >= 1', lambda x: is_integer(x) and x >= 1, **counts)


def check_size(**sizes: Any) -> None:
  """Raises ValueError unless each value is an integer >= 0.

  >>> check_size(min_size=0)
  """
  check_static(**sizes)
  for name, x in sizes.items():
    if not is_integer(x) or x < 0:
      raise ValueError(f'{name} must be an integer >= 0, got {x!r}')


def check_integer(**values: Any) -> None:
  """Raises ValueError for what is no integer, such as a seed of 1.5.

  >>> check_integer(seed=0)
  """
  known = lambda x: isinstance(x, jax.Array) or is_integer(x)
  require('an integer', known, **values)


def check_static(**values: object) -> None:
  """Raises ValueError for an array, traced or not, where a number must be.

  >>> check_static(rank=4, gap=200)
  """
  rule = (
    'a Python number, as what is compiled depends on it; under'
    f' optax.inject_hyperparams it belongs in static_args={tuple(values)}'
  )
  require(rule, lambda x: not isinstance(x, jax.Array), **values)


def check_flag(**values: object) -> None:
  """Raises ValueError unless each value is a boolean.

  >>> check_flag(scale_parameter=True)
  """
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
  """Whether a value is a pair of numbers >= 0, or of arrays."""
  if not isinstance(x, tuple | list) or len(x) != 2:
    return False
  return all(
    isinstance(one, jax.Array)
    or (is_number(one) and math.isfinite(one) and one >= 0)
    for one in x
  )


def check_above_zero(rule: str, **values: Any) -> None:
  """Raises ValueError unless each value is a number above zero.

  Infinity is a number. The value of an array is not checked.

  Args:
    rule: the text of the rule.
    **values: numbers by name.

  >>> check_above_zero('positive, or infinity', clip_threshold=math.inf)
  """
  for name, x in values.items():
    known = isinstance(x, jax.Array) or (is_number(x) and x > 0)
    if not known:
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def check_least(least: float, rule: str, **values: Any) -> None:
  """Raises ValueError unless each value is a number of at least `least`.

  Infinity is a number. The value of an array is not checked.

  Args:
    least: the smallest value.
    rule: the text of the rule.
    **values: numbers by name.

  >>> check_least(1, 'a number >= 1', limit=math.inf)
  """
  for name, x in values.items():
    known = isinstance(x, jax.Array) or (is_number(x) and x >= least)
    if not known:
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def check_one_of(known: tuple[str, ...], **values: object) -> None:
  """Raises ValueError for a name that is not known.

  >>> check_one_of(('keep', 'reset'), moments='keep')
  """
  rule = f'one of {", ".join(known)}'
  require(rule, lambda x: isinstance(x, str) and x in known, **values)


def check_not_negative(**values: Any) -> None:
  """Raises ValueError for what is no finite number >= 0.

  >>> check_not_negative(weight_decay=0.1)
  """
  _check_finite('a finite number >= 0', lambda x: x >= 0, values)


def check_positive(**values: Any) -> None:
  """Raises ValueError for what is no finite number above 0.

  >>> check_positive(decay_rate=0.8)
  """
  _check_finite('a finite number > 0', lambda x: x > 0, values)


def check_decay(**values: Any) -> None:
  """Raises ValueError for what is no decay of a moment, in [0, 1).

  >>> check_decay(b1=0.9, b2=0.999)
  """
  _check_finite('in [0, 1), the share kept', lambda x: 0 <= x < 1, values)


def check_learning_rate(**rates: Any) -> None:
  """Raises ValueError for a number that is no learning rate.

  >>> check_learning_rate(learning_rate=lambda count: 0.1)
  """
  check_not_negative(**{k: x for k, x in rates.items() if not callable(x)})


def check_params(params: Any, what: str) -> None:
  """Raises ValueError where an update is not given the weights it needs.

  >>> check_params({'w': jax.numpy.ones(2)}, 'weight decay')
  """
  if params is None:
    raise ValueError(f'{what} needs params: tx.update(g, state, params)')


def require(rule: str, holds: Callable[[Any], Any], **values: Any) -> None:
  """Raises ValueError for a value for which a rule does not hold.

  >>> require('at least 1', lambda x: x >= 1, limit=1.01)
  """
  for name, x in values.items():
    if not holds(x):
      raise ValueError(f'{name} must be {rule}, got {x!r}')


def _check_finite(rule, holds, values) -> None:
  finite = lambda x: is_number(x) and math.isfinite(x) and holds(x)
  # An array, traced or not, is its maker's business.
  require(rule, lambda x: isinstance(x, jax.Array) or finite(x), **values)
