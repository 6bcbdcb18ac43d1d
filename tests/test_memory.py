"""The tables of memory: what is committed follows from the shapes."""

import jax
import pytest

from tests.bench import memory


# Slow: shapes of five models, each with its optimizers.
@pytest.mark.slow
@pytest.mark.optimized
def test_the_page_is_what_the_program_prints():
  assert memory.PAGE.read_text() == memory.page()


def test_elements_are_those_of_two_matrices_and_a_vector():
  struct = jax.ShapeDtypeStruct
  params = {
    'up': struct((3, 10, 20), 'bfloat16'),
    'embed': struct((50, 10), 'bfloat16'),
    'bias': struct((7,), 'bfloat16'),
  }
  # Bases [4, 10], two moments [4, 20]; Adam's two of what is left.
  low = 3 * (4 * 10 + 2 * 4 * 20) + 2 * (500 + 7)
  assert memory.sizes(params, 4) == (1107, low, 3 * 4 * 30, 507)


@pytest.mark.parametrize(
  ('section', 'off'),
  # LOMO's exactly, but for two digits of 0.24; GLUE's to a byte in two hundred.
  [
    (memory.lomo_table, 0.02),
    pytest.param(memory.glue, 0.005, marks=pytest.mark.slow),
  ],
)
def test_these_figures_follow_from_the_shapes(section, off):
  for row in section().rows:
    assert row.paper == pytest.approx(row.formula, rel=off), row.what
