"""The same training on one device and on many, to rounding."""

import jax
import numpy as np
import pytest

from tests.train.program import write_config
from train import training

GRIDS = {
  'data': ('--mesh.data', '8'),
  'fsdp': ('--mesh.fsdp', '8'),
  'tensor': ('--mesh.tensor', '2', '--mesh.fsdp', '4'),
  'mixed': ('--mesh.data', '2', '--mesh.tensor', '2', '--mesh.fsdp', '2'),
}


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  return write_config(tmp_path_factory.mktemp('mesh'))


def setup(config, directory, *options):
  return training.prepare(
    [config, '--run', str(directory), '--batch-size', '16', *options]
  )


def losses(setup, state, steps):
  found = []
  for _ in range(steps):
    state, metrics = setup.step(state, next(setup.batches))
    found.append(metrics['loss'])
  return np.array(jax.device_get(found)), state


def trained(config, directory, *options, steps=30):
  made = setup(config, directory, *options)
  found, state = losses(made, training.begin(made), steps)
  validated = made.task.evaluate(made.text)(state.params)
  return np.append(found, validated['loss']), state


TOLERANCES = {'svd': 1e-5, 'gram': 1e-3, 'power': 1e-3}
"""The finders but 'svd' amplify rounding."""


@pytest.mark.slow
@pytest.mark.parametrize('finder', TOLERANCES)
def test_losses_are_the_same_on_any_mesh(config, tmp_path, finder):
  options = ('--optimizer.subspace', finder)
  expected, _ = trained(config, tmp_path / 'one', *options)
  assert expected[-2] < expected[0] - 0.5
  for name, grid in GRIDS.items():
    found, state = trained(config, tmp_path / name, *options, *grid)
    np.testing.assert_allclose(
      found, expected, rtol=TOLERANCES[finder], err_msg=name
    )
    q = state.params['blocks']['attention']['q']['kernel']
    assert len(q.devices()) == 8
