"""This module holds what must be known before a step is traced."""

import jax


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
