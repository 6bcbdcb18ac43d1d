"""The moving average of the weights, in the step and in checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import program
from train import pretrain
from train.config import Layerwise
from train.engine import checkpoint, metrics
from train.engine import step as step_lib
from train.engine.command import load
from train.engine.run import Run
from train.engine.step import State
from train.engine.task import task_of

ARGS = ['--average', '0.9', '--save-every', '4']


@pytest.fixture(scope='module')
def config_path(tmp_path_factory):
  return program.write_config(tmp_path_factory.mktemp('average'))


@pytest.fixture(scope='module')
def run(config_path, tmp_path_factory):
  where = tmp_path_factory.mktemp('average') / 'run'
  assert pretrain.main([config_path, '--run', str(where), *ARGS]) == 0
  return Run(where)


def test_it_follows_the_recurrence():
  found = iter([2.0, -1.0, 0.5, 3.0])
  weights, mean, means = 1.0, 1.0, []

  def step(state, batch):
    assert state.average is None
    skipped = jnp.int32(batch['skipped'])
    return state._replace(step=state.step + 1, params=batch['w']), {
      'skipped_steps': skipped
    }

  averaged = step_lib.with_average(step, 0.3)
  state = State(jnp.int32(0), jnp.float32(weights), (), jnp.float32(mean))
  for done, skipped in enumerate([0, 0, 1, 0]):
    weights = next(found)
    state, _ = averaged(
      state, {'w': jnp.float32(weights), 'skipped': jnp.int32(skipped)}
    )
    decay = min(0.3, (1 + done) / (10 + done))
    mean += 0 if skipped else (1 - decay) * (weights - mean)
    means.append(float(state.average))
    assert means[-1] == pytest.approx(mean, abs=1e-6)
  assert means[1] == means[2]


@pytest.mark.slow
def test_validations_use_the_average(run):
  config = run.config()
  task = task_of(config)
  params = checkpoint.restore_params(run.checkpoints_path, task)
  found = task.evaluate(task.held_out(run.directory))(params)
  lines = metrics.read(run.metrics_path)
  logged = [x['validation_loss'] for x in lines if 'validation_loss' in x]
  assert found['loss'] == logged[-1]
  weights = checkpoint.restore_params(
    run.checkpoints_path, task_of(dataclasses.replace(config, average=None))
  )
  assert any(
    np.any(a != b)
    for a, b in zip(*map(jax.tree.leaves, (params, weights)), strict=True)
  )


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal(run, config_path, tmp_path):
  assert program.saved(run)[0].average is not None
  again = program.resumed(run, config_path, tmp_path / 'run', 8)
  program.assert_same_end(run, again)


def test_the_average_of_bfloat16_weights_is_in_float32(config_path):
  config = load(config_path)
  model = dataclasses.replace(config.model, param_dtype='bfloat16')
  config = dataclasses.replace(config, model=model, average=0.9)
  init, _ = step_lib.build(config, task_of(config))
  state = jax.eval_shape(init, jax.random.key(0))
  assert {x.dtype.name for x in jax.tree.leaves(state.average)} == {'float32'}
  evaluated = jax.eval_shape(lambda state: state.evaluated, state)
  kept = {x.dtype.name for x in jax.tree.leaves(evaluated)}
  assert kept == {'bfloat16'}


@pytest.mark.parametrize('rate', [0.0, 1.0, -1.0])
def test_a_rate_outside_0_and_1_is_refused(config_path, rate):
  with pytest.raises(ValueError, match='average must be between 0 and 1'):
    dataclasses.replace(load(config_path), average=rate)


def test_quantized_weights_have_no_average(config_path):
  with pytest.raises(ValueError, match='needs weights in arrays'):
    dataclasses.replace(
      load(config_path), average=0.9, update=Layerwise(weights='int8')
    )
