"""The device benchmark, with small workloads on the available device."""

import json

import jax
import pytest

from tests.bench.card import __main__ as card


@pytest.mark.slow
@pytest.mark.optimized
def test_measures_small_rows(capsys):
  card.main(['--small', '--steps', '3'])
  lines = capsys.readouterr().out.splitlines()
  found = {}
  for name, line in zip(card.SMALL, lines, strict=True):
    assert line.startswith(f'{name} ')
    found[name] = json.loads(line.removeprefix(name))
  step, update = found['small step'], found['small update']
  for row in (step, update):
    assert row['device'] == jax.devices()[0].device_kind
    assert 0 < row['seconds'] < row['first'] and row['finite']
  assert step['tokens'] == 2 * 32
  assert 'no config file configs/none.py' in found['no such config']['failed']
  # A machine without a GPU has no plans, so the page must not contain any.
  page = card.page(found)
  assert '| small step |' in page and '| small update |' in page
  assert 'no such config' not in page


def test_a_row_for_each_workload_that_the_page_shows():
  kinds = {workload[1] for workload in card.ROWS.values()}
  assert kinds == {'rates', 'step', 'update'}
