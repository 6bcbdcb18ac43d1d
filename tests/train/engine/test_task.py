"""The flops of a model equal a count of the matrix products by hand.

They count one forward and one backward pass, without the optimizer.
"""

import dataclasses

import jax
import numpy as np
import pytest

from models.encoder import EncoderConfig
from models.llama import LlamaConfig
from models.lowrank import Lora
from tests.train.test_config import CONFIG
from train.engine.task import everything, task_of

B, T = 3, 10
MODEL = LlamaConfig(
  vocab_size=31, width=12, mlp_width=20, num_heads=6, num_layers=2,
  num_kv_heads=3, head_dim=4, qkv_bias=True, qk_norm=True,
)  # fmt: skip


BATCH = {'inputs': np.zeros((B, T), np.int32)}


def count(model, trained=everything):
  shapes = jax.eval_shape(model.layers().init, jax.random.key(0))
  return model.flops(shapes, trained(shapes), BATCH)


def products(model):
  """Returns the number of multiplications in a forward pass."""
  heads, keys = 4 * model.num_heads, 4 * model.kv_heads
  D, F, L = model.width, model.mlp_width, model.num_layers
  linear = L * (2 * D * heads + 2 * D * keys + 3 * D * F) + D * model.vocab_size
  seen = min(T, model.window or T)
  # Attention multiplies queries with keys, and weights with values, for all
  # pairs of tokens within the window.
  return B * T * (linear + L * 2 * seen * heads)


@pytest.mark.parametrize('other', [{}, {'tied': True}, {'window': 4}])
def test_llama(other):
  model = dataclasses.replace(MODEL, **other)
  # A multiplication with its addition counts as two flops. The backward pass
  # has twice as many products as the forward pass.
  assert count(model) == 3 * 2 * products(model)


def test_encoder():
  model = EncoderConfig(
    vocab_size=31, width=12, mlp_width=20, num_heads=3, num_layers=2,
    num_positions=16,
  )  # fmt: skip
  linear = 2 * (4 * 12 * 12 + 2 * 12 * 20)
  pairs = B * T * (linear + 2 * 2 * T * 12)
  assert count(model) == 6 * pairs


def test_a_task_has_the_shapes_of_its_batches():
  config = dataclasses.replace(CONFIG, model=MODEL)
  task = task_of(config)
  shapes = task.inputs()
  assert {x.shape for x in shapes.values()} == {(4, 16)}
  params = jax.eval_shape(task.init, jax.random.key(0))
  loss, _ = jax.eval_shape(task.loss, params, shapes)
  assert loss.shape == ()


def test_frozen_weights_have_no_gradient():
  nothing = lambda params: jax.tree.map(lambda _: False, params)
  attention = 2 * B * T * 2 * 2 * T * 24
  linear = 2 * products(MODEL) - attention
  assert count(MODEL, trained=nothing) == 2 * linear + 3 * attention


def test_a_task_counts_its_batches():
  model = dataclasses.replace(MODEL, vocab_size=300)
  config = dataclasses.replace(CONFIG, model=model)
  whole = task_of(config).flops(BATCH)
  assert whole == 6 * products(model)
  lora = dataclasses.replace(config, adapter=Lora(rank=2))
  # Frozen kernels save one third of the products. Factors and attention are
  # still differentiated.
  assert 0.66 < task_of(lora).flops(BATCH) / whole < 0.9
