"""The studies of methods: runs repeat exactly, and a stopped study goes on."""

import concurrent.futures
import dataclasses
import pathlib
import re

import chex
import jax
import pytest

from configs.quickstart import config as quickstart_config
from configs.studies.comparison import command
from configs.studies.comparison.runner import Runner
from configs.studies.comparison.runs import save
from configs.studies.comparison.study import Job
from configs.studies.comparison.table import METHODS
from configs.studies.comparison.text import Size, unshuffled
from configs.studies.methods import STUDY
from configs.studies.quickstart import Quickstart
from galore_optax.paths import is_matrix, paths
from models.llama import LlamaConfig
from models.lowrank import Factored, Lora
from tests.configs.studies.comparison.small import COUNT, SMALL
from tests.train.test_config import CONFIG
from train.engine.task import task_of


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
    command.main(STUDY, line.split())
  assert re.search(wrong, capsys.readouterr().err)


def test_runs_of_another_size_do_not_mix(tmp_path):
  save(tmp_path / 'methods.json', '{"size": {"width": 8}, "runs": []}')
  with pytest.raises(SystemExit, match=r'holds runs of .*move the file away'):
    command.runs_of(tmp_path, SMALL)


def test_calls_at_one_time_lose_no_run(tmp_path):
  jobs = [Job('chitchat', 'GaLore', 1.0, 1.0, seed, 4) for seed in range(40)]

  def call(mine):
    runs = command.runs_of(tmp_path, SMALL)
    for job in mine:
      runs.add(job, {'bits_per_byte': float(job.seed)})
      save(tmp_path / 'methods.md', 'a page')

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(call, (jobs[i::4] for i in range(4))))
  done = command.runs_of(tmp_path, SMALL).done
  assert {*done} == {*jobs}
  assert all(run['bits_per_byte'] == job.seed for job, run in done.items())


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_every_method_has_a_step(tmp_path, name):
  runner = Runner(SMALL, tmp_path)
  config = runner.config(Job('chitchat', name, 1.0, 1.0, seed=0, steps=4))
  batch = task_of(config).inputs()
  start, step, _ = runner.compiled(name, SMALL.around(4))
  state = jax.eval_shape(start, jax.random.key(0))
  after, metrics = jax.eval_shape(step, state, batch, (0.01, 0.1), 4)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
  assert metrics['loss'].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize('name', ['GaLore', 'Muon', 'ReLoRA', 'BAdam', 'LOMO'])
def test_a_run_is_the_same_again(tmp_path, name):
  runner = Runner(SMALL, tmp_path)
  job = Job('chitchat', name, 3e-3, 1e-2, seed=1, steps=4)
  first, again = runner.run(job), runner.run(job)
  same = lambda found: {k: x for k, x in found.items() if k != 'seconds'}
  assert same(first) == same(again)
  assert first['bits_per_byte'] < 8 and first['tokens'] == 4 * 2 * 32
  # Both learning rates must affect training.
  other = runner.run(job._replace(matrix=1e-2))
  assert other['bits_per_byte'] != first['bits_per_byte']


@pytest.mark.slow
def test_a_stopped_study_goes_on(tmp_path, capsys):
  runner = Runner(SMALL, tmp_path)
  run = lambda hours: command.train(
    runner, tmp_path, names=['AdamW', 'SCALE'], hours=hours
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
  given, study = quickstart_config, Quickstart()
  runner = Runner(study, pathlib.Path())
  job = Job('chitchat', 'GaLore', 1.0, 1.0, seed=given.seed, steps=given.steps)
  config = runner.config(job)
  # The study chooses the learning rates and the method itself.
  changed = {
    name: getattr(given, name)
    for name in ('optimizer', 'learning_rate', 'window')
  }
  assert dataclasses.replace(config, **changed) == given
  around = study.around(job.steps)
  assert around == (given.optimizer.rank, given.optimizer.gap)
  assert study.size.rank == around.rank
  assert study.size.first[-1].steps == given.steps
  assert {*study.usual} <= {*METHODS}


def test_the_pattern_of_matrices_is_their_names():
  for adapter in (None, Factored(2), Lora(rank=2, rest='trained')):
    model = LlamaConfig(
      vocab_size=300, width=8, mlp_width=12, num_heads=2, num_layers=1
    )
    config = dataclasses.replace(CONFIG, model=model, adapter=adapter)
    task = task_of(config)
    params = jax.eval_shape(task.init, jax.random.key(0))
    for path in paths(params):
      assert bool(re.fullmatch(STUDY.matrices, path)) == is_matrix(path)


def test_pages_say_that_rows_are_not_shuffled():
  pages = 'methods', 'ablations', 'claims', 'quickstart', 'finetune'
  for name in pages:
    text = (command.RESULTS / f'{name}.md').read_text()
    assert '**Rows not shuffled**' in text[:300]
  assert not unshuffled(Size(window=1024))
