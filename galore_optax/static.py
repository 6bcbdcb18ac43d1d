"""This module holds what must be known before a step is traced."""

from typing import Any

import jax
import numpy as np


def check_count(**numbers: Any) -> None:
  """Raises ValueError for what is no integer of one or more.

  >>> check_count(microbatches=4)
  """
  for name, number in numbers.items():
    whole = isinstance(number, int) and not isinstance(number, bool)
    if not whole or number < 1:
      raise ValueError(f'{name} must be an integer >= 1, got {number!r}')


def check_range(low: float, high: float, **values: Any) -> None:
  """Raises ValueError for a number outside of [low, high), NaN included.

  What is no Python or NumPy number passes: a schedule, an array, None.

  >>> check_range(0, 1, momentum=0.9, other=None)
  """
  for name, value in values.items():
    if isinstance(value, int | float | np.number) and not (low <= value < high):
      raise ValueError(
        f'{name} must be at least {low} and less than {high}, got {value!r}'
      )


def is_zero(number: object) -> bool:
  """Whether a number is a zero of Python's, known before a step is traced.

  >>> is_zero(0.0), is_zero(jax.numpy.zeros(()))
  (True, False)
  """
  return isinstance(number, int | float) and number == 0


def check_static(**numbers: object) -> None:
  """Raises ValueError for an array, traced or not, where a number must be.

  >>> check_static(rank=4, gap=200)
  """
  for name, number in numbers.items():
    if isinstance(number, jax.Array):
      raise ValueError(
        f'{name} must be a Python number, as what is compiled depends on it,'
        f' got {number}; under optax.inject_hyperparams it belongs in'
        f' static_args={tuple(numbers)}'
      )
