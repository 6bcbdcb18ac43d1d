"""Saves in the background, digests, and errors about damaged checkpoints."""

import functools
import pathlib
import resource
import shutil

import chex
import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from tests.bench.faults import flip, largest, truncate
from tests.train.test_config import CONFIG
from train.engine import checkpoint
from train.engine.step import State


def state(step):
  # Random numbers do not compress, so each array needs two megabytes on disk.
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
      # Overwrites the donated state several times, as later steps do.
      for _ in range(5):
        now = jax.block_until_ready(overwrite(now))
  chex.assert_trees_all_equal(restored(tmp_path), state(2))


@pytest.fixture
def full():
  """Returns a function after whose call no file can grow beyond 100 kB.

  This imitates a full disk.
  """
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


# If one array cannot be written, tensorstore raises the errors of other arrays
# later, where pytest reports them as unraisable exceptions.
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


@pytest.fixture(scope='module')
def twice(tmp_path_factory):
  """Returns a directory with checkpoints 1 and 2; the first scores better."""
  directory = tmp_path_factory.mktemp('run') / 'checkpoints'
  with checkpoint.opened(directory) as manager:
    for step in (1, 2):
      checkpoint.save(manager, state(step), data(), CONFIG, float(step))
  return directory


@pytest.fixture
def two(twice, tmp_path):
  return shutil.copytree(twice, tmp_path / 'checkpoints')


ITEMS = ('params', 'optimizer', 'data', 'config', 'metrics', 'digests.json')


@pytest.mark.parametrize('item', ITEMS)
@pytest.mark.parametrize('harm', [truncate, flip, pathlib.Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(two, capfd, harm, item):
  newest = two / '2'
  if item == 'digests.json':
    file = newest / item
    harm = flip if harm is pathlib.Path.unlink else harm
  else:
    file = largest(newest, item)
  harm(file)
  with checkpoint.reading(two) as manager:
    like = jax.eval_shape(lambda: state(0))
    found = checkpoint.restore(manager, like, data())
  chex.assert_trees_all_equal(found, state(1))
  err = capfd.readouterr().err
  assert err.count('\n') == 1
  assert err.startswith(f'{two}: checkpoint 2 is damaged (')
  assert str(file.relative_to(newest)) in err
  assert err.endswith('taken is checkpoint 1\n')


def test_sound_checkpoints_print_nothing_and_best_is_best(two, capfd):
  with checkpoint.reading(two) as manager:
    items = ocp.args.Composite(
      params=ocp.args.StandardRestore(
        checkpoint.on_device(jax.eval_shape(lambda: state(0).params))
      )
    )
    newest = checkpoint.read(manager, items).params
    best = checkpoint.read(manager, items, best=True).params
    flip(largest(two / '1', 'params'))
    assert capfd.readouterr().err == ''
    next_best = checkpoint.read(manager, items, best=True).params
  chex.assert_trees_all_equal(newest, state(2).params)
  chex.assert_trees_all_equal(best, state(1).params)
  chex.assert_trees_all_equal(next_best, state(2).params)
  assert 'taken is checkpoint 2' in capfd.readouterr().err


def test_without_digests_a_checkpoint_is_taken_unchecked(two, capfd):
  (two / '2' / 'digests.json').unlink()
  with checkpoint.reading(two) as manager:
    like = jax.eval_shape(lambda: state(0))
    found = checkpoint.restore(manager, like, data())
    chex.assert_trees_all_equal(found, state(2))
    assert 'checkpoint 2 has no digests.json' in capfd.readouterr().err
    shutil.rmtree(two / '2' / 'params')
    found = checkpoint.restore(manager, like, data())
  chex.assert_trees_all_equal(found, state(1))
  assert 'checkpoint 2 is damaged' in capfd.readouterr().err


def test_if_no_checkpoint_is_sound_each_is_named(two):
  for step in (1, 2):
    flip(largest(two / str(step), 'optimizer'))
  with checkpoint.reading(two) as manager:
    like = jax.eval_shape(lambda: state(0))
    with pytest.raises(ValueError, match=r'checkpoint 2 .* checkpoint 1 .*run'):
      checkpoint.restore(manager, like, data())


def test_a_run_goes_on_after_damaged_checkpoints_are_moved(two):
  flip(largest(two / '2', 'params'))
  flip(largest(two / '1', 'metrics'))
  (two / '3.orbax-checkpoint-tmp').mkdir()
  for number in range(2):
    with checkpoint.opened(two, begun=1) as manager:
      checkpoint.save(manager, state(2), data(), CONFIG)
    names = sorted(x.name for x in (two.parent / 'damaged').iterdir())
    assert names == ['1', '2', '2.1'][: 2 + number]
    assert checkpoint.steps(two) == [2]
  assert not (two / '3.orbax-checkpoint-tmp').exists()


def test_the_configuration_is_in_a_checkpoint_too(two):
  flip(largest(two / '2', 'config'))
  assert checkpoint.restore_config(two) == CONFIG
  assert checkpoint.restore_config(two / '1') is None
