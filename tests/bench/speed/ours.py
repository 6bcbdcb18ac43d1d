"""The JAX workloads of the speed benchmark, from this library and from optax.

Each workload is a function that returns `run, notes`. `run()` does the work
once and donates weights and state, as in training. `notes` has further
measurements, such as the seconds of compilation.
"""

import inspect
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from models.llama import Layers, llama
from train.engine import step as step_lib
from train.method import METHODS, VARIANTS
from train.plan.account import account

RANK, GAP = 128, 200
STAGGERED_GAP = 28
"""Steps over which the 56 matrices are refreshed, two in each step."""
BATCH, TIME = 4, 256
Run = Callable[[], Any]


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
  """Returns the name and options of every preset and variant, by its call."""
  found: dict[str, Any] = {f'{name}()': (name, {}) for name in METHODS}
  return found | {f'{x.name}({x.given})': (x.name, x.options) for x in VARIANTS}


def parameters(name: str) -> Mapping[str, inspect.Parameter]:
  """Returns the parameters of a preset."""
  return inspect.signature(METHODS[name].preset).parameters


def transformation(
  row: str, gap: Any = GAP, **more: Any
) -> optax.GradientTransformation:
  """Returns the optimizer of a row, at rank 128 or FRUGAL's default density."""
  if row == 'optax.adamw':
    return optax.adamw(0.01)
  name, options = rows()[row]
  # 'power' finds the first subspace fastest. Updates between two refreshes do
  # not depend on the finder.
  usual = {'rank': RANK, 'subspace': 'power'}
  usual |= dict.fromkeys(('gap', 'update_proj_gap'), gap)
  known = parameters(name)
  options = {k: v for k, v in usual.items() if k in known} | options | more
  return METHODS[name].preset(0.01, **options)


def batch(vocab_size: int) -> dict[str, np.ndarray]:
  """Returns a batch of random tokens [B, T]."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab_size, (BATCH, TIME + 1), dtype=np.int32)
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones((BATCH, TIME), np.float32),
    'positions': np.tile(np.arange(TIME, dtype=np.int32), (BATCH, 1)),
    'segments': np.ones((BATCH, TIME), np.int32),
  }


def step(row: str, size: str, **more: Any) -> tuple[Run, dict[str, Any]]:
  """Returns a run of the whole step of `train.pretrain`."""
  start = time.perf_counter()
  model = Layers(llama(size))
  tx = transformation(row, **more)
  run_step = step_lib.make_step(
    model, tx, schedule=optax.constant_schedule(0.01)
  )
  init = jax.jit(lambda key: step_lib.init(model.init(key), tx))
  held = [init(jax.random.key(0))]
  inputs = batch(model.config.vocab_size)
  ready = time.perf_counter()

  def run() -> None:
    held[0], metrics = run_step(held[0], inputs)
    jax.block_until_ready((held[0], metrics))

  run()
  first = time.perf_counter() - ready
  tokens = BATCH * TIME
  params = held[0].params
  flops = 6 * tokens * (size_of(params) - params['embed']['embedding'].size)
  # Attention: scores and weighted values of earlier positions only (half of
  # T x T), once forward and twice backward.
  flops += 6 * tokens * TIME * model.config.width * model.config.num_layers
  cost = update_cost(params, tx, row)
  return run, {
    'init': ready - start,
    'first': first,
    'flops': flops + cost['flops'],
    'bytes': cost['bytes'],
    'tokens': tokens,
  }


def update(
  row: str, size: str, gap: int = GAP, **more: Any
) -> tuple[Run, dict[str, Any]]:
  """Returns a run of the optimizer's update, between two refreshes."""
  tx = transformation(row, int(gap), **more)
  params = jax.jit(Layers(llama(size)).init)(jax.random.key(0))
  if row == 'OptaxGalore()':
    params = unstacked(params)
  grads = jax.jit(lambda x: jax.tree.map(lambda w: jnp.sin(1 + w), x))(params)

  def apply(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  start = time.perf_counter()
  compiled = jax.jit(apply, donate_argnums=(1, 2)).lower(grads, state, params)
  compiled = compiled.compile()
  notes = {'compile': time.perf_counter() - start}
  # `update_cost` counts all weights, but BAdam updates only a few of them.
  if row != 'Badam()':
    notes |= update_cost(params, tx, row)
  # This update contains the first refresh.
  held = [compiled(grads, state, params)]
  jax.block_until_ready(held)

  def run() -> None:
    params, state = held[0]
    held[0] = jax.block_until_ready(compiled(grads, state, params))

  return run, notes


def first(size: str, cache: str) -> tuple[Run, dict[str, Any]]:
  """Returns a run of the step, using a cache of compiled programs."""
  jax.config.update('jax_compilation_cache_dir', cache)
  return step('Galore()', size, subspace='power')


def staggered_step(finder: str, size: str) -> tuple[Run, dict[str, Any]]:
  """Returns a run of the whole step, with refreshes spread over the gap."""
  gap = galore_optax.Staggered(STAGGERED_GAP)
  return step('Galore()', size, subspace=finder, gap=gap)


def refresh(finder: str, size: str) -> tuple[Run, dict[str, Any]]:
  """Returns a run of an update that contains a warm refresh."""
  return update('Galore()', size, gap=1, subspace=finder)


def rates() -> tuple[Run, dict[str, Any]]:
  """Measures the flops and bytes per second of the machine."""

  def draw(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape)

  product = jax.jit(jnp.matmul)
  a, b = draw(2048, 2048), draw(2048, 2048)
  add = jax.jit(lambda x, y: x + 2 * y, donate_argnums=0)
  held = [draw(2**26), draw(2**26)]

  def copy() -> None:
    held[0] = jax.block_until_ready(add(*held))

  flops = 2 * 2048**3 / median(lambda: jax.block_until_ready(product(a, b)))
  return copy, {'flops': flops, 'bytes': 3 * 4 * 2**26 / median(copy)}


def compile_separate(finder: str, depth: str) -> tuple[Run, dict[str, Any]]:
  """Compiles an update of `depth` layers with seven separate matrices each."""
  return compiled(separate(int(depth)), finder)


def compile_stacked(finder: str, depth: str) -> tuple[Run, dict[str, Any]]:
  """Compiles an update of the same matrices, with the layers stacked."""
  shapes = {f'w{i}': (int(depth), *s) for i, s in enumerate(SHAPES)}
  return compiled({k: jnp.zeros(s) for k, s in shapes.items()}, finder)


def compile_shapes(finder: str, count: str) -> tuple[Run, dict[str, Any]]:
  """Compiles an update of 32 matrices that have `count` different shapes."""
  shapes = itertools.islice(
    itertools.cycle([(64, 64 + 8 * i) for i in range(int(count))]), 32
  )
  params = {f'w{i}': jnp.zeros(s) for i, s in enumerate(shapes)}
  return compiled(params, finder)


SHAPES = [(64, 64)] * 4 + [(64, 192)] * 3


def unstacked(params: Any) -> Any:
  """Returns params with a list of layers instead of stacked layers.

  optax.contrib.galore would treat stacked layers as one tensor.
  """
  layers = range(jax.tree.leaves(params['blocks'])[0].shape[0])
  blocks = [jax.tree.map(lambda x, i=i: x[i], params['blocks']) for i in layers]
  return params | {'blocks': blocks}


def separate(depth: int) -> dict[str, Any]:
  """Returns the matrices of a transformer whose layers are not stacked."""
  return {
    f'layer{i}': {f'w{j}': jnp.zeros(s) for j, s in enumerate(SHAPES)}
    for i in range(depth)
  }


def compiled(params: Any, finder: Any) -> tuple[Run, dict[str, Any]]:
  """Returns a run that compiles an update."""
  tx = galore_optax.galore(optax.adam(1e-3), rank=16, subspace=finder)
  state = tx.init(params)

  def run() -> None:
    # A new function in each run, because jit caches programs by function.
    jax.jit(lambda g, s: tx.update(g, s)).lower(params, state).compile()

  return run, {}


def update_cost(
  params: Any, tx: optax.GradientTransformation, row: str
) -> dict[str, float]:
  """Returns the minimal flops and bytes of an update.

  Bytes: gradients and bases are read once; weights and moments are read and
  written once. Flops: the products that project the gradient and project the
  update back.
  """
  name, options = rows().get(row, (row, {}))
  coordinates = options.get('subspace') in ('columns', 'entries')
  ranked = name in METHODS and {'rank', 'density'} & parameters(name).keys()
  products = ranked and not coordinates
  sums = account(params, jax.eval_shape(tx.init, params))
  weights = 4 * size_of(params)
  matrices = [x for x in jax.tree.leaves(params['blocks']) if x.ndim > 1]
  flops = sum(4 * RANK * x.size for x in matrices) if products else 0
  return {
    'flops': flops,
    'bytes': 3 * weights + sums.bases + 2 * sums.moments,
  }


def size_of(tree: Any) -> int:
  """Returns the number of elements of a tree."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def median(run: Run, rounds: int = 9) -> float:
  """Returns the median seconds of a run."""
  run()
  times = []
  for _ in range(rounds):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return float(np.median(times))
