"""Weights in 8 bits work in training, resumption, evaluation and sampling."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from galore_optax.quantized.array import is_quantized
from models.llama import Layers
from tests.train.program import lines, saved, write_config
from train import evaluate, pretrain, sample
from train.engine import command, metrics
from train.engine.run import Run
from train.engine.task import task_of

INT8 = (
  *('--update', 'Layerwise', '--update.weights', 'int8', '--update.slices'),
  *('2', '--optimizer', 'Galore8bit', '--optimizer.rank', '4'),
  *('--optimizer.gap', '3', '--optimizer.basis-bits', '4'),
  # These tests need only one pass through the model per step.
  *('--microbatches', '1', '--clip-norm', 'None'),
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  directory = tmp_path_factory.mktemp('int8')
  args = [write_config(directory), *INT8]
  run = Run(directory / 'run')
  assert pretrain.main([*args, '--run', str(run.directory)]) == 0
  return args, run


@pytest.mark.slow
def test_the_run_learns_and_its_matrices_are_integers(finished):
  _, run = finished
  validated = [x for x in lines(run) if 'validation_loss' in x]
  assert [x['step'] for x in validated] == [4, 8]
  assert validated[1]['validation_loss'] < validated[0]['validation_loss']
  state, _ = saved(run)
  blocks = state.params['blocks']
  for leaf in jax.tree.leaves(blocks['mlp']['up']):
    assert leaf.dtype in (np.uint8, np.int8, np.float32)
  assert blocks['mlp']['up']['kernel'].codes.shape == (2, 16, 40)
  assert blocks['mlp_norm']['scale'].dtype == np.float32


@pytest.mark.slow
def test_resume_is_bit_equal_to_no_stop(finished, tmp_path):
  args, whole = finished
  run = Run(tmp_path / 'run')
  args = [*args, '--run', str(run.directory), '--save-every', '5']

  class Killed(Exception):
    pass

  def crash(batch):
    raise Killed

  with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
    patch.setattr(metrics, 'describe', crash)
    pretrain.main([*args, '--eval-every', '6'])
  assert pretrain.main([*args, '--resume', '--eval-every', '6']) == 0
  chex.assert_trees_all_equal(saved(run), saved(whole))


@pytest.mark.slow
def test_evaluate_and_sample_read_them(finished, capsys):
  _, run = finished
  evaluate.main([str(run.directory), '--batches', '2'])
  loss = lines(run)[-1]['validation_loss']
  assert f'validation: loss {loss:.4f}' in capsys.readouterr().out
  args = [str(run.directory), '--prompt', 'the old dog', '--num-tokens', '20']
  sample.main(args)
  assert len(capsys.readouterr().out) > len('the old dog\n')


@pytest.mark.slow
def test_the_model_reads_dequantized_weights(tmp_path):
  launch = command.parse([write_config(tmp_path), *INT8])
  config = launch.config
  stored = task_of(config).init(jax.random.key(0))
  read = config.weights().read
  arrays = jax.tree.map(read, stored, is_leaf=is_quantized)
  shape = (2, config.sequence_length)
  names = ('inputs', 'positions', 'segments')
  batch = {name: jnp.ones(shape, jnp.int32) for name in names}
  ours, plain = task_of(config).stored_layers, Layers(config.model)
  chex.assert_trees_all_equal(
    jax.jit(ours.logits)(stored, batch), jax.jit(plain.logits)(arrays, batch)
  )
