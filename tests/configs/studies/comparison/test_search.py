"""The search of learning rates: the same trials for every method."""

import math

import pytest

from configs.studies.comparison import results, search
from configs.studies.comparison.study import Job, Rung
from configs.studies.comparison.table import METHODS
from configs.studies.comparison.text import Size
from configs.studies.methods import STUDY, Methods
from tests.configs.studies.comparison.small import SIZE, SMALL


def pretended(job, best):
  """Returns a made-up run, with fewer bits for rates near to `best`."""
  away = math.log(job.matrix / best[0]) ** 2 + math.log(job.rest / best[1]) ** 2
  return {**job._asdict(), 'bits_per_byte': 2 + away - job.steps / 1e3}


def everything(names, study, best):
  """Returns all scheduled jobs with made-up results, in order of execution."""
  done = {}
  while (job := next(search.todo(names, study, done), None)) is not None:
    assert job not in done
    done[job] = pretended(job, best(job.method))
  return done


def test_all_methods_have_the_same_trials():
  inside = lambda name: search.pairs(METHODS[name])[4]
  size = Size(first=(Rung(2, 12), Rung(3, 2), Rung(4, 1)), tuned=5, final=6)
  study = Methods(size)
  done = everything([*METHODS], study, inside)
  for name in METHODS:
    first = [job for job in done if job.method == name and job.steps <= 4]
    # The best of the first column is at an edge of the grid, so that one
    # neighbor outside the grid is tried. A method with tied rates has a ladder
    # of six rates; its fifth already has both neighbors.
    tied = METHODS[name].tied is not None
    count = 6 + 2 + 1 if tied else 12 + 2 + 1
    assert len(first) == count and {job.seed for job in first} == {0}
    assert (first[-1].matrix, first[-1].rest) == inside(name)
  last = [job for job in done if job.steps == 6]
  assert len(last) == (1 + size.finalists) * 2 * size.seeds
  assert {job.corpus for job in last} == {*STUDY.corpora}
  assert STUDY.baseline in {job.method for job in last}


def test_a_best_at_an_edge_moves_on():
  start = METHODS['GaLore']
  far = (search.rung(start.matrix, -2), start.rest)
  done = everything(['GaLore'], SMALL, lambda _: far)
  found = search.tuned('GaLore', SMALL, done)
  with pytest.raises(StopIteration) as end:
    next(found)
  assert end.value.value[0] == far


def test_finals_tune_the_rates_of_their_own_length():
  """The best pair of long runs is two places from that of short ones."""
  names = [*METHODS]
  longest = SIZE.first[-1].steps

  def best(job):
    pair = search.pairs(METHODS[job.method])[4]
    places = 0 if job.steps <= longest else -2
    if METHODS[job.method].tied is None:
      return (pair[0], search.rung(pair[1], places))
    rest = search.rung(pair[1], places)
    return (METHODS[job.method].tied * rest, rest)

  done = {}
  while (job := next(search.todo(names, SMALL, done), None)) is not None:
    done[job] = pretended(job, best(job))
  last = [job for job in done if job.steps == SIZE.final]
  assert last
  for job in last:
    assert (job.matrix, job.rest) == best(job), job


def test_finals_are_of_the_pair_that_tuning_has_ahead():
  runs = lambda pair, bits, steps, seeds: {
    (job := Job('chitchat', 'GaLore', *pair, seed, steps)): {
      **job._asdict(),
      'bits_per_byte': bits,
    }
    for seed in range(seeds)
  }
  good, bad = (0.01, 0.01), (0.03, 0.03)
  tried = runs(good, 2.0, SIZE.tuned, 1) | runs(bad, 2.1, SIZE.tuned, 1)
  last = runs(good, 1.5, SIZE.final, SIZE.seeds)
  other = runs(bad, 1.4, SIZE.final, SIZE.seeds)
  for done in (tried | last | other, tried | other | last):
    (found,) = results.finals('chitchat', SMALL, done).values()
    assert {run['matrix'] for run in found} == {0.01}
  # A method enters the finals only after all of its seeds have run.
  few = tried | runs(good, 1.5, SIZE.final, SIZE.seeds - 1)
  assert not results.finals('chitchat', SMALL, few)


def test_a_tied_rate_moves_on_along_one_axis():
  far = (0.75, 3.0)
  study = Methods(Size(first=(Rung(2, 12), Rung(3, 2), Rung(4, 1))))
  done = everything(['GaLore, one rate'], study, lambda _: far)
  assert all(job.matrix == 0.25 * job.rest for job in done)
  best = min(done.values(), key=lambda run: run['bits_per_byte'])
  assert (best['matrix'], best['rest']) == far


def test_without_all_methods_there_are_no_finals():
  names = ['AdamW', 'GaLore']
  done = everything(names, SMALL, lambda _: (3e-3, 3e-3))
  assert {job.steps for job in done} == {2, 3, 4}


def test_calls_with_half_of_the_methods_each_do_what_one_does():
  inside = lambda name: search.pairs(METHODS[name])[4]
  names = [*METHODS]
  whole = everything(names, SMALL, inside)
  done = {}
  for half in (names[::2], names[1::2]) * 2:
    while (job := next(search.todo(half, SMALL, done), None)) is not None:
      assert job.method in half
      done[job] = pretended(job, inside(job.method))
  assert done == whole


def test_more_methods_may_be_in_the_finals():
  inside = lambda name: search.pairs(METHODS[name])[4]
  names = [*METHODS]
  done = everything(names, SMALL, inside)
  last = {job.method for job in done if job.steps == SIZE.final}
  other = next(name for name in names if name not in last)
  assert not [*search.todo([other], SMALL, done)]
  job = next(search.todo([other], SMALL, done, [other]))
  assert (job.method, job.steps) == (other, SIZE.tuned)
