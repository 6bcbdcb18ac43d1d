"""Intervals for the difference of two methods, over seeds and held-out rows."""

import math
from typing import Any

import numpy as np
from scipy.special import stdtrit


def less(rows: Any, base: Any) -> str:
  """Returns the mean difference and half its 95% interval, as text.

  >>> less([2.0, 3.0, 4.0], [1.0, 3.0, 2.0])
  '+1.0000 +- 2.4841'
  """
  mean, error = paired(rows, base)
  return f'{mean:+.4f} +- {error:.4f}'


def paired(rows: Any, base: Any) -> tuple[float, float]:
  """Returns the mean difference of two methods and half its 95% interval.

  Seeds and rows are both random samples, so their variances are added. An
  effect of one seed on one row is then counted twice, which makes the interval
  wider and never too narrow. Student's distribution has the degrees of freedom
  of the smaller sample, so the interval is wide with three seeds.

  Args:
    rows: the metric of a method: [rows] with one seed, whose interval does not
      contain the variance between seeds, or [seeds, rows].
    base: the same of the other method, for the same seeds and rows.
  """
  each = np.atleast_2d(rows) - np.atleast_2d(base)
  samples = [x for x in (each.mean(0), each.mean(1)) if x.size > 1]
  variance = sum(np.var(x, ddof=1) / x.size for x in samples)
  freedom = min(x.size for x in samples) - 1
  error = stdtrit(freedom, 0.975) * math.sqrt(variance)
  return float(each.mean()), float(error)
