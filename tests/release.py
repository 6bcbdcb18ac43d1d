"""Runs the first lines of README.md with the installed wheel.

`make release` calls this file with `python -I`, in an environment that contains
the wheel and its dependencies only.
"""

import importlib.metadata
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parent.parent


def first_lines(text):
  """Returns the first block of Python of a page.

  >>> print(first_lines('Install it.\\n```python\\nimport optax\\n```\\n'))
  import optax
  <BLANKLINE>
  """
  return re.search(r'^```python\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)[1]


def main():
  """Builds the transformation of the page, and checks that its state is low."""
  names = {}
  exec(first_lines((ROOT / 'README.md').read_text()), names)
  import jax

  import galore_optax

  source = pathlib.Path(galore_optax.__file__)
  assert source.is_relative_to(sys.prefix), f'{source} is not the wheel'
  params = {'w': jax.ShapeDtypeStruct((1024, 4096), 'float32')}
  (row,) = galore_optax.describe(names['tx'], params)
  assert row.projected_shape == (512, 4096), row
  version = importlib.metadata.version('galore-optax')
  print(f'galore-optax {version} works when installed from its wheel')


if __name__ == '__main__':
  main()
