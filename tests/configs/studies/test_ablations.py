"""The study of ablations: all choices run, and its baseline is plain GaLore."""

import dataclasses
import json

import pytest

from configs.studies import ablations
from configs.studies.ablations import BASE, CHOICES, Choice, Runner, Size
from configs.studies.comparison.runner import Runner as MethodRunner
from configs.studies.comparison.study import Job
from configs.studies.methods import Methods
from tests.configs.studies.comparison.small import SIZE

RATES = (3e-3, 1e-2)
# The batch needs four rows, because one choice trains with a quarter of it.
MODEL = dataclasses.replace(SIZE, batch_size=4)
SMALL = Size(steps=4, gap=2, model=MODEL)


def test_names_are_of_one_choice_each():
  names = [choice[:2] for choice in CHOICES]
  assert len({*names}) == len(names)
  jobs = [job for _, job in ablations.todo(CHOICES, seeds=3)]
  assert len({*jobs}) == len(jobs)


def test_all_have_one_rate_before_any_has_three():
  jobs = [job for _, job in ablations.todo(CHOICES, seeds=3)]
  assert [job.seed for job in jobs[:3]] == [0, 1, 2]
  once = len(CHOICES) + 2
  assert len({job[:2] for job in jobs[:once]}) == len(CHOICES)
  assert sum(job.seed > 0 for job in jobs) == 2
  # A choice with the rates of the baseline runs with all seeds as well.
  like = BASE._replace(factors=(1.0,))
  assert len([*ablations.todo([like], seeds=3)]) == 3


def test_rates_come_from_the_bench_of_methods(tmp_path):
  with pytest.raises(SystemExit, match=r'has no rates of GaLore: run python'):
    ablations.known_rates(tmp_path)


@pytest.mark.slow
def test_the_base_is_galore_of_the_bench_of_methods(tmp_path):
  # The two benchmarks build different programs for the same training run. The
  # ablations scale the updates; the method benchmark passes the learning rates
  # to the optimizer. The gap must equal that of the method benchmark, and 20
  # steps give both a warm-up of whole steps.
  runner = Runner(SMALL._replace(gap=25, steps=20), RATES)
  ours = runner.run(BASE, 1.0, 0)
  runner_of_methods = MethodRunner(Methods(MODEL), tmp_path)
  job = Job('chitchat', 'GaLore', *RATES, 0, 20)
  theirs = runner_of_methods.run(job)
  assert ours['bits_per_byte'] == pytest.approx(theirs['bits_per_byte'], 1e-5)
  # A choice whose rounding function returns its input must reproduce the run
  # exactly.
  same = Choice('base', 'same', {}, lambda name, x: x)
  assert runner.run(same, 1.0, 0)['rows'] == ours['rows']


# One choice of each table, and all choices that take another path through the
# program.
TRIED = {
  'bfloat16, sums stochastic',
  'bfloat16, to nearest',
  'a quarter of the batch',
  'side full',
  'head too',
  'blocks along r',
  'Fira, outside at the rate of the rest',
  'APOLLO, no limit',
}


@pytest.mark.slow
def test_apollo_is_that_of_the_bench_of_methods(tmp_path):
  runner = Runner(SMALL._replace(gap=25, steps=20), RATES)
  choice = next(c for c in CHOICES if c.name == 'APOLLO')
  runner_of_methods = MethodRunner(Methods(MODEL), tmp_path)
  theirs = runner_of_methods.run(Job('chitchat', 'APOLLO', *RATES, 0, 20))
  ours = runner.run(choice, 1.0, 0)
  assert ours['bits_per_byte'] == pytest.approx(theirs['bits_per_byte'], 1e-5)


@pytest.mark.slow
def test_choices_train_and_a_stopped_bench_goes_on(tmp_path, capsys):
  tried = [c for c in CHOICES if c is BASE or c.name in TRIED]
  choices = [c._replace(factors=c.factors[:1]) for c in tried]
  run = lambda hours: ablations.bench(
    tmp_path, RATES, size=SMALL, choices=choices, hours=hours
  )
  run(None)
  assert len(capsys.readouterr().out.splitlines()) == 1 + len(TRIED) + 2
  runs = json.loads((tmp_path / 'ablations.json').read_text())['runs']
  bits = {x['name']: x['bits_per_byte'] for x in runs if not x['seed']}
  # Each choice must change the result of training.
  assert all(0 < bits[name] < 20 for name in TRIED)
  assert bits['GaLore'] not in [bits[name] for name in TRIED]
  page = (tmp_path / 'ablations.md').read_text()
  assert all(f'| {c.table} | {c.name} |' in page for c in tried)
  run(None)
  assert not capsys.readouterr().out
  with pytest.raises(SystemExit, match=r"holds runs of {'rates'"):
    ablations.bench(tmp_path, (1.0, 1.0), size=SMALL, choices=choices)
