"""The table of methods tells the truth, wherever it stands."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import galore_optax
from galore_optax import methods

README = pathlib.Path(__file__).parents[2] / 'README.md'


PRESETS = (
  *('galore_adamw', 'galore_adamw_8bit', 'galore_adafactor', 'frugal'),
  *('badam', 'fira', 'apollo', 'apollo_mini', 'lomo', 'adalomo'),
)


@pytest.mark.parametrize('method', methods.METHODS, ids=lambda m: m.name)
def test_bytes_of_state(method):
  # Large enough for 8 bits, and no multiple of a block.
  m, n, r = 48, 260, 16
  w = jax.ShapeDtypeStruct((m, n), jnp.float32)
  (row,) = galore_optax.describe(method.make(m, r), {'w': w})
  # BAdam takes a layer out of the stack, with all its sides.
  whole = method.subspace == 'whole' or method.name == 'badam'
  assert (row.projected_shape is None) == whole
  assert row.bytes == method.num_bytes(m, n, r)


def test_every_preset_has_a_row():
  named = {method.name.split('(')[0] for method in methods.METHODS}
  assert named == set(PRESETS) | {'galore'}


def test_the_table_stands_in_the_docstring_and_the_readme():
  rows = [line.strip() for line in galore_optax.__doc__.splitlines()]
  for line in methods.table().splitlines():
    assert line in rows
    assert line in README.read_text().splitlines()
