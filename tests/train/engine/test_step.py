import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.galore_optax.every import build
from train.config import Layerwise, WholeTree
from train.engine import step as step_lib
from train.engine.command import load
from train.engine.task import task_of
from train.method import Galore, Galore8bit
from train.tasks.language import INPUTS

# A bigram model, because steps do not depend on the inside of a loss. Sizes are
# vocabulary V, width D, rows B and tokens per row T.
V, D, B, T = 13, 8, 6, 9


def loss(params, batch):
  logits_BTV = params['embed'][batch['inputs']] @ params['up']
  chosen_BT = jnp.take_along_axis(
    jax.nn.log_softmax(logits_BTV.astype(jnp.float32)),
    batch['targets'][..., None],
    axis=-1,
  )[..., 0]
  nll = -jnp.sum(batch['weights'] * chosen_BT)
  return nll / batch['weights'].size, {'nll': nll}


def example(seed=0):
  random = np.random.default_rng(seed)
  # Rows have different numbers of scored tokens, so that a mean of the means of
  # microbatches would be wrong.
  scored = np.arange(T)[None] < random.integers(1, T, B)[:, None]
  return {
    'inputs': random.integers(0, V, (B, T), dtype=np.int32),
    'targets': random.integers(0, V, (B, T), dtype=np.int32),
    'weights': scored.astype(np.float32),
  }


def weights(dtype=jnp.float32):
  embed, up = jax.random.split(jax.random.key(0))
  return {
    'embed': jax.random.normal(embed, (V, D), dtype),
    'up': jax.random.normal(up, (D, V), dtype),
  }


def run(tx, *, microbatches=1, num_steps=1, dtype=jnp.float32):
  step = step_lib.make_step(
    loss,
    tx,
    schedule=optax.constant_schedule(0.1),
    microbatches=microbatches,
  )
  state = step_lib.init(weights(dtype), tx)
  for seed in range(num_steps):
    state, metrics = step(state, example(seed))
  return state, metrics


def test_loss_is_the_mean_over_scored_tokens():
  batch, params = example(), weights()
  tokens = batch['weights'].sum()
  assert tokens < B * T
  mean = lambda params: loss(params, batch)[1]['nll'] / tokens
  expected, gradient = jax.jit(jax.value_and_grad(mean))(params)
  _, metrics = run(optax.sgd(0.1))
  # The tolerance allows for sums of 54 float32 numbers in different orders.
  np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-6)
  np.testing.assert_allclose(
    metrics['grad_norm'], optax.tree.norm(gradient), rtol=1e-6
  )
  assert metrics['weight'] == tokens
  # The loss uses weights normalized to a mean of 1, but the other sums must
  # refer to the batch's own weights.
  np.testing.assert_allclose(metrics['nll'], expected * tokens, rtol=1e-6)


@pytest.mark.parametrize('microbatches', [2, 3, 6])
def test_microbatches_change_nothing(microbatches):
  whole, expected = run(optax.sgd(1.0))
  parts, metrics = run(optax.sgd(1.0), microbatches=microbatches)
  # The tolerance allows for a gradient whose float32 sum has a different order.
  # Its entries are up to 3.
  chex.assert_trees_all_close(parts.params, whole.params, rtol=0, atol=1e-6)
  chex.assert_trees_all_close(metrics, expected, rtol=1e-6)


def test_microbatches_keep_types():
  tx = optax.adam(0.01)
  whole, metrics = run(tx, dtype=jnp.bfloat16)
  parts, _ = run(tx, dtype=jnp.bfloat16, num_steps=2, microbatches=2)
  assert parts.params['up'].dtype == jnp.bfloat16
  chex.assert_trees_all_equal_shapes_and_dtypes(whole, parts)
  # The norm of bfloat16 gradients is computed in float32.
  assert metrics['grad_norm'].dtype == jnp.float32


def test_state_is_donated_and_the_step_compiles_once():
  tx = build('Galore', optax.constant_schedule(0.01), rank=4, gap=2)
  step = step_lib.make_step(
    chex.assert_max_traces(loss, n=1), tx, schedule=lambda count: 0.1 * count
  )
  first = state = step_lib.init(weights(), tx)
  rates = []
  for seed in range(4):
    state, metrics = step(state, example(seed))
    rates.append(float(metrics['learning_rate']))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
  np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3], rtol=1e-6)
  assert state.step == 4


@pytest.mark.parametrize(
  'update, optimizer',
  [
    (WholeTree(), Galore(rank=4, gap=2)),
    pytest.param(
      Layerwise(slices=2), Galore8bit(rank=4, gap=2), marks=pytest.mark.slow
    ),
  ],
)
def test_every_donated_buffer_is_used(update, optimizer):
  config = dataclasses.replace(quickstart(), update=update, optimizer=optimizer)
  task = task_of(config)
  init, step = step_lib.build(config, task)
  shapes = jax.eval_shape(init, jax.random.key(0))
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  state = jax.device_put(zeros)
  tokens = np.ones((config.batch_size, config.sequence_length), np.int32)
  batch = dict.fromkeys(INPUTS, tokens) | {'weights': tokens.astype('f4')}
  # XLA warns about a donated buffer that it cannot use, and warnings are errors
  # here.
  compiled = step.lower(state, batch).compile()
  memory = compiled.memory_analysis()
  held = sum(x.nbytes for x in jax.tree.leaves(state))
  # A scalar that the step does not read may stay.
  assert held - memory.alias_size_in_bytes < 8
  after, _ = compiled(state, batch)
  assert after.step == 1
  kept = [x for x in jax.tree.leaves(state) if not x.is_deleted()]
  assert sum(x.nbytes for x in kept) < 8


def quickstart():
  """Returns the quickstart config with a smaller model and shorter rows."""
  config = load('configs/quickstart.py')
  small = dict(vocab_size=64, width=16, mlp_width=40, num_layers=2)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, **small),
    batch_size=2,
    sequence_length=8,
  )


def test_clipping_acts_before_the_optimizer():
  clipped = optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(1.0))
  after, metrics = run(clipped)
  change = jax.tree.map(jnp.subtract, after.params, weights())
  # The parameters are near 1, so changes of about 1e-3 have a rounding error of
  # 1e-7.
  np.testing.assert_allclose(optax.tree.norm(change), 1e-2, rtol=1e-4)
  assert metrics['grad_norm'] > 0.1


@pytest.mark.parametrize('norm', ['grad_norm', 'projected_grad_norm'])
def test_a_layerwise_update_names_its_norm(norm):
  found = {'loss': 2.0, norm: 3.0, 'nll': 4.0}
  step = step_lib.make_layerwise_step(
    lambda params, state, batch: (params, state, found),
    schedule=optax.constant_schedule(0.1),
  )
  state = step_lib.State(jnp.zeros([], jnp.int32), (), ())
  _, metrics = step(state, {'weights': jnp.array([1.0, 0.0])})
  # Only `nll` is a sum over weights normalized to a mean of 1. The step
  # multiplies it by their actual mean of 0.5.
  expected = {'loss': 2.0, norm: 3.0, 'learning_rate': 0.1}
  expected |= {'nll': 2.0, 'weight': 1.0, 'skipped_steps': 0}
  chex.assert_trees_all_close(metrics, expected)
