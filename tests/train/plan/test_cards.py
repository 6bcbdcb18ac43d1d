"""Compiles for absent GPUs, and guards sizes that must not grow."""

import functools
import importlib.metadata
import importlib.util
import typing

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax.galore import galore
from galore_optax.layerwise.step import layerwise
from galore_optax.subspace.finders import PowerIteration
from models import attention
from models.llama import Layers, LlamaConfig
from tests.galore_optax.every import maker
from train.engine.mesh import Mesh
from train.plan import cards
from train.plan.cards import GPUS, GpuName

needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec('jax_cuda12_plugin') is None,
  reason='needs the extra `plan`',
)


RULES = {
  'galore': lambda: galore(
    optax.sgd(0.1), rank=64, gap=5, subspace=PowerIteration()
  ),
  # FRUGAL and Fira also use the residual of the gradient, for which XLA chooses
  # other layouts.
  'Frugal': maker('Frugal', subspace=PowerIteration()),
  'Fira': maker('Fira', rank=64, subspace=PowerIteration()),
}


@functools.cache
def compile_layers(num_layers, rule='galore'):
  config = LlamaConfig(
    vocab_size=512,
    width=256,
    mlp_width=640,
    num_heads=4,
    num_layers=num_layers,
    dtype='bfloat16',
    param_dtype='bfloat16',
  )
  model = Layers(config)
  step = layerwise(model, RULES[rule]())
  params = jax.eval_shape(model.init, jax.random.key(0))
  mesh = cards.topology_mesh(GPUS['rtx4090'])
  everywhere = NamedSharding(mesh, PartitionSpec())
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
  batch = dict.fromkeys(
    ('inputs', 'targets', 'positions', 'segments'),
    jax.ShapeDtypeStruct((2, 64), jnp.int32),
  )
  batch['weights'] = jax.ShapeDtypeStruct((2, 64), jnp.float32)
  arguments = (params, jax.eval_shape(step.init, params), batch)
  return cards.compile_step(
    jax.jit(step, donate_argnums=(0, 1)), *jax.tree.map(place, arguments)
  )


# Temporary memory of four small layers with jax 0.10.2. One layer has
# gradients of 1.5 MB.
TEMP_BYTES = 5_144_392


@pytest.mark.card
def test_the_compiler_has_the_version_of_jax():
  # Without JAX's CUDA plugin all other tests of this module are skipped. This
  # one fails instead, so that a missing plugin is noticed.
  for name in ('jax-cuda12-plugin', 'jax-cuda12-pjrt'):
    assert importlib.metadata.version(name) == jax.__version__


@needs_compiler
@pytest.mark.card
def test_temporaries_and_program_do_not_grow_with_depth():
  few, many = compile_layers(4), compile_layers(32)
  kept = 28 * 2 * 64 * 256 * 2  # inputs of the layers, bfloat16
  # All other temporaries are those of one layer, whatever the depth.
  assert many.temp_bytes - few.temp_bytes == pytest.approx(kept, rel=0.05)
  assert many.program_bytes < 1.1 * few.program_bytes
  # Weights and state are written in place. Only the metrics are new outputs.
  for compiled in (few, many):
    assert compiled.output_bytes - compiled.alias_bytes < 1024


@needs_compiler
@pytest.mark.card
@pytest.mark.parametrize('rule', ['Frugal', 'Fira'])
def test_no_stack_is_copied(rule):
  few, many = compile_layers(4, rule), compile_layers(32, rule)
  kept = 28 * 2 * 64 * 256 * 2  # inputs of the layers, bfloat16
  moments = 28 * 64 * 256 * 4  # the smallest stack: q, k, v or o
  assert many.temp_bytes - few.temp_bytes < kept + moments / 2


@needs_compiler
@pytest.mark.card
def test_temporaries_of_a_layer():
  compiled = compile_layers(4)
  # Temporary memory may grow by less than 5%.
  assert compiled.temp_bytes < 1.05 * TEMP_BYTES


def test_the_command_line_names_every_gpu():
  assert typing.get_args(GpuName) == tuple(GPUS)


@needs_compiler
@pytest.mark.card
def test_another_card():
  mesh = cards.topology_mesh(GPUS['a100-40'])
  x = jax.ShapeDtypeStruct(
    (64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
  )
  compiled = cards.compile_step(jax.jit(lambda x: x @ x.T @ x), x)
  assert compiled.argument_bytes == compiled.output_bytes == 64 * 64 * 4
  assert compiled.collectives == ()
  total = 2 * 64 * 64 * 4 + compiled.temp_bytes
  assert compiled.total_bytes == total
  assert compiled.buffers[0].bytes <= compiled.temp_bytes


@needs_compiler
@pytest.mark.card
def test_collectives_of_eight_cards():
  mesh = cards.topology_mesh(GPUS['rtx4090'], Mesh(data=8))
  x = jax.ShapeDtypeStruct(
    (64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('data'))
  )
  total = jax.jit(
    lambda x: x.T @ x, out_shardings=NamedSharding(mesh, PartitionSpec())
  )
  (reduce,) = cards.compile_step(total, x).collectives
  assert reduce == ('all-reduce', 'f32[32,32]', 1, 32 * 32 * 4)


def attend(time):
  q = jax.ShapeDtypeStruct((2, time, 4, 64), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((2, time), jnp.int32)
  return (lambda *x: attention.attend(*x, kind='cudnn')), (q, q, q, segments)


def test_cudnn_is_there_for_a_plan_alone():
  f, arguments = attend(128)
  with pytest.raises(ValueError, match='cuDNN'):
    jax.eval_shape(f, *arguments)
  with cards.cudnn():
    assert jax.eval_shape(f, *arguments).shape == (2, 128, 4, 64)
  with pytest.raises(ValueError, match='cuDNN'):
    jax.eval_shape(f, *arguments)


@needs_compiler
@pytest.mark.card
@pytest.mark.parametrize('devices', [1, 2])
def test_compiles_the_kernel_of_cudnn(devices):
  mesh = cards.topology_mesh(GPUS['rtx4090'], Mesh(data=devices))
  shared = NamedSharding(mesh, PartitionSpec('data'))
  f, arguments = attend(1024)
  placed = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shared), arguments
  )
  grad = jax.grad(lambda *x: jnp.sum(f(*x).astype(jnp.float32)))
  with cards.cudnn():
    compiled = cards.compile_step(jax.jit(grad), *placed)
  # The mask and its cotangent, in bfloat16, are shared by all four heads.
  pairs = 2 * 2 * 1024 * 1024 // devices
  assert pairs < compiled.temp_bytes < 3.5 * pairs
  assert compiled.collectives == ()


def test_says_what_is_missing(monkeypatch):
  def missing(**_):
    raise RuntimeError('Unknown backend cuda')

  monkeypatch.setattr(cards.topologies, 'get_topology_desc', missing)
  with pytest.raises(RuntimeError, match='make plan ARGS'):
    cards.topology_mesh(GPUS['h100'])
