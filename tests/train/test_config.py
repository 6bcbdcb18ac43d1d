import dataclasses
import json
import math

import numpy as np
import pytest

from galore_optax import Group
from models.llama import Llama3Scaling, LlamaConfig
from models.lowrank import Factored
from train.config import Config
from train.data.chats import Chats, ChitchatAnswers
from train.data.corpus import TextFiles
from train.engine.config_json import differences, flatten, from_json, to_json
from train.method import AdamW, Galore

CONFIG = Config(
  model=LlamaConfig(
    vocab_size=300, width=8, mlp_width=12, num_heads=2, num_layers=1
  ),
  corpus=TextFiles(train='a.txt'),
  optimizer=Galore(rank=0.5, targets=('.*/q/.*',)),
  steps=100,
  learning_rate=0.02,
  batch_size=4,
  sequence_length=16,
)


@pytest.mark.parametrize('optimizer', [CONFIG.optimizer, AdamW(b1=0.8)])
def test_json_round_trip(optimizer):
  config = dataclasses.replace(CONFIG, optimizer=optimizer)
  assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_json_round_trip_of_scaled_waves():
  model = dataclasses.replace(
    CONFIG.model, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)
  )
  config = dataclasses.replace(CONFIG, model=model)
  assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config
  changed = differences(CONFIG, config)['model.rope_scaling']
  assert changed == (None, 'Llama3Scaling')


def test_a_run_of_before_a_field_takes_its_default():
  data = to_json(CONFIG)
  later = ('head_dim', 'qkv_bias', 'qk_norm', 'window', 'rope_scaling')
  for name in ('attention', *later):
    del data['model'][name]
  assert from_json(Config, data) == CONFIG


def test_rows_of_older_runs_keep_the_order_of_packing():
  data = to_json(CONFIG)
  del data['window'], data['groups']
  assert from_json(Config, data) == dataclasses.replace(CONFIG, window=0)


@pytest.mark.parametrize('corpus', [Chats('a.jsonl'), ChitchatAnswers()])
def test_chats_of_before_variables(corpus):
  config = dataclasses.replace(CONFIG, corpus=corpus)
  data = to_json(config)
  del data['corpus']['template_variables']
  assert from_json(Config, data) == config
  given = dataclasses.replace(corpus, template_variables=('a=1', 'b=x'))
  config = dataclasses.replace(CONFIG, corpus=given)
  assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


def test_differences_name_fields_and_both_values():
  other = dataclasses.replace(
    CONFIG, steps=50, optimizer=dataclasses.replace(CONFIG.optimizer, rank=2)
  )
  assert differences(CONFIG, CONFIG) == {}
  assert differences(CONFIG, other) == {
    'steps': (100, 50),
    'optimizer.rank': (0.5, 2),
  }
  found = differences(CONFIG, dataclasses.replace(CONFIG, optimizer=AdamW()))
  assert found['optimizer'] == ('Galore', 'AdamW')
  assert found['optimizer.rank'] == (0.5, 'absent')


def test_schedule_rises_from_zero_and_falls_to_a_tenth():
  rates = np.array([CONFIG.schedule()(count) for count in range(100)])
  # The reference's formula is computed in float64; optax computes in float32.
  expected = [
    0.02 * count / 10
    if count < 10
    else 0.002 + 0.009 * (1 + math.cos(math.pi * (count - 10) / 90))
    for count in range(100)
  ]
  np.testing.assert_allclose(rates, expected, rtol=1e-5)
  np.testing.assert_allclose(CONFIG.schedule()(100), 0.002, rtol=1e-6)


def test_cycles_of_the_schedule_are_alike():
  part = dataclasses.replace(CONFIG, steps=25)
  whole = dataclasses.replace(CONFIG, steps=100, cycles=4)
  rates = np.array([whole.schedule()(count) for count in range(100)])
  once = np.array([part.schedule()(count) for count in range(25)])
  # The numbers are equal, because each cycle begins at a whole step.
  np.testing.assert_array_equal(rates, np.tile(once, 4))
  assert whole.schedule()(100) == part.schedule()(25) > 0


@pytest.mark.parametrize(
  'change, message',
  [
    ({'steps': 0}, 'steps must be at least 1, got 0'),
    ({'cycles': 3}, 'cycles must divide steps=100, got 3'),
    ({'microbatches': 3}, r'microbatches x update.accumulate = 3, got 4'),
    ({'warmup': 1.0}, r'share of the steps in \[0, 1\), got 1.0'),
    ({'learning_rate': -1.0}, 'finite and not negative, got -1.0'),
    ({'learning_rate': math.inf}, 'finite and not negative, got inf'),
    ({'learning_rate': math.nan}, 'finite and not negative, got nan'),
    ({'final': -3.0}, r'share of learning_rate in \[0, 1\], got -3.0'),
    ({'clip_norm': 0.0}, 'clip_norm must be positive, or None, got 0.0'),
    ({'eval_batches': 0}, 'eval_batches must be at least 1, got 0'),
    ({'window': -1}, 'window must be an integer >= 0, got -1'),
    ({'window': None}, 'window must be an integer >= 0, got None'),
    ({'window': 0.5}, 'window must be an integer >= 0, got 0.5'),
    ({'groups': Group('embed/.*')}, 'groups must be a tuple of Group'),
    ({'groups': [Group('embed/.*')]}, 'groups must be a tuple of Group'),
    ({'groups': (('embed/.*', 2),)}, 'groups must be a tuple of Group'),
    ({'groups': (Group('embed', np.float32(2)),)}, 'with Python numbers'),
    (
      {'checkpoint': 'here', 'adapter': Factored()},
      'draws its factors in place of the weights of here',
    ),
  ],
)
def test_bad_values_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_every_field_is_documented():
  # Read the source, because docstrings of fields do not exist at run time.
  import ast
  import inspect

  import train.config

  for module in (train.config,):
    tree = ast.parse(inspect.getsource(module))
    for cls in [x for x in tree.body if isinstance(x, ast.ClassDef)]:
      for field, after in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
          assert isinstance(after, ast.Expr), f'{cls.name}: {field.target.id}'


def test_flatten_has_every_key():
  assert flatten(CONFIG)['optimizer.targets'] == ('.*/q/.*',)
  assert flatten(CONFIG)['corpus'] == 'TextFiles'
