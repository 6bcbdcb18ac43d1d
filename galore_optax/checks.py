"""Checks of what a user passes: each message has value, rule and remedy.

A traced number, as `optax.inject_hyperparams` passes it, is checked nowhere:
its value is not known.
"""

import math
import numbers
from typing import Any

import jax


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


def check_count(**counts: Any) -> None:
  """Raises ValueError for what is no integer of one or more.

  >>> check_count(microbatches=4)
  """
  for name, count in counts.items():
    if not _is_integer(count) or count < 1:
      raise ValueError(f'{name} must be an integer >= 1, got {count!r}')


def check_integer(**values: Any) -> None:
  """Raises ValueError for what is no integer, such as a seed of 1.5.

  >>> check_integer(seed=0)
  """
  for name, value in values.items():
    if not (isinstance(value, jax.Array) or _is_integer(value)):
      raise ValueError(f'{name} must be an integer, got {value!r}')


def check_static(**values: object) -> None:
  """Raises ValueError for an array, traced or not, where a number must be.

  >>> check_static(rank=4, gap=200)
  """
  for name, value in values.items():
    if isinstance(value, jax.Array):
      raise ValueError(
        f'{name} must be a Python number, as what is compiled depends on it,'
        f' got {value}; under optax.inject_hyperparams it belongs in'
        f' static_args={tuple(values)}'
      )


def check_one_of(known: tuple[str, ...], **values: object) -> None:
  """Raises ValueError for a name that is not known.

  >>> check_one_of(('keep', 'reset'), moments='keep')
  """
  for name, value in values.items():
    if not isinstance(value, str) or value not in known:
      names = ', '.join(known)
      raise ValueError(f'{name} must be one of {names}, got {value!r}')


def check_not_negative(**values: Any) -> None:
  """Raises ValueError for what is no finite number >= 0.

  >>> check_not_negative(weight_decay=0.1)
  """
  _check('a finite number >= 0', lambda x: x >= 0, values)


def check_positive(**values: Any) -> None:
  """Raises ValueError for what is no finite number above 0.

  >>> check_positive(decay_rate=0.8)
  """
  _check('a finite number > 0', lambda x: x > 0, values)


def check_decay(**values: Any) -> None:
  """Raises ValueError for what is no decay of a moment, in [0, 1).

  >>> check_decay(b1=0.9, b2=0.999)
  """
  rule = 'in [0, 1), the share that a moment keeps'
  _check(rule, lambda x: 0 <= x < 1, values)


def check_learning_rate(**rates: Any) -> None:
  """Raises ValueError for a number that is no learning rate.

  >>> check_learning_rate(learning_rate=lambda count: 0.1)
  """
  check_not_negative(**{k: x for k, x in rates.items() if not callable(x)})


def _is_integer(x) -> bool:
  return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _check(rule, holds, values) -> None:
  for name, x in values.items():
    # An array, traced or not, is its maker's business.
    known = not isinstance(x, jax.Array)
    if known and not (is_number(x) and math.isfinite(x) and holds(x)):
      raise ValueError(f'{name} must be {rule}, got {x!r}')
