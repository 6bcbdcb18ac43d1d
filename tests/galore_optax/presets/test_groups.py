"""A group is updated as if its rate and decay applied to the whole tree."""

import dataclasses
import functools
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import galore_optax as go
from galore_optax import Group, grouped
from galore_optax.layerwise.weights import quantized
from galore_optax.presets.groups import assigned
from tests.galore_optax.layerwise.program import (
  Residual,
  make_batch,
  make_params,
  run,
  run_whole_tree,
)
from tests.galore_optax.program import each, gradients, normal32
from tests.rounding import assert_close as assert_rounded
from tests.rounding import distance, units
from train.method import adam_8bit, adamw

RATE, DECAY = 0.1, 0.2
RANK = dict(rank=3, gap=2)
DECAYED = dict(weight_decay=DECAY)


def verbatim(learning_rate, *, weight_decay=1e-4):
  stage = go.galore(rank=3, gap=2)
  return go.chain(stage, optax.adamw(learning_rate, weight_decay=weight_decay))


def with_residual(learning_rate, *, residual=None):
  return go.galore(optax.adam(learning_rate), residual=residual, **RANK)


PRESETS = {
  'galore_adamw': (go.galore_adamw, RANK | DECAYED),
  'galore_adamw_8bit': (go.galore_adamw_8bit, dict(min_size=30) | RANK),
  'galore_adafactor': (
    go.galore_adafactor,
    dict(b1=0.9, scale_parameter=True) | RANK | DECAYED,
  ),
  'galore_muon': (go.galore_muon, RANK | DECAYED),
  'galore_muon, two rates': (
    go.galore_muon,
    dict(adam_learning_rate=0.3) | RANK | DECAYED,
  ),
  'frugal': (go.frugal, dict(density=0.5, gap=2) | DECAYED),
  'frugal, density 0': (go.frugal, dict(density=0.0) | DECAYED),
  'fira': (go.fira, RANK | DECAYED),
  'apollo': (go.apollo, RANK | DECAYED),
  'apollo_mini': (go.apollo_mini, dict(gap=2) | DECAYED),
  'badam': (go.badam, dict(switch_every=2, train_rest=True) | DECAYED),
  'badam, master weights': (
    go.badam,
    dict(switch_every=2, master_weights=True) | DECAYED,
  ),
  'lomo': (go.lomo, dict(clip_norm=None) | DECAYED),
  'lomo, clipped': (go.lomo, dict(clip_norm=0.5) | DECAYED),
  'adalomo': (go.adalomo, DECAYED),
  'scale_sgd': (go.scale_sgd, dict(vector_learning_rate=0.3) | DECAYED),
  'adamw': (adamw, DECAYED),
  'adam_8bit': (adam_8bit, {}),
  'optax': (optax.lion, {}),
  'verbatim': (verbatim, DECAYED),
  'residual': (with_residual, dict(residual=go.Sign(RATE))),
}


def params():
  return {
    'blocks': {
      'up': normal32((2, 6, 11)),
      'down': normal32((2, 11, 6), 1),
      'norm': normal32((2, 6), 2),
    },
    'embed': normal32((13, 6), 3),
    'bias': normal32((5,), 4),
  }


def updates_of(tx, steps=3):
  """Yields the updates of each step.

  The weights at each step, and so the gradients, are the same for every
  transformation.
  """
  tx, w = optax.with_extra_args_support(tx), params()
  state, update = tx.init(w), jax.jit(tx.update)
  for i in range(steps):
    updates, state = update(gradients(w, i), state, w)
    yield updates
    w = jax.tree.map(lambda x: 0.9 * x, w)


def assert_close(ours, want, name=''):
  """Asserts that the results of the same arithmetic in two programs are close.

  Float32 rounding errors are divided by small second moments. In 8 bits, a
  value half-way between two codes may round to either; they are a sixteenth
  apart.
  """
  assert distance(ours, want) < (0.01 if '8bit' in name else 1e-3)


def scaled(preset, options, rate, decay):
  """Returns a preset with its rate and decay multiplied, for all leaves."""
  options = dict(options)
  for name in options:
    if name.endswith('_learning_rate'):
      options[name] = options[name] * rate
  if 'weight_decay' in options:
    options['weight_decay'] *= decay
  if 'residual' in options:
    options['residual'] = go.Sign(RATE * rate)
  return preset(RATE * rate, **options)


@each('name', PRESETS, quick=['galore_adamw'])
def test_a_group_moves_as_its_own_rate_and_decay_would_move_it(name):
  """All runs have the same weights at each step, and so the same gradients."""
  preset, options = PRESETS[name]
  decayed = 'weight_decay' in options
  decays = (0.5, 0.0) if decayed else (1.0, 1.0)
  groups = [
    Group('blocks/up', rate=2.0, decay=decays[0]),
    Group('embed|bias', rate=0.25, decay=decays[1]),
  ]
  factors = [(2.0, decays[0]), (0.25, decays[1]), (1.0, 1.0)]
  wants = [updates_of(scaled(preset, options, *x)) for x in factors]
  mine = assigned(groups, params())
  ours = updates_of(grouped(preset, groups)(RATE, **options))
  for updates, *alone in zip(ours, *wants, strict=True):
    leaves = [jax.tree.leaves(one) for one in alone]
    want = [leaves[index][at] for at, index in enumerate(mine)]
    assert_close(jax.tree.leaves(updates), want, name)


@each('name', PRESETS, quick=['adalomo'])
def test_multipliers_of_one_change_nothing(name):
  preset, options = PRESETS[name]
  groups = [Group('blocks/.*'), Group('bias')]
  ours = updates_of(grouped(preset, groups)(RATE, **options))
  for pair in zip(ours, updates_of(preset(RATE, **options)), strict=True):
    assert_close(*pair, name)


@each('name', PRESETS, quick=['galore_adamw', 'badam'])
def test_a_frozen_group_keeps_nothing_and_does_not_move(name):
  preset, options = PRESETS[name]
  frozen = Group('blocks/(up|norm)|embed', rate=0.0)
  tx = grouped(preset, [frozen])(RATE, **options)
  [updates] = updates_of(tx, steps=1)
  moved = jax.tree.map(lambda u: bool(u.any()), updates)
  assert not (moved['blocks']['up'] or moved['blocks']['norm'])
  assert moved['blocks']['down'] and not moved['embed']
  state = jax.eval_shape(tx.init, params())
  kept = {x.shape for x in jax.tree.leaves(state)}
  assert not kept & {x.shape for x in jax.tree.leaves(params()['embed'])}
  rows = {row.path: row.bytes for row in go.describe(tx, params())}
  assert {rows[path] for path in ('blocks/up', 'blocks/norm', 'embed')} == {0}


def test_the_rate_multiplies_scale_and_stays_a_schedule():
  schedule = lambda count: 0.1 * (count + 1)
  make = grouped(go.galore_adamw, [Group('.*', rate=4.0)])
  ours = make(schedule, scale=0.125, **RANK | DECAYED)
  want = go.galore_adamw(
    lambda count: 4.0 * schedule(count), scale=0.125, **RANK | DECAYED
  )
  for pair in zip(updates_of(ours), updates_of(want), strict=True):
    assert_close(*pair)


def test_the_default_decay_of_a_preset_is_multiplied():
  ours = grouped(optax.adamw, [Group('.*', decay=0.0)])(RATE)
  want = optax.adamw(RATE, weight_decay=0.0)
  for pair in zip(updates_of(ours), updates_of(want), strict=True):
    assert_close(*pair)


@dataclasses.dataclass(frozen=True)
class Half:
  """A custom residual rule with a learning rate."""

  learning_rate: float

  def init(self, plan: Any) -> tuple[()]:
    return ()

  def __call__(self, plan: Any, split: Any, state: Any) -> tuple[Any, Any]:
    return -0.5 * self.learning_rate * split.g_io, state


def decayed_sgd(
  learning_rate: float = RATE, *, bias_weight_decay: float = DECAY
) -> optax.GradientTransformation:
  decay = optax.add_decayed_weights(bias_weight_decay)
  return optax.chain(decay, optax.sgd(learning_rate))


def passes_on(
  learning_rate: float, **options: Any
) -> optax.GradientTransformation:
  options.pop('weight_decay', None)
  return decayed_sgd(learning_rate, **options)


def with_rule(learning_rate: float, *, residual: Any) -> go.Galore:
  return go.galore(optax.sgd(learning_rate), residual=residual, **RANK)


def test_every_rate_and_decay_of_a_call_is_multiplied() -> None:
  """Multipliers apply to defaults, options and residual rules."""
  by = dict(rate=0.5, decay=0.25)
  decay = dict(bias_weight_decay=DECAY / 4)
  want = decayed_sgd(RATE / 2, **decay)
  calls = [
    (decayed_sgd, {}, dict(rate=0.5), decayed_sgd(RATE / 2)),
    (
      functools.partial(decayed_sgd, learning_rate=3.0),
      {},
      dict(rate=0.5),
      decayed_sgd(1.5),
    ),
    (
      lambda weight_decay=0.0, **rest: decayed_sgd(**rest),
      dict(learning_rate=RATE, bias_weight_decay=DECAY),
      by,
      want,
    ),
    (
      passes_on,
      dict(learning_rate=RATE, weight_decay=0.0, bias_weight_decay=DECAY),
      by,
      want,
    ),
    (
      with_rule,
      dict(learning_rate=RATE, residual=Half(RATE)),
      dict(rate=0.5),
      with_rule(RATE / 2, residual=Half(RATE / 2)),
    ),
  ]
  for preset, options, factors, same in calls:
    make = grouped(preset, [Group('.*', **factors)])
    [ours], [theirs] = (
      updates_of(tx, steps=1) for tx in (make(**options), same)
    )
    assert_close(ours, theirs)


def test_clipping_reads_the_whole_gradient():
  w = params()
  tx = grouped(go.lomo, [Group('embed', rate=2.0)])(1.0, clip_norm=0.5)
  updates, _ = jax.jit(tx.update)(gradients(w), tx.init(w), w)
  updates['embed'] = updates['embed'] / 2
  # The tolerance allows for rounding in a float32 sum of about 300 squares.
  norm = jax.jit(optax.tree.norm)(updates)
  np.testing.assert_allclose(norm, 0.5, rtol=units(300))


def test_a_master_copy_has_the_steps_of_its_group():
  """Multipliers must act before the float32 master copy is updated.

  If only the finished bfloat16 updates were scaled, the copy would move at the
  full rate.
  """
  make = grouped(go.badam, [Group('blocks/up', rate=0.5)])
  tx = make(1.0, master_weights=True, order='fixed', inner='sgdm')
  w = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
  g = jax.tree.map(lambda x: jnp.full_like(x, 2.0**-12), w)
  state, start = tx.init(w), w['blocks']['up'][0].astype(jnp.float32)
  update = jax.jit(tx.update)
  for _ in range(3):
    updates, state = update(g, state, w)
    w = optax.apply_updates(w, updates)
  master = state.block.parts[0].master
  steps = start - jax.tree.leaves(master)[0]
  # With momentum 0.9, a constant gradient moves the weight by 1 + 1.9 + 2.71
  # gradients in three steps, here at half the rate.
  np.testing.assert_allclose(steps, 0.5 * 5.61 * 2.0**-12, rtol=1e-2)


@each('name', PRESETS, quick=['adamw'])
def test_layerwise_is_the_whole_tree(name):
  preset, options = PRESETS[name]
  groups = [Group('blocks/w', rate=0.5), Group('embed/.*', rate=2.0)]
  tx = grouped(preset, groups)(RATE, **options)
  start = make_params()
  ours, _, _ = run(go.layerwise(Residual(), tx), steps=3, params=start)
  want, _ = run_whole_tree(Residual(), tx, steps=3, params=start)
  # The tolerance allows for rounding: the layer-wise step differentiates and
  # decomposes single matrices, the whole-tree step stacks. Adam divides small
  # entries by their own magnitude, which amplifies the difference.
  chex.assert_trees_all_close(ours, want, rtol=1e-3, atol=1e-3)


def test_layerwise_clips_by_the_norm_of_all_groups():
  tx = grouped(go.lomo, [Group('head/.*', rate=2.0)])(RATE, clip_norm=0.01)
  start = make_params()
  ours, _, _ = run(go.layerwise(Residual(), tx), steps=2, params=start)
  want, _ = run_whole_tree(Residual(), tx, steps=2, params=start)
  # The tolerance allows for two different programs, whose two updates are at
  # most a thousandth of the weights.
  assert_rounded(ours, want, operations=4)


# `test_the_stages_make_the_update` proves this for the whole tree.
@pytest.mark.slow
def test_projected_gradients_are_summed():
  groups = [Group('blocks/w'), Group('head/.*', rate=0.0)]
  options = dict(rank=3, gap=2)
  tx = grouped(go.galore_adamw, groups)(RATE, **options)
  assert isinstance(tx, go.Galore) and tx.linear
  ours, _, _ = run(go.layerwise(Residual(), tx, accumulate=2), steps=1)
  tx = go.galore_adamw(RATE, **options)
  want, _, _ = run(go.layerwise(Residual(), tx, accumulate=2), steps=1)
  chex.assert_trees_all_equal(ours['head'], make_params()['head'])
  assert_close(ours['blocks'], want['blocks'])


def test_the_stages_make_the_update():
  groups = [Group('blocks/up', rate=0.5), Group('bias', rate=0.0)]
  tx = grouped(go.galore_adamw, groups)(RATE, **RANK | DECAYED)
  w = params()
  state, g = tx.init(w), gradients(params())

  def by_stages(g, state):
    ready = tx.refresh(g, state)
    return tx.apply(tx.project(g, ready), ready, w, g)

  update = lambda g, state: tx.update(g, state, w)
  # The stages finish one after another for all groups, and the update finishes
  # one group after another, so the two programs may be rounded differently.
  assert_rounded(
    jax.jit(by_stages)(g, state), jax.jit(update)(g, state), operations=100
  )
  assert bool(tx.due(state)) and not bool(tx.due(jax.jit(update)(g, state)[1]))

  @jax.jit
  def projected(g, state):
    ready = tx.refresh(g, state)
    half = tx.project(jax.tree.map(lambda x: x / 2, g), ready)
    return tx.project(g, ready), jax.tree.map(jnp.add, half, half)

  low, twice = projected(g, state)
  assert low['blocks']['up'].shape == (2, 3, 11) and low['bias'].shape == ()
  # Projection is linear in the gradient, so the sum of two projected halves
  # equals the projected whole.
  assert_rounded(twice, low, operations=11)
  kinds = [type(p).__name__ for p in tx.plan(w)]
  assert kinds == ['Whole', 'Projection', 'Whole', 'Projection', 'Whole']


def test_bases_are_quantized_in_each_group():
  groups = [Group('blocks/up', rate=0.5)]
  tx = go.quantize_bases(grouped(go.galore_adamw, groups)(RATE, **RANK))
  state = tx.init(params())
  stored = jax.tree.leaves(
    state, is_leaf=lambda x: type(x).__name__ == 'Quantized'
  )
  assert sum(type(x).__name__ == 'Quantized' for x in stored) == 2


def test_injected_hyperparameters_reach_each_group():
  groups = [Group('blocks/up', rate=0.5, decay=0.0)]
  make = grouped(go.galore_adamw, groups)
  injected = optax.inject_hyperparams(make, static_args=('rank', 'gap'))
  schedule = lambda count: 0.1 / (count + 1)
  ours = injected(schedule, weight_decay=DECAY, **RANK)
  want = make(schedule, weight_decay=DECAY, **RANK)
  state = ours.init(params())
  assert set(state.hyperparams) >= {'learning_rate', 'weight_decay', 'scale'}
  for pair in zip(updates_of(ours), updates_of(want), strict=True):
    assert_close(*pair)


def test_multipliers_may_be_traced():
  @functools.partial(jax.jit, static_argnums=0)
  def updates(preset, rate):
    tx = grouped(preset, [Group('embed', rate=rate)])(RATE)
    return tx.update(gradients(params()), tx.init(params()), params())[0]

  ours = updates(optax.lion, 3.0)
  [want] = updates_of(optax.lion(RATE), steps=1)
  # Five products and five sums are rounded, which are ten operations. The terms
  # of each sum have the same sign, so they do not cancel.
  want['embed'] = 3 * want['embed']
  assert_rounded(ours, want, operations=10)


def test_the_state_is_cut_over_devices_and_restored(tmp_path):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  w = {'up': normal32((16, 24)), 'down': normal32((24, 16))}
  places = jax.tree.map(
    lambda _: NamedSharding(mesh, PartitionSpec(None, 'x')), w
  )
  w = jax.device_put(w, places)
  tx = grouped(go.galore_adamw, [Group('up', rate=0.5)])(RATE, **RANK)
  state = tx.init(w)
  found = go.state_shardings(tx, w, places)
  chex.assert_trees_all_equal_structs(found, state)
  for part, name in zip(state.parts, ('up', 'down'), strict=True):
    basis = jax.tree.leaves(part[0].basis)[0]
    [moment, _] = [x for x in jax.tree.leaves(part[0].inner) if x.ndim]
    for x in (basis, moment):
      assert x.addressable_shards[0].data.size == x.size // 8, name
  _, state = jax.jit(tx.update)(gradients(w), state, w)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(
      tmp_path / 'state', jax.eval_shape(lambda: state)
    )
  chex.assert_trees_all_equal(back, state)


def test_describe_shows_the_multipliers_and_no_state_of_frozen_leaves():
  groups = [Group('blocks/up', rate=0.5, decay=0.0), Group('embed', rate=0)]
  tx = grouped(go.galore_adamw, groups)(RATE, **RANK)
  table = go.describe(tx, params())
  rows = {row.path: row for row in table}
  assert rows['embed'].bytes == 0 and rows['embed'].projected_shape is None
  assert rows['blocks/up'].projected_shape == (2, 3, 11)
  lines = {line.split()[0]: line.split() for line in str(table).split('\n')}
  assert lines['path'][-3:] == ['rate', 'decay', 'reason']
  assert lines['blocks/up'][-3:] == ['0.5', '0.0', 'matrix']
  assert lines['bias'][-3:] == ['1.0', '1.0', 'bias']
  assert rows['embed'].reason == 'frozen: rate 0'


def test_describe_shows_nested_groups_and_other_transformations() -> None:
  inside = grouped(optax.lion, [Group('blocks/.*', rate=0.5, decay=0.5)])
  outside = grouped(inside, [Group('blocks/up|bias', rate=0.5, decay=0.0)])
  labels = jax.tree.map(lambda _: 'grouped', params()) | {'embed': 'other'}
  rules = {'grouped': outside(RATE), 'other': optax.sgd(RATE)}
  table = go.describe(optax.partition(rules, labels), params())
  shown = {
    line.split()[0]: line.split()[-3:] for line in str(table).split('\n')
  }
  assert shown['blocks/up'] == ['0.25', '0.0', '-']
  assert shown['blocks/down'] == ['0.5', '0.5', '-']
  assert shown['bias'] == ['0.5', '0.0', '-']
  assert shown['embed'] == ['-', '-', '-']


@pytest.mark.parametrize(
  'groups, message',
  [
    (
      [('blocks/gate', 2.0)],
      r"\['blocks/gate'\] match no parameter.*blocks/up",
    ),
    ([('blocks/.*', 2.0), ('.*/up', 1.0)], 'in common.*: blocks/up. Narrow'),
    ([('(', 1.0)], 'no regular expression'),
  ],
)
def test_patterns_that_do_not_fit(groups, message):
  groups = [Group(*x) for x in groups]
  for preset, options in (PRESETS['galore_adamw'], PRESETS['badam']):
    tx = grouped(preset, groups)(RATE, **options)
    with pytest.raises(ValueError, match=message):
      tx.init(params())


def test_options_are_checked_on_the_whole_tree():
  make = grouped(go.galore_adamw, [Group('blocks/.*', rate=0.5)])
  with pytest.raises(ValueError, match='match no parameter'):
    make(RATE, rank=3, targets=['blocks/gate']).init(params())
  with pytest.raises(ValueError, match='projects no parameter'):
    make(RATE, rank=99).init(params())
  with pytest.raises(ValueError, match='more than decoupled'):
    grouped(
      lambda learning_rate: go.galore(optax.lamb(learning_rate), rank=3),
      [Group('blocks/.*', rate=0.5)],
    )(RATE).init(params())


def test_multipliers_that_nothing_reads_are_refused():
  with pytest.raises(ValueError, match='multiply weight_decay by decay'):
    grouped(adam_8bit, [Group('.*', decay=0.5)])
  with pytest.raises(ValueError, match='multiply learning_rate by rate'):
    grouped(go.galore, [Group('.*', rate=0.5)])
  for bad in (-1.0, float('nan'), 'fast'):
    with pytest.raises(ValueError, match='rate must be a finite number >= 0'):
      Group('.*', rate=bad)
  by_options = grouped(passes_on, [Group('.*', decay=0.5)])
  with pytest.raises(ValueError, match='multiply weight_decay by decay'):
    by_options(RATE, bias_weight_decay=0.0)
  relative = grouped(optax.adafactor, [Group('.*', rate=0.5)])
  with pytest.raises(ValueError, match='learning_rate=None: pass a number'):
    relative()


@pytest.mark.parametrize('groups', [Group('.*'), '.*', [('.*', 2.0)], {'a': 1}])
def test_values_that_are_not_groups_are_refused(groups: Any) -> None:
  with pytest.raises(ValueError, match='groups must be a list of Group'):
    grouped(go.galore_adamw, groups)


def test_patterns_are_strings() -> None:
  for bad in (3, None, ['.*']):
    with pytest.raises(ValueError, match='pattern must be a regex'):
      Group(bad)


def test_wrong_options_are_those_of_the_preset():
  with pytest.raises(TypeError, match='update_proj_gap is called gap'):
    grouped(go.galore_adamw, [Group('.*')])(RATE, update_proj_gap=2)


def test_train_batches_of_a_frozen_head_move_nothing_there():
  tx = grouped(go.galore_adamw, [Group('head/.*', rate=0)])(RATE, rank=3)
  start = make_params()
  step = go.layerwise(Residual(), tx)
  after, _, metrics = jax.jit(step)(start, step.init(start), make_batch())
  chex.assert_trees_all_equal(after['head'], start['head'])
  assert np.isfinite(metrics['loss'])


@pytest.mark.parametrize('bits', [4, 8])
def test_a_frozen_weight_in_codes_is_not_rounded_again(
  bits: Literal[4, 8],
) -> None:
  stored = quantized(bits=bits, dtype=jnp.float32)
  w = normal32((64, 256))
  # If zero updates were rounded, 50 of them would move one 8-bit code in
  # 10,000.
  write = jax.jit(stored.write)
  first = after = jax.jit(stored.store)(w)
  zeros, ones = np.zeros_like(w), np.ones_like(w)
  for i in range(50):
    after = write(after, zeros, jax.random.key(i))
  chex.assert_trees_all_equal(after, first)
  moved = write(first, ones, jax.random.key(0))
  assert distance(jax.jit(stored.read)(moved), w + ones) < 0.5
