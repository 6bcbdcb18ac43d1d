"""Metrics of a text classifier, and their mean over several seeds.

To add a metric, add its name to `Agreement` or `Correlation`, and its value to
`agreement` or `correlations`.

Axes: n rows of a split.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

Agreement: TypeAlias = Literal['accuracy', 'f1', 'matthews']
"""Metrics of a model that chooses a label."""
Correlation: TypeAlias = Literal['pearson', 'spearman']
"""Metrics of a model that predicts a number."""
Metric: TypeAlias = Literal[Agreement, Correlation]
Metrics: TypeAlias = dict[str, float]


def agreement(found_n: np.ndarray, targets_n: np.ndarray) -> Metrics:
  """Returns accuracy, F1 and Matthews' correlation coefficient.

  F1 is that of label 1 if the labels are 0 and 1, else the mean over labels.

  >>> found = agreement(np.array([0, 1, 1, 1]), np.array([0, 1, 1, 0]))
  >>> {name: round(x, 3) for name, x in found.items()}
  {'accuracy': 0.75, 'f1': 0.8, 'matthews': 0.577}
  """
  try:
    from sklearn import metrics
  except ImportError as error:
    raise ImportError(
      'the metrics of a classifier need scikit-learn: pip install '
      "'galore-optax[train]'"
    ) from error
  labels = {*found_n.tolist(), *targets_n.tolist()}
  average = 'binary' if labels <= {0, 1} else 'macro'
  with warnings.catch_warnings():
    # scikit-learn warns if all rows have one label, and returns 0 for metrics
    # that are not defined.
    warnings.simplefilter('ignore')
    return {
      'accuracy': float(metrics.accuracy_score(targets_n, found_n)),
      'f1': float(metrics.f1_score(targets_n, found_n, average=average)),
      'matthews': float(metrics.matthews_corrcoef(targets_n, found_n)),
    }


def correlations(found_n: np.ndarray, targets_n: np.ndarray) -> Metrics:
  """Returns Pearson's and Spearman's correlations.

  They are 0 if all predictions, or all targets, are equal.

  >>> found = correlations(np.array([1.0, 2.0, 9.0]), np.array([0.0, 1.0, 2.0]))
  >>> {name: round(x, 3) for name, x in found.items()}
  {'pearson': 0.918, 'spearman': 1.0}
  """
  from scipy import stats

  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    found: dict[str, Any] = {
      'pearson': stats.pearsonr(found_n, targets_n)[0],
      'spearman': stats.spearmanr(found_n, targets_n)[0],
    }
  return {name: float(np.nan_to_num(x)) for name, x in found.items()}


def spread(values: Sequence[float]) -> str:
  """Formats the mean over seeds and the standard deviation of one seed.

  >>> spread([0.9, 0.92, 0.91])
  '0.9100 +- 0.0100 (3 seeds)'
  """
  mean = f'{np.mean(values):.4f}'
  if len(values) == 1:
    return f'{mean} (1 seed)'
  return f'{mean} +- {np.std(values, ddof=1):.4f} ({len(values)} seeds)'
