"""Intervals: Student's, and as wide as they have to be."""

import numpy as np
import pytest
from scipy import stats

from configs.studies.comparison.intervals import paired


def test_an_interval_is_student_s_where_one_thing_is_a_sample():
  rng = np.random.default_rng(0)
  rows, base = rng.normal(size=(2, 9))
  interval = stats.ttest_rel(rows, base).confidence_interval()
  mean, error = paired(rows, base)
  assert (mean - error, mean + error) == pytest.approx(tuple(interval))
  # If all rows of a seed are equal, the seeds are the sample.
  seeds = np.repeat(rows[:3, None], 5, 1), np.repeat(base[:3, None], 5, 1)
  interval = stats.ttest_rel(rows[:3], base[:3]).confidence_interval()
  mean, error = paired(*seeds)
  assert (mean - error, mean + error) == pytest.approx(tuple(interval))
  assert paired(rows, rows) == (0.0, 0.0)


@pytest.mark.parametrize('of_seeds', [0.0, 0.1, 0.3, 1.0])
def test_an_interval_has_the_truth_in_it_as_often_as_it_says(of_seeds):
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(2000):
    seeds, rows = rng.normal(size=(3, 1)), rng.normal(size=(1, 64))
    each = of_seeds * seeds + rows + rng.normal(size=(3, 64))
    mean, error = paired(each, 0.0)
    inside += abs(mean) <= error
  # The limit is three standard deviations of 2,000 trials below 95%.
  assert inside / 2000 > 0.935
