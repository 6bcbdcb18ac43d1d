"""Training with low-rank factors: trained weights, restarts, resumption."""

import dataclasses
import json
import os
import re
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import lowrank
from models.llama import LlamaConfig
from models.lowrank import Factored, Lora, Relora
from tests.train import program
from train import pretrain
from train.config import Config, Layerwise, WholeTree
from train.data.corpus import TextFiles
from train.engine import loop, memory_table
from train.engine import step as step_lib
from train.engine.command import parse
from train.engine.config_json import from_json, to_json
from train.engine.run import Run
from train.engine.task import task_of
from train.method import Adam8bit, AdamW, Galore
from train.optimizers import adapter as adapter_lib
from train.plan.footprint import Cards, make_plan

B, T, V = 4, 6, 19
KERNELS = 7  # per layer

CONFIG = Config(
  model=LlamaConfig(
    vocab_size=V, width=8, mlp_width=12, num_heads=2, num_layers=2, init_std=0.3
  ),
  corpus=TextFiles(train='none.txt'),
  optimizer=AdamW(),
  steps=6,
  learning_rate=0.05,
  warmup=0.0,
  batch_size=B,
  sequence_length=T,
  adapter=Lora(rank=3),
)


def example(seed):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(V, size=(B, T + 1), dtype=np.int32)
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': (rng.random((B, T)) < 0.8).astype(np.float32),
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    'segments': np.ones((B, T), np.int32),
  }


def changed(**options):
  return dataclasses.replace(CONFIG, **options)


def start(config):
  init, step = step_lib.build(config, task_of(config))
  return jax.jit(init)(jax.random.key(0)), step


def run(config, num_steps=3, state=None):
  """Returns the state after some steps, and the metrics of the last step."""
  first, step = start(config)
  state = first if state is None else state
  for seed in range(int(state.step), int(state.step) + num_steps):
    state, metrics = step(state, example(seed))
  return state, metrics


def by_role(params):
  """Groups weights into factors, frozen weights beneath them, and the rest."""
  flat = lowrank.flatten(params)
  found = {'factor': {}, 'beneath': {}, 'rest': {}}
  for path, role in lowrank.roles(params).items():
    found[role][path] = flat[path]
  return found


LAYERWISE = Layerwise()
UPDATES = [WholeTree(), pytest.param(LAYERWISE, marks=pytest.mark.slow)]


@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize(
  'adapter, frozen',
  [
    (Lora(rank=3), {'beneath', 'rest'}),
    *(
      pytest.param(*rare, marks=pytest.mark.slow)
      for rare in (
        (Lora(rank=3, rest='trained'), {'beneath'}),
        (Lora(rank=3, lomo=0.5), set()),
        (Relora(rank=3, every=9, restart_warmup=1), {'beneath'}),
        (Factored(rank=3), set()),
      )
    ),
  ],
)
def test_which_weights_are_trained(update, adapter, frozen):
  config = changed(adapter=adapter, update=update)
  state, step = start(config)
  before = by_role(jax.device_get(state.params))
  for seed in range(3):
    state, _ = step(state, example(seed))
  after = by_role(jax.device_get(state.params))
  for role in before:
    for path, weight in before[role].items():
      same = np.array_equal(after[role][path], weight)
      assert same == (role in frozen), path


@pytest.mark.parametrize('update', [WholeTree(), LAYERWISE])
def test_the_optimizer_keeps_moments_only_of_trained_weights(update):
  config = changed(update=update)
  init, _ = step_lib.build(config, task_of(config))
  state = jax.eval_shape(init, jax.random.key(0))
  factors = by_role(state.params)['factor']
  assert len(factors) == 2 * KERNELS
  numbers = sum(x.size for x in factors.values())
  kept = [x for x in jax.tree.leaves(state.optimizer) if x.dtype == 'float32']
  # The layer-wise state also contains the norm of the last step, a scalar.
  assert sum(x.size for x in kept if x.ndim) == 2 * numbers


@pytest.mark.slow
@pytest.mark.parametrize(
  'adapter',
  [
    Lora(rank=3, dropout=0.3),
    Lora(rank=3, rest='trained', targets=('.*/[qv]/kernel',)),
    Lora(rank=3, lomo=0.5),
    # reset=1.0 resets all moments. A smaller share would choose different ones,
    # because the choice depends on the order of leaves in the state.
    Relora(rank=3, every=2, restart_warmup=0, reset=1.0, dropout=0.1),
    Factored(rank=3),
  ],
)
def test_layer_by_layer_is_the_whole_tree(adapter):
  config = changed(adapter=adapter, microbatches=2)
  whole, expected = run(config)
  layers, found = run(dataclasses.replace(config, update=LAYERWISE))
  # The tolerance allows for Adam's division by the root of the second moment,
  # which amplifies rounding where gradients are smallest. There are three steps
  # of 0.05 each.
  chex.assert_trees_all_close(layers.params, whole.params, rtol=0, atol=2e-4)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-4)


@pytest.mark.slow
def test_frozen_weights_have_no_gradient():
  config = changed(clip_norm=None)
  state, step = start(config)
  moving, _ = step_lib.split_trained(state.params, task_of(config).trained)
  assert set(by_role(moving)['beneath'].values()) == {None}
  _, metrics = step(state, example(0))
  state, _ = start(config)
  batch, _ = step_lib.with_mean_weight(example(0))
  grads = jax.grad(lambda p: task_of(config).loss(p, batch)[0])
  of_factors = by_role(grads(state.params))['factor']
  # The norm must include only the gradients of the factors.
  np.testing.assert_allclose(
    metrics['grad_norm'], optax.tree.norm(of_factors), rtol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['int8', 'rounded'])
def test_frozen_weights_may_be_stored_in_8_bits(weights):
  config = changed(update=Layerwise(weights=weights))
  before = jax.device_get(start(config)[0].params)
  state, metrics = run(config)
  assert np.isfinite(metrics['loss'])
  roles = by_role(jax.device_get(state.params))
  chex.assert_trees_all_equal(roles['beneath'], by_role(before)['beneath'])
  assert all(x.dtype == np.float32 for x in roles['factor'].values())
  bytes_of = lambda x: sum(a.nbytes for a in jax.tree.leaves(x))
  q = roles['beneath']['blocks/attention/q/kernel']
  assert (bytes_of(q) < 2 * 8 * 8 * 4) == (weights == 'int8')


@pytest.mark.slow
def test_lomo_and_lora_add_up():
  config = changed(adapter=Lora(rank=3, lomo=0.5), clip_norm=None)
  # After two steps, the factors are large enough to affect the gradients.
  state, _ = run(config, 2)
  start_at = jax.tree.map(jnp.copy, state.params)
  both, _ = run(config, 1, state)

  batch, _ = step_lib.with_mean_weight(example(2))
  task = task_of(config)
  grads = jax.jit(jax.grad(lambda p: task.loss(p, batch)[0]))(start_at)
  rate = 0.5 * float(config.schedule()(2))
  sgd = jax.tree.map(lambda w, g: w - rate * g, start_at, grads)
  got, want = by_role(both.params), by_role(sgd)
  for role in ('beneath', 'rest'):
    # The tolerance allows for updates of about 0.1 that are computed in a
    # different order.
    chex.assert_trees_all_close(got[role], want[role], rtol=1e-5, atol=1e-6)

  # The factors must be updated as by LoRA without LOMO, from the same weights
  # and moments.
  alone = changed(clip_norm=None)
  moments = _state_of_factors(run(config, 2)[0].optimizer)
  tx = alone.transformation()
  trained = task_of(alone).trained
  moving, _ = step_lib.split_trained(start_at, trained)
  moving_grads, _ = step_lib.split_trained(grads, trained)
  updates, _ = tx.update(moving_grads, moments, moving)
  lora = by_role(optax.apply_updates(moving, updates))['factor']
  chex.assert_trees_all_close(got['factor'], lora, rtol=1e-5, atol=1e-6)


def _state_of_factors(optimizer):
  """Returns the state of LoRA's optimizer from the combined state."""
  inner = optimizer.inner_states['optimizer'].inner_state
  hole = lambda x: isinstance(x, optax.MaskedNode)
  return jax.tree.map(lambda x: None if hole(x) else x, inner, is_leaf=hole)


RELORA = Relora(rank=3, every=3, restart_warmup=2)


@pytest.mark.slow
@pytest.mark.parametrize('update', UPDATES)
def test_a_merge_keeps_the_function_and_restarts_the_factors(update):
  config = changed(adapter=RELORA, update=update)
  never = dataclasses.replace(RELORA, every=7, restart_warmup=0)
  before, _ = run(dataclasses.replace(config, adapter=never))
  after, _ = run(config)
  layers = task_of(config).layers
  chex.assert_trees_all_equal(
    by_role(before.params)['rest'], by_role(after.params)['rest']
  )
  expected = layers.logits(before.params, example(9))
  # The tolerance allows for float32 rounding in x W + (x A) B and x (W + A B).
  # Each sums tens of products up to 10.
  np.testing.assert_allclose(
    layers.logits(after.params, example(9)), expected, rtol=0, atol=1e-4
  )
  for path, factor in by_role(after.params)['factor'].items():
    if path.endswith('lora_b'):
      assert not factor.any(), path
    else:
      old = by_role(before.params)['factor'][path]
      assert float(jnp.mean(factor != old)) == 1, path
      assert 0.5 < float(jnp.abs(factor).max()) * factor.shape[1] ** 0.5 <= 1
  # The merge resets the moments of the factors, except about one in a thousand.
  # It does not reset other moments.
  for state, some in ((before, 1.0), (after, 0.01)):
    share = _nonzero(state.optimizer, True)
    assert share == 1.0 if some == 1.0 else share < some
  chex.assert_trees_all_equal(
    _counters(before.optimizer), _counters(after.optimizer)
  )
  assert _nonzero(after.optimizer, False) > 0.9


def _nonzero(optimizer, of_factor):
  """Returns the share of nonzero moments, of factors or of other weights."""
  leaves = jax.tree_util.tree_leaves_with_path(optimizer)
  moments = [
    np.asarray(leaf).ravel()
    for path, leaf in leaves
    if leaf.dtype == 'float32' and leaf.ndim > 1
    if adapter_lib._of_factor(path) == of_factor
  ]
  return float(np.mean(np.concatenate(moments) != 0))


def _counters(optimizer):
  return [x for x in jax.tree.leaves(optimizer) if x.dtype == 'int32']


@pytest.mark.parametrize(
  'optimizer',
  [
    pytest.param(AdamW(), marks=pytest.mark.slow),
    pytest.param(Adam8bit(), marks=pytest.mark.slow),
    Galore(rank=2),
  ],
)
@pytest.mark.parametrize('update', UPDATES)
def test_a_reset_reaches_the_moments_of_every_optimizer(optimizer, update):
  config = changed(optimizer=optimizer, update=update)
  init, _ = step_lib.build(config, task_of(config))
  shapes = jax.eval_shape(init, jax.random.key(0)).optimizer
  ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  reset = adapter_lib.reset_moments(ones, 1.0, jax.random.key(0))
  reset = jax.device_get(reset)
  names = jax.tree_util.tree_leaves_with_path(reset)
  zeroed = [path for path, leaf in names if not leaf.any()]
  # Each kernel has two factors with two moments each.
  assert len(zeroed) == 4 * KERNELS
  for path, leaf in names:
    assert leaf.all() or path in zeroed


def test_a_merge_into_8_bits_adds_the_product_of_the_factors():
  weights = changed(update=Layerwise(weights='int8')).weights()
  kernel = jax.random.normal(jax.random.key(0), (2, 16, 32))
  params = {'blocks': {'up': {'kernel': kernel}}}
  params = lowrank.adapt(params, RELORA, jax.random.key(1))
  up = params['blocks']['up']
  up['lora_b'] = jax.random.normal(jax.random.key(2), up['lora_b'].shape)
  expected = lowrank.merge(params, RELORA)['blocks']['up']['kernel']
  up['kernel'] = weights.store(kernel)
  key = jax.random.key(3)
  found = adapter_lib.merge_into(params, RELORA, weights, key)
  got = weights.read(found['blocks']['up']['kernel'])
  assert float(jnp.abs(expected - kernel).max()) > 1
  # The tolerance is two quantization steps, each 1 / 127 of the block's largest
  # entry.
  unit = float(jnp.abs(expected).max()) / 127
  np.testing.assert_allclose(got, expected, rtol=0, atol=2 * unit)


def test_the_schedule_rises_to_the_cosine_after_each_merge():
  config = changed(
    adapter=dataclasses.replace(RELORA, every=10, restart_warmup=4),
    steps=40,
    warmup=0.1,
  )
  smooth = dataclasses.replace(config, adapter=None).schedule()
  jagged = config.schedule()
  rates = [float(jagged(step)) for step in range(40)]
  cosine = [float(smooth(step)) for step in range(40)]
  for merge in (10, 20, 30):
    top = cosine[merge + 4]
    expected = [0, top / 4, top / 2, top * 3 / 4, top]
    np.testing.assert_allclose(rates[merge : merge + 5], expected, rtol=1e-6)
    np.testing.assert_allclose(
      rates[merge + 4 : merge + 10], cosine[merge + 4 : merge + 10], rtol=1e-6
    )
  np.testing.assert_allclose(rates[:10], cosine[:10], rtol=1e-6)


def test_a_config_takes_its_adapter_to_json_and_back():
  for adapter in (None, Lora(targets=('.*q.*',)), RELORA, Factored(rank=2)):
    config = changed(adapter=adapter)
    data = json.loads(json.dumps(to_json(config)))
    assert from_json(Config, data) == config


def test_the_command_line_names_an_adapter(tmp_path):
  path = program.write_config(tmp_path)
  said = lambda *options: parse([path, *options]).config.adapter
  assert said() is None
  assert said('--adapter', 'Lora', '--adapter.rank', '4') == Lora(rank=4)
  relora = said(
    '--adapter', 'Relora', '--adapter.targets', '.*/q/.*', '.*/v/.*'
  )
  assert relora == Relora(targets=('.*/q/.*', '.*/v/.*'))
  assert said('--adapter', 'Lora', '--adapter', 'None') is None
  with pytest.raises(ValueError, match='--adapter must be one of Lora, Relora'):
    said('--adapter', 'Dora')


def test_an_adapter_comes_with_adamw_unless_an_optimizer_is_named(
  tmp_path, capsys
):
  path = program.write_config(tmp_path)
  said = lambda *options: parse([path, *options]).config.optimizer
  for adapter in ('Lora', 'Relora', 'Factored'):
    assert said('--adapter', adapter) == AdamW()
    assert f'--adapter {adapter} is trained by AdamW' in capsys.readouterr().err
  own = said()
  for options in (
    ['--optimizer', 'Galore'],
    ['--optimizer=Galore'],
    ['--optimizer.rank', '4'],
  ):
    assert said('--adapter', 'Lora', *options) == own
  # An optimizer without a rank trains the factors like any other weights.
  assert said('--optimizer', 'Adam8bit', '--adapter', 'Lora') == Adam8bit()
  # The config of a resumed run already contains the adapter.
  tuned = changed(adapter=Lora(), optimizer=Galore(rank=2))
  again = parse([path, '--adapter', 'Lora'], default=lambda _: tuned)
  assert again.config == tuned
  assert not capsys.readouterr().err


@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize(
  'optimizer, match',
  [
    (Galore(rank=16), 'rank 16 projects no parameter'),
    (Galore(rank=3, targets=('.*/q/kernel',)), 'match no parameter'),
    (Galore(rank=4, targets=('.*/q/lora_a',)), r'rank must be in 1\.\.3 for'),
  ],
)
def test_an_optimizer_that_cannot_project_factors_names_adamw(
  optimizer, match, update
):
  config = changed(optimizer=optimizer, update=update)
  init, _ = step_lib.build(config, task_of(config))
  with pytest.raises(ValueError, match=match) as error:
    jax.eval_shape(init, jax.random.key(0))
  assert 'factors of rank 3: take --optimizer AdamW' in str(error.value)


def test_without_factors_no_other_optimizer_is_named():
  config = changed(optimizer=Galore(rank=16), adapter=None)
  init, _ = step_lib.build(config, task_of(config))
  with pytest.raises(ValueError, match='rank 16 projects no') as error:
    jax.eval_shape(init, jax.random.key(0))
  assert 'AdamW' not in str(error.value)


@pytest.mark.parametrize(
  'options, match',
  [
    (['--adapter.rank', '17'], r'adapter.rank must be in 1\.\.16 for blocks/'),
    (['--adapter.targets', 'q'], r"adapter.targets \['q'\] match no kernel"),
    (['--adapter.rank', '0'], 'adapter.rank must be at least 1'),
  ],
)
def test_bad_adapters_are_one_line(
  options, match, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  path = program.write_config(tmp_path)
  line = [path, '--optimizer', 'AdamW', '--adapter', 'Lora', *options]
  with pytest.raises(SystemExit):
    pretrain.main(line)
  assert re.search(match, capsys.readouterr().err)
  assert not (tmp_path / 'runs').exists()


@pytest.mark.slow
@pytest.mark.parametrize('update', ['WholeTree', 'Layerwise'])
def test_a_resumed_run_is_bit_equal_over_a_merge(update, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = program.write_config(tmp_path)
  options = ['--optimizer', 'AdamW', '--update', update, '--adapter', 'Relora']
  options += [
    '--adapter.rank',
    '3',
    '--adapter.every',
    '3',
    '--save-every',
    '4',
  ]
  options += ['--adapter.restart-warmup', '1', '--adapter.dropout', '0.2']
  assert pretrain.main([path, *options, '--run', 'whole']) == 0

  show = loop.Meter.add

  def interrupt(meter, step, metrics, *rest):
    if step == 4:  # between the merges after steps 3 and 6
      os.kill(os.getpid(), signal.SIGTERM)
    show(meter, step, metrics, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(loop.Meter, 'add', interrupt)
    args = [path, *options, '--run', 'parts']
    assert pretrain.main(args) == 128 + signal.SIGTERM
  assert pretrain.main([path, '--run', 'parts', '--resume']) == 0
  whole, parts = (Run(tmp_path / name) for name in ('whole', 'parts'))
  chex.assert_trees_all_equal(program.saved(parts), program.saved(whole))
  assert program.lines(parts) == program.lines(whole)


def test_the_memory_table_has_frozen_weights_without_state():
  config = changed(adapter=Lora(rank=3, targets=('.*/q/kernel',)))
  task = task_of(config)
  table = memory_table.memory_table(
    task.shapes,
    jax.eval_shape(task.init, jax.random.key(0)),
    config.transformation(),
    'AdamW',
    task.trained,
  )
  text = str(table.caption)
  # The factors A [2, 8, 3] and B [2, 3, 8] have two float32 moments each.
  assert f'optimizer state: {2 * 2 * 48 * 4:,} bytes' in text


@pytest.mark.parametrize('update', [WholeTree(), LAYERWISE])
def test_a_plan_counts_state_only_of_trained_weights(update):
  cards = Cards('rtx4090', estimate=True)
  plan = lambda adapter: make_plan(
    changed(adapter=adapter, update=update), cards
  )
  lora, plain = plan(Lora(rank=1)), plan(None)
  factors = 4 * 2 * (4 * (8 + 8) + 3 * (8 + 12))
  assert lora.parameter_bytes == plain.parameter_bytes + factors
  assert lora.gradient_bytes < plain.gradient_bytes
  assert lora.moment_bytes < plain.moment_bytes / 4
