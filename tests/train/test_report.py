import io

import jax
import optax
import pytest
from rich.console import Console

from models.llama import Layers, LlamaConfig
from train import report
from train.method import AdamW, Galore

MODEL = LlamaConfig(
  vocab_size=31, width=12, mlp_width=20, num_heads=2, num_layers=3
)


def text(optimizer, width=100, stored='float32'):
  shapes = jax.eval_shape(Layers(MODEL).init, jax.random.key(0))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, stored), shapes)
  tx = optimizer.build(optax.constant_schedule(0.1))
  console = Console(file=io.StringIO(), width=width)
  console.print(report.memory_table(shapes, like, tx, type(optimizer).__name__))
  return console.file.getvalue()


def test_bytes_are_exact():
  # A layer: 4 of 12 x 12, and 3 of 12 x 20, the shorter side projected to 5.
  projected = 3 * (4 * 12 * 12 + 3 * 12 * 20)
  rest = 2 * 31 * 12 + 7 * 12
  state = 3 * (4 * (5 * 12 + 2 * 5 * 12) + 3 * (5 * 12 + 2 * 5 * 20))
  found = text(Galore(rank=5))
  assert f'{projected + rest:,} parameters, {4 * (projected + rest):,}' in found
  assert f'of projected weights: {4 * state:,} bytes' in found
  assert f'optimizer state: {4 * (state + 2 * rest):,} bytes' in found
  assert f'AdamW: {8 * (projected + rest):,} ' in found
  assert '3x12x20' in found and '3x5x20' in found


def test_weights_count_as_they_are_stored():
  number = 3 * (4 * 12 * 12 + 3 * 12 * 20) + 2 * 31 * 12 + 7 * 12
  found = text(Galore(rank=5), stored='bfloat16')
  assert f'{number:,} parameters, {2 * number:,} bytes' in found


def test_the_table_fits_a_terminal():
  assert max(map(len, text(Galore(rank=5), width=80).splitlines())) <= 80


def test_adamw_projects_nothing():
  found = text(AdamW())
  assert 'of projected weights' not in found and '(100.0%)' in found


@pytest.mark.parametrize('rank', [4, 5])
def test_nothing_is_allocated(rank):
  # Of a weight's three axes: a thread of another test may still make batches.
  stacks = lambda: sum(x.ndim > 2 for x in jax.live_arrays())
  before = stacks()
  text(Galore(rank=rank))
  assert stacks() == before
