"""The speed benchmark: a worker times a small model, and tables are correct."""

import pytest

from tests.bench.speed import ours, report
from tests.bench.speed.worker import Worker


# This test is slow because it starts processes that compile programs.
@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('function', ['update', 'step'])
def test_a_worker_times_runs_in_a_row(function):
  worker = Worker('tests.bench.speed.ours', function, 'Galore()', '20m')
  assert worker.notes['ready'] > 0 and worker.notes['flops'] > 0
  assert min(worker.time(2)) > 0
  assert worker.end() > 2**27


@pytest.mark.slow
@pytest.mark.optimized
def test_an_error_of_a_worker_is_raised_with_its_reason():
  with pytest.raises(RuntimeError, match='no attribute'):
    Worker('tests.bench.speed.ours', 'nothing')


@pytest.mark.parametrize('row', ours.rows())
def test_every_row_is_a_transformation(row):
  assert callable(ours.transformation(row).update)


def test_a_limit_is_the_larger_of_flops_and_bytes(tmp_path):
  section = {'date': 'today', 'machine': '2 cores', 'rounds': 3, 'load': 0.5}
  rates = [{'name': 'flops', 'median': 1e9}, {'name': 'bytes', 'median': 1e8}]
  row = {
    **{
      'name': 'Galore()',
      'median': 4.0,
      'low': 3.0,
      'high': 5.0,
      'ratio': 0.5,
    },
    **{'flops': 2e9, 'bytes': 1e8, 'compile': 1.5, 'peak_bytes': 3e9},
  }
  found = {
    'rates': section | {'rows': rates},
    'updates': section | {'rows': [row]},
  }
  report.write(found, tmp_path)
  text = (tmp_path / 'speed.md').read_text()
  assert '| `Galore()` | 4.000 (3.000-5.000) | 0.50 | 2.000 | 50% |' in text
