"""The optimizer in MaxText (commit e591f30): wrappers, and its NNX path.

Its linen path, whose parameters are in boxes, is in `test_partitioned.py`.
"""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_optax as go
from tests.trainers import program

PARAMS = {
  'decoder': {'wi': {'kernel': (16, 24)}, 'wo': {'kernel': (24, 16)}},
  'token_embedder': {'embedding': (40, 16)},
}


def weights():
  key = jax.random.key(0)
  is_shape = lambda x: isinstance(x, tuple)
  return jax.tree.map(
    lambda shape: jax.random.normal(key, shape), PARAMS, is_leaf=is_shape
  )


def skip_spikes(inner):
  """Repeats `skip_step_on_spikes` of src/maxtext/optimizers/optimizers.py."""

  def init(params):
    return {'inner_state': inner.init(params), 'last': jnp.float32(jnp.inf)}

  def update(updates, state, params=None, **extra):
    loss = extra.pop('loss')
    extra.pop('grad_norm')

    def take():
      return inner.update(updates, state['inner_state'], params, **extra)

    def skip():
      return jax.tree.map(jnp.zeros_like, updates), state['inner_state']

    updates, new = jax.lax.cond(loss < 2 * state['last'], take, skip)
    return updates, {'inner_state': new, 'last': loss}

  return optax.GradientTransformationExtraArgs(init, update)


def test_steps_with_a_spike_of_the_loss_are_skipped():
  params, tx = weights(), skip_spikes(program.line())
  state, step = tx.init(params), jax.jit(tx.update)
  inner, alone = program.line().init(params), jax.jit(program.line().update)
  for i, loss in enumerate([1.0, 9.0, 9.0]):
    grads = jax.tree.map(lambda x: jnp.sin(x + i), params)  # noqa: B023
    old = state['inner_state']
    updates, state = step(
      grads, state, params, loss=jnp.float32(loss), grad_norm=jnp.float32(1)
    )
    if i == 1:
      assert not any(np.any(x) for x in jax.tree.leaves(updates))
      wanted = old
    else:
      wanted, inner = alone(grads, inner, params)
      jax.tree.map(np.testing.assert_array_equal, updates, wanted)
      wanted = inner
    jax.tree.map(np.testing.assert_array_equal, state['inner_state'], wanted)


def test_parameters_that_are_not_trainable_have_no_state():
  # `trainable_parameters_mask`, a list of regexes.
  def labels(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: (
        'trainable' if re.search('wi', jax.tree_util.keystr(path)) else 'frozen'
      ),
      params,
    )

  tx = optax.multi_transform(
    {'trainable': program.line(), 'frozen': optax.set_to_zero()}, labels
  )
  params = weights()
  state = tx.init(params)
  paths = program.by_path(state)
  assert any('basis/decoder/wi' in path for path in paths)
  assert not any('wo' in path or 'embed' in path for path in paths)
  updates, _ = jax.jit(tx.update)(params, state, params)
  assert not np.any(updates['decoder']['wo']['kernel'])
  assert np.any(updates['decoder']['wi']['kernel'])


RULES = [
  ['layers', 'stage'],
  ['moe_layers', []],
  ['embed', ['fsdp', 'fsdp_transpose']],
  ['embed', ['fsdp']],
  ['mlp', ['fsdp_transpose', 'tensor']],
]
AXES = ('stage', 'fsdp', 'fsdp_transpose', 'tensor')


class Decoder(nnx.Module):
  """A stack of layers, with the metadata of `add_scan_metadata`."""

  def __init__(self, rngs, stack='layers'):
    def param(names, shape):
      return nnx.Param(
        jax.random.normal(rngs.params(), (3, *shape)) / 4,
        out_sharding=(stack, *names),
        param_scan_axis=0,
        eager_sharding=False,
        **{nnx.PARTITION_NAME: stack},
      )

    self.wi = param(('embed', 'mlp'), (16, 24))
    self.wo = param(('mlp', 'embed'), (24, 16))

  def __call__(self, x):
    for i in range(3):
      x = x + jax.nn.silu(x @ self.wi[...][i]) @ self.wo[...][i]
    return x


class TrainState(nnx.Module):
  def __init__(self, model, optimizer):
    self.model = model
    self.optimizer = optimizer


def named_sharding(variable, mesh):
  """Repeats `get_nnx_var_named_sharding_with_scan_axis`."""
  metadata, value = variable.get_metadata(), variable.get_value()
  names = list(metadata.get('out_sharding') or ())
  if names and 'param_scan_axis' in metadata:
    # MaxText inserts the name of the stack into names without it.
    if metadata[nnx.PARTITION_NAME] not in names:
      names.insert(metadata['param_scan_axis'], metadata[nnx.PARTITION_NAME])
  elif names:
    names += [None] * (value.ndim - len(names))
  spec = nn.logical_to_mesh_axes(names, rules=RULES)
  return variable.replace(NamedSharding(mesh, spec or PartitionSpec()))


@pytest.mark.parametrize('stack', ['layers', 'moe_layers'])
@pytest.mark.parametrize(
  'sizes',
  [
    pytest.param((1, 8, 1, 1), marks=pytest.mark.slow),
    pytest.param((1, 1, 1, 8), marks=pytest.mark.slow),
    (1, 4, 1, 2),
  ],
)
def test_the_nnx_state_is_sharded_as_state_shardings_has_it(sizes, stack):
  # src/maxtext/utils/maxtext_utils.py, get_abstract_state_nnx.
  mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)
  tx = program.line(8)

  def create():
    model = Decoder(nnx.Rngs(0), stack)
    return TrainState(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

  with nn.logical_axis_rules(RULES):
    shapes = nnx.state(nnx.eval_shape(create))
    places = jax.tree.map(
      lambda x: named_sharding(x, mesh),
      shapes,
      is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    arrays = program.unboxed(places)
    state = jax.jit(
      lambda: program.unboxed(nnx.state(create())), out_shardings=arrays
    )()
  wanted = program.by_path(
    go.state_shardings(tx, program.unboxed(shapes['model']), arrays['model'])
  )
  found = program.by_path(state['optimizer']['opt_state'])
  assert found.keys() == wanted.keys()
  for path, x in found.items():
    size = np.prod(wanted[path].shard_shape(x.shape), dtype=int)
    for shard in x.addressable_shards:
      assert shard.data.size == size, path


def test_the_nnx_train_state_trains():
  model = Decoder(nnx.Rngs(0))
  state = TrainState(model, nnx.Optimizer(model, program.line(), wrt=nnx.Param))
  graphdef, state = nnx.split(state)

  @jax.jit
  def step(state, batch):
    state = nnx.merge(graphdef, state)
    model, params, rest = nnx.split(state.model, nnx.Param, ...)

    def loss_fn(params):
      model_of = nnx.merge(model, params, rest, copy=True)
      return jnp.mean((model_of(batch[0]) - batch[1]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    state.optimizer.update(state.model, grads)
    return nnx.state(state), loss

  losses = []
  for batch in program.data(steps=8):
    state, loss = step(state, batch)
    losses.append(float(loss))
  program.assert_falls(losses)
