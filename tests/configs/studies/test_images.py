"""Studies of models of images: small copies of them train and are scored."""

import dataclasses
import json
import re
from typing import ClassVar

import jax
import numpy as np
import pytest

from configs.studies import diffusion, diffusion_transformer, vision
from configs.studies.comparison import command, page, table
from configs.studies.comparison.runner import Runner
from configs.studies.comparison.study import Job, Rung
from galore_optax import names
from galore_optax.paths import paths
from tests.train.tasks.images import write_idx
from train.data.images.corpora import IdxImages
from train.engine.task import task_of

NAMES = ('AdamW', 'GaLore')
STUDIES = (vision.STUDY, diffusion.STUDY, diffusion_transformer.STUDY)


def small(study, **model):
  """Returns a study that takes seconds, on other images of the same size."""
  size = dataclasses.replace(
    study.size,
    first=(Rung(2, 2),),
    tuned=2,
    final=3,
    finalists=1,
    seeds=2,
    batch_size=4,
    eval_images=8,
    rank=4,
  )

  class Small(type(study)):
    usual = NAMES
    methods: ClassVar = {name: study.methods[name] for name in NAMES}

    @property
    def model(self):
      return dataclasses.replace(super().model, **model)

    def corpus(self, name, scratch):
      directory = write_idx(scratch / name, side=self.model.image_size)
      return IdxImages(directory)

  return Small(size)


SMALL = {
  'vision': small(vision.STUDY, width=16, mlp_width=16, labels=None),
  'diffusion': small(
    diffusion.STUDY, image_size=8, width=8, groups=4, attention_sizes=(4,)
  ),
  'diffusion_transformer': small(diffusion_transformer.STUDY, width=16),
}


@pytest.mark.parametrize('study', STUDIES, ids=lambda study: study.name)
def test_all_methods_are_in_the_finals(study):
  assert study.baseline in study.methods
  assert study.size.finalists == len(study.methods) - 1
  assert study.size.first[-1].steps < study.size.tuned < study.size.final
  assert study.size.eval_images % study.size.batch_size == 0


@pytest.mark.parametrize('study', STUDIES, ids=lambda study: study.name)
def test_the_pattern_of_matrices_is_that_of_the_layers(study):
  task = task_of(study.config(IdxImages()))
  params = jax.eval_shape(task.init, jax.random.key(0))
  shapes = [x.shape for x in jax.tree.leaves(params)]
  for path, shape in zip(paths(params), shapes, strict=True):
    kind = names.of(path, shape).kind
    in_layer = not path.startswith(('conv', 'condition', 'embed', 'head'))
    is_matrix = kind in ('matrix', 'attention', 'convolution') and in_layer
    assert bool(re.fullmatch(study.matrices, path)) == is_matrix, path


def test_muon_takes_a_convolution_as_one_matrix():
  found = table.dimensions('down0/conv1/kernel', (3, 3, 8, 16))
  assert found == ((0, 1, 2), (3,))
  assert table.dimensions('blocks/mlp/up/kernel', (2, 8, 16)) == (-2, -1)
  for path, shape in (
    ('conv_in/kernel', (3, 3, 1, 16)),
    ('conv_out/kernel', (3, 3, 16, 1)),
    ('down0/conv1/bias', (16,)),
    ('embed/labels/embedding', (11, 16)),
  ):
    assert table.dimensions(path, shape) is None, path


def test_images_are_halved_by_means(tmp_path):
  whole = IdxImages(write_idx(tmp_path / 'whole', side=8))
  half = tmp_path / 'half'
  half.mkdir()
  found = diffusion.halved(whole, half)
  for split in ('train', 'validation'):
    old, new = whole.open(split), found.open(split)
    assert len(old) == len(new) and new.shape == (4, 4, 1)
    before, after = (
      next(iter(images.stored(seed=0, repeat=False))) for images in (old, new)
    )
    assert before.label == after.label
    parts = old.image(before).astype(float)[..., 0]
    means = [
      [parts[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(4)]
      for i in range(4)
    ]
    np.testing.assert_allclose(new.image(after)[..., 0], means, atol=0.5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['vision', 'diffusion_transformer'])
def test_a_study_trains_and_writes_its_page(tmp_path, name):
  study = SMALL[name]
  command.train(Runner(study, tmp_path), tmp_path, names=study.usual)
  runs = json.loads((tmp_path / f'{name}.json').read_text())['runs']
  finals = [run for run in runs if run['steps'] == study.size.final]
  assert {(run['method'], run['seed']) for run in finals} == {
    (method, seed) for method in study.usual for seed in range(2)
  }
  for run in runs:
    assert np.mean(run['rows']) == pytest.approx(
      run[study.metric.key], abs=1e-4
    )
    assert len(run['rows']) * 4 == study.size.eval_images
  text = (tmp_path / f'{name}.md').read_text()
  assert '## Final round on Fashion-MNIST: 12 images, 2 seeds' in text
  for line in text.splitlines():
    if line.startswith('!['):
      assert (tmp_path / line[line.index('(') + 1 : -1]).exists()
  assert 'Not yet in the finals' not in text
  done = command.runs_of(tmp_path, study).done
  last = Job(*(finals[-1][name] for name in Job._fields))
  del done[last]
  assert f'Not yet in the finals: {last.method}.' in study.page(done)


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_the_score_is_the_loss_of_the_task(tmp_path, name):
  """The study and `train.evaluate` agree on the same images."""
  study = SMALL[name]
  runner = Runner(study, tmp_path)
  job = Job('Fashion-MNIST', 'AdamW', 0.001, 0.001, 0, 2)
  task = task_of(runner.config(job))
  params = task.init(jax.random.key(1))
  score = jax.jit(study.score(task))
  found = runner.measured(job.corpus, lambda batch: score(params, batch))
  expected = task.evaluate(runner.data(job.corpus))(params)
  assert found[study.metric.key] == pytest.approx(expected['loss'], rel=1e-5)
  if 'errors' in found:
    assert found['errors'] == pytest.approx(100 * (1 - expected['accuracy']))


def test_better_rates_of_the_baseline_are_named():
  study = vision.STUDY
  size = study.size

  def runs(matrix, tuned, final):
    jobs = [
      Job('Fashion-MNIST', 'AdamW', matrix, 0.1, seed, size.final)
      for seed in range(size.seeds)
    ]
    tried = jobs[0]._replace(steps=size.tuned)
    values = {tried: tuned} | dict.fromkeys(jobs, final)
    return {
      job: {**job._asdict(), 'cross_entropy': x} for job, x in values.items()
    }

  def remark(done):
    return ''.join(page.unselected('Fashion-MNIST', study, done))

  selected = runs(0.01, tuned=0.5, final=0.45)
  assert not remark(selected)
  found = remark(selected | runs(0.03, tuned=0.6, final=0.4))
  assert 'with 0.03 and 0.1 the mean of its last runs is 0.4000' in found
  assert 'too favourable to other methods by 0.0500' in found
