"""Selects the records of a study that its tables and claims are about."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from configs.studies.comparison.study import Done, Job, Study


def firsts(study: Study, done: Done) -> dict[str, dict[str, Any]]:
  """Returns the best run of each method at the end of the first round."""
  return best_at(study.corpora[0], study.size.first[-1].steps, study, done)


def best_at(
  corpus: str, steps: int, study: Study, done: Done
) -> dict[str, dict[str, Any]]:
  """Returns the best run of each method with `steps` steps and seed 0."""
  found: dict[str, dict[str, Any]] = {}
  for job, run in done.items():
    if (job.corpus, job.steps, job.seed) == (corpus, steps, 0):
      known = found.get(job.method, run)
      found[job.method] = min(known, run, key=lambda x: x[study.metric.key])
  return found


def last_runs(corpus: str, study: Study, done: Done) -> dict[Job, list[dict]]:
  """Returns the last runs on a corpus, by the job that tuned their rates.

  Runs of which a seed is missing are left out.
  """
  found: dict[Job, list[dict]] = {}
  for job, run in done.items():
    if job.corpus == corpus and job.steps == study.size.final:
      tried = job._replace(seed=0, steps=study.size.tuned)
      found.setdefault(tried, []).append(run)
  seeds = study.size.seeds
  return {job: runs for job, runs in found.items() if len(runs) == seeds}


def finals(corpus: str, study: Study, done: Done) -> dict[str, list[dict]]:
  """Returns each method's last runs on a corpus, one for each seed."""
  found = last_runs(corpus, study, done)

  def score(job: Job) -> float:
    return done[job][study.metric.key] if job in done else math.inf

  # If a method has two pairs of rates, the later key of the dict wins, so the
  # pair that was better in tuning comes last.
  order = sorted(found, key=score, reverse=True)
  return {
    job.method: sorted(found[job], key=lambda run: run['seed']) for job in order
  }


def rows_of(runs: Sequence[dict[str, Any]]) -> np.ndarray:
  """Returns the first metric of each held-out row: [seeds, rows]."""
  return np.array([run['rows'] for run in runs])


def held(run: dict[str, Any]) -> int:
  """Returns the bytes of a run's weights and optimizer state."""
  return run['weight_bytes'] + run['state_bytes']


def machines(runs: Iterable[dict[str, Any]]) -> str:
  """Returns the names of the devices that computed the runs."""
  return ' and '.join(sorted({run['machine'] for run in runs}))
