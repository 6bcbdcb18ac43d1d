"""The bench of a card, in small and on whatever is here."""

import jax
import pytest

from tests.bench import card


@pytest.mark.slow
def test_measures_a_small_step(capsys):
  card.main(['--small', '--steps', '2'])
  out = capsys.readouterr().out
  (row,) = [line for line in out.splitlines() if line.startswith('| small')]
  _, peak, plan, step, _, tokens, _ = row.strip('| ').split(' | ')
  assert jax.devices()[0].device_kind in out
  assert float(step) > 0 and float(tokens.replace(',', '')) > 0
  # The CPU does not count its memory, and is no card to plan for.
  assert (peak, plan) == ('-', '-')
