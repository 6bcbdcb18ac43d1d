"""The study of the papers' claims: when a difference confirms a claim."""

import numpy as np
import pytest

from configs.studies import claims
from configs.studies.claims import Claim, Kind, Pair
from configs.studies.comparison.study import Job, Rung
from configs.studies.comparison.text import Size
from configs.studies.methods import Methods

STUDY = Methods(Size(first=(Rung(4, 1),), final=6, seeds=2))
ROWS = np.linspace(2.0, 2.2, 8)
NOISE = np.array([1, -1, 1, -1, 1, -1, 1, -1]) * 1e-3


def runs(name, rows, *, state=100, corpus='chitchat', steps=4, seeds=1):
  """Returns made-up runs of a method, with the same results for each seed."""
  return {
    Job(corpus, name, 1.0, 1.0, seed, steps): {
      'seed': seed,
      'rows': [float(x) for x in rows],
      'bits_per_byte': float(np.mean(rows)),
      'weight_bytes': 10,
      'state_bytes': state,
    }
    for seed in range(seeds)
  }


@pytest.mark.parametrize(
  'kind, off, expected',
  [
    (Kind.BETTER, -0.01, True),
    (Kind.BETTER, 0.01, False),
    (Kind.BETTER, 0.0, None),
    (Kind.NO_WORSE, 0.0, True),
    (Kind.NO_WORSE, 0.01, False),
    (Kind.EQUAL, 0.0, True),
    (Kind.EQUAL, -0.01, False),
    # With 3 bytes per token, 2% in perplexity are 0.0095 bits per byte.
    (Kind.NEAR, 0.008, True),
    (Kind.NEAR, 0.0094, None),
    (Kind.NEAR, 0.011, False),
    (Kind.NEAR, -1.0, True),
  ],
)
def test_a_difference_beyond_its_error_counts(kind, off, expected):
  pair = Pair('', ROWS + off + NOISE, ROWS)
  assert claims.confirmed(kind, pair, 3.0) is expected


def test_equality_within_a_large_error_is_not_confirmed():
  pair = Pair('', ROWS + 20 * NOISE, ROWS)
  assert pair.error > 0.0095
  assert claims.confirmed(Kind.EQUAL, pair, 3.0) is None


def test_finals_go_before_the_first_round():
  claim = Claim('GaLore', Kind.BETTER, 'LoRA', 'x')
  done = runs('GaLore', ROWS) | runs('LoRA', ROWS + 0.1)
  (first,) = claims.pairs(claim, STUDY, done)
  assert first.where == 'first round'
  assert first.difference == pytest.approx(-0.1)
  for name, more in (('GaLore', 0.3), ('LoRA', 0.1)):
    last = {
      'corpus': STUDY.corpora[1],
      'steps': STUDY.size.final,
      'seeds': STUDY.size.seeds,
    }
    done |= runs(name, ROWS + more, **last)
  (final,) = claims.pairs(claim, STUDY, done)
  assert final.where == f'{STUDY.corpora[1]}, 2 seeds'
  assert final.difference == pytest.approx(0.2)


def test_the_front_excludes_methods_that_another_beats_in_size_and_score():
  done = runs('SCALE', ROWS, state=50) | runs('AdamW', ROWS - 1, state=51)
  assert not claims.on_front('SCALE', STUDY, done)
  done |= runs('LOMO', ROWS - 0.1 + NOISE, state=0)
  assert claims.on_front('SCALE', STUDY, done) == ['LOMO']


def test_the_page_has_each_claim():
  done = runs('GaLore', ROWS) | runs('AdamW', ROWS + NOISE)
  page = claims.page(STUDY, done, {'chitchat': 3.0})
  assert page.count('not yet run') == len(claims.CLAIMS) - 1
  (line,) = [x for x in page.splitlines() if '| GaLore within' in x]
  assert line.endswith('| confirmed |')
