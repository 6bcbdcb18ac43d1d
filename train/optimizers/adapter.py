"""Training with low-rank factors: their optimizer, dropout keys and restarts.

`models.lowrank` defines the model with factors. `train.engine.step` and
`train.config` call the functions here if the config has an adapter.

Axes: B examples of a batch.
"""

from typing import Any, TypeAlias

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from galore_optax.layerwise import stack
from galore_optax.layerwise.weights import Weights
from models import lowrank
from models.lowrank import Adapter, Lora, Relora
from train.method import Lomo

PyTree: TypeAlias = Any

# Tags folded into the run's keys, so that keys for different uses differ.
FIRST, NOISE, MERGE = range(1, 4)


def with_lomo(
  optimizer: optax.GradientTransformation,
  adapter: Adapter | None,
  schedule: optax.Schedule,
) -> optax.GradientTransformation:
  """Adds LOMO for the frozen weights, if the adapter has a `lomo` rate.

  Args:
    optimizer: the optimizer of the factors.
    adapter: the adapter of the config.
    schedule: the learning-rate schedule; LOMO's is `adapter.lomo` times it.
  """
  if not isinstance(adapter, Lora) or not adapter.lomo:
    return optimizer
  beneath = Lomo().build(lambda count: adapter.lomo * schedule(count))

  def labels(params: PyTree) -> PyTree:
    chosen = lowrank.optimized(params, adapter)
    return jax.tree.map(label, chosen, params)

  def label(is_chosen: bool, weight: PyTree) -> PyTree:
    # A stored weight may have several leaves.
    name = 'optimizer' if is_chosen else 'lomo'
    return jax.tree.map(lambda _: name, weight)

  return optax.partition({'optimizer': optimizer, 'lomo': beneath}, labels)


def jagged(envelope: optax.Schedule, adapter: Relora) -> optax.Schedule:
  """Returns a schedule that rises from 0 to `envelope` after each merge.

  >>> schedule = jagged(lambda step: 1.0, Relora(every=8, restart_warmup=2))
  >>> [float(schedule(step)) for step in (0, 7, 8, 9, 10)]
  [1.0, 1.0, 0.0, 0.5, 1.0]
  """
  every = adapter.every
  warmup = adapter.restart_warmup

  def schedule(step: Any) -> Any:
    since = step % every
    rising = (step >= every) & (since < warmup)
    peak = envelope(jnp.where(rising, step - since + warmup, step))
    return peak * jnp.where(rising, since / max(warmup, 1), 1.0)

  return schedule


def with_noise(batch: PyTree, seed: int, step: jax.Array) -> PyTree:
  """Adds the keys of dropout to a batch; they depend on seed and step."""
  key = _key(seed, NOISE, step)
  keys_B = jax.random.split(key, batch['inputs'].shape[0])
  return batch | {'noise': jax.random.key_data(keys_B)}


def restart(
  params: PyTree,
  optimizer: PyTree,
  step: jax.Array,
  *,
  adapter: Relora,
  weights: Weights,
  seed: int,
) -> tuple[PyTree, PyTree]:
  """Performs ReLoRA's merge if this step is due for one.

  A merge adds the product of the factors A and B to the weights, draws A again,
  sets B to 0, and sets a share of the factors' moments to 0. The optimizer's
  counters continue. All other steps change nothing.

  Args:
    params: parameters, as they are stored.
    optimizer: the optimizer's state.
    step: number of updates done.
    adapter: sets when to merge.
    weights: how weights are stored.
    seed: the seed of the run.

  Returns:
    The parameters and the optimizer's state.
  """
  merge_key, moment_key = jax.random.split(_key(seed, MERGE, step))

  def merged(found: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    params, optimizer = found
    new = merge_into(params, adapter, weights, merge_key)
    return new, reset_moments(optimizer, adapter.reset, moment_key)

  due = step % adapter.every == 0
  return jax.lax.cond(due, merged, lambda found: found, (params, optimizer))


def merge_into(
  params: PyTree, adapter: Relora, weights: Weights, key: jax.Array
) -> PyTree:
  """Merges the factors into the stored weights, and draws new factors."""
  flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep='/')
  roles = lowrank.roles(params)
  names = sorted(path for path in roles if roles[path] == 'beneath')
  for number, path in enumerate(names):
    beside = path.rpartition('/')[0]
    of_a, of_b = (f'{beside}/{name}' for name in lowrank.FACTORS)
    a = flat[of_a]
    rounding = jax.random.fold_in(key, number)

    def add(
      stored: Any,
      b: jax.Array,
      layer: Any,
      a: jax.Array = a,
      rounding: jax.Array = rounding,
    ) -> Any:
      total = lowrank.product(stack.take(a, layer), b, adapter.scale)
      return weights.write(stored, total, jax.random.fold_in(rounding, layer))

    flat[path] = stack.map_layers(add, flat[path], flat[of_b])
    shape = (*a.shape[:-1], flat[of_b].shape[-1])
    # Use another key than for the rounding above.
    fresh = jax.random.fold_in(key, number + len(names))
    flat[of_a], flat[of_b] = lowrank.fresh_factors(shape, adapter.rank, fresh)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def reset_moments(optimizer: PyTree, share: float, key: jax.Array) -> PyTree:
  """Sets a random share of the factors' moments to 0.

  Moments are the leaves below a field `mu` or `nu`. If blocks of a quantized
  moment share a scale, setting the scale to 0 resets the whole block.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(optimizer)

  def kept(number: int, path: Any, leaf: jax.Array) -> jax.Array:
    if not (_of_factor(path) and jnp.issubdtype(leaf.dtype, jnp.floating)):
      return leaf
    draw = jax.random.uniform(jax.random.fold_in(key, number), leaf.shape)
    return jnp.where(draw < share, 0, leaf)

  return treedef.unflatten(
    kept(number, *entry) for number, entry in enumerate(leaves)
  )


def _of_factor(path: tuple[Any, ...]) -> bool:
  """Whether a leaf of an optimizer's state belongs to a factor's moment."""
  keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
  # In a layer-wise state, a key is the whole path of a weight.
  of_factor = any(key.split('/')[-1] in lowrank.FACTORS for key in keys)
  return of_factor and not {'mu', 'nu'}.isdisjoint(keys)


def first_key(key: jax.Array) -> jax.Array:
  """Returns the key of the first factors, made from the weights' key."""
  return jax.random.fold_in(key, FIRST)


def _key(seed: int, use: int, step: jax.Array) -> jax.Array:
  """Returns the key of a step of a run for one use."""
  key = jax.random.key(seed, impl='threefry2x32')
  return jax.random.fold_in(jax.random.fold_in(key, use), step)
