"""The blocks of galore_optax/README.md that need other libraries run."""

import pathlib
import re

import pytest

import galore_optax as go

pytestmark = pytest.mark.peers

PAGE = pathlib.Path(go.__file__).parent / 'README.md'


def test_the_line_in_each_trainer_runs():
  section = (
    PAGE.read_text().split('\n## In your trainer\n')[1].split('\n## ')[0]
  )
  names = {}
  exec('import jax, jax.numpy as jnp, optax', names)
  exec('from galore_optax import galore', names)
  blocks = re.findall(r'^```python\n(.*?)^```$', section, re.M | re.S)
  # All blocks run in order, since later ones use names of earlier ones.
  for code in blocks:
    exec(code, names)
  assert 'trainer' in names and 'svi' in names
  assert section.count('<!-- peers -->') < len(blocks)
