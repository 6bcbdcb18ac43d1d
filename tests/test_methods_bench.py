"""The method benchmark: its schedule of runs, and that runs repeat exactly."""

import concurrent.futures
import dataclasses
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from scipy import stats

from galore_optax.paths import is_matrix, paths
from models.llama import LlamaConfig
from models.lowrank import Factored, Lora
from tests.bench import methods, quickstart
from tests.bench.methods import Job, Rung, Size
from tests.bench.runs import save
from tests.train.test_config import CONFIG
from train.engine.command import load
from train.engine.task import task_of

SIZE = Size(
  width=32,
  num_layers=2,
  vocab_size=400,
  batch_size=2,
  sequence_length=32,
  eval_rows=4,
  first=(Rung(2, 3), Rung(3, 2), Rung(4, 1)),
  tuned=5,
  final=6,
  finalists=2,
  seeds=2,
)
COUNT = 3 + 2 + 1


def pretended(job, best):
  """Returns a made-up run, with fewer bits for rates near to `best`."""
  away = math.log(job.matrix / best[0]) ** 2 + math.log(job.rest / best[1]) ** 2
  return {**job._asdict(), 'bits_per_byte': 2 + away - job.steps / 1e3}


def everything(names, size, best):
  """Returns all scheduled jobs with made-up results, in order of execution."""
  done = {}
  while (job := next(methods.todo(names, size, done), None)) is not None:
    assert job not in done
    done[job] = pretended(job, best(job.method))
  return done


def test_all_methods_have_the_same_trials():
  inside = lambda name: methods.pairs(methods.METHODS[name])[4]
  size = Size(first=(Rung(2, 12), Rung(3, 2), Rung(4, 1)), tuned=5, final=6)
  done = everything([*methods.METHODS], size, inside)
  for name in methods.METHODS:
    first = [job for job in done if job.method == name and job.steps <= 4]
    # The best of the first column is at an edge of the grid, so that one
    # neighbor outside the grid is tried. A method with tied rates has a ladder
    # of six rates; its fifth already has both neighbors.
    tied = methods.METHODS[name].tied is not None
    count = 6 + 2 + 1 if tied else 12 + 2 + 1
    assert len(first) == count and {job.seed for job in first} == {0}
    assert (first[-1].matrix, first[-1].rest) == inside(name)
  last = [job for job in done if job.steps == 6]
  assert len(last) == (1 + size.finalists) * 2 * size.seeds
  assert {job.corpus for job in last} == {*methods.CORPORA}
  assert methods.BASELINE in {job.method for job in last}


def test_a_best_at_an_edge_moves_on():
  start = methods.METHODS['GaLore']
  far = (methods.rung(start.matrix, -2), start.rest)
  done = everything(['GaLore'], SIZE, lambda _: far)
  found = methods.tuned('GaLore', SIZE, done)
  with pytest.raises(StopIteration) as end:
    next(found)
  assert end.value.value[0] == far


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
    (found,) = methods.finals('chitchat', SIZE, done).values()
    assert {run['matrix'] for run in found} == {0.01}
  # A method enters the finals only after all of its seeds have run.
  few = tried | runs(good, 1.5, SIZE.final, SIZE.seeds - 1)
  assert not methods.finals('chitchat', SIZE, few)


def test_an_interval_is_student_s_where_one_thing_is_a_sample():
  rng = np.random.default_rng(0)
  rows, base = rng.normal(size=(2, 9))
  interval = stats.ttest_rel(rows, base).confidence_interval()
  mean, error = methods.paired(rows, base)
  assert (mean - error, mean + error) == pytest.approx(tuple(interval))
  # If all rows of a seed are equal, the seeds are the sample.
  seeds = np.repeat(rows[:3, None], 5, 1), np.repeat(base[:3, None], 5, 1)
  interval = stats.ttest_rel(rows[:3], base[:3]).confidence_interval()
  mean, error = methods.paired(*seeds)
  assert (mean - error, mean + error) == pytest.approx(tuple(interval))
  assert methods.paired(rows, rows) == (0.0, 0.0)


@pytest.mark.parametrize('of_seeds', [0.0, 0.1, 0.3, 1.0])
def test_an_interval_has_the_truth_in_it_as_often_as_it_says(of_seeds):
  rng = np.random.default_rng(0)
  inside = 0
  for _ in range(2000):
    seeds, rows = rng.normal(size=(3, 1)), rng.normal(size=(1, 64))
    each = of_seeds * seeds + rows + rng.normal(size=(3, 64))
    mean, error = methods.paired(each, 0.0)
    inside += abs(mean) <= error
  # The limit is three standard deviations of 2,000 trials below 95%.
  assert inside / 2000 > 0.935


@pytest.mark.parametrize(
  'line, wrong',
  [
    ('--run chitchat Galore 1 1 0 4', r"no method is named 'Galore'"),
    ('--run chat GaLore 1 1 0 4', r"one of .* got 'chat'"),
    ('--run chitchat GaLore 1 1 0 many', r"invalid literal .* 'many'"),
    ('--only AdamW --finals GaLore', r'must be among the methods of --only'),
  ],
)
def test_bad_arguments_are_named(capsys, line, wrong):
  with pytest.raises(SystemExit):
    methods.main(argv=line.split())
  assert re.search(wrong, capsys.readouterr().err)


def test_a_tied_rate_moves_on_along_one_axis():
  far = (0.75, 3.0)
  size = Size(first=(Rung(2, 12), Rung(3, 2), Rung(4, 1)))
  done = everything(['GaLore, one rate'], size, lambda _: far)
  assert all(job.matrix == 0.25 * job.rest for job in done)
  best = min(done.values(), key=lambda run: run['bits_per_byte'])
  assert (best['matrix'], best['rest']) == far


def test_without_all_methods_there_are_no_finals():
  names = ['AdamW', 'GaLore']
  done = everything(names, SIZE, lambda _: (3e-3, 3e-3))
  assert {job.steps for job in done} == {2, 3, 4}


def test_calls_with_half_of_the_methods_each_do_what_one_does():
  inside = lambda name: methods.pairs(methods.METHODS[name])[4]
  names = [*methods.METHODS]
  whole = everything(names, SIZE, inside)
  done = {}
  for half in (names[::2], names[1::2]) * 2:
    while (job := next(methods.todo(half, SIZE, done), None)) is not None:
      assert job.method in half
      done[job] = pretended(job, inside(job.method))
  assert done == whole


def test_more_methods_may_be_in_the_finals():
  inside = lambda name: methods.pairs(methods.METHODS[name])[4]
  names = [*methods.METHODS]
  done = everything(names, SIZE, inside)
  last = {job.method for job in done if job.steps == SIZE.final}
  other = next(name for name in names if name not in last)
  assert not [*methods.todo([other], SIZE, done)]
  job = next(methods.todo([other], SIZE, done, [other]))
  assert (job.method, job.steps) == (other, SIZE.tuned)


def test_runs_of_another_size_do_not_mix(tmp_path):
  save(tmp_path / 'methods.json', '{"size": {"width": 8}, "runs": []}')
  with pytest.raises(SystemExit, match=r'holds runs of .*move the file away'):
    methods.runs_of(tmp_path, SIZE)


def test_calls_at_one_time_lose_no_run(tmp_path):
  jobs = [Job('chitchat', 'GaLore', 1.0, 1.0, seed, 4) for seed in range(40)]

  def call(mine):
    runs = methods.runs_of(tmp_path, SIZE)
    for job in mine:
      runs.add(job, {'bits_per_byte': float(job.seed)})
      save(tmp_path / 'methods.md', 'a page')

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(call, (jobs[i::4] for i in range(4))))
  done = methods.runs_of(tmp_path, SIZE).done
  assert {*done} == {*jobs}
  assert all(run['bits_per_byte'] == job.seed for job, run in done.items())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['GaLore', 'Muon', 'ReLoRA', 'BAdam', 'LOMO'])
def test_a_run_is_the_same_again(tmp_path, name):
  bench = methods.Bench(SIZE, methods.Corpora(tmp_path))
  job = Job('chitchat', name, 3e-3, 1e-2, seed=1, steps=4)
  first, again = bench.run(job), bench.run(job)
  same = lambda found: {k: x for k, x in found.items() if k != 'seconds'}
  assert same(first) == same(again)
  assert first['bits_per_byte'] < 8 and first['tokens'] == 4 * 2 * 32
  # Both learning rates must affect training.
  other = bench.run(job._replace(matrix=1e-2))
  assert other['bits_per_byte'] != first['bits_per_byte']


@pytest.mark.slow
def test_a_stopped_bench_goes_on(tmp_path, capsys):
  bench = methods.Bench(SIZE, methods.Corpora(tmp_path))
  run = lambda hours: methods.bench(
    bench, tmp_path, names=['AdamW', 'SCALE'], hours=hours
  )
  run(0)
  assert not (tmp_path / 'methods.json').exists()
  run(None)
  ran = capsys.readouterr().out.splitlines()
  assert len(ran) >= 2 * COUNT
  page = (tmp_path / 'methods.md').read_text()
  assert '| AdamW |' in page and '| SCALE |' in page
  assert (tmp_path / 'methods.png').exists()
  run(None)
  assert not capsys.readouterr().out


def test_the_quickstart_is_tuned_as_it_is():
  given, size = load(quickstart.CONFIG), quickstart.Quickstart.usual()
  bench = quickstart.Quickstart(size, methods.Corpora(pathlib.Path()))
  job = Job('chitchat', 'GaLore', 1.0, 1.0, seed=given.seed, steps=given.steps)
  config = bench.config(job)
  # The benchmark chooses the learning rates and the method itself.
  changed = {
    name: getattr(given, name)
    for name in ('optimizer', 'learning_rate', 'window')
  }
  assert dataclasses.replace(config, **changed) == given
  around = bench.around(job.steps)
  assert around == (given.optimizer.rank, given.optimizer.gap)
  assert size.rank == around.rank and size.first[-1].steps == given.steps
  assert {*quickstart.Quickstart.names} <= {*methods.METHODS}


def test_the_pattern_of_matrices_is_their_names():
  for adapter in (None, Factored(2), Lora(rank=2, rest='trained')):
    model = LlamaConfig(
      vocab_size=300, width=8, mlp_width=12, num_heads=2, num_layers=1
    )
    config = dataclasses.replace(CONFIG, model=model, adapter=adapter)
    task = task_of(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    for path in paths(params):
      assert bool(re.fullmatch(methods.MATRICES, path)) == is_matrix(path)


def test_pages_say_that_rows_are_not_shuffled():
  results = pathlib.Path(methods.RESULTS)
  pages = 'methods', 'ablations', 'claims', 'quickstart', 'finetune'
  for name in pages:
    assert '**Rows not shuffled**' in (results / f'{name}.md').read_text()[:300]
  assert not methods.unshuffled(Size(window=1024))
