"""Training is the same on one device, on many, and in several processes."""

import dataclasses
import datetime
import json
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from models.llama import LlamaConfig
from tests.bench import faults, scaling
from tests.train.program import lines, write_config
from tests.train.test_config import CONFIG
from train.config import Layerwise
from train.engine import checkpoint, cluster, mesh, step, training
from train.engine.mesh import Mesh
from train.engine.run import Run
from train.engine.task import task_of
from train.method import AdamW, Fira
from train.plan.account import account
from train.plan.footprint import placed_step

GRIDS = {
  'data': ('--mesh.data', '8'),
  'fsdp': ('--mesh.fsdp', '8'),
  'tensor': ('--mesh.tensor', '2', '--mesh.fsdp', '4'),
  'mixed': ('--mesh.data', '2', '--mesh.tensor', '2', '--mesh.fsdp', '2'),
}

SVD = ('--optimizer.subspace', 'svd')

# All finders except 'svd' amplify rounding errors.
TOLERANCES = {'svd': 1e-5, 'gram': 1e-3, 'power': 1e-3}


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return write_config(tmp_path_factory.mktemp('mesh'))


def prepared(config, run, *options):
  options = ('--batch-size', '16', '--steps', '30', *options)
  return training.prepare([config, '--run', str(run), *options])


def trained(setup, steps):
  """Returns the losses of some steps and of a validation, and the state."""
  state, found = training.begin(setup), []
  for _ in range(steps):
    state, metrics = setup.step(state, next(setup.batches))
    found.append(metrics['loss'])
  validated = setup.task.evaluate(setup.data)(state.params)
  return np.array([*jax.device_get(found), validated['loss']]), state


def position_of(setup):
  """Returns the position in the data as JSON."""
  return json.dumps(setup.batches.get_state())


@pytest.mark.slow
@pytest.mark.parametrize('finder', TOLERANCES)
def test_losses_are_the_same_on_any_mesh(config, tmp_path, finder):
  options = ('--optimizer.subspace', finder)
  one = prepared(config, tmp_path / 'one', *options)
  expected, _ = trained(one, 30)
  assert expected[-2] < expected[0] - 0.5
  for name, grid in GRIDS.items():
    many = prepared(config, tmp_path / name, *options, *grid)
    found, state = trained(many, 30)
    np.testing.assert_allclose(
      found, expected, rtol=TOLERANCES[finder], err_msg=name
    )
    # A step must not change the shardings of the state.
    places = jax.tree.map(lambda x: x.sharding, state)
    jax.tree.map(assert_equivalent, state, places, many.places)


def assert_equivalent(x, place, expected):
  assert place.is_equivalent_to(expected, x.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    ('--update', 'Layerwise', '--optimizer', 'Galore8bit'),
    ('--optimizer', 'Apollo'),
  ],
)
def test_other_steps_are_the_same_on_a_mesh(config, tmp_path, options):
  rank = ('--optimizer.rank', '4')
  one = prepared(config, tmp_path / 'one', *options, *rank)
  many = prepared(config, tmp_path / 'many', *options, *rank, *GRIDS['mixed'])
  # The run has two refreshes by a finder that amplifies rounding errors, which
  # the tolerance allows for.
  expected, _ = trained(one, 8)
  np.testing.assert_allclose(trained(many, 8)[0], expected, rtol=1e-3)


SHARED = {
  'data': ('--mesh.data', '8'),
  'fsdp': ('--mesh.data', '2', '--mesh.fsdp', '4'),
  'tensor': ('--mesh.data', '2', '--mesh.tensor', '2'),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    SVD,
    ('--optimizer', 'Galore8bit', '--optimizer.rank', '4', *SVD),
    ('--optimizer', 'GaloreAdafactor', '--optimizer.rank', '4', *SVD),
  ],
)
def test_projected_sums_train_as_whole_ones(config, tmp_path, options):
  options = (*options, '--clip-norm', 'None', '--optimizer.gap', '5')
  one = prepared(config, tmp_path / 'one', *options)
  expected, _ = trained(one, 12)
  for name, grid in SHARED.items():
    many = prepared(config, tmp_path / name, *options, *grid)
    assert 'sums projected gradients' in step.traffic(many.config)
    found, state = trained(many, 12)
    # The tolerance allows for summing across devices in a different order.
    np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    places = jax.tree.map(lambda x: x.sharding, state)
    jax.tree.map(assert_equivalent, state, places, many.places)


@pytest.mark.slow
def test_projected_sums_are_a_quarter_of_whole_ones():
  # The rank is a quarter of the projected side, so projected gradients have a
  # quarter of the size.
  found = {}
  for name, config in scaling.configs(width=64, num_layers=2).items():
    config = dataclasses.replace(config, mesh=Mesh(data=8))
    grid = mesh.devices(config.mesh)
    task = task_of(config)
    jitted, state, batch = placed_step(config, task, grid)
    text = jitted.lower(state, batch).compile().as_text()
    # All methods send the whole gradients of weights that are not projected.
    rest = {k: x for k, x in state.params.items() if k != 'blocks'}
    whole = account(rest, ()).weights
    found[name] = [scaling.sent(text, at) - whole for at in (min, max)]
  for name in ('GaLore', '8-bit GaLore'):
    assert found['AdamW'][0] >= 3.5 * found[name][0]
    assert found[name][1] <= found['AdamW'][1]


def test_the_program_names_the_gradients_that_devices_send():
  projected = 'mesh.data sums projected gradients, whole ones at a refresh'
  whole = 'mesh.data sums whole gradients; .* clip_norm and norm_growth None'
  config = dataclasses.replace(CONFIG, mesh=Mesh(data=2), clip_norm=None)
  assert step.traffic(config) == projected
  for other in (
    {'clip_norm': 1.0},
    {'norm_growth': 1.1},
    {'optimizer': Fira(rank=4)},
    {'optimizer': AdamW()},
    {'update': Layerwise()},
    {'mesh': Mesh(data=2, fsdp=2, tensor=2), 'batch_size': 8},
  ):
    assert re.match(whole, step.traffic(dataclasses.replace(config, **other)))


@pytest.mark.slow
def test_a_checkpoint_goes_from_mesh_to_mesh(config, tmp_path):
  setup = prepared(config, tmp_path / 'run', '--mesh.fsdp', '8')
  _, state = trained(setup, 2)
  saved = jax.device_get(state)
  position = position_of(setup)
  with checkpoint.opened(setup.run.checkpoints_path) as manager:
    checkpoint.save(manager, state, setup.batches, setup.config)
  for grid in (('fsdp', 4), ('tensor', 2), ('fsdp', 1)):
    sides = {'data': 1, 'fsdp': 1, 'tensor': 1} | dict([grid])
    options = [f'--mesh.{name}={size}' for name, size in sides.items()]
    again = training.prepare(
      [config, '--run', str(tmp_path / 'run'), '--resume', *options]
    )
    restored = training.begin(again)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), saved)
    assert position_of(again) == position
    q = restored.params['blocks']['attention']['q']['kernel']
    assert len(q.sharding.device_set) == grid[1]


def free_port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


def start(argv, *, port, process, processes=2):
  """Starts one process of a run, with four devices."""
  variables = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
    'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
    'JAX_NUM_PROCESSES': str(processes),
    'JAX_PROCESS_ID': str(process),
  }
  return subprocess.Popen(
    [sys.executable, '-m', 'train.pretrain', *argv],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=variables,
  )


@pytest.mark.slow
@pytest.mark.optimized
def test_two_processes_train_as_one_does(config, tmp_path):
  options = ('--batch-size', '16', '--steps', '30', '--eval-every', '30')
  options += SVD
  argv = [config, *options, '--run', str(tmp_path / 'two'), '--mesh.fsdp', '4']
  port = free_port()
  both = [
    start([*argv, '--mesh.data', '2'], port=port, process=i) for i in (0, 1)
  ]
  ends = [process.communicate(timeout=900) for process in both]
  assert [process.returncode for process in both] == [0, 0], ends
  # Only the first process prints and writes files.
  assert 'validation' in ends[0][0] and 'run:' not in ends[1][0]
  two = Run(tmp_path / 'two')
  assert (two.directory / 'curves.png').exists()
  setup = prepared(config, tmp_path / 'one', *options)
  expected, _ = trained(setup, 30)
  found = [x['loss'] for x in lines(two) if 'loss' in x]
  found += [x['validation_loss'] for x in lines(two) if 'validation_loss' in x]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  # One process can read the checkpoint that two processes saved.
  again = training.prepare(
    [config, '--run', str(two.directory), '--resume', '--mesh.data', '1']
  )
  state = training.begin(again)
  assert int(state.step) == 30
  assert position_of(again) == position_of(setup)
  # Both processes find that the newest checkpoint is damaged, and one of them
  # moves it.
  faults.flip(faults.largest(two.checkpoints_path / '30', 'params'))
  argv = [config, '--run', str(two.directory), '--resume', '--mesh.data', '2']
  port = free_port()
  both = [start(argv, port=port, process=i) for i in (0, 1)]
  ends = [process.communicate(timeout=900) for process in both]
  assert [process.returncode for process in both] == [0, 0], ends
  assert all('30 is damaged' in err for _, err in ends)
  assert (two.directory / 'damaged' / '30').exists()
  assert checkpoint.newest_sound(two.checkpoints_path).name == '30'


MODEL = LlamaConfig(
  vocab_size=48, width=32, mlp_width=40, num_heads=4, num_layers=3
)


def test_shardings_of_parameters():
  grid = mesh.absent(Mesh(data=2, fsdp=8, tensor=4))
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, 'float32')
  params = {
    'embed': {'embedding': shape(48, 32)},
    'blocks': {
      'norm': {'scale': shape(8, 32)},
      'attention': {
        'q': {'kernel': shape(3, 32, 64), 'lora_a': shape(3, 32, 8)},
        'o': {'kernel': shape(3, 64, 32)},
      },
      # 30 is not divisible by the fsdp axis, so `up` is sharded only along its
      # output. No side of `odd` is divisible.
      'mlp': {'up': {'kernel': shape(3, 30, 64)}, 'odd': shape(3, 7, 5)},
    },
    'lm_head': {'kernel': shape(32, 47)},
  }
  found = jax.tree.map(lambda x: x.spec, mesh.of_params(params, grid))
  spec = PartitionSpec
  assert found == {
    'embed': {'embedding': spec('tensor', 'fsdp')},
    'blocks': {
      'norm': {'scale': spec()},
      'attention': {
        'q': {
          'kernel': spec(None, 'fsdp', 'tensor'),
          'lora_a': spec(None, 'fsdp', None),
        },
        'o': {'kernel': spec(None, 'tensor', 'fsdp')},
      },
      'mlp': {
        'up': {'kernel': spec(None, None, ('tensor', 'fsdp'))},
        'odd': spec(None, None, None),
      },
    },
    'lm_head': {'kernel': spec('fsdp', None)},
  }


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (('--mesh.fsdp', '0'), 'mesh.fsdp must be at least 1, got 0'),
    (
      ('--mesh.data', '16'),
      'data 16 x fsdp 1 x tensor 1 = 16 devices .* got 8',
    ),
    (('--mesh.data', '3'), 'multiple of mesh.data x mesh.fsdp = 3 x 2 parts'),
    (('--mesh.tensor', '4'), 'must divide model.num_heads = 2, got 4'),
  ],
)
def test_a_mesh_that_does_not_fit(config, tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    prepared(config, tmp_path / 'run', '--batch-size', '32', *options)
  assert not (tmp_path / 'run').exists()


@pytest.fixture
def asked(monkeypatch):
  """Records the arguments of `jax.distributed.initialize`; never calls it."""
  calls = []
  initialize = lambda **given: calls.append(given)
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  return calls


@pytest.mark.parametrize(
  ('variables', 'message'),
  [
    ({}, None),
    ({'SLURM_NTASKS': '1', 'SLURM_JOB_ID': '7'}, None),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, 'JAX_NUM_PROCESSES must be a number'),
    (
      {'JAX_COORDINATOR_ADDRESS': 'a:1', 'JAX_NUM_PROCESSES': '2'},
      "JAX_PROCESS_ID must be a number .* got ''",
    ),
  ],
)
def test_a_cluster_is_joined_if_there_is_one(
  monkeypatch, asked, variables, message
):
  asked = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **x: asked.append(x)
  )
  for name in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
    monkeypatch.delenv(name, raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  if message is None:
    cluster.join_cluster()
  else:
    with pytest.raises(ValueError, match=message):
      cluster.join_cluster()
  assert not asked


def test_slurm_is_detected(monkeypatch, asked):
  asked = []
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **x: asked.append(x)
  )
  task = {'NTASKS': 2, 'JOB_ID': 7, 'PROCID': 1, 'LOCALID': 0}
  for name, value in {**task, 'STEP_NODELIST': 'a,b'}.items():
    monkeypatch.setenv(f'SLURM_{name}', str(value))
  cluster.join_cluster()
  assert asked == [{}]


def test_the_clock_is_that_of_the_first_process(monkeypatch):
  assert cluster.clock().microsecond == 0
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  theirs = np.array([2026, 1, 2, 3, 4, 5], np.int32)
  monkeypatch.setattr(
    cluster.multihost_utils,
    'broadcast_one_to_all',
    lambda ours: theirs.astype(ours.dtype).reshape(ours.shape),
  )
  assert cluster.clock() == datetime.datetime(2026, 1, 2, 3, 4, 5)
