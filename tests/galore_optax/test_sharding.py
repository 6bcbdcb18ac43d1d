"""Steps and states on meshes of eight devices equal those of one device."""

import contextlib
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_optax as go
from tests.galore_optax.every import PROJECTING, build, maker, makers
from tests.galore_optax.program import each, normal, run
from tests.rounding import distance, units

AXES = ('data', 'fsdp', 'tensor')
SHAPES = {'blocks': {'up': (2, 16, 24)}, 'w': (24, 40), 'embed': (16, 8)}
# The sizes of the mesh axes, and the mesh axes that shard the input and the
# output axis of a kernel.
LAYOUTS = {
  'data': ((8, 1, 1), (None, None)),
  'in': ((1, 8, 1), ('fsdp', None)),
  'out': ((1, 8, 1), (None, 'fsdp')),
  'tensor': ((1, 1, 8), (None, 'tensor')),
  'mixed': ((1, 4, 2), ('fsdp', 'tensor')),
}
LOW = dict(rank=4, gap=2)
GALORE = {
  'svd': dict(weight_decay=0.1),
  'gram': dict(subspace='gram'),
  'randomized': dict(subspace='randomized'),
  'power': dict(subspace='power'),
  'random': dict(subspace='random'),
  'coordinates': dict(subspace='coordinates'),
  'lazy': dict(subspace=go.Lazy('svd', memory=1)),
  'full': dict(side='full'),
  'rotate': dict(side='reverse_std', moments='rotate'),
  'staggered': dict(gap=go.Staggered(2)),
}
PRESETS = {
  name: maker('Galore', **LOW | options) for name, options in GALORE.items()
} | {
  'reset': lambda: go.galore(optax.adamw(0.1), moments='reset', **LOW),
  'chain': lambda: optax.chain(go.galore(**LOW), optax.adamw(0.1)),
  **makers(
    **LOW, min_size=0, block_size=5, scale_parameter=True, switch_every=1
  ),
  'packed': maker('Galore8bit', basis_bits=4, **LOW),
  'columns': maker('Frugal', gap=2, subspace='columns'),
  'entries': maker('Frugal', gap=2, subspace='entries'),
  'sign': maker('Frugal', density=0),
}


def weights(seed=0, shapes=SHAPES):
  shape = lambda x: isinstance(x, tuple)
  make = lambda shape: jnp.asarray(normal(shape, seed))
  return jax.tree.map(make, shapes, is_leaf=shape)


def mesh_of(layout, kind=AxisType.Auto):
  return jax.make_mesh(LAYOUTS[layout][0], AXES, axis_types=(kind,) * 3)


def put(tree, layout, mesh):
  """Shards all leaves by a layout."""

  def of_leaf(x):
    spec = PartitionSpec(*(None,) * (x.ndim - 2), *LAYOUTS[layout][1])
    return jax.device_put(x, NamedSharding(mesh, spec))

  return jax.tree.map(of_leaf, tree)


def one_by_one(jit):
  """Returns a context in which operations outside of `jit` wait for each other.

  On the CPU without jit, more than 32 programs may be queued that wait for a
  device. If the program that they wait for is not among the first 32, XLA ends
  the process. debug_nans waits for each operation, which avoids this.
  """
  return jax.debug_nans(not jit)


def last_weights(tx, params, grads, *, jit=True):
  with one_by_one(jit):
    state = (jax.jit(tx.init) if jit else tx.init)(params)
    return run(tx, params, grads, state=state, jit=jit)[-1].params


CODES = ('Galore8bit', 'packed')
# These presets run on all layouts and kinds of mesh. The others run only on the
# most general layout.
CORE = ('svd', 'Galore8bit', 'GaloreAdafactor', 'Fira')
KINDS = ('Explicit', 'Auto')
CASES = [
  *((name, 'mixed', 'Explicit', True) for name in PRESETS),
  *(
    (name, layout, kind, True)
    for name in CORE
    for layout in LAYOUTS
    for kind in KINDS
    if (layout, kind) != ('mixed', 'Explicit')
  ),
  *((name, 'mixed', 'Explicit', False) for name in (*CORE, 'Lomo')),
]


@each(
  ('name', 'layout', 'kind', 'jit'),
  CASES,
  # Stacks that are dealt out have a quick case below.
  quick=[('Lomo', 'mixed', 'Explicit', False)],
)
def test_a_mesh_is_one_device(name, layout, kind, jit):
  check_one_device(name, layout, kind, SHAPES, jit=jit)


# The layers of a stack are distributed over all eight devices, or over six.
STACKS = {'eight': (8, 16, 24), 'six': (6, 16, 24)}


@each(
  'name, layout',
  [
    (name, layout)
    for name in ('svd', 'full', 'rotate', 'staggered')
    for layout in LAYOUTS
  ],
  quick=[('svd', 'mixed')],
)
def test_a_stack_that_is_dealt_out_is_one_device(name, layout):
  check_one_device(name, layout, 'Explicit', STACKS)


def check_one_device(name, layout, kind, shapes, *, jit=True):
  mesh = mesh_of(layout, AxisType[kind])
  with jax.enable_x64(True):
    tx, start = PRESETS[name](), weights(0, shapes)
    grads = [weights(seed, shapes) for seed in (10, 20, 30)]
    want = last_weights(tx, start, grads)
    with jax.set_mesh(mesh):
      grads = [put(g, layout, mesh) for g in grads]
      ours = last_weights(tx, put(start, layout, mesh), grads, jit=jit)
  if name in CODES:
    # The tolerance allows for float32 scales, and for values half-way between
    # two codes, which may round to either. About one entry in a thousand may be
    # off by a hundredth of its update.
    assert distance(ours, want) < 1e-4
  else:
    # The tolerance allows for summing across devices in a different order.
    chex.assert_trees_all_close(ours, want, rtol=0, atol=1e-12)


class Deep:
  """A model for `layerwise` whose dimensions are divisible by eight devices."""

  def embed(self, params, batch):
    return batch['x'] @ params['embed']

  def block(self, layer_params, x):
    return x + jnp.tanh(x @ layer_params['up']) @ layer_params['down']

  def loss(self, params, x, batch):
    rest = (x @ params['w'] - batch['y']) ** 2
    return jnp.mean(rest), {'rest': jnp.mean(rest)}


DEEP = {'blocks': {'up': (3, 16, 24), 'down': (3, 24, 16)}}
DEEP |= {'w': (16, 40), 'embed': (16, 16)}
ONE_LAYER = build('Badam', switch_every=1)
WAYS = {
  'plain': lambda: go.layerwise(Deep(), PRESETS['svd']()),
  'clipped': lambda: go.layerwise(
    Deep(), PRESETS['Galore8bit'](), clip_norm=0.1
  ),
  'parts': lambda: go.layerwise(
    Deep(), PRESETS['GaloreAdafactor'](), microbatches=2
  ),
  'sums': lambda: go.layerwise(Deep(), PRESETS['staggered'](), accumulate=2),
  'sliced': lambda: go.layerwise(Deep(), build('Lomo'), slices={'w': 2}),
  'one layer': lambda: go.layerwise(Deep(), ONE_LAYER),
}


@each(
  ('way', 'layout', 'kind'),
  [
    *((way, 'mixed', kind) for way in WAYS for kind in KINDS),
    *(('plain', cut, 'Explicit') for cut in LAYOUTS if cut != 'mixed'),
  ],
  quick=[('sliced', 'mixed', 'Explicit')],
)
def test_a_layerwise_step_on_a_mesh_is_that_of_one_device(way, layout, kind):
  step, mesh = WAYS[way](), mesh_of(layout, AxisType[kind])

  def three_steps(params, batch):
    state, found = step.init(params), []
    for _ in range(3):
      params, state, metrics = jax.jit(step)(params, state, batch)
      found.append(metrics)
    return params, found

  with jax.enable_x64(True):
    data = {'x': (16, 16), 'y': (16, 40)}
    small = functools.partial(jax.tree.map, lambda x: 0.1 * x)
    params, batch = small((weights(0, DEEP), weights(1, data)))
    want = three_steps(params, batch)
    with jax.set_mesh(mesh):
      rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
      ours = three_steps(put(params, layout, mesh), jax.device_put(batch, rows))
  if kind == 'Explicit':
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(ours[1]))
    specs = lambda tree: [x.sharding.spec for x in jax.tree.leaves(tree)]
    assert specs(ours[0]) == specs(put(params, layout, mesh))
  # The tolerance allows for summing across devices in a different order. If
  # gradients are clipped, norms are float32, and a value half-way between two
  # codes may round to either.
  if way == 'clipped':
    assert distance(ours[0], want[0]) < 1e-4
  else:
    chex.assert_trees_all_close(ours[0], want[0], rtol=0, atol=1e-11)
  # The tolerance allows for norms that are float32 sums of three thousand
  # squares, whose errors average out.
  chex.assert_trees_all_close(ours[1], want[1], rtol=units(100))


@each(
  ('name', 'layout', 'kind'),
  [
    *((name, 'mixed', 'Explicit') for name in PRESETS),
    *((name, cut, 'Auto') for name in CORE for cut in ('in', 'out', 'mixed')),
  ],
  quick=[('svd', 'mixed', 'Explicit')],
)
def test_the_first_state_is_sharded_as_state_shardings_returns(
  name, layout, kind
):
  mesh, tx = mesh_of(layout, AxisType[kind]), PRESETS[name]()
  with jax.set_mesh(mesh):
    params = put(weights(), layout, mesh)
    state = tx.init(params)
    places = jax.tree.map(lambda x: x.sharding, params)
    places = go.state_shardings(tx, params, places)
  chex.assert_trees_all_equal_structs(state, places)
  for x, place in zip(*map(jax.tree.leaves, (state, places)), strict=True):
    assert x.sharding.is_equivalent_to(place, x.ndim)


@pytest.mark.parametrize('cut', [('fsdp', None), (None, 'fsdp')])
def test_moments_are_cut_along_n_and_bases_along_m(cut):
  mesh = jax.make_mesh((8,), ('fsdp',))
  place = NamedSharding(mesh, PartitionSpec(*cut))
  params = {'w': jax.ShapeDtypeStruct((24, 40), 'float32')}
  tx = build('Galore8bit', block_size=5, min_size=0, **LOW)
  state, _ = go.state_shardings(tx, params, {'w': place})
  spec = lambda x: tuple(x.spec)
  assert spec(state.basis['w']) == (None, 'fsdp')
  for moment in (state.inner[0].mu['w'], state.inner[0].nu['w']):
    assert spec(moment.codes) == spec(moment.scale) == (None, 'fsdp')
  assert spec(state.count) == spec(state.inner[0].count) == ()
  # 25 is not divisible by 8, so these moments are replicated.
  params = {'w': jax.ShapeDtypeStruct((24, 25), 'float32')}
  state, _ = go.state_shardings(build('Galore', **LOW), params, {'w': place})
  assert spec(state.basis['w']) == (None, 'fsdp')
  assert spec(state.inner[0].mu['w']) == (None, None)


def test_codes_of_a_stack_are_cut_along_it():
  mesh = jax.make_mesh((8,), ('fsdp',))
  tx = build('Galore8bit', block_size=5, min_size=0, **LOW)
  # 16 layers are divisible by 8 devices and are sharded. Three layers are not,
  # so codes are sharded along n instead.
  for length, cut in ((16, ('fsdp', None, None)), (3, (None, None, 'fsdp'))):
    params = {'up': jax.ShapeDtypeStruct((length, 24, 40), 'float32')}
    place = NamedSharding(mesh, PartitionSpec(None, 'fsdp'))
    state, _ = go.state_shardings(tx, params, {'up': place})
    moment = state.inner[0].nu['up']
    assert tuple(moment.codes.spec) == tuple(moment.scale.spec) == cut
    assert tuple(state.basis['up'].spec) == (None, None, 'fsdp')


def test_a_place_that_is_no_partition_raises():
  params = {'w': jnp.ones((24, 40))}
  with pytest.raises(ValueError, match='must be a NamedSharding for w, got'):
    go.state_shardings(build('Galore', rank=4), params, {'w': None})


WIDE = dict(rank=64)
BILL = {
  **{k: make for k, make in makers(**WIDE).items() if k in PROJECTING},
  'entries': maker('Frugal', subspace='entries'),
  'packed': maker('Galore8bit', basis_bits=4, **WIDE),
}


@each(
  ('name', 'cut'),
  [(name, cut) for name in BILL for cut in ('in', 'out')],
  quick=[('Galore', 'in'), ('GaloreAdafactor', 'out')],
)
def test_a_device_holds_an_eighth_of_the_state(name, cut):
  mesh = jax.make_mesh((8,), ('fsdp',))
  spec = PartitionSpec(None, *LAYOUTS[cut][1])
  # The number of blocks of 256 is divisible by eight devices.
  params = {'up': jax.ShapeDtypeStruct((3, 2048, 4096), 'float32')}
  tx, places = BILL[name](), {'up': NamedSharding(mesh, spec)}
  places = go.state_shardings(tx, params, places)
  state = jax.eval_shape(tx.init, params)
  pairs = list(zip(*map(jax.tree.leaves, (state, places)), strict=True))
  size = lambda x, shape: np.prod(shape, dtype=int) * x.dtype.itemsize
  whole = sum(size(x, x.shape) for x, _ in pairs)
  share = sum(size(x, place.shard_shape(x.shape)) for x, place in pairs)
  assert share <= 1.05 * whole / 8


@each('name', PRESETS, quick=['svd', 'GaloreAdafactor', 'Badam', 'ScaleSgd'])
def test_optax_finds_the_state_that_is_like_parameters(name):
  tx = PRESETS[name]()
  state = jax.eval_shape(tx.init, weights())
  seen = []
  mark = lambda x: seen.append(x) or x
  back = optax.tree.map_params(tx, mark, state)
  chex.assert_trees_all_equal_structs(back, state)
  # The remaining leaves are counters.
  rest = len(jax.tree.leaves(state)) - len(seen)
  assert rest <= 5 and (seen or name in ('sign', 'Lomo'))


class Layer(nnx.Module):
  def __init__(self, **options):
    self.up = nnx.Linear(24, 40, use_bias=False, rngs=nnx.Rngs(0), **options)


@each('kind', [AxisType.Auto, AxisType.Explicit], quick=[AxisType.Explicit])
def test_flax_optimizer_has_its_state_in_place(kind):
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(kind,))
  rows = NamedSharding(mesh, PartitionSpec('fsdp'))
  with jax.set_mesh(mesh):
    graph, state = nnx.split(Layer())
    model = nnx.merge(graph, jax.device_put(state, rows))
    tx = build('Galore', **LOW)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def places():
      galore = nnx.to_pure_dict(nnx.state(optimizer))['opt_state'][0]
      arrays = galore['basis'], galore['inner'][0]['mu']
      return [
        (x.shape, tuple(x.sharding.spec)) for x in jax.tree.leaves(arrays)
      ]

    cut = (None, 'fsdp')
    assert places() == [((4, 24), cut), ((4, 40), cut)]
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    nnx.jit(lambda *run: run[0].update(*run[1:]))(optimizer, model, grads)
    assert places() == [((4, 24), cut), ((4, 40), cut)]


@each('name', ['chain', 'Galore8bit', 'GaloreAdafactor'], quick=['chain'])
def test_axis_names_of_flax_apply_only_to_weights(name):
  # nnx.Optimizer copies the axis names of a variable to its state, whose arrays
  # have other dimensions.
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,))
  named = nnx.with_partitioning(nnx.initializers.ones, ('fsdp', None))
  with jax.set_mesh(mesh):
    model = Layer(kernel_init=named)
    rows = NamedSharding(mesh, PartitionSpec('fsdp'))
    nnx.update(model, jax.device_put(nnx.state(model), rows))
    params, tx = nnx.state(model, nnx.Param), PRESETS[name]()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    places = jax.tree.map(lambda x: x.sharding, params)
    places = go.state_shardings(tx, params, places)
    state = jax.jit(tx.init, out_shardings=places)(params)
    ours = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    leaves = map(jax.tree.leaves, (state, places))
    for x, same, place in zip(ours, *leaves, strict=True):
      assert x.shape == same.shape
      assert x.sharding.is_equivalent_to(place, x.ndim)
    # Some state must be sharded; it must not all be replicated.
    assert any(not x.is_fully_replicated for x in ours)
    nnx.jit(lambda *run: run[0].update(*run[1:]))(optimizer, model, params)
  assert model.up.kernel.get_metadata()
  assert (model.up.kernel[...] < 1).any()


def computations(text):
  """Returns the lines of each computation of a compiled program, by name."""
  found, name = {}, None
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
    if head:
      name = 'ENTRY' if head[1] else head[2]
    found.setdefault(name, []).append(line)
  return found


def unconditional(parts, name='ENTRY'):
  """Returns the lines that run at every step, outside of `cond` branches."""
  lines = [*parts[name]]
  calls = r'(?:calls|to_apply|body|condition)=%?([\w.\-]+)'
  for called in re.findall(calls, '\n'.join(parts[name])):
    lines += unconditional(parts, called)
  return lines


def elements(shape):
  """Returns the number of elements of an array from its shape as text."""
  return math.prod(map(int, filter(None, shape.split(','))))


def gathered(lines):
  """Returns the number of elements of each array that is all-gathered."""
  shapes = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', '\n'.join(lines))
  return list(map(elements, shapes))


def dealt(lines):
  """Returns the number of elements that a device receives per all-to-all."""
  found = re.findall(r'= (\(.*\)) all-to-all\(', '\n'.join(lines))
  return [sum(map(elements, re.findall(r'\w\[([\d,]*)\]', x))) for x in found]


@each(
  ('name', 'layout', 'kind', 'is_set'),
  [
    ('svd', 'in', 'Auto', True),
    ('svd', 'in', 'Auto', False),
    ('svd', 'out', 'Explicit', True),
    ('svd', 'out', 'Explicit', False),
    ('Fira', 'in', 'Auto', True),
    ('staggered', 'mixed', 'Auto', True),
    ('staggered', 'mixed', 'Auto', False),
  ],
  quick=[('svd', 'out', 'Explicit', True)],
)
def test_a_refresh_deals_a_stack_out_and_gathers_one_matrix_at_a_time(
  name, layout, kind, is_set
):
  mesh, tx = mesh_of(layout, AxisType[kind]), PRESETS[name]()
  params = {'up': (8, 64, 96), 'w': (64, 96), 'v': (64, 96)}
  with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
    params = put({k: jnp.ones(x) for k, x in params.items()}, layout, mesh)
    state = tx.init(params)
    places = jax.tree.map(lambda x: x.sharding, params)
    places = places, go.state_shardings(tx, params, places)
    update = jax.jit(tx.update, out_shardings=places)
    text = update.lower(params, state, params).compile().as_text()
  parts = computations(text)
  every = gathered(text.splitlines())
  assert ' conditional(' in text and max(every) == 64 * 96
  # The stack has eight matrices. Each device sends parts of all and receives
  # one whole matrix.
  assert max(dealt(text.splitlines())) == 64 * 96
  # Outside of refreshes, only a basis or a low-rank update of the stack is
  # gathered.
  assert 0 < max(gathered(unconditional(parts))) <= 8 * LOW['rank'] * 96
