"""What is timed of ours, and of optax's: functions that return `run, notes`.

`run()` does the work once, on weights and state that are donated as in
training; notes say what it took to get there.
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
from train import step as step_lib
from train.method import METHODS, VARIANTS
from train.plan.account import account

RANK, GAP = 128, 200
STAGGERED_GAP = 28  # two matrices of 56 at a step
BATCH, TIME = 4, 256
Run = Callable[[], Any]


def rows() -> dict[str, tuple[str, dict[str, Any]]]:
  """Returns every preset by its call: its name and its options."""
  found: dict[str, Any] = {f'{name}()': (name, {}) for name in METHODS}
  return found | {f'{x.name}({x.given})': (x.name, x.options) for x in VARIANTS}


def parameters(name: str) -> Mapping[str, inspect.Parameter]:
  """Returns what a preset can be given."""
  return inspect.signature(METHODS[name].preset).parameters


def transformation(
  row: str, gap: Any = GAP, **more: Any
) -> optax.GradientTransformation:
  """Returns a preset at rank 128, or the quarter that FRUGAL takes."""
  if row == 'optax.adamw':
    return optax.adamw(0.01)
  name, options = rows()[row]
  # The first subspace is found soonest by 'power'; between two it makes no
  # difference.
  usual = {'rank': RANK, 'subspace': 'power'}
  usual |= dict.fromkeys(('gap', 'update_proj_gap'), gap)
  known = parameters(name)
  options = {k: v for k, v in usual.items() if k in known} | options | more
  return METHODS[name].preset(0.01, **options)


def batch(vocab_size: int) -> dict[str, np.ndarray]:
  """Returns random tokens [B, T]."""
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
  """The whole step that `train.pretrain` runs."""
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
  # Scores and their sum of values, what is not later alone, three times.
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
  """The optimizer's part of a step, between two refreshes."""
  tx = transformation(row, int(gap), **more)
  params = jax.jit(Layers(llama(size)).init)(jax.random.key(0))
  if row == 'OptaxGalore()':
    params = unstacked(params)
  grads = jax.jit(lambda x: jax.tree.map(lambda w: jnp.sin(1 + w), x))(params)

  def apply(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  start = time.perf_counter()
  compiled = jax.jit(apply, donate_argnums=(1, 2)).lower(grads, state, params)
  compiled = compiled.compile()
  notes = {'compile': time.perf_counter() - start}
  if row != 'Badam()':  # It touches few of the weights.
    notes |= update_cost(params, tx, row)
  held = [compiled(grads, state, params)]  # The first refresh.
  jax.block_until_ready(held)

  def run() -> None:
    params, state = held[0]
    held[0] = jax.block_until_ready(compiled(grads, state, params))

  return run, notes


def first(size: str, cache: str) -> tuple[Run, dict[str, Any]]:
  """The first step, with a cache of compiled programs."""
  jax.config.update('jax_compilation_cache_dir', cache)
  return step('Galore()', size, subspace='power')


def staggered_step(finder: str, size: str) -> tuple[Run, dict[str, Any]]:
  """The whole step where refreshes are spread over the gap."""
  gap = galore_optax.Staggered(STAGGERED_GAP)
  return step('Galore()', size, subspace=finder, gap=gap)


def refresh(finder: str, size: str) -> tuple[Run, dict[str, Any]]:
  """An update with a warm refresh in it."""
  return update('Galore()', size, gap=1, subspace=finder)


def rates() -> tuple[Run, dict[str, Any]]:
  """What the machine can do: flops and bytes a second."""
  draw = lambda *shape: jax.random.normal(jax.random.key(0), shape)
  product = jax.jit(jnp.matmul)
  a, b = draw(2048, 2048), draw(2048, 2048)
  add = jax.jit(lambda x, y: x + 2 * y, donate_argnums=0)
  held = [draw(2**26), draw(2**26)]

  def copy() -> None:
    held[0] = jax.block_until_ready(add(*held))

  flops = 2 * 2048**3 / median(lambda: jax.block_until_ready(product(a, b)))
  return copy, {'flops': flops, 'bytes': 3 * 4 * 2**26 / median(copy)}


def compile_separate(finder: str, depth: str) -> tuple[Run, dict[str, Any]]:
  """Compiling an update of `depth` layers of seven matrices, one by one."""
  return compiled(separate(int(depth)), finder)


def compile_stacked(finder: str, depth: str) -> tuple[Run, dict[str, Any]]:
  """The same matrices on a leading axis."""
  shapes = {f'w{i}': (int(depth), *s) for i, s in enumerate(SHAPES)}
  return compiled({k: jnp.zeros(s) for k, s in shapes.items()}, finder)


def compile_shapes(finder: str, count: str) -> tuple[Run, dict[str, Any]]:
  """Compiling an update of 32 matrices of so many shapes."""
  shapes = itertools.islice(
    itertools.cycle([(64, 64 + 8 * i) for i in range(int(count))]), 32
  )
  params = {f'w{i}': jnp.zeros(s) for i, s in enumerate(shapes)}
  return compiled(params, finder)


SHAPES = [(64, 64)] * 4 + [(64, 192)] * 3


def unstacked(params: Any) -> Any:
  """Returns the layers one by one: the peer takes a stack for a matrix."""
  layers = range(jax.tree.leaves(params['blocks'])[0].shape[0])
  blocks = [jax.tree.map(lambda x, i=i: x[i], params['blocks']) for i in layers]
  return params | {'blocks': blocks}


def separate(depth: int) -> dict[str, Any]:
  """Returns layers of a transformer that is not stacked."""
  return {
    f'layer{i}': {f'w{j}': jnp.zeros(s) for j, s in enumerate(SHAPES)}
    for i in range(depth)
  }


def compiled(params: Any, finder: Any) -> tuple[Run, dict[str, Any]]:
  """Returns a run that compiles an update."""
  tx = galore_optax.galore(optax.adam(1e-3), rank=16, subspace=finder)
  state = tx.init(params)

  def run() -> None:
    # Another function each time: nothing is remembered.
    jax.jit(lambda g, s: tx.update(g, s)).lower(params, state).compile()

  return run, {}


def update_cost(
  params: Any, tx: optax.GradientTransformation, row: str
) -> dict[str, float]:
  """Returns the flops and the bytes that an update cannot do without.

  Bytes: each gradient read, each weight and what the optimizer keeps read and
  written, a basis read. Flops: a low rank's products with the basis, there and
  back.
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
  """Returns the number of elements."""
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
