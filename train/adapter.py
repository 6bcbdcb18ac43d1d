"""Training with factors of low rank: their optimizer, noise and restarts.

`models.lowrank` has the mathematics; here is what an update does beside it.
`train.step` and `train.config` call these functions where a config has an
adapter.

Axes: B examples of a batch.
"""

from typing import Any, TypeAlias

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

import galore_optax
from galore_optax.layerwise import stack
from galore_optax.layerwise.weights import Weights
from models import lowrank
from models.lowrank import Adapter, Lora, Relora

PyTree: TypeAlias = Any

# What a run's seed and step are folded with, for keys of different use.
FIRST, NOISE, MERGE = range(1, 4)


def with_lomo(
  optimizer: optax.GradientTransformation,
  adapter: Adapter | None,
  schedule: optax.Schedule,
) -> optax.GradientTransformation:
  """Returns an optimizer, and LOMO for what it does not train, if wanted."""
  if not isinstance(adapter, Lora) or not adapter.lomo:
    return optimizer
  beneath = galore_optax.lomo(
    lambda count: adapter.lomo * schedule(count), clip_norm=None
  )

  def labels(params):
    name = lambda chosen: 'optimizer' if chosen else 'lomo'
    return jax.tree.map(
      lambda chosen, w: jax.tree.map(lambda _: name(chosen), w),
      *(lowrank.optimized(params, adapter), params),
    )

  return optax.partition({'optimizer': optimizer, 'lomo': beneath}, labels)


def restarts(adapter: Adapter | None) -> bool:
  """Whether training merges factors now and then, and starts them anew."""
  return isinstance(adapter, Relora)


def jagged(envelope: optax.Schedule, adapter: Relora) -> optax.Schedule:
  """Returns a schedule that rises from 0 after each merge, to the envelope.

  >>> schedule = jagged(lambda step: 1.0, Relora(every=8, restart_warmup=2))
  >>> [float(schedule(step)) for step in (0, 7, 8, 9, 10)]
  [1.0, 1.0, 0.0, 0.5, 1.0]
  """
  every, warmup = adapter.every, adapter.restart_warmup

  def schedule(step):
    since = step % every
    rising = (step >= every) & (since < warmup)
    peak = envelope(jnp.where(rising, step - since + warmup, step))
    return peak * jnp.where(rising, since / max(warmup, 1), 1.0)

  return schedule


def with_noise(batch: PyTree, seed: int, step: jax.Array) -> PyTree:
  """Returns a batch with the keys of its dropout, by seed and step."""
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
  """Returns parameters and optimizer state after ReLoRA's merge.

  The factors' product goes into the weights, A is drawn anew, B is 0, and most
  of the moments of both are 0. The optimizer's counters go on. Between merges
  nothing happens.

  Args:
    params: as they are stored.
    optimizer: its state.
    step: updates done.
    adapter: when to merge.
    weights: how weights are stored.
    seed: of the run.
  """
  merge_key, moment_key = jax.random.split(_key(seed, MERGE, step))

  def merged(found):
    params, optimizer = found
    new = merge_into(params, adapter, weights, merge_key)
    return new, reset_moments(optimizer, adapter.reset, moment_key)

  due = step % adapter.every == 0
  return jax.lax.cond(due, merged, lambda found: found, (params, optimizer))


def merge_into(
  params: PyTree, adapter: Relora, weights: Weights, key: jax.Array
) -> PyTree:
  """Returns stored parameters with their factors merged and drawn anew."""
  flat = flax.traverse_util.flatten_dict(params, sep='/')
  roles = lowrank.roles(params)
  names = sorted(path for path in roles if roles[path] == 'beneath')
  for number, path in enumerate(names):
    beside = path.rpartition('/')[0]
    of_a, of_b = (f'{beside}/{name}' for name in lowrank.FACTORS)
    a, rounding = flat[of_a], jax.random.fold_in(key, number)

    def add(stored, b, layer, a=a, rounding=rounding):
      total = lowrank.product(stack.take(a, layer), b, adapter.scale)
      return weights.write(stored, total, jax.random.fold_in(rounding, layer))

    flat[path] = stack.each(add, flat[path], flat[of_b])
    shape = (*a.shape[:-1], flat[of_b].shape[-1])
    # Another key than that of the rounding.
    fresh = jax.random.fold_in(key, number + len(names))
    flat[of_a], flat[of_b] = lowrank.fresh_factors(shape, adapter.rank, fresh)
  return flax.traverse_util.unflatten_dict(flat, sep='/')


def reset_moments(optimizer: PyTree, share: float, key: jax.Array) -> PyTree:
  """Returns a state with a share of the factors' moments set to 0.

  Moments are the entries of a field `mu` or `nu`; where they are stored in
  blocks that share a scale, a block goes as a whole.
  """
  leaves, treedef = jax.tree_util.tree_flatten_with_path(optimizer)

  def kept(number, path, leaf):
    if not (_of_factor(path) and jnp.issubdtype(leaf.dtype, jnp.floating)):
      return leaf
    draw = jax.random.uniform(jax.random.fold_in(key, number), leaf.shape)
    return jnp.where(draw < share, 0, leaf)

  return treedef.unflatten(
    kept(number, *entry) for number, entry in enumerate(leaves)
  )


def _of_factor(path) -> bool:
  """Whether a leaf of an optimizer's state is in a moment of a factor."""
  keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
  # A layer-wise state's keys are whole paths of weights.
  of_factor = any(key.split('/')[-1] in lowrank.FACTORS for key in keys)
  return of_factor and not {'mu', 'nu'}.isdisjoint(keys)


def first_key(key: jax.Array) -> jax.Array:
  """Returns the key of the first factors, from that of the first weights."""
  return jax.random.fold_in(key, FIRST)


def _key(seed: int, use: int, step: jax.Array) -> jax.Array:
  key = jax.random.key(seed, impl='threefry2x32')
  return jax.random.fold_in(jax.random.fold_in(key, use), step)
