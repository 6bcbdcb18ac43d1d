"""The command line of a study: trains the missing runs and writes the page.

Each run is added to the results file when it ends. Runs that are in this file
are skipped, so an interrupted study continues. The file stores the command of
each run. This command trains the run again and prints the same figures on the
same machine.

A CPU computes everything on one core: sums are split over cores, so the figures
would otherwise depend on the number of cores. A GPU multiplies in float32 and
adds in a fixed order. Two calls can share a results file: write `taskset -c 1`
before the second one and give each call half of the methods (`--only`).
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

from configs.studies.comparison.page import draw
from configs.studies.comparison.results import firsts
from configs.studies.comparison.runner import Runner
from configs.studies.comparison.runs import Runs, save, until
from configs.studies.comparison.search import todo, waiting
from configs.studies.comparison.study import Job, Study
from train.engine import machine

RESULTS = pathlib.Path(__file__).parents[1] / 'results'


def runs_of(directory: pathlib.Path, study: Study) -> Runs:
  """Reads the runs of a study from its results file in a directory."""
  return Runs(directory / f'{study.name}.json', Job, study.shared)


def train(
  runner: Runner,
  directory: pathlib.Path,
  *,
  names: Sequence[str],
  more: Sequence[str] = (),
  hours: float | None = None,
) -> None:
  """Trains the missing runs and writes the page and its pictures.

  Args:
    runner: trains single runs.
    directory: where the results are read and written.
    names: the methods that may run.
    more: those of them that are in the finals even if others are better.
    hours: no run starts after this time; None sets no limit.
  """
  study = runner.study
  runs = runs_of(directory, study)
  for job in until(todo(names, study, runs.done, more), hours):
    found = runner.run(job)
    runs.add(job, found)
    value = f'{found[study.metric.key]:.4f} {study.metric.title}'
    print(f'{job}: {value}', flush=True)
  if firsts(study, runs.done):
    draw(study, runs.done, directory)
  if more and (left := waiting(study, runs.done)):
    print(f'the final round needs the first round of {", ".join(left)}')
  if runs.done:
    save(directory / f'{study.name}.md', study.page(runs.done))


def repeatable() -> None:
  """Makes results reproducible on the same machine.

  Call it before JAX starts. A CPU uses one core, the first that the process may
  use, if the system supports this. A GPU multiplies in float32, and XLA
  uses deterministic kernels that it does not select by timing them.
  """
  # `jax.devices()` would start JAX before the flags below are set.
  can = machine.nvidia() and importlib.util.find_spec('jax_plugins') is not None
  if can and jax.config.values['jax_platforms'] != 'cpu':
    flags = '--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
    jax.config.update('jax_default_matmul_precision', 'highest')
  elif hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def job_of(
  words: Sequence[str], study: Study, error: Callable[[str], Any]
) -> Job:
  """Parses the values of `--run`; calls `error` with a message if it cannot."""
  corpus, method, *numbers = words
  if corpus not in study.corpora:
    error(f'--run: the corpus must be one of {study.corpora}, got {corpus!r}')
  if method not in study.methods:
    error(f'--run: no method is named {method!r}; --help has their names')
  try:
    matrix, rest, seed, steps = numbers
    return Job(
      corpus, method, float(matrix), float(rest), int(seed), int(steps)
    )
  except ValueError as wrong:
    return error(f'--run: {wrong}')


def main(study: Study, argv: Sequence[str] | None = None) -> None:
  """Trains the missing runs and writes the page, or trains one run."""
  parser = argparse.ArgumentParser(f'python -m configs.studies.{study.name}')
  parser.add_argument(
    '--hours', type=float, help='start no run after this time'
  )
  of_methods: Any = {
    'nargs': '+',
    'choices': study.methods,
    'metavar': 'METHOD',
  }
  names = ', '.join(map(repr, study.methods))
  parser.add_argument(
    '--only',
    default=study.usual,
    help=f'methods that run, from {names}',
    **of_methods,
  )
  parser.add_argument(
    '--finals',
    default=(),
    help='methods of --only that are in the final round in any case',
    **of_methods,
  )
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  for name, text in study.options.items():
    default = getattr(study.size, name)
    parser.add_argument(f'--{name}', type=int, default=default, help=text)
  parser.add_argument(
    '--run',
    nargs=len(Job._fields),
    metavar=tuple(name.upper() for name in Job._fields),
    help='train one run and print its results',
  )
  args = parser.parse_args(argv)
  if not {*args.finals} <= {*args.only}:
    parser.error('--finals must be among the methods of --only')
  job = args.run and job_of(args.run, study, parser.error)
  repeatable()
  given = {name: getattr(args, name) for name in study.options}
  size = dataclasses.replace(study.size, **given)
  with tempfile.TemporaryDirectory() as scratch:
    runner = Runner(
      dataclasses.replace(study, size=size), pathlib.Path(scratch)
    )
    if job is None:
      options = dict(names=args.only, more=args.finals, hours=args.hours)
      train(runner, args.results, **options)
      return
    found = runner.run(job)
  print(json.dumps({k: x for k, x in found.items() if k != 'rows'}, indent=1))
