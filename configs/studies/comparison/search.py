"""Selects the runs of a study: successive halving, then the finals.

The same search tunes two learning rates for every method: one for the matrices
of the layers and one for all other parameters. It starts from a grid of twelve
pairs of rates. If the best pair is at the edge of the grid, the search also
tries its neighbours outside the grid. There are two rounds:

* First: all methods on the first corpus, with one seed.
* Final: the baseline, the best other methods and those that the caller names,
  on all corpora. Each method trains its three best pairs of the first round
  again, for more steps. While a neighbour of the best pair has not been tried,
  it is tried too, because good rates depend on the number of steps. The best
  pair is then trained with several seeds. This round starts once the first
  round of all methods is complete.

The functions are generators: the caller adds each run to `done` before it takes
the next one.
"""

import math
from collections.abc import (
  Collection,
  Generator,
  Iterable,
  Iterator,
  Sequence,
)
from typing import TypeAlias, TypeVar

from configs.studies.comparison.results import firsts
from configs.studies.comparison.study import Done, Job, Method, Study

T = TypeVar('T')
Pair: TypeAlias = tuple[float, float]
"""Learning rates of the matrices and of all other parameters."""
Search: TypeAlias = Generator[Job, None, list[Pair]]
"""Yields missing runs, and returns the pairs of rates, the best first."""
ROUNDS = 4
"""Number of rounds that tune a finalist: the first has its best pairs, the
others have neighbours of the best pair so far."""


def pairs(method: Method) -> list[Pair]:
  """Returns the first pairs of rates (matrix, rest): 4 x 3, or 6 if tied.

  >>> from configs.studies.comparison.table import METHODS
  >>> pairs(METHODS['GaLore'])[:3]
  [(0.003, 0.003), (0.003, 0.01), (0.003, 0.03)]
  >>> pairs(METHODS['AdamW, one rate'])[:3]
  [(0.0003, 0.0003), (0.001, 0.001), (0.003, 0.003)]
  """
  if method.tied is not None:
    rests = [rung(method.rest, i) for i in range(6)]
    return [(method.tied * rest, rest) for rest in rests]
  return [
    (rung(method.matrix, i), rung(method.rest, j))
    for i in range(4)
    for j in range(3)
  ]


def rung(start: float, i: int) -> float:
  """Returns the rate `i` places above `start` in 0.1, 0.3, 1, 3, 10, ....

  >>> [rung(0.003, i) for i in (-1, 0, 1, 2)]
  [0.001, 0.003, 0.01, 0.03]
  """
  place = round(2 * math.log10(start)) + i
  return float(f'{(1, 3)[place % 2]}e{place // 2}')


def beyond(
  pair: Pair,
  tried: Collection[Pair],
  tied: float | None = None,
) -> list[Pair]:
  """Returns the neighbours of a pair outside the range of all tried rates.

  >>> beyond((0.1, 0.01), {(0.1, 0.003), (0.1, 0.01), (0.03, 0.03)})
  [(0.3, 0.01)]
  >>> beyond((0.01, 0.01), {(0.01, 0.01), (0.003, 0.003)}, tied=1.0)
  [(0.03, 0.03)]
  """
  found = []
  for axis in (0, 1) if tied is None else (1,):
    values = {one[axis] for one in tried}
    for end, by in ((min(values), -1), (max(values), 1)):
      if pair[axis] == end:
        matrix, rest = pair
        if axis == 0:
          matrix = rung(end, by)
        else:
          rest = rung(end, by)
        if tied is not None:
          matrix = tied * rest
        found.append((matrix, rest))
  return found


def neighbours(pair: Pair, tied: float | None = None) -> list[Pair]:
  """Returns the pairs with one rate that is a place higher or lower.

  >>> neighbours((0.1, 0.01))
  [(0.03, 0.01), (0.3, 0.01), (0.1, 0.003), (0.1, 0.03)]
  >>> neighbours((0.01, 0.01), tied=1.0)
  [(0.003, 0.003), (0.03, 0.03)]
  """
  matrix, rest = pair
  rests = [rung(rest, -1), rung(rest, 1)]
  if tied is not None:
    return [(tied * rest, rest) for rest in rests]
  matrices = [rung(matrix, -1), rung(matrix, 1)]
  return [(x, rest) for x in matrices] + [(matrix, x) for x in rests]


def missing(jobs: Iterable[T], done: Collection[T]) -> Iterator[T]:
  """Yields the jobs that have no record yet."""
  yield from (job for job in jobs if job not in done)


def tuned(name: str, study: Study, done: Done) -> Search:
  """Yields the missing runs of a method's first round.

  Returns:
    The method's pairs of rates, the best first (the generator's return value).
  """
  method = study.methods[name]

  def job(pair: Pair, steps: int) -> Job:
    return Job(study.corpora[0], name, *pair, 0, steps)

  def best_first(found: Sequence[Pair], steps: int) -> list[Pair]:
    return sorted(found, key=lambda x: done[job(x, steps)][study.metric.key])

  order = pairs(method)
  steps = 0
  for steps, count in study.size.first:
    order = order[:count]
    yield from missing([job(pair, steps) for pair in order], done)
    order = best_first(order, steps)
  tried = set(pairs(method))
  for _ in range(3):
    more = beyond(order[0], tried, method.tied)
    yield from missing([job(pair, steps) for pair in more], done)
    tried |= {*more}
    order = best_first([*order, *more], steps)
  return order


def retuned(
  tries: Sequence[Job], study: Study, done: Done
) -> Generator[Job, None, Job]:
  """Yields missing runs of some jobs, and of neighbours of the best of them.

  Args:
    tries: jobs with different pairs of rates.
    study: defines the metric.
    done: the records so far.

  Returns:
    The best job (the generator's return value).
  """
  tied = study.methods[tries[0].method].tied
  tried = list(tries)
  best = tries[0]
  for _ in range(ROUNDS):
    yield from missing(tried, done)
    best = min(tried, key=lambda job: done[job][study.metric.key])
    near = [
      best._replace(matrix=matrix, rest=rest)
      for matrix, rest in neighbours((best.matrix, best.rest), tied)
    ]
    more = [job for job in near if job not in tried]
    if not more:
      break
    tried += more
  return best


def todo(
  names: Sequence[str], study: Study, done: Done, more: Sequence[str] = ()
) -> Iterator[Job]:
  """Yields the missing runs of both rounds.

  Finals run only after the first round of all methods is complete, because
  that round selects the finalists.

  Args:
    names: the methods that may run in this call.
    study: defines methods and sizes.
    done: the records so far, to which the caller adds each yielded run.
    more: methods that are in the finals in any case.
  """
  for name in names:
    yield from tuned(name, study, done)
  if waiting(study, done):
    return
  size, key, found = study.size, study.metric.key, firsts(study, done)
  others = sorted(
    (name for name in study.methods if name != study.baseline),
    key=lambda name: found[name][key],
  )
  last = dict.fromkeys([study.baseline, *others[: size.finalists], *more])
  for name in [name for name in last if name in names]:
    order = yield from tuned(name, study, done)
    for corpus in study.corpora:
      tries = [Job(corpus, name, *p, 0, size.tuned) for p in order[:3]]
      best = yield from retuned(tries, study, done)
      last_job = best._replace(steps=size.final)
      seeds = [last_job._replace(seed=seed) for seed in range(size.seeds)]
      yield from missing(seeds, done)


def waiting(study: Study, done: Done) -> list[str]:
  """Returns the methods whose first round is not complete."""
  return [name for name in study.methods if any(tuned(name, study, done))]
