"""The optimizer in flax's NNX examples (flax 0.12.8, commit 18f8f31)."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType

import galore_optax as go
from tests.galore_optax.program import each
from tests.trainers import program


class Count(nnx.Variable):
  pass


class Linear(nnx.Module):
  def __init__(self, inputs, outputs, *, rngs, names=None):
    key = rngs.params()
    metadata = {'out_sharding': names} if names else {}
    w = jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    self.w = nnx.Param(w, **metadata)
    self.b = nnx.Param(jnp.zeros((outputs,)))

  def __call__(self, x):
    return x @ self.w[...] + self.b[...][None]


class MLP(nnx.Module):
  def __init__(self, *, rngs, names=(None, None)):
    self.count = Count(jnp.array(0))
    self.up = Linear(16, 24, rngs=rngs, names=names[0])
    self.down = Linear(24, 16, rngs=rngs, names=names[1])

  def __call__(self, x):
    self.count[...] += 1
    return self.down(jax.nn.relu(self.up(x)))


class TrainState(train_state.TrainState):
  counts: nnx.State
  graphdef: Any


def test_a_train_state_of_an_nnx_state():
  # examples/nnx_toy_examples/03_train_state.py
  model = MLP(rngs=nnx.Rngs(0))
  graphdef, params, counts = nnx.split(model, nnx.Param, Count)
  state = TrainState.create(
    apply_fn=None,
    graphdef=graphdef,
    params=params,
    tx=program.line(),
    counts=counts,
  )
  program.assert_low_rank(state.opt_state, params)
  program.assert_same_as_plain(params)

  @jax.jit
  def step(state, batch):
    x, y = batch

    def loss_fn(params):
      model = nnx.merge(state.graphdef, params, state.counts, copy=True)
      return jnp.mean((model(x) - y) ** 2), nnx.state(model, Count)

    grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, counts), grads = grad(state.params)
    return state.apply_gradients(grads=grads, counts=counts), loss

  losses = []
  for batch in program.data(steps=6):
    state, loss = step(state, batch)
    losses.append(float(loss))
  program.assert_falls(losses)
  assert step._cache_size() == 2
  model = nnx.merge(state.graphdef, state.params, state.counts)
  assert model.count[...] == 6


@nnx.jit
def step_of_optimizer(model, optimizer, x, y):
  """One step of a model and its `nnx.Optimizer`, as flax's examples have it."""

  def loss_fn(model):
    return jnp.mean((model(x) - y) ** 2)

  loss, grads = nnx.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return loss


def test_an_nnx_optimizer():
  # examples/mnist/train.py
  model = MLP(rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, program.line(), wrt=nnx.Param)
  program.assert_low_rank(
    nnx.state(optimizer)['opt_state'], nnx.state(model, nnx.Param)
  )

  losses = [
    float(step_of_optimizer(model, optimizer, *batch))
    for batch in program.data(steps=6)
  ]
  program.assert_falls(losses)


MESHES = {'fsdp': (8, 1), 'tensor': (1, 8), 'both': (4, 2)}


@each(
  'kind, sizes',
  itertools.product((AxisType.Auto, AxisType.Explicit), MESHES),
  quick=[(AxisType.Explicit, 'both')],
)
def test_no_device_holds_a_whole_copy_of_the_state(sizes, kind):
  # examples/gemma/train.py makes model and optimizer under `jax.set_mesh`. The
  # names of a parameter are mesh axes.
  names = ('fsdp', 'tensor'), ('tensor', 'fsdp')
  mesh = jax.make_mesh(MESHES[sizes], names[0], axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    model = MLP(rngs=nnx.Rngs(0), names=names)
    optimizer = nnx.Optimizer(model, program.line(8), wrt=nnx.Param)
  params = nnx.state(model, nnx.Param)
  low = [
    x
    for x in jax.tree.leaves(program.unboxed(nnx.state(optimizer)))
    if x.ndim > 1
  ]
  assert len(low) == 6 and program.unboxed(params)
  for x in low:
    assert {s.data.size for s in x.addressable_shards} == {x.size // 8}


@each('sizes', MESHES, quick=['both'])
def test_specs_of_an_abstract_optimizer_are_those_of_state_shardings(sizes):
  # nnx.get_partition_spec of an abstract model and optimizer, as in flax's
  # guides and in MaxText's NNX path.
  names = ('fsdp', 'tensor'), ('tensor', 'fsdp')
  mesh = jax.make_mesh(MESHES[sizes], names[0], axis_types=(AxisType.Auto,) * 2)
  tx = program.line(8)

  def create():
    model = MLP(rngs=nnx.Rngs(0), names=names)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

  with jax.set_mesh(mesh):
    model, optimizer = nnx.eval_shape(create)
    places = [
      nnx.get_named_sharding(nnx.state(part), mesh)
      for part in (model, optimizer)
    ]
  of_params = program.unboxed(nnx.filter_state(places[0], nnx.Param))
  wanted = go.state_shardings(tx, nnx.state(model, nnx.Param), of_params)
  shapes = program.by_path(nnx.state(optimizer)['opt_state'])
  found = program.by_path(places[1]['opt_state'])
  wanted = program.by_path(wanted)
  assert found.keys() == wanted.keys() == shapes.keys()
  for path, x in shapes.items():
    assert found[path].is_equivalent_to(wanted[path], x.ndim), path


def test_gradients_of_a_state_sharded_on_a_mesh_train():
  # examples/nnx_toy_examples/10_fsdp_and_optimizer.py with an optax optimizer:
  # everything is made inside nnx.jit under a mesh.
  names = (None, 'model'), ('model', None)
  mesh = jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(AxisType.Auto,) * 2
  )

  @nnx.jit
  def create():
    model = MLP(rngs=nnx.Rngs(0), names=names)
    return model, nnx.Optimizer(model, program.line(), wrt=nnx.Param)

  with jax.set_mesh(mesh):
    model, optimizer = create()
    losses = []
    for batch in program.data(steps=6):
      place = jax.sharding.NamedSharding(mesh, jax.P('data'))
      batch = jax.device_put(batch, place)
      losses.append(step_of_optimizer(model, optimizer, *batch))
  program.assert_falls([float(x) for x in losses])
