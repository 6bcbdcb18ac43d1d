"""The JAX workloads of the GPU benchmark.

Each workload is a generator. It yields an empty dict when it has compiled its
program, then runs the program and yields the measurements.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.engine import machine
from train.engine import step as step_lib
from train.engine.command import parse
from train.engine.mesh import devices
from train.engine.task import task_of
from train.plan.bill import whole_update

PyTree = Any
Found = dict[str, Any]


def step(steps: str, *argv: str) -> Iterator[Found]:
  """Measures the training step of a config, with made-up weights and tokens."""
  config = parse(argv).config.resolved()
  task = task_of(config)
  init, run_step = step_lib.build(config, task)
  shapes = jax.eval_shape(init, jax.random.key(0))
  inputs = jax.tree.map(made_up, task.inputs())
  # Compile before anything is allocated, so that compilation does not raise the
  # peak memory of the step.
  compiled = run_step.lower(shapes, inputs).compile()
  yield {}
  held = [zeros(shapes._replace(params=())), {}]
  held[0] = held[0]._replace(params=jax.jit(lambda: waves(shapes.params))())

  def run() -> Any:
    held[:] = compiled(held[0], inputs)
    return held

  found = measured(run, int(steps))
  yield found | {
    'tokens': config.batch_size * config.sequence_length,
    'finite': math.isfinite(float(held[1]['loss'])),
  }


def update(steps: str, *argv: str) -> Iterator[Found]:
  """Measures a config's optimizer update, of all weights at once."""
  config = parse(argv).config.resolved()
  run_update, *shapes = whole_update(config, devices(config.mesh))
  compiled = run_update.lower(*shapes).compile()
  yield {}
  params, state, grads = shapes
  held = [jax.jit(lambda: waves(params))(), zeros(state)]
  grads = jax.jit(lambda: noise(grads))()

  def run() -> Any:
    held[:] = compiled(*held, grads)
    return held

  yield measured(run, int(steps)) | {
    'elements': sum(x.size for x in jax.tree.leaves(params)),
    'finite': all(
      bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(held[0])
    ),
  }


def rates(steps: str) -> Iterator[Found]:
  """Measures the GPU's bytes and flops per second, in three precisions."""
  size = 8192
  product = jax.jit(jnp.matmul, static_argnames='precision')
  yield {}
  x = jnp.ones(2**30, jnp.float32)
  double = jax.jit(lambda x: 2 * x)
  copied = measured(lambda: double(x), int(steps))
  found = {key: copied[key] for key in ('device', 'software')}
  found['bandwidth'] = 8 * x.size / copied['seconds']
  for name, dtype, precision in (
    ('bfloat16', jnp.bfloat16, None),
    ('float32 as it is', jnp.float32, None),
    ('float32, highest', jnp.float32, 'highest'),
  ):
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    run = functools.partial(product, a, a, precision=precision)
    found[name] = 2 * size**3 / measured(run, int(steps))['seconds']
  yield found


def measured(run: Callable[[], Any], steps: int) -> Found:
  """Returns the seconds of a run and the peak memory of the first device."""
  return timed(run, jax.block_until_ready, steps) | {
    'device': jax.devices()[0].device_kind,
    'software': f'jax {jax.__version__}',
    'peak_bytes': machine.peak_bytes(),
  }


def timed(
  run: Callable[[], Any], wait: Callable[[Any], Any], steps: int
) -> Found:
  """Times the first run, and `steps` further runs in three rounds.

  Returns:
    `first`, the seconds of the first run, and `seconds`, those of a later run:
    the median of the means of the rounds.
  """

  def seconds(count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
      last = run()
    wait(last)
    return (time.perf_counter() - start) / count

  first = seconds(1)
  usual = statistics.median(seconds(max(1, steps // 3)) for _ in range(3))
  return {'seconds': usual, 'first': first}


def zeros(shapes: PyTree) -> PyTree:
  """Returns a tree of zeros, which serves as the optimizer's initial state."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def waves(shapes: PyTree) -> PyTree:
  """Returns made-up weights.

  The initialization of real weights would raise the peak memory.
  """

  def wave(x: jax.ShapeDtypeStruct) -> jax.Array:
    column = jax.lax.broadcasted_iota(jnp.float32, x.shape, len(x.shape) - 1)
    return (0.02 * jnp.cos(column)).astype(x.dtype)

  return jax.tree.map(wave, shapes)


def noise(shapes: PyTree) -> PyTree:
  """Returns random gradients, which have full rank."""
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  made = [
    jax.random.normal(key, x.shape, x.dtype)
    for key, x in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, made)


def made_up(x: jax.ShapeDtypeStruct) -> np.ndarray:
  """Returns an input of the step: float32 ones, or small integers."""
  if x.dtype == jnp.float32:
    return np.ones(x.shape, x.dtype)
  return np.resize(np.arange(x.shape[-1]), x.shape).astype(x.dtype) % 128
