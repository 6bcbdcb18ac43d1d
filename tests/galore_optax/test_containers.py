"""Every transformation computes the same, whatever container a tree is in.

The programs are compared, not their results: a container must not change an
operation, so the jaxprs of an update have equal text.
"""

import collections
import copy
import dataclasses
import functools
import re

import chex
import equinox as eqx
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import galore_optax as go
from galore_optax import containers
from tests.galore_optax.every import PRESETS, build, maker, makers
from tests.galore_optax.program import each, normal32

TRANSFORMATIONS = {
  'line': lambda: optax.chain(go.galore(rank=4), optax.adamw(0.1)),
  'reset': lambda: go.galore(optax.adamw(0.1), rank=4, moments='reset'),
  'rotate': lambda: go.galore(optax.adam(0.1), rank=4, moments='rotate'),
  'staggered': lambda: go.galore(
    optax.adam(0.1), rank=4, gap=go.Staggered(3), subspace='random'
  ),
  'inners': lambda: go.galore(
    go.Inners(optax.lion(0.1), optax.sgd(0.1)), rank=4
  ),
  **makers(
    rank=4, weight_decay=0.1, min_size=1, scale_parameter=True, blocks='b/.*'
  ),
  'density 0': maker('Frugal', density=0),
  'density 1': maker('Frugal', density=1),
  'quantize_state': lambda: go.quantize_state(optax.adamw(0.1), min_size=1),
  'grouped': lambda: go.grouped(
    PRESETS['Galore'], [go.Group('.*/bias', rate=0.5)]
  )(0.1, rank=4),
}


class Linear(eqx.Module):
  """A module with `__call__`. A tree of this type is callable."""

  bias: jax.Array
  kernel: jax.Array

  def __call__(self, x):
    return x @ self.kernel + self.bias


class Model(eqx.Module):
  a: Linear
  b: Linear

  def __call__(self, x):
    return self.b(self.a(x))


@flax.struct.dataclass
class Struct:
  a: dict
  b: dict


@chex.dataclass
class Mappable:
  a: dict
  b: dict


class NamedArray:
  """An array with named axes and the methods of haliax.

  As in haliax, the number of axes must be that of the array.
  """

  def __init__(self, array, axes):
    if hasattr(array, 'shape'):
      assert [size for _, size in axes] == [*array.shape]
    self.array, self.axes = array, axes

  def rename(self, renames):
    return NamedArray(self.array, [renames[name] for name, _ in self.axes])


jax.tree_util.register_pytree_with_keys(
  NamedArray,
  lambda x: (((jax.tree_util.GetAttrKey('array'), x.array),), x.axes),
  lambda axes, xs: NamedArray(*xs, axes),
)


class Keyless(collections.UserDict):
  """A mapping whose keys JAX does not see, as haiku's immutable mapping."""


jax.tree_util.register_pytree_node(
  Keyless,
  lambda x: (tuple(x.values()), tuple(x)),
  lambda keys, xs: Keyless(zip(keys, xs, strict=True)),
)


def plain(seed=0):
  """The stack 'b' has leading axes, as BAdam requires."""
  shapes = {
    'a': {'bias': (2, 9), 'kernel': (13, 9)},
    'b': {'bias': (2, 9), 'kernel': (2, 9, 17)},
  }
  return jax.tree.map(
    lambda shape: normal32(shape, sum(shape) + seed),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def named(x):
  return NamedArray(x, tuple(zip('xyz', x.shape, strict=False)))


CONTAINERS = {
  'nnx': lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
  'partitioned': lambda tree: jax.tree.map(
    lambda x: nn.Partitioned(x, (None,) * x.ndim), tree
  ),
  'logical': lambda tree: jax.tree.map(
    lambda x: nn.LogicallyPartitioned(x, tuple('xyz'[: x.ndim])), tree
  ),
  'equinox': lambda tree: Model(*(Linear(**x) for x in tree.values())),
  'haliax': lambda tree: jax.tree.map(named, tree),
  'frozen': FrozenDict,
  'keyless': lambda tree: Keyless(
    {name: Keyless(part) for name, part in tree.items()}
  ),
  'struct': lambda tree: Struct(**tree),
  'chex': lambda tree: Mappable(**tree),
}


def program(f, *args):
  """The text of a program, without addresses."""
  return program_and_results(f, *args)[0]


def program_and_results(f, *args):
  """The text of a program, and the shapes of its results."""
  text, results = jax.make_jaxpr(f, return_shape=True)(*args)
  return re.sub(r'0x[0-9a-f]+', '', str(text)), results


@functools.cache
def plain_case(name):
  """Returns a transformation, an example of its arguments, and its program."""
  tx, w, g = TRANSFORMATIONS[name](), plain(), plain(1)
  args = g, jax.eval_shape(tx.init, w), w
  return tx, args, program(tx.update, *args)


# Their programs have no parts that those of other transformations lack.
COMPOSED = ('Galore', 'Galore8bit', 'Apollo', 'ApolloMini', 'density 1')
DISTINCT = [name for name in TRANSFORMATIONS if name not in COMPOSED]
PAIRS = [(name, kind) for name in TRANSFORMATIONS for kind in CONTAINERS]


@each(
  'name, kind',
  PAIRS,
  quick=[
    *((name, 'nnx') for name in DISTINCT),
    *((name, 'equinox') for name in ('reset', 'inners', 'GaloreMuon')),
    *((name, 'equinox') for name in ('Frugal', 'density 0')),
    *(('line', kind) for kind in CONTAINERS),
  ],
)
def test_a_container_changes_no_operation(name, kind):
  into, (tx, (g, state, w), want) = CONTAINERS[kind], plain_case(name)
  boxed = jax.eval_shape(tx.init, into(w))
  values = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
  assert values == [(x.shape, x.dtype) for x in jax.tree.leaves(boxed)]
  boxed_args = into(g), boxed, into(w)
  found, (updates, after) = program_and_results(tx.update, *boxed_args)
  assert found == want
  assert jax.tree.structure(updates) == jax.tree.structure(into(g))
  assert jax.tree.structure(after) == jax.tree.structure(boxed)
  # The same state may follow gradients without boxes, as in `nnx.Optimizer`.
  if kind in ('nnx', 'haliax'):
    again = containers.opened(into(g)), boxed, containers.opened(into(w))
    assert program(tx.update, *again) == want


@each(
  'name, kind',
  [pair for pair in PAIRS if pair[0] in ('line', 'GaloreAdafactor', 'grouped')],
  quick=[('line', 'nnx'), ('line', 'haliax'), ('GaloreAdafactor', 'nnx')],
)
def test_stages_take_containers(name, kind):
  tx, into = TRANSFORMATIONS[name](), CONTAINERS[kind]
  w, g = plain(), plain(1)
  state, boxed = jax.eval_shape(tx.init, w), jax.eval_shape(tx.init, into(w))

  def update(g, state, w):
    state = tx.refresh(g, state)
    return tx.apply(tx.project(g, state), state, w, g), tx.due(state)

  assert program(update, g, state, w) == program(
    update, into(g), boxed, into(w)
  )
  (updates, after), _ = jax.eval_shape(update, into(g), boxed, into(w))
  assert jax.tree.structure(updates) == jax.tree.structure(into(g))
  assert jax.tree.structure(after) == jax.tree.structure(boxed)
  plans = [(p.path, p.rank) for p in tx.plan(w)]
  if kind != 'equinox':
    assert plans == [(p.path, p.rank) for p in tx.plan(into(w))]


@pytest.mark.parametrize('kind', CONTAINERS)
def test_describe_takes_containers(kind):
  tx = TRANSFORMATIONS['line']()
  assert go.describe(tx, CONTAINERS[kind](plain())) == go.describe(tx, plain())


@each(
  'kind', ['nnx', 'partitioned', 'logical', 'haliax', 'frozen'], quick=['nnx']
)
def test_layerwise_takes_containers(kind):

  class Layers:
    def embed(self, params, batch):
      return batch

    def block(self, layer_params, x):
      return x @ layer_params['w']

    def loss(self, params, x, batch):
      return jnp.mean(x**2), {}

  params = {'blocks': {'w': normal32((3, 6, 6))}}
  boxed = CONTAINERS[kind](params)
  batch = normal32((4, 6))
  results = []
  for w in (params, boxed):
    step = go.layerwise(Layers(), build('Galore', rank=4))
    new, state, _ = jax.jit(step)(w, step.init(w), batch)
    assert jax.tree.structure(new) == jax.tree.structure(w)
    results.append(jax.tree.leaves((new, state)))
  chex.assert_trees_all_equal(*results)


ODD = {
  'empty': jnp.zeros((0, 24)),
  'vector': jnp.zeros((0,)),
  'stack': jnp.zeros((0, 16, 24)),
  'step': jnp.int32(3),
  'flags': np.array([True, False]),
  'key': jax.random.key(0),
  'none': None,
}


@each('name', TRANSFORMATIONS, quick=['line', 'AdaLomo', 'quantize_state'])
def test_leaves_that_are_not_trained_are_left_out(name):
  tx = TRANSFORMATIONS[name]()
  w, g = plain(), plain(1)
  state = tx.init(w)
  updates, after = jax.jit(tx.update)(g, state, w)

  @jax.jit
  def odd_update(g, state, w):
    odd_w, odd_g = {**w, **ODD, 'act': jnp.tanh}, {**g, **ODD, 'act': None}
    return tx.update(odd_g, state, odd_w)

  odd_state = tx.init({**w, **ODD, 'act': jnp.tanh})
  odd, odd_after = odd_update(g, odd_state, w)
  chex.assert_trees_all_equal(
    [*map(jax.tree.leaves, (after, updates))],
    [jax.tree.leaves(odd_after), jax.tree.leaves({x: odd[x] for x in updates})],
  )
  assert odd['act'] is None and odd['none'] is None
  assert odd['step'] == 0 and odd['step'].dtype == jnp.int32
  assert not odd['flags'].any() and odd['empty'].shape == (0, 24)
  finite = [
    np.isfinite(x).all()
    for x in jax.tree.leaves(odd_after)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  # The first norm of a residual rule may be infinite.
  assert all(finite) or name in ('Fira', 'Apollo', 'ApolloMini')


def test_a_gradient_of_integers_has_a_zero_update():
  tx = optax.chain(go.galore(rank=4), optax.adam(0.1))
  w = {'w': normal32((9, 13)), 'steps': jnp.arange(3)}
  loss = lambda w: jnp.sum(w['w'] ** 2) + jnp.sum(w['steps'])
  g = jax.grad(loss, allow_int=True)(w)
  updates, _ = tx.update(g, tx.init(w), w)
  new = optax.apply_updates(w, updates)
  assert jnp.array_equal(new['steps'], w['steps'])


def test_numbers_are_weights():
  tx = build('Galore', rank=4)
  w = {'w': normal32((9, 13)), 'gain': 1.0}
  state = tx.init(w)
  updates, after = tx.update({'w': w['w'], 'gain': 0.5}, state, w)
  assert updates['gain'] < 0
  weak = jax.tree.map(lambda x: jax.typeof(x).weak_type, (state, after))
  assert not any(jax.tree.leaves(weak))


def test_parameters_may_be_the_whole_model():
  """A function among the leaves has no gradient, and frozen arrays neither."""
  model = eqx.nn.MLP(9, 9, 13, 1, key=jax.random.key(0))
  tx = optax.chain(go.galore(rank=4), optax.adamw(0.1))
  x = normal32((5, 9))
  loss = lambda model: jnp.mean(jax.vmap(model)(x) ** 2)
  first, g = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model)
  arrays = eqx.filter(model, eqx.is_array)
  state = tx.init(model)
  chex.assert_trees_all_equal(state, tx.init(arrays))
  # The function among the leaves is not an array, so `filter_jit` passes it to
  # the update as it is.
  update = eqx.filter_jit(tx.update)
  updates, _ = update(g, state, model)
  want, _ = update(g, state, arrays)
  chex.assert_trees_all_equal(updates, want)
  assert loss(eqx.apply_updates(model, updates)) < first


def test_a_tree_without_arrays_raises():
  @dataclasses.dataclass
  class NotRegistered:
    w: jax.Array

  tx = go.galore(optax.adam(0.1), rank=4)
  with pytest.raises(TypeError, match='leaves of type NotRegistered'):
    tx.init(NotRegistered(normal32((9, 13))))


@each('name', TRANSFORMATIONS, quick=DISTINCT)
def test_the_argument_of_init_has_a_name(name):
  tx = TRANSFORMATIONS[name]()
  state = jax.eval_shape(lambda w: tx.init(params=w), plain())
  chex.assert_trees_all_equal_shapes_and_dtypes(
    state, jax.eval_shape(tx.init, plain())
  )


REBUILD = {
  '_replace': lambda tx: tx._replace(init=tx.init),
  'map': lambda tx: jax.tree.map(lambda f: f, tx),
  'copy': copy.copy,
  'deepcopy': copy.deepcopy,
}


@each(
  'name, way',
  [(name, way) for name in TRANSFORMATIONS for way in REBUILD],
  quick=[*(('line', way) for way in REBUILD), ('Badam', '_replace')],
)
def test_a_rebuilt_transformation_works_in_a_chain(name, way):
  tx = TRANSFORMATIONS[name]()
  chains = [
    optax.chain(one, optax.scale(1.0)) for one in (tx, REBUILD[way](tx))
  ]
  w, g = plain(), plain(1)
  programs = [
    program(chain.update, g, jax.eval_shape(chain.init, w), w)
    for chain in chains
  ]
  assert programs[0] == programs[1]


def test_a_rebuilt_transformation_has_no_stages():
  tx = go.galore(optax.adam(0.1), rank=4)
  with pytest.raises(AttributeError, match='rebuilt from its `init`'):
    tx._replace(init=tx.init).refresh(plain(), None)
  with pytest.raises(ValueError, match='tx must be a galore'):
    go.quantize_bases(tx._replace(init=tx.init))


def test_gradients_and_results_of_boxes():
  tree = {'w': nnx.Param(jnp.ones(2)), 'act': abs, 'step': 3}
  opened = containers.opened(tree)
  assert opened['act'] is None and opened['step'] is None
  assert isinstance(opened['w'], jax.Array)
  closed = containers.closed({**opened, 'w': jnp.zeros(2)}, tree)
  assert isinstance(closed['w'], nnx.Param) and closed['act'] is abs
  assert not closed['w'][...].any()


def test_variables_keep_their_own_metadata():
  """Boxes of state have other axis names; the parameters keep theirs."""
  with jax.set_mesh(jax.make_mesh((1, 1), ('x', 'y'))):
    w = {'w': nnx.Param(normal32((8, 16)), out_sharding=('x', 'y'))}
  tx = go.galore(optax.adam(0.1), rank=4)
  state = tx.init(w)
  assert w['w'].get_metadata()['out_sharding'] == ('x', 'y')
  mu = state.inner[0].mu['w']
  assert isinstance(mu, nnx.Param) and mu[...].shape == (4, 16)
  assert mu.get_metadata()['out_sharding'] == (None, ('y', 'x'))
  basis = state.basis['w'].get_metadata()['out_sharding']
  assert basis == (None, ('x', 'y'))


def test_gradients_of_integers_may_be_floating():
  params = {'w': jnp.asarray(normal32((8, 12))), 'step': jnp.int32(3)}
  grads = {**params, 'step': jnp.float32(1)}
  for make in TRANSFORMATIONS['Galore'], TRANSFORMATIONS['Apollo']:
    tx = make()
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates['step'] == 0
    assert optax.apply_updates(params, updates)['step'] == 3


def test_a_box_that_jax_does_not_flatten_is_named():
  class Box:
    def unbox(self):
      return 1.0

    def replace_boxed(self, val):
      return val

  with pytest.raises(TypeError, match='got leaves of type Box'):
    TRANSFORMATIONS['Galore']().init({'w': Box()})
