"""A study of another task needs no change to the runner or the tables."""

import dataclasses
import json
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from configs.studies.comparison import command, page, table
from configs.studies.comparison.runner import Runner
from configs.studies.comparison.study import (
  Around,
  Metric,
  Rounds,
  Rung,
  Study,
)
from models.encoder import EncoderConfig
from tests.train import glue
from train.config import Config
from train.data import labelled
from train.data import tokenizer as tokenizer_lib
from train.data.labelled import LabelledFiles
from train.method import AdamW
from train.tasks.text import Text

NAMES = ('AdamW', 'GaLore')
LABELS = ('bad', 'good')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size(Rounds):
  checkpoint: str
  batch: int = 8


@dataclasses.dataclass(frozen=True)
class Sentences(Study):
  """Classification of made-up sentences, from random weights."""

  size: Size

  name = 'sentences'
  methods: ClassVar = {name: table.METHODS[name] for name in NAMES}
  usual = NAMES
  corpora = ('made-up',)
  metrics = (Metric('cost', 'cross-entropy'), Metric('accuracy', 'accuracy'))
  rows = 'sentences'
  unit = 'examples'

  def amount(self, steps):
    return steps * self.size.batch

  def corpus(self, name, scratch):
    paths = []
    for seed, part in enumerate(('train', 'validation')):
      rows = glue.examples(('text',), LABELS, 32, seed)
      paths.append(scratch / f'{name}-{part}.jsonl')
      texts = [{'text': x['text'], 'label': x['label']} for x in rows]
      paths[-1].write_text(''.join(json.dumps(x) + '\n' for x in texts))
    return LabelledFiles(*map(str, paths))

  def config(self, corpus):
    return Config(
      model=EncoderConfig(
        vocab_size=320,
        width=16,
        mlp_width=24,
        num_heads=2,
        num_layers=1,
        num_positions=66,
        family='roberta',
      ),
      corpus=corpus,
      tokenizer=self.size.checkpoint,
      optimizer=AdamW(),
      steps=1,
      learning_rate=1.0,
      batch_size=self.size.batch,
      sequence_length=32,
    )

  def around(self, steps):
    return Around(rank=4, gap=2)

  def data(self, config):
    parts = [config.corpus.open(x) for x in ('train', 'validation')]
    return Text(*parts, tokenizer_lib.load(config.tokenizer))

  def held_out(self, config, data):
    return [
      *labelled.validation_batches(
        data.validation,
        data.tokenizer,
        labelled.Labels(2, None),
        batch_size=1,
        sequence_length=32,
      )
    ]

  def score(self, task):
    def score(params, batch):
      found = task.loss.logits(params, batch)
      right = jnp.argmax(found, -1) == batch['targets']
      return task.loss(params, batch)[0], jnp.mean(right)

    return score

  def measured(self, held_out, score):
    found = np.array([score(batch) for batch in held_out])
    cost, accuracy = found.mean(0)
    return {
      'cost': float(cost),
      'accuracy': float(accuracy),
      'rows': [float(x) for x in found[:, 0]],
    }

  def page(self, done):
    first = page.first_table(self, done)
    return '\n'.join([*first, *page.final_section('made-up', self, done), ''])


@pytest.mark.slow
def test_a_study_of_another_task_trains_and_writes_its_page(tmp_path, capsys):
  checkpoint = tmp_path / 'roberta'
  glue.roberta(checkpoint)
  size = Size(
    first=(Rung(2, 1),),
    tuned=2,
    final=3,
    finalists=1,
    seeds=2,
    checkpoint=str(checkpoint),
  )
  runner = Runner(Sentences(size), tmp_path)
  command.train(runner, tmp_path, names=NAMES)
  lines = capsys.readouterr().out.splitlines()
  runs = json.loads((tmp_path / 'sentences.json').read_text())['runs']
  assert len(lines) == len(runs)
  assert {
    (run['method'], run['seed']) for run in runs if run['steps'] == 3
  } == {(name, seed) for name in NAMES for seed in range(2)}
  assert all(run['examples'] == 8 * run['steps'] for run in runs)
  by_name = {run['method']: run['state_bytes'] for run in runs}
  assert by_name['GaLore'] < by_name['AdamW']
  text = (tmp_path / 'sentences.md').read_text()
  assert '| cross-entropy | accuracy |' in text
  assert '## Final round on made-up: 24 examples, 2 seeds' in text
  assert 'the same 32 sentences' in text
  rows = [x for x in text.splitlines() if x.startswith('| GaLore |')]
  heads = [x for x in text.splitlines() if x.startswith('| method |')]
  assert [x.count('|') for x in rows] == [x.count('|') for x in heads]
  assert (tmp_path / 'sentences_first.png').exists()
