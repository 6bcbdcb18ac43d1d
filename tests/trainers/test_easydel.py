"""The optimizer in EasyDeL (commit 090a03b, easydel/infra/base_state.py).

Its state holds `nnx.State`s, without `nnx.Optimizer`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.trainers import program


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up_proj = nnx.Linear(16, 24, use_bias=False, rngs=rngs)
    self.down_proj = nnx.Linear(24, 16, use_bias=False, rngs=rngs)
    self.norm = nnx.RMSNorm(16, rngs=rngs)
    self.dropout = nnx.Dropout(0.0, rngs=rngs)

  def __call__(self, x):
    y = self.dropout(jax.nn.silu(self.up_proj(self.norm(x))))
    return x + self.down_proj(y)


class Model(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([Block(rngs) for _ in range(2)])

  def __call__(self, x):
    for layer in self.layers:
      x = layer(x)
    return x


def update(tx, grads, state, params):
  # All arguments are given by name.
  return tx.update(updates=grads, state=state, params=params)


def train(tx, graphdef, params, other, state, places=None):
  @functools.partial(jax.jit, out_shardings=places)
  def step(params, state, batch):
    def loss_fn(params):
      model = nnx.merge(graphdef, params, other)
      return jnp.mean((model(batch[0]) - batch[1]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = update(tx, grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  losses = []
  for batch in program.data(steps=8):
    params, state, loss = step(params, state, batch)
    losses.append(float(loss))
  assert step._cache_size() == 1
  return params, state, losses


def test_a_state_of_parameters_without_an_nnx_optimizer():
  model = Model(nnx.Rngs(0))
  graphdef, params, other = nnx.split(model, nnx.Param, ...)
  tx = program.line()
  state = tx.init(params)
  program.assert_low_rank(state, params)
  program.assert_same_as_plain(params, update=update)
  params, _, losses = train(tx, graphdef, params, other, state)
  program.assert_falls(losses)
  assert isinstance(params, nnx.State)
  nnx.update(model, params)


# EasyDeL finds the sharding of each leaf of the state by its path, and leaves
# out the axes that do not divide.
RULES = (
  ('.*(up_proj)/kernel', PartitionSpec('fsdp', 'tp')),
  ('.*(down_proj)/kernel', PartitionSpec('tp', 'fsdp')),
  ('.*', PartitionSpec()),
)


def test_state_sharded_by_rules_of_paths():
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tp'), axis_types=(AxisType.Auto,) * 2)
  graphdef, params, other = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
  tx = program.line()

  def place(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    name = name.removesuffix('/value')
    spec = next(spec for rule, spec in RULES if re.search(f'{rule}$', name))
    spec = [
      axis if axis and n % mesh.shape[axis] == 0 else None
      for n, axis in zip(x.shape, spec, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))

  shapes = jax.eval_shape(tx.init, params)
  places = jax.tree_util.tree_map_with_path(place, shapes)
  assert sum(not x.is_fully_replicated for x in jax.tree.leaves(places)) == 12
  state = jax.jit(tx.init, out_shardings=places)(params)
  of_params = jax.tree_util.tree_map_with_path(place, params)
  params, places = jax.device_put(params, of_params), (of_params, places, None)
  *_, losses = train(tx, graphdef, params, other, state, places)
  program.assert_falls(losses)
