"""The classification task, from files to metrics."""

import dataclasses
import json

import flax.traverse_util
import jax
import numpy as np
import pytest

from models import huggingface
from models.encoder import EncoderConfig, Layers
from models.lowrank import Lora
from tests.train import glue
from train import evaluate, export, finetune
from train.config import Classifier, Config, Layerwise
from train.data import classifier_metrics as classify
from train.data import tokenizer as tokenizer_lib
from train.data.corpus import Chitchat
from train.data.labelled import LabelledFiles
from train.engine import metrics
from train.engine import step as step_lib
from train.engine.run import Run
from train.engine.task import task_of
from train.method import AdamW, Galore
from train.tasks.text import Text


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """Writes a random RoBERTa without a head."""
  directory = tmp_path_factory.mktemp('roberta')
  glue.roberta(directory, init_std=0.1, dropout=0.1)
  return directory


@pytest.fixture
def config(tmp_path, checkpoint):
  """Returns a config that classifies made-up reviews as good or bad."""
  records = glue.examples(('text',), ('bad', 'good'), 240, 0)
  path = tmp_path / 'reviews.jsonl'
  path.write_text(''.join(json.dumps(x) + '\n' for x in records))
  return Config(
    model=Classifier(labels=('bad', 'good'), dropout=0.0),
    corpus=LabelledFiles(str(path)),
    optimizer=AdamW(),
    steps=60,
    learning_rate=0.01,
    batch_size=16,
    sequence_length=32,
    eval_every=20,
    checkpoint=str(checkpoint),
  )


def fit(config, steps):
  """Trains without the program; returns task, state, losses and metrics."""
  config = config.resolved()
  task = task_of(config)
  corpus, tokenizer = config.corpus, tokenizer_lib.load(config.checkpoint)
  text = Text(corpus.open('train'), corpus.open('validation'), tokenizer)
  _, step = step_lib.build(config, task)
  params = task.read(jax.random.key(0))
  state = step_lib.starter(config, task)(params)
  data, validate = task.batches(text), task.evaluate(text)
  losses = [validate(state.params)]
  for _ in range(steps):
    state, found = step(state, next(data))
    losses.append(float(found['loss']))
  return task, state, losses, validate(state.params)


@pytest.mark.slow
def test_a_classifier_learns_the_labels(config):
  task, _, (before, *losses), after = fit(config, 60)
  assert before['accuracy'] < 0.75 and after['accuracy'] > 0.95
  assert np.mean(losses[-5:]) < 0.3 < np.mean(losses[:5])
  assert after['loss'] < before['loss']
  assert task.score(after) == -after['accuracy']


@pytest.mark.parametrize('dropout', [0.0, 0.2])
@pytest.mark.parametrize('num_labels', [1, 2])
def test_a_task_has_the_shapes_of_its_largest_batch(
  config, tmp_path, num_labels, dropout
):
  # The texts fill all 64 positions of the model.
  path = tmp_path / 'long.jsonl'
  path.write_text(
    ''.join(
      json.dumps({'text': 'fine dull ' * 99, 'label': i % 2}) + '\n'
      for i in range(64)
    )
  )
  config = dataclasses.replace(
    config,
    model=Classifier(num_labels=num_labels, dropout=dropout),
    corpus=LabelledFiles(
      str(path), metric='pearson' if num_labels == 1 else 'accuracy'
    ),
    sequence_length=64,
  ).resolved()
  task = task_of(config)
  corpus, tokenizer = config.corpus, tokenizer_lib.load(config.checkpoint)
  batch = next(task.batches(Text(corpus.open('train'), None, tokenizer)))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), batch)
  assert shapes == jax.tree.map(
    lambda x: (x.shape, x.dtype.name), task.inputs()
  )
  longer = dataclasses.replace(config, sequence_length=512)
  assert task_of(longer).inputs() == task.inputs()


@pytest.mark.slow
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_layer_wise_and_microbatches_change_nothing(config, dropout):
  model = dataclasses.replace(config.model, dropout=dropout)
  config = dataclasses.replace(config, model=model, clip_norm=None)
  expected = fit(config, 3)
  for change in (
    {'microbatches': 2},
    {'update': Layerwise()},
    {'update': Layerwise(), 'microbatches': 4},
  ):
    found = fit(dataclasses.replace(config, **change), 3)
    # The tolerance allows for summing gradients in a different order, before
    # Adam divides by their magnitude.
    np.testing.assert_allclose(found[2][1:], expected[2][1:], rtol=2e-3)


@pytest.mark.slow
def test_dropout_acts_only_in_training(config):
  model = dataclasses.replace(config.model, dropout=0.5)
  config = dataclasses.replace(config, learning_rate=0.0)
  quiet = fit(config, 2)
  noisy = fit(dataclasses.replace(config, model=model), 2)
  assert quiet[2][0] == noisy[2][0] and quiet[3] == noisy[3]
  assert quiet[2][1] != noisy[2][1]


@pytest.mark.slow
def test_only_factors_and_the_head_are_trained(config):
  config = dataclasses.replace(config, adapter=Lora(rank=2, dropout=0.1))
  # LoRA's B is zero at first, and so is the learning rate. B changes in the
  # second step, after which A has a gradient.
  task, state, *_ = fit(config, 4)
  # `fit` starts from the same key.
  before, after = task.read(jax.random.key(0)), state.params
  same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
  flat = flax.traverse_util.flatten_dict(same, sep='/')
  moved = {path for path, is_same in flat.items() if not is_same}
  assert moved == {
    path for path in flat if 'lora' in path or path.startswith('head/')
  }


@pytest.mark.slow
def test_a_validation_does_not_depend_on_the_batches(config):
  found = [
    fit(dataclasses.replace(config, batch_size=size), 0)[3] for size in (7, 16)
  ]
  np.testing.assert_allclose(
    [*found[0].values()], [*found[1].values()], rtol=1e-5
  )


def test_metrics_are_those_of_their_definitions():
  found, targets = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 0, 1])
  # Label 1 has 2 true positives, 1 false positive and no false negatives; there
  # are 2 true negatives.
  expected = {'accuracy': 0.8, 'f1': 0.8, 'matthews': 4 / 6}
  assert classify.agreement(found, targets) == pytest.approx(expected)
  constant = classify.agreement(np.zeros(3, int), np.array([0, 1, 0]))
  assert constant['matthews'] == constant['f1'] == 0
  numbers = np.array([0.0, 1.0, 4.0])
  assert classify.correlations(np.ones(3), numbers) == {
    'pearson': 0.0,
    'spearman': 0.0,
  }
  assert classify.correlations(-numbers, numbers) == pytest.approx(
    {'pearson': -1.0, 'spearman': -1.0}
  )
  assert classify.agreement(found + 1, targets + 1)['f1'] == pytest.approx(0.8)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'corpus': Chitchat()}, 'must hold labelled texts, got Chitchat'),
    (
      {'corpus': LabelledFiles('x', metric='pearson')},
      r'metric must be none of pearson .*num_labels=2, got pearson',
    ),
    (
      {'model': Classifier(num_labels=1)},
      r'metric must be one of pearson .*num_labels=1, got accuracy',
    ),
    ({'model': Classifier(num_labels=3, labels=('a',))}, 'labels must be 3'),
    ({'checkpoint': None}, 'read from a checkpoint'),
  ],
)
def test_options_that_do_not_fit_are_refused(config, change, message):
  with pytest.raises(ValueError, match=message):
    task_of(dataclasses.replace(config, **change).resolved())


@pytest.mark.parametrize('option', ['--run x', '--resume', '--branch'])
def test_several_seeds_are_new_runs(option):
  with pytest.raises(ValueError, match='3 starts as many new runs'):
    finetune.of_seeds(['a.py', '--seeds', '3', *option.split()])


def test_a_model_from_nothing_needs_a_tokenizer(config):
  model = EncoderConfig(320, 16, 32, 2, 2, 66)
  config = dataclasses.replace(config, model=model, checkpoint=None)
  with pytest.raises(ValueError, match=r'needs a tokenizer\.json.*--tokenizer'):
    task_of(config.resolved())


@pytest.mark.slow
@pytest.mark.parametrize('task', ['cola', 'stsb'])
def test_a_shipped_config_runs_from_directory_to_directory(
  task, tmp_path, checkpoint, monkeypatch, capsys
):
  glue.prepare(tmp_path / 'data', task)
  monkeypatch.chdir(tmp_path)
  root = __file__.partition('tests')[0]
  options = {
    'checkpoint': checkpoint,
    'corpus.data-dir': tmp_path / 'data',
    **{'steps': 12, 'eval-every': 6, 'save-every': 6, 'batch-size': 8},
    **{'learning-rate': 0.01, 'sequence-length': 64, 'optimizer.gap': 5},
  }
  argv = [f'{root}configs/glue_{task}.py', '--seeds', '2']
  argv += [str(x) for k, v in options.items() for x in (f'--{k}', v)]
  assert finetune.main(argv) == 0
  shown = capsys.readouterr().out
  metric = {'cola': 'matthews', 'stsb': 'pearson'}[task]
  assert '<s>' in shown and f'best {metric}: ' in shown and '2 seeds' in shown
  runs = [tmp_path / 'runs' / f'glue_{task}{end}' for end in ('', '-2')]
  for run in runs:
    lines = metrics.read(Run(run).metrics_path)
    assert [x['step'] for x in lines if f'validation_{metric}' in x] == [6, 12]
  capsys.readouterr()
  evaluate.main([str(runs[0])])
  lines = metrics.read(Run(runs[0]).metrics_path)
  name = f'validation_{metric}'
  value = [line[name] for line in lines if name in line][-1]
  assert f'{metric} {value:.4f}' in capsys.readouterr().out
  export.main([str(runs[0]), str(tmp_path / 'out')])
  config, params = huggingface.load(tmp_path / 'out')
  assert config.labels == (glue.GLUE[task][1] or None)
  assert (tmp_path / 'out/tokenizer.json').is_file()
  assert jax.tree.structure(params) == jax.tree.structure(
    jax.eval_shape(Layers(config).init, jax.random.key(0))
  )


@pytest.mark.slow
def test_galore_learns(config):
  optimizer = Galore(rank=4, gap=20, scale=2.0)
  config = dataclasses.replace(config, optimizer=optimizer)
  assert fit(config, 60)[3]['accuracy'] > 0.9
