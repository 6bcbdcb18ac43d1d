"""The table of methods tells the truth, wherever it stands."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import galore_optax
from galore_optax import methods

README = pathlib.Path(__file__).parents[2] / 'README.md'


def _tree_bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('method', methods.METHODS, ids=lambda m: m.name)
def test_elements_of_state(method):
  m, n, r = 12, 20, 3
  w = jax.ShapeDtypeStruct((m, n), jnp.float32)
  (row,) = galore_optax.describe(method.make(m, r), {'w': w})
  # BAdam takes a layer out of the stack, with all its sides.
  assert (row.projected_shape is None) == (method.name == 'badam')
  assert row.bytes == 4 * method.count(m, n, r)


def test_the_table_stands_in_the_docstring_and_the_readme():
  rows = [line.strip() for line in galore_optax.__doc__.splitlines()]
  for line in methods.table().splitlines():
    assert line in rows
    assert line in README.read_text().splitlines()
