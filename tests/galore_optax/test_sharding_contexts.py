"""Meshes as callers provide them: set, only on the arrays, or automatic."""

import contextlib
import functools
import inspect
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_optax as go
from galore_optax import closures
from tests.galore_optax.every import PRESETS as EVERY
from tests.galore_optax.every import maker
from tests.galore_optax.program import each, normal32, run
from tests.galore_optax.test_sharding import CORE, PRESETS, one_by_one

SHAPES = {'blocks': {'up': (3, 16, 24)}, 'w': (24, 40)}
LOW = dict(rank=4, gap=2)
SMALL = dict(min_size=0, block_size=5)


def weights(seed=0, shapes=SHAPES):
  is_shape = lambda x: isinstance(x, tuple)
  make = lambda shape: jnp.asarray(normal32(shape, seed))
  return jax.tree.map(make, shapes, is_leaf=is_shape)


def mesh_of(*sizes, kind=AxisType.Explicit):
  names = ('data', 'fsdp')[-len(sizes) :]
  return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


def put(tree, mesh, *cut):
  """Shards the matrices of all leaves, by default along their rows."""
  cut = cut or ('fsdp', None)

  def of_leaf(x):
    spec = PartitionSpec(*(None,) * (x.ndim - 2), *cut)
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(of_leaf, tree)


def two_steps(tx, params, *, jit=True):
  """Returns the parameters and the state after two updates."""

  def times(factor):
    return lambda params: jax.tree.map(lambda x: factor * x, params)

  with one_by_one(jit):
    last = run(tx, params, [times(0.5), times(1.5)], jit=jit)[-1]
  return last.params, last.state


def inject(f, *static):
  return optax.inject_hyperparams(f, static_args=static)


def injected(name):
  """Returns a preset whose floating-point options are injected."""
  preset = EVERY[name]
  defaults = {
    x.name: x.default for x in inspect.signature(preset).parameters.values()
  }
  static = {key for key, x in defaults.items() if not isinstance(x, float)}
  # The density determines shapes.
  static = (static | {'density'}) & defaults.keys() - {'learning_rate'}
  sizes = {**LOW, **SMALL, 'switch_every': 1}
  options = {key: x for key, x in sizes.items() if key in defaults}
  return inject(preset, *static)(0.1, **options)


INJECTED = {
  **{name: functools.partial(injected, name) for name in EVERY},
  'chain': lambda: inject(
    lambda rate: optax.chain(go.galore(**LOW), optax.adamw(rate))
  )(0.1),
  'rule': lambda: inject(
    lambda rate, decay: go.galore(
      optax.adamw(rate, weight_decay=decay),
      residual=go.residual.Sign(rate),
      **LOW,
    )
  )(0.1, 0.01),
  'quantized': lambda: inject(
    lambda rate: go.quantize_state(optax.adamw(rate), **SMALL)
  )(0.1),
  'inner': lambda: go.galore(inject(optax.adamw)(0.1), **LOW),
  'stage': lambda: optax.chain(go.galore(**LOW), inject(optax.adamw)(0.1)),
}
QUICK = ('Galore', 'chain', 'Badam')
# Each preset on both kinds of mesh, and some of them without `jit`.
CASES = [
  *((name, is_set, True) for name in INJECTED for is_set in (True, False)),
  *((name, is_set, False) for name in QUICK for is_set in (True, False)),
]


@each(
  ('name', 'is_set', 'jit'),
  CASES,
  quick=[('Badam', False, True)],
)
def test_injected_numbers_work_on_an_explicit_mesh(name, is_set, jit):
  mesh = mesh_of(8)
  want, _ = two_steps(INJECTED[name](), weights())
  with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
    params = put(weights(), mesh)
    ours, _ = two_steps(INJECTED[name](), params, jit=jit)
  # Codes of values half-way between two codes may differ.
  chex.assert_trees_all_close(ours, want, rtol=0, atol=1e-4)
  for x, y in zip(*map(jax.tree.leaves, (ours, params)), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_describe_reads_injected_numbers_on_an_explicit_mesh():
  mesh = mesh_of(8)
  want = str(go.describe(INJECTED['chain'](), weights()))
  with jax.set_mesh(mesh):
    params = put(weights(), mesh)
    assert str(go.describe(INJECTED['chain'](), params)) == want
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params
    )
    assert str(go.describe(INJECTED['chain'](), shapes)) == want


@each(
  ('name', 'jit'),
  [
    *((name, True) for name in PRESETS),
    *((name, False) for name in (*CORE, 'Badam')),
  ],
  quick=[('svd', True)],
)
def test_without_a_set_mesh_the_arrays_determine_it(name, jit):
  mesh = mesh_of(8)
  with jax.set_mesh(mesh):
    want = two_steps(PRESETS[name](), put(weights(), mesh), jit=jit)
  ours = two_steps(PRESETS[name](), put(weights(), mesh), jit=jit)
  chex.assert_trees_all_equal(ours, want)
  for x, y in zip(*map(jax.tree.leaves, (ours, want)), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


@pytest.mark.parametrize('jit', [True, False])
def test_each_stage_works_without_a_set_mesh(jit):
  tx, mesh = PRESETS['svd'](), mesh_of(8)

  def stages(params, jit):
    maybe_jit = jax.jit if jit else lambda f: f
    state = maybe_jit(tx.refresh)(params, tx.init(params))
    low = maybe_jit(tx.project)(params, state)
    return maybe_jit(tx.apply)(low, state, params, params), low

  one = weights(shapes={'w': SHAPES['w']})
  want = jax.tree.map(np.asarray, stages(one, jit=True))
  ours = stages(put(one, mesh), jit)
  chex.assert_trees_all_close(ours, want, rtol=0, atol=1e-5)
  assert tuple(ours[1]['w'].sharding.spec) == (None, 'fsdp')


def test_an_init_that_reads_params_from_a_closure_is_placed():
  tx, mesh = PRESETS['svd'](), mesh_of(8)
  params = put(weights(), mesh)
  # The shardings that `init` sets need the devices, which the weights are not
  # passed to determine. JAX raises this error for optax.adamw too.
  with pytest.raises(ValueError, match=r'jax\.set_mesh'):
    jax.jit(tx.init)(params)
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: tx.init(params))()
  assert tuple(state[0].basis['w'].sharding.spec) == (None, 'fsdp')


LARGER = {
  'blocks': {'up': (3, 64, 192), 'down': (3, 192, 64)},
  'w': (64, 192),
  'v': (192, 64),
}
WIDE = dict(rank=16, gap=2)
STATES = PRESETS | {
  'Galore8bit': maker('Galore8bit', min_size=0, **WIDE),
  'short blocks': maker('Galore8bit', min_size=0, block_size=24, **WIDE),
  'packed': maker('Galore8bit', min_size=0, basis_bits=4, **WIDE),
  'momentum': lambda: optax.chain(
    go.galore(**WIDE), go.quantize_state(optax.trace(0.9), min_size=0)
  ),
  'quantized': lambda: go.quantize_state(optax.adamw(0.1), min_size=0),
  'whole leaf': lambda: go.quantize_state(
    optax.lamb(0.1), min_size=0, elementwise=False
  ),
}
MESHES = {
  'rows': ((8,), ('fsdp', None)),
  'columns': ((8,), (None, 'fsdp')),
  'both': ((2, 4), ('data', 'fsdp')),
  'some': ((2, 4), (None, 'fsdp')),
}


def bytes_of(tree, device):
  shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
  return sum(shard.data.nbytes for shard in shards if shard.device == device)


@each(
  ('name', 'layout', 'jit'),
  [
    *((name, 'both', True) for name in STATES),
    *(
      (name, layout, True)
      for name in ('svd', 'Galore8bit', 'packed', 'momentum', 'quantized')
      for layout in MESHES
      if layout != 'both'
    ),
    *((name, 'rows', False) for name in ('svd', 'Galore8bit', 'quantized')),
  ],
  quick=[('quantized', 'some', True)],
)
def test_updates_keep_the_sharding_of_the_state(name, layout, jit):
  sizes, cut = MESHES[layout]
  mesh, tx = mesh_of(*sizes, kind=AxisType.Auto), STATES[name]()
  params = put(weights(shapes=LARGER), mesh, *cut)
  update = jax.jit(tx.update) if jit else tx.update
  state = tx.init(params)
  most = lambda tree: max(bytes_of(tree, x) for x in mesh.devices.flat)
  first = most(state)
  for _ in range(3):
    # Without waiting, three steps would run at the same time, and XLA's threads
    # would wait for each other with all their cores.
    _, state = jax.block_until_ready(update(params, state, params))
    assert most(state) <= first


def test_a_state_that_stays_sharded_compiles_once():
  mesh, tx = mesh_of(8, kind=AxisType.Auto), STATES['Galore8bit']()
  params = put(weights(shapes={'w': (64, 192)}), mesh)
  traces = []

  @jax.jit
  def update(state):
    traces.append(None)
    return tx.update(params, state, params)[1]

  places = jax.tree.map(lambda x: x.sharding, params)
  places = go.state_shardings(tx, params, places)
  state = jax.jit(tx.init, out_shardings=places)(params)
  # The counters that `init` returns are on the mesh too.
  for _ in range(3):
    state = update(state)
  assert len(traces) == 1


# `shard_map` maps each shard by `vmap`.
@each('way', ['scan', 'vmap', 'shard_map'], quick=['scan', 'shard_map'])
def test_quantized_state_is_updated_inside_transformations(way):
  mesh = mesh_of(8, kind=AxisType.Auto)
  tx = go.quantize_state(optax.adam(0.1), min_size=0, block_size=8)
  params = weights(shapes={'w': (8, 16, 24)})

  def step(params, state):
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state

  def scanned(params):
    steps = lambda carry, _: (step(*carry), None)
    return jax.lax.scan(steps, (params, tx.init(params)), length=2)[0]

  mapped = jax.vmap(scanned)
  rows = PartitionSpec('fsdp')
  ways = {
    'scan': scanned,
    'vmap': mapped,
    'shard_map': jax.shard_map(
      mapped, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
    ),
  }
  one_device = scanned if way == 'scan' else mapped
  want = jax.jit(one_device)(params)
  ours = jax.jit(ways[way])(jax.device_put(params, NamedSharding(mesh, rows)))
  chex.assert_trees_all_equal(ours, want)


def test_state_of_one_layer_is_sharded_like_its_weight():
  mesh = mesh_of(8, kind=AxisType.Auto)
  state = PRESETS['Badam']().init(put(weights(), mesh))
  assert tuple(state.block.inner.mu['blocks']['up'].sharding.spec) == (
    'fsdp',
    None,
  )


def test_arrays_are_replaced_in_everything_that_holds_a_function():
  two, three = jnp.float32(2), jnp.float32(3)

  def times(x, rate=two):
    return x * rate

  def recursive(n):
    return two if n == 0 else recursive(n - 1)

  swap = lambda x: three if x is two else x
  replaced = functools.partial(closures.with_arrays, replace=swap)
  assert replaced(times)(1) == 3
  assert replaced(functools.partial(times, rate=two))(1) == 3
  assert replaced(lambda: recursive(0))() == 3
  assert replaced({'a': [two]}) == {'a': [three]}
  tx = go.galore(optax.scale(two), rank=2)
  copy = replaced(tx)
  params = {'w': jnp.ones((4, 6))}
  step = lambda tx: tx.update(params, tx.init(params), params)[0]['w']
  chex.assert_trees_all_close(step(copy), 1.5 * step(tx), rtol=1e-6)
  assert type(copy) is go.Galore and copy.stages is not tx.stages
  # An object without the array is returned as is.
  other = go.galore(optax.scale(three), rank=2)
  assert replaced(other) is other


MANY = """
import jax, numpy as np, optax, galore_optax
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
shapes = [(3, 256, 256), (3, 256, 768), (3, 768, 256)]
rng = np.random.default_rng(0)
params = [jax.device_put(rng.normal(size=x).astype('f'), rows) for x in shapes]
tx = galore_optax.galore(optax.adamw(0.1), rank=32, gap=2)
state, update = tx.init(params), jax.jit(tx.update)
for _ in range(3):
  _, state = jax.block_until_ready(update(params, state, params))
"""


@pytest.mark.slow
def test_eight_cpu_devices_refresh_with_one_thread_of_lapack_each():
  # With more threads, eight decompositions at the same time block each other
  # for minutes, and XLA ends the process.
  env = os.environ | {
    'OPENBLAS_NUM_THREADS': '1',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
    'JAX_PLATFORMS': 'cpu',
  }
  root = pathlib.Path(__file__).parent.parent.parent
  command = [sys.executable, '-c', MANY]
  subprocess.run(command, check=True, cwd=root, env=env, timeout=90)


@pytest.mark.parametrize('bias', [np.ones(16), jnp.ones(16), 1.0])
def test_an_array_on_no_mesh_does_not_unshard_the_state_of_others(bias):
  mesh = mesh_of(8, kind=AxisType.Auto)
  params = put(weights(shapes={'w': (24, 40)}), mesh) | {'bias': bias}
  state = go.galore(optax.adam(0.1), **LOW).init(params)
  fsdp = PartitionSpec(None, 'fsdp')
  assert state.basis['w'].sharding.spec == fsdp
  assert state.inner[0].mu['w'].sharding.spec == fsdp
  assert state.inner[0].mu['bias'].sharding.is_fully_replicated
  assert len(state.count.sharding.device_set) == 8
