"""Prints the lowest versions of dependencies that pyproject.toml allows.

`python tests/lowest.py chex pytest` prints pip requirements for the library's
dependencies, and for chex and pytest from the optional dependencies.
"""

import itertools
import pathlib
import re
import sys
import tomllib


def lowest(project, tools=()):
  """Returns each lower bound as an exact pip requirement.

  >>> extras = {'test': ['chex>=0.1', 'pytest>=8'], 'lint': ['ruff']}
  >>> project = {'dependencies': ['jax>=0.8'], 'optional-dependencies': extras}
  >>> lowest(project, ['pytest'])
  ['jax==0.8', 'pytest==8']
  """
  extras = itertools.chain(*project['optional-dependencies'].values())
  # Several extras may contain the same tool.
  named = dict.fromkeys(x for x in extras if re.split(r'[^\w-]', x)[0] in tools)
  return [x.replace('>=', '==') for x in [*project['dependencies'], *named]]


if __name__ == '__main__':
  path = pathlib.Path(__file__).parents[1] / 'pyproject.toml'
  print(*lowest(tomllib.loads(path.read_text())['project'], sys.argv[1:]))
