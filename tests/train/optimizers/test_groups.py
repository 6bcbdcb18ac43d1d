"""Parameter groups of a config: command line, steps, logs and plans."""

import dataclasses
import json
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax import Group
from models.lowrank import Lora
from tests.train.program import lines, saved, write_config
from tests.train.test_config import CONFIG
from train import pretrain
from train.config import Config, Layerwise, group_of, spelled
from train.engine import loop, metrics
from train.engine import step as step_lib
from train.engine.command import load, parse
from train.engine.config_json import differences, from_json, to_json
from train.engine.memory_table import memory_of
from train.engine.run import Run
from train.engine.task import task_of
from train.method import Adam8bit, AdamW, Badam, Galore, ScaleSgd
from train.plan.footprint import Cards, make_plan

GROUPS = (Group('embed/.*', 2.0, 0.0), Group('.*norm/scale', 0.0))
GROUPED = dataclasses.replace(
  CONFIG, optimizer=Galore(rank=2, gap=2, weight_decay=0.1), groups=GROUPS
)


def batch(config, seed=0):
  shape = config.batch_size, config.sequence_length
  tokens = np.random.default_rng(seed).integers(0, 300, size=shape)
  return {
    'inputs': np.int32(tokens),
    'targets': np.int32(tokens[:, ::-1]),
    'weights': np.ones(shape, np.float32),
    'positions': np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
    'segments': np.ones(shape, np.int32),
  }


def trained(config, steps=2):
  """Returns the initial parameters, and the state and metrics after steps."""
  init, step = step_lib.build(config, task_of(config))
  state = jax.jit(init)(jax.random.key(0))
  first = jax.tree.map(np.asarray, state.params)
  for i in range(steps):
    state, found = step(state, batch(config, i))
  return first, state, found


def test_json_and_the_command_line_round_trip(tmp_path):
  assert from_json(Config, json.loads(json.dumps(to_json(GROUPED)))) == GROUPED
  assert 'groups' in differences(CONFIG, GROUPED)
  path = write_config(tmp_path)
  words = ['--groups', 'embed/.*=2,0', '.*norm/scale=0']
  assert parse([path, *words]).config.groups == GROUPS
  assert parse([path, '--groups']).config.groups == ()
  assert parse([path]).config.groups == load(path).groups == ()


@pytest.mark.parametrize('rate', [10, 0.5, 1 / 3, 1e-30, 2.5e20])
def test_a_spelled_group_is_the_group(rate: float) -> None:
  group = Group('a=b/.*', rate, 0.1)
  assert group_of(spelled(group)) == group


@pytest.mark.parametrize('text', ['embed', 'embed=fast', '=2', 'embed=1,2,3'])
def test_malformed_groups_are_refused(text, tmp_path, capsys):
  with pytest.raises(SystemExit):
    parse([write_config(tmp_path), '--groups', text])
  assert 'PATTERN=RATE' in capsys.readouterr().err


@pytest.mark.parametrize(
  'update', [None, pytest.param(Layerwise(), marks=pytest.mark.slow)]
)
def test_a_frozen_group_has_no_state_and_does_not_move(update):
  config = dataclasses.replace(
    GROUPED, update=update or GROUPED.update, clip_norm=None
  )
  first, state, found = trained(config)
  last = jax.device_get(state.params)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), first, last)
  assert not moved['norm']['scale'] and moved['embed']['embedding']
  kept = {
    jax.tree_util.keystr(path)
    for path, x in jax.tree_util.tree_leaves_with_path(state.optimizer)
    if x.ndim
  }
  assert not any('norm' in path for path in kept) and kept
  rate = float(found['learning_rate'])
  assert float(found['learning_rate/embed/.*']) == 2 * rate
  assert float(found['learning_rate/.*norm/scale']) == 0


def test_without_groups_the_state_is_as_before():
  plain = dataclasses.replace(GROUPED, groups=())
  only_frozen = dataclasses.replace(GROUPED, groups=GROUPS[1:])
  for config in (plain, only_frozen):
    init, _ = step_lib.build(config, task_of(config))
    state = jax.eval_shape(init, jax.random.key(0))
    assert 'GroupedState' not in str(jax.tree.structure(state.optimizer))


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', [AdamW(), Adam8bit(), Badam()])
def test_every_method_has_groups(optimizer):
  groups = (Group('blocks/attention/.*', 0.5), Group('norm/.*', 0.0))
  config = dataclasses.replace(
    CONFIG, optimizer=optimizer, groups=groups, clip_norm=None
  )
  whole, layerwise = (
    trained(dataclasses.replace(config, update=update))[1].params
    for update in (config.update, Layerwise())
  )
  # The tolerance allows for summing gradients in a different order, before Adam
  # divides by their magnitude.
  chex.assert_trees_all_close(whole, layerwise, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_factors_have_groups_of_their_own():
  """Checks LoRA+, which trains the second factor with a higher rate."""
  adapter = Lora(rank=2, alpha=2.0)
  config = dataclasses.replace(CONFIG, optimizer=AdamW(), adapter=adapter)
  groups = (Group('.*/lora_b', 16.0),)
  (first, plain, _), (_, fast, _) = (
    trained(dataclasses.replace(config, groups=x), steps=2)
    for x in ((), groups)
  )
  steps = [
    np.abs(state.params['blocks']['attention']['q']['lora_b']).max()
    for state in (plain, fast)
  ]
  # B is zero at first, and the warm-up starts at a rate of zero. After two
  # steps, B therefore equals the second update.
  np.testing.assert_allclose(steps[1], 16 * steps[0], rtol=1e-4)
  chex.assert_trees_all_equal(first['embed'], fast.params['embed'])
  beneath = dataclasses.replace(config, groups=(Group('embed/.*', 2.0),))
  with pytest.raises(ValueError, match=r"'embed/.*match no parameter.*lora_a"):
    trained(beneath)


@pytest.mark.parametrize(
  'groups, optimizer, message',
  [
    ((Group('embd'),), AdamW(), "'embd'.*match no parameter.*embed/embedding"),
    ((Group('.*', 0.0),), AdamW(), 'freeze every trained parameter'),
    ((Group('embed/.*'), Group('.*')), AdamW(), 'in common.*embed/embedding'),
    ((Group('embed/.*', decay=0.0),), Adam8bit(), 'multiply weight_decay'),
  ],
)
def test_groups_that_do_not_fit(groups, optimizer, message):
  config = dataclasses.replace(CONFIG, groups=groups, optimizer=optimizer)
  with pytest.raises(ValueError, match=message):
    init, _ = step_lib.build(config, task_of(config))
    jax.eval_shape(init, jax.random.key(0))


def test_layers_that_are_all_frozen_need_an_update_of_the_whole_tree() -> None:
  config = dataclasses.replace(
    CONFIG, optimizer=AdamW(), groups=(Group('blocks/.*', 0.0),)
  )
  init, _ = step_lib.build(config, task_of(config))
  jax.eval_shape(init, jax.random.key(0))
  config = dataclasses.replace(config, update=Layerwise())
  with pytest.raises(ValueError, match=r'every layer.*--update WholeTree'):
    init, _ = step_lib.build(config, task_of(config))
    jax.eval_shape(init, jax.random.key(0))


def test_every_rate_of_an_optimizer_is_multiplied() -> None:
  optimizer = ScaleSgd(vector_learning_rate=0.25)
  config = dataclasses.replace(
    CONFIG, optimizer=optimizer, groups=(Group('norm', 0.5),)
  )
  params = {'norm': jnp.ones(4), 'bias': jnp.ones(4)}
  tx = config.rule()
  updates, _ = tx.update(params, tx.init(params), params)
  # The multiplier is a power of two, so no product is rounded.
  np.testing.assert_array_equal(2 * updates['norm'], updates['bias'])
  assert updates['bias'].all()


def test_the_table_of_memory_has_the_multipliers():
  table = memory_of(GROUPED, task_of(GROUPED))
  columns = {str(c.header): [*c.cells] for c in table.columns}
  rates = dict(zip(columns['parameter'], columns['rate'], strict=True))
  assert rates['embed/embedding'] == '2' and rates['norm/scale'] == '0'
  assert columns['decay'][columns['parameter'].index('embed/embedding')] == '0'


def test_the_table_of_memory_has_frozen_groups() -> None:
  config = dataclasses.replace(GROUPED, groups=GROUPS[1:])
  table = memory_of(config, task_of(config))
  columns = {str(c.header): [*c.cells] for c in table.columns}
  rates = dict(zip(columns['parameter'], columns['rate'], strict=True))
  assert rates['norm/scale'] == '0' and rates['embed/embedding'] == '1'


def test_a_plan_counts_no_state_of_frozen_weights():
  frozen = dataclasses.replace(GROUPED, groups=(Group('embed/.*', 0.0),))
  plans = [
    make_plan(config, Cards('rtx4090', estimate=True))
    for config in (dataclasses.replace(GROUPED, groups=()), frozen)
  ]
  # Freezing the embedding saves Adam's two float32 moments and its gradient.
  size = 4 * 300 * 8
  assert plans[0].moment_bytes - plans[1].moment_bytes == 2 * size
  assert plans[0].gradient_bytes - plans[1].gradient_bytes == size


@pytest.mark.slow
def test_a_run_with_groups_resumes_bit_equal(tmp_path, monkeypatch):
  monkeypatch.setattr(pretrain, 'show_samples', lambda *args: None)
  monkeypatch.setattr(metrics, 'plot', lambda *args: None)
  config = write_config(tmp_path)
  groups = ['--groups', 'embed/.*=2,0', '.*norm/scale=0']
  whole, run = Run(tmp_path / 'whole'), Run(tmp_path / 'run')
  assert pretrain.main([config, '--run', str(whole.directory), *groups]) == 0
  add = loop.Meter.add

  def interrupt(meter, step, found, *rest):
    if step == 4:
      signal.raise_signal(signal.SIGTERM)
    add(meter, step, found, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Meter, 'add', interrupt)
    code = pretrain.main([config, '--run', str(run.directory), *groups])
  assert code == 128 + signal.SIGTERM
  assert pretrain.main([config, '--run', str(run.directory), '--resume']) == 0
  (ours, _), (theirs, _) = saved(run), saved(whole)
  chex.assert_trees_all_equal(ours, theirs)
  assert lines(run) == lines(whole)
