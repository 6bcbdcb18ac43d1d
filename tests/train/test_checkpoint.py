"""Saves in the background: what is written, and what a user learns if not."""

import functools
import resource

import chex
import grain
import jax
import jax.numpy as jnp
import pytest

from tests.train.test_config import CONFIG
from train import checkpoint
from train.step import State


def state(step):
  # Two megabytes that no compression makes smaller.
  noise = jax.random.normal(jax.random.key(step), (512, 1024))
  return State(jnp.int32(step), {'w': noise}, {'mu': noise + 1})


def data():
  return iter(grain.MapDataset.range(9).to_iter_dataset())


def restored(directory):
  with checkpoint.opened(directory) as manager:
    return checkpoint.restore(manager, jax.eval_shape(lambda: state(0)), data())


@functools.partial(jax.jit, donate_argnums=0)
def overwrite(state):
  return jax.tree.map(lambda x: x * 0 - 1, state)


def test_a_state_is_as_it_was_when_the_save_began(tmp_path):
  with checkpoint.opened(tmp_path) as manager:
    for step in (1, 2):
      now = state(step)
      checkpoint.save(manager, now, data(), CONFIG)
      # What the next step does, again and again in the same memory.
      for _ in range(5):
        now = jax.block_until_ready(overwrite(now))
  chex.assert_trees_all_equal(restored(tmp_path), state(2))


@pytest.fixture
def full():
  """A disk where no file may grow further."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Where one array fails, tensorstore tells the others of it too late.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('then', ['the next save', 'the end'])
def test_a_save_that_fails_comes_to_light(tmp_path, full, capfd, then):
  with pytest.raises(OSError, match=r'cannot save step 2: .* make room'):
    with checkpoint.opened(tmp_path) as manager:
      checkpoint.save(manager, state(1), data(), CONFIG)
      checkpoint.finish(manager)
      full()
      checkpoint.save(manager, state(2), data(), CONFIG)
      if then == 'the next save':
        checkpoint.save(manager, state(3), data(), CONFIG)
        pytest.fail('went on')
  assert 'Traceback' not in capfd.readouterr().err
  chex.assert_trees_all_equal(restored(tmp_path), state(1))
