import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from models.llama import Layers, LlamaConfig
from train import step as step_lib

MODEL = LlamaConfig(
  vocab_size=31, width=12, mlp_width=20, num_heads=2, num_layers=2
)


def example(num_rows=6, num_tokens=9, seed=0):
  random = np.random.default_rng(seed)
  shape = (num_rows, num_tokens)
  # Rows differ in how many tokens are scored, so that a mean of means over
  # microbatches would be wrong.
  scored = (
    np.arange(num_tokens)[None] < random.integers(1, 10, num_rows)[:, None]
  )
  return {
    'inputs': random.integers(0, 31, shape, dtype=np.int32),
    'targets': random.integers(0, 31, shape, dtype=np.int32),
    'positions': np.tile(np.arange(num_tokens, dtype=np.int32), (num_rows, 1)),
    'segments': np.ones(shape, np.int32),
    'weights': scored.astype(np.float32),
  }


def weights(layers):
  return jax.jit(layers.init)(jax.random.key(0))


def run(tx, *, microbatches=1, num_steps=1, model=MODEL):
  layers = Layers(model)
  step = step_lib.make_step(
    layers,
    tx,
    schedule=optax.linear_schedule(0.0, 1.0, 10),
    microbatches=microbatches,
  )
  state = step_lib.init(weights(layers), tx)
  for i in range(num_steps):
    state, metrics = step(state, example(seed=i))
  return state, metrics


def test_loss_is_the_mean_over_scored_tokens():
  layers, batch = Layers(MODEL), example()
  params = weights(layers)
  aux = layers(params, batch)[1]
  _, metrics = run(optax.sgd(0.1))
  tokens = batch['weights'].sum()
  # Two summation orders of 54 float32 numbers.
  np.testing.assert_allclose(metrics['loss'], aux['nll'] / tokens, rtol=1e-6)
  assert metrics['tokens'] == tokens
  gradient = jax.grad(lambda p: layers(p, batch)[1]['nll'] / tokens)(params)
  np.testing.assert_allclose(
    metrics['grad_norm'], optax.tree.norm(gradient), rtol=1e-5
  )


@pytest.mark.parametrize('microbatches', [2, 3])
def test_microbatches_change_nothing(microbatches):
  whole, expected = run(optax.sgd(1.0))
  parts, metrics = run(optax.sgd(1.0), microbatches=microbatches)
  # The gradient's float32 sum in another order; entries are up to 1.
  chex.assert_trees_all_close(parts.params, whole.params, rtol=0, atol=1e-6)
  chex.assert_trees_all_close(metrics, expected, rtol=1e-5)


def test_microbatches_keep_the_parameters_type():
  model = dataclasses.replace(MODEL, param_dtype='bfloat16')
  tx = optax.adam(0.01)
  before, _ = run(tx, model=model)
  after, _ = run(tx, num_steps=2, microbatches=2, model=model)
  chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


def test_state_is_donated_and_the_step_compiles_once():
  layers = Layers(MODEL)
  tx = galore_optax.galore_adamw(optax.constant_schedule(0.01), rank=4, gap=2)

  traced = chex.assert_max_traces(lambda p, b: layers(p, b), n=1)
  step = step_lib.make_step(traced, tx, schedule=lambda count: 0.1 * count)
  state = step_lib.init(weights(layers), tx)
  first = state
  rates = []
  for i in range(4):
    state, metrics = step(state, example(seed=i))
    rates.append(float(metrics['learning_rate']))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.optimizer))
  np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3], rtol=1e-6)
  assert state.step == 4


def test_clipping_acts_before_the_optimizer():
  clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
  layers = Layers(MODEL)
  before = weights(layers)
  after, metrics = run(clipped)
  change = jax.tree.map(jnp.subtract, after.params, before)
  # Parameters near 1 hold a change of 1e-3 to about 1e-7 each.
  np.testing.assert_allclose(optax.tree.norm(change), 1e-3, rtol=1e-3)
  assert metrics['grad_norm'] > 1e-2
