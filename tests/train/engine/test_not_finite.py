"""Steps with a non-finite loss or gradient leave the state unchanged."""

import dataclasses
import functools
import io
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from galore_optax.layerwise import layerwise
from tests.galore_optax.layerwise.program import (
  Residual,
  galore_rule,
  make_batch,
  make_params,
)
from tests.train.engine.test_loop import Uncounted
from tests.train.test_config import CONFIG
from train.config import Layerwise
from train.engine import loop
from train.engine import mesh as mesh_lib
from train.engine import step as step_lib
from train.engine.mesh import Mesh
from train.engine.signals import Stop
from train.method import Badam, Galore, limit_growth


class Kink(Residual):
  """A model whose gradient is NaN if a certain weight is 0."""

  def block(self, layer_params, x):
    h = super().block(layer_params, x)['h']
    return {**x, 'h': h + jnp.sqrt(layer_params['u'][0, 0] ** 2)}

  def loss(self, params, x, batch):
    value, sums = super().loss(params, x, batch)
    return value * jnp.mean(batch['weights']), sums


def params(kink=False):
  found = make_params()
  if kink:
    found['blocks']['u'] = found['blocks']['u'].at[1, 0, 0].set(0)
  return found


def batch(weight=1.0):
  return make_batch() | {'weights': jnp.full((4, 7), weight)}


@functools.cache
def whole():
  tx = galore_rule()
  model = Kink()
  step = step_lib.make_step(model, tx, schedule=optax.constant_schedule(0.1))
  return tx, step


@functools.cache
def by_layer(**options):
  tx = layerwise(Kink(), galore_rule(), **options)
  in_part = 'clip_norm' not in options and 'accumulate' not in options
  step = step_lib.make_layerwise_step(
    tx, schedule=optax.constant_schedule(0.1), in_part=in_part
  )
  return tx, step


@functools.cache
def projected():
  """Returns a step on four devices that sum projected gradients."""
  tx, step = whole()
  mesh = mesh_lib.devices(Mesh(data=4))
  place = mesh_lib.everywhere(mesh)
  run = jax.jit(mesh_lib.under(mesh, step), in_shardings=place)
  return tx, run


STEPS = {
  'whole': whole,
  'projected': projected,
  'exact': lambda: by_layer(clip_norm=1.0),
  'accumulate': lambda: by_layer(accumulate=2),
}

IN_PARTS = ('projected', 'accumulate')
"""Kinds of step that sum projected gradients, and never the whole ones."""


def start(tx, **options):
  made = jax.tree.map(jnp.copy, params(**options))
  return step_lib.State(jnp.int32(3), made, tx.init(made))


@pytest.mark.parametrize(
  'of', [pytest.param('loss', marks=pytest.mark.slow), 'gradient']
)
@pytest.mark.parametrize('kind', STEPS)
def test_everything_but_the_step_stays(monkeypatch, kind, of):
  # with_mean_weight would divide infinite weights by their infinite mean, which
  # gives NaN.
  monkeypatch.setattr(step_lib, 'with_mean_weight', lambda x: (x, jnp.ones([])))
  tx, step = STEPS[kind]()
  state = start(tx, kink=of == 'gradient')
  before = jax.tree.map(np.asarray, state)
  after, metrics = step(state, batch(math.inf if of == 'loss' else 1.0))
  if kind == 'accumulate':
    # Refreshes happen before the sum of gradients is known to be non-finite, so
    # the bases may change.
    pick = lambda x: (x.params, x.optimizer.count, x.optimizer.norm)
    chex.assert_trees_all_equal(pick(after), pick(before))
  else:
    chex.assert_trees_all_equal(after, before._replace(step=np.int32(4)))
  assert after.step == 4
  assert metrics['skipped_steps'] == 1 and 'partial_steps' not in metrics
  assert ('projected_grad_norm' in metrics) == (kind in IN_PARTS)
  assert bool(jnp.isfinite(metrics['loss'])) == (of == 'gradient')
  # The next step is the same as without the skipped step.
  if of == 'loss' and kind != 'accumulate':
    again, metrics = step(after, batch())
    other, _ = step(start(tx), batch())
    assert metrics['skipped_steps'] == 0
    chex.assert_trees_all_equal(again.params, other.params)
    assert not np.array_equal(
      again.params['head']['w'], before.params['head']['w']
    )


@pytest.mark.parametrize('of', ['loss', 'gradient'])
def test_without_a_first_pass_nothing_changes_from_there_on_down(
  monkeypatch, of
):
  monkeypatch.setattr(step_lib, 'with_mean_weight', lambda x: (x, jnp.ones([])))
  tx, step = by_layer()
  state = start(tx, kink=of == 'gradient')
  before = jax.tree.map(np.asarray, state)
  after, metrics = step(state, batch(math.inf if of == 'loss' else 1.0))
  if of == 'loss':
    chex.assert_trees_all_equal(after, before._replace(step=np.int32(4)))
    assert (metrics['skipped_steps'], metrics['partial_steps']) == (1, 0)
    return
  assert (metrics['skipped_steps'], metrics['partial_steps']) == (0, 1)
  moved = jax.tree.map(lambda a, b: a != b, after.params, before.params)
  assert moved['head']['w'].any() and moved['blocks']['u'][2].any()
  assert not moved['blocks']['w'][:2].any()
  assert not moved['blocks']['u'][:2].any()
  assert not moved['embed']['table'].any()
  chex.assert_tree_all_finite(after.params)


def test_a_condition_costs_no_copy_of_the_state():
  """A copy of the state would be noticed: it is 256 times the batch's size."""
  tx = optax.adam(0.1)
  weights = {'w': jnp.zeros((256, 1024))}
  loss = lambda params, x: (jnp.mean((x['x'] @ params['w']) ** 2), {})
  step = step_lib.make_step(loss, tx, schedule=optax.constant_schedule(0.1))
  state = step_lib.init(weights, tx)
  inputs = {'x': jnp.ones((4, 256)), 'weights': jnp.ones(4)}
  memory = step.lower(state, inputs).compile().memory_analysis()
  held = sum(x.nbytes for x in jax.tree.leaves(state))
  assert memory.alias_size_in_bytes >= held - 8
  # Temporaries contain the gradient and at most one more array of its size.
  assert memory.temp_size_in_bytes < 2.5 * weights['w'].nbytes


def values(loss=1.0, norm=1.0):
  bad = not (math.isfinite(loss) and math.isfinite(norm))
  found = {'loss': loss, 'grad_norm': norm, 'skipped_steps': float(bad)}
  return found | {'weight': 8.0, 'learning_rate': 0.1}


def trained(found, **options):
  """Returns a loop with given metrics, and lists of its saves and log lines."""
  saved, logged, each = [], [], iter(found)
  config = dataclasses.replace(
    CONFIG, steps=len(found), eval_every=99, save_every=2, **options
  )
  step = lambda state, _: (state._replace(step=state.step + 1), next(each))
  run = functools.partial(
    loop.train,
    step_lib.State(0, {}, ()),
    config,
    step=step,
    batches=itertools.repeat({}),
    validate=lambda params: {'loss': 1.0},
    save=lambda state, score: saved.append(state.step),
    best=math.inf,
    log=lambda step, values: logged.append((step, values)),
    console=Console(file=io.StringIO()),
    stop=Stop(),
    task=Uncounted(CONFIG),
  )
  return run, saved, logged


def test_a_row_of_bad_steps_ends_the_run_and_replaces_no_checkpoint():
  bad = values(norm=math.nan)
  run, saved, logged = trained([values()] * 3 + [bad] * 9, max_skipped=3)
  with pytest.raises(FloatingPointError, match='nan at step 7, as 4 in a row'):
    run()
  assert saved == [2]
  assert 'grad_norm' not in logged[-1][1] and logged[-1][1]['loss'] == 1
  steps = [x for _, x in logged if 'loss' in x]
  assert [x['skipped_steps'] for x in steps] == [0] * 3 + [1] * 3


def test_bad_steps_apart_do_not():
  good, bad = values(), values(loss=math.inf)
  run, saved, logged = trained([good, bad] * 5, max_skipped=1)
  run()
  # A save that is due at a skipped step happens after the next good step.
  assert saved == [3, 5, 7, 9, 10]
  assert sum(x['skipped_steps'] for _, x in logged if 'grad_norm' in x) == 5


def test_growth_is_limited_for_each_matrix():
  tx = limit_growth(1.5)
  update = jax.jit(tx.update)
  eye, ones = np.eye(3, dtype=np.float32), np.ones(2, np.float32)
  grads = {'stack': np.stack([eye, 2 * eye]), 'b': ones}
  state = tx.init(grads)
  first, state = update(grads, state)
  chex.assert_trees_all_equal(first, grads)
  more = {
    'stack': grads['stack'] * np.float32([4, 1.2])[:, None, None],
    'b': 0 * grads['b'],
  }
  second, state = update(more, state)
  np.testing.assert_allclose(second['stack'][0], 1.5 * eye, rtol=1e-6)
  np.testing.assert_allclose(second['stack'][1], 2.4 * eye, rtol=1e-6)
  # A norm of zero sets no limit for the next one.
  third, _ = update(grads, state)
  chex.assert_trees_all_equal(third['b'], grads['b'])


def test_a_config_limits_growth_before_the_optimizer():
  config = dataclasses.replace(CONFIG, norm_growth=1.5, clip_norm=None)
  state = config.transformation().init({'a': {'q': {'w': jnp.ones((4, 6))}}})
  assert state[0].norms['a']['q']['w'].shape == ()
  for options in (
    {'norm_growth': 0.5},
    {'max_skipped': -1},
    {'norm_growth': 1.5, 'optimizer': Badam(), 'update': Layerwise()},
    {
      'norm_growth': 1.5,
      'optimizer': Galore(rank=2),
      'batch_size': 4,
      'update': Layerwise(accumulate=2),
    },
  ):
    with pytest.raises(ValueError, match=r'norm_growth|max_skipped'):
      dataclasses.replace(CONFIG, **options)
