"""Imports the libraries of Hugging Face with their use of the network off."""

import importlib
from typing import Any

from train.engine.environment import environment

_OFFLINE = {
  'HF_HUB_OFFLINE': '1',
  'HF_DATASETS_OFFLINE': '1',
  # Without PyTorch, importing transformers prints a line of advice.
  'TRANSFORMERS_VERBOSITY': 'error',
}


def import_offline(name: str, needed_by: str) -> Any:
  """Returns a library of the extra `data`.

  Call it where the library is used: such an import takes seconds, and the
  quickstart runs without these libraries.

  Args:
    name: the library's name.
    needed_by: the file or directory that needs it, for the error.

  Raises:
    ImportError: the library is not installed.
  """
  try:
    with environment(_OFFLINE):
      return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(
      f'{needed_by} needs {name}, which is not installed ({error}): pip '
      "install 'galore-optax[data]'"
    ) from error
