"""The memory tables: the committed page follows from the models' shapes."""

import jax
import pytest

from tests.bench import memory


# This test is slow: it evaluates the shapes of five models with several
# optimizers each.
@pytest.mark.slow
@pytest.mark.optimized
def test_the_page_equals_the_output_of_the_program():
  assert memory.PAGE.read_text() == memory.page()


def test_elements_are_those_of_two_matrices_and_a_vector():
  struct = jax.ShapeDtypeStruct
  params = {
    'up': struct((3, 10, 20), 'bfloat16'),
    'embed': struct((50, 10), 'bfloat16'),
    'bias': struct((7,), 'bfloat16'),
  }
  # Per layer of `up`, the basis is [4, 10] and the two moments are [4, 20]. The
  # other leaves have Adam's two full moments.
  low = 3 * (4 * 10 + 2 * 4 * 20) + 2 * (500 + 7)
  assert memory.sizes(params, 4) == (1107, low, 3 * 4 * 30, 507)


@pytest.mark.parametrize(
  ('section', 'off'),
  # LOMO's figures are exact, except that 0.24 has only two digits. GLUE's
  # figures are exact to half a percent.
  [
    (memory.lomo_table, 0.02),
    pytest.param(memory.glue, 0.005, marks=pytest.mark.slow),
  ],
)
def test_these_figures_follow_from_the_shapes(section, off):
  for row in section().rows:
    assert row.paper == pytest.approx(row.formula, rel=off), row.what
