"""When bases are due, and how those of a tree are found anew.

A unit is one matrix: a stack of L layers is L units. What is kept for a leaf is
a `kept` value with the leaf's batch axes in front, a pair of them for side
'full', or a MaskedNode where the leaf is whole.

Axes: k matrices of a stack, m projected side, n other side, r rank.
"""

import collections
import dataclasses
import functools
import zlib
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from galore_optax import paths, projection
from galore_optax.checks import is_integer, require
from galore_optax.precision import full
from galore_optax.projection import Basis, Projection, Whole
from galore_optax.subspace.kept import Keeper, Kept, Seeds

FREE = P.UNCONSTRAINED  # cut as it is

# Multiples of it, modulo one, never come close to each other.
GOLDEN = 0.618033988749895


@dataclasses.dataclass(frozen=True)
class Staggered:
  """A gap at which the matrices take turns, so that no step pays for all.

  All are found at step 0, and then each every `gap` steps.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(optax.adam(0.1), gap=Staggered(200))
  """

  gap: int  # Updates from one refresh of a matrix to its next.


# Updates between refreshes: of all matrices at once, or in turns.
Gap: TypeAlias = int | Staggered


class Phase(NamedTuple):
  """Where the matrices of a leaf stand in the order of turns."""

  # [k], int32: the number of each matrix; of layer 0 in a layer-wise step.
  number_k: jax.Array
  # [], int32: numbers from one layer to the next in a layer-wise step.
  stride: jax.Array


class Job(NamedTuple):
  """One matrix whose basis may be due, or [k, ...] of them."""

  g_mn: Any  # Its gradient, the projected side first.
  kept: Kept  # What is kept of its basis.
  seeds: tuple[jax.Array, ...]  # uint32: what its random key is made of.
  due: jax.Array  # bool: whether it is due, where matrices take turns.


def checked_gap(gap: Any) -> Gap:
  """Returns a gap with a Python integer in it; ValueError for what is none."""
  steps = gap.gap if isinstance(gap, Staggered) else gap
  holds = lambda _: is_integer(steps) and steps >= 1
  require('an integer >= 1, in optimizer steps', holds, gap=gap)
  return Staggered(int(steps)) if isinstance(gap, Staggered) else int(steps)


def phases(plans: list, tree: Any, gap: Gap) -> Any:
  """Returns a tree of `Phase`s for matrices that take turns; () for others."""
  if not isinstance(gap, Staggered):
    return ()
  places, total = paths.places(tree)

  def phase(p, place):
    if isinstance(p, Whole):
      return optax.MaskedNode()
    number_k = place + total * jnp.arange(p.num_matrices, dtype=jnp.int32)
    return Phase(number_k, jnp.int32(total * p.num_matrices))

  return jax.tree.structure(tree).unflatten(map(phase, plans, places))


def is_due(gap: Gap, phase: Any, count: jax.Array, layer: Any) -> jax.Array:
  """Whether any matrix is due: [], bool."""
  if isinstance(gap, int):
    return count % gap == 0
  nodes = jax.tree.leaves(phase, is_leaf=lambda x: isinstance(x, Phase))
  due = [jnp.any(_due_k(gap, node, count, layer)) for node in nodes]
  return jnp.any(jnp.array(due, bool))


def _refreshes_k(gap, phase, count, layer) -> Any:
  """How many refreshes of each matrix came before `count` updates."""
  if isinstance(gap, int):
    return count // gap
  turn_k = (phase.number_k + phase.stride * layer) * GOLDEN % 1
  offset_k = 1 + jnp.int32(turn_k * gap.gap)
  return (count - offset_k) // gap.gap + 1


def _due_k(gap, phase, count, layer) -> Any:
  """Which matrices are due, bool."""
  before, now = (_refreshes_k(gap, phase, c, layer) for c in (count - 1, count))
  return (before != now) | (count == 0)


def first_kept(keeper: Keeper, plan: Projection | Whole, dtype: Any) -> Any:
  """Returns what the state keeps for a leaf before its first refresh."""
  if isinstance(plan, Whole):
    return optax.MaskedNode()
  stacked = lambda x: jnp.broadcast_to(x, plan.batch + x.shape)
  sizes = [plan.matrix_shape[side] for side in plan.sides]
  firsts = [keeper.first(plan.rank, m, dtype) for m in sizes]
  return jax.tree.map(stacked, _joined(firsts))


def basis_of(keeper: Keeper, plan: Any, kept: Any, dtype: Any) -> Basis:
  """Returns the basis of each projected side of a leaf."""
  if isinstance(plan, Whole):
    return ()
  sizes = [plan.matrix_shape[side] for side in plan.sides]
  pairs = zip(_by_side(plan, kept), sizes, strict=True)
  return tuple(keeper.rows(one, plan.rank, m, dtype) for one, m in pairs)


def changed(gap: Gap, plan: Projection, phase, count, layer) -> jax.Array:
  """Returns which matrices have a new basis and had one before: [..., 1, 1]."""
  due = _due_k(gap, phase, count, layer) & (count > 0)
  return jnp.broadcast_to(due, plan.num_matrices).reshape(*plan.batch, 1, 1)


def refreshed(keeper, plans, grads, kept, phase, *, gap, count, layer) -> Any:
  """Finds the bases that are due.

  A stack runs matrix by matrix, so that its workspace is one matrix's, and so
  do single matrices of one shape: a finder is compiled once for each shape.

  Args:
    keeper: how a basis is found and kept.
    plans: of each leaf.
    grads: gradients in the weights' shapes.
    kept: what the state keeps for each leaf.
    phase: of each leaf, where matrices take turns.
    gap: updates between refreshes.
    count: [], int32: updates done so far.
    layer: index of the layer where one layer is updated at a time.

  Returns:
    What is kept now, and how many matrices kept their basis as the gradient
    (or what was found) was not finite: [], int32.
  """

  def find(job):
    one = lambda: _find(keeper, job, count == 0)
    if isinstance(gap, int):
      return one()
    return jax.lax.cond(job.due, one, lambda: (job.kept, jnp.int32(0)))

  alone, found, skips = collections.defaultdict(dict), {}, []
  for i, p in enumerate(plans):
    for number, one in enumerate(_by_side(p, kept[i])):
      jobs = _jobs(p, number, grads[i], one, gap, phase[i], count, layer)
      if len(jobs.due) > 1:
        found[i, number], skip_k = _dealt(find, jobs)
        skips.append(jnp.sum(skip_k, dtype=jnp.int32))
      else:
        job = jax.tree.map(lambda x: x[0], jobs)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(job)]
        alone[jax.tree.structure(job), *shapes][i, number] = job
  for jobs in alone.values():
    new, skip = _each(find, [*jobs.values()])
    found |= zip(jobs, new, strict=True)
    skips.append(skip)
  sides = [[(i, n) for n in range(len(p.sides))] for i, p in enumerate(plans)]
  new = [_joined([found[place] for place in places]) for places in sides]
  new = jax.tree.map(lambda x, old: x.reshape(old.shape), new, [*kept])
  return new, sum(skips, jnp.int32(0))


def _jobs(p, number, g, kept, gap, phase, count, layer) -> Job:
  """Returns the matrices of a leaf as a job with a leading axis [k, ...]."""
  k = p.num_matrices
  g_io = projection.to_matrix(p, g).reshape(k, *p.matrix_shape[-2:])
  # The path names the leaf: a number would change with the part of the tree.
  path, index_k = zlib.crc32(p.path.encode()), jnp.arange(k) + layer * k
  seeds = number, path, index_k, _refreshes_k(gap, phase, count, layer)
  wide = lambda x, dtype=jnp.uint32: jnp.broadcast_to(jnp.asarray(x, dtype), k)
  return Job(
    g_mn=projection.orient(g_io, p.sides[number]),
    kept=jax.tree.map(lambda x: x.reshape(k, *x.shape[len(p.batch) :]), kept),
    seeds=tuple(wide(x) for x in seeds),
    due=wide(_due_k(gap, phase, count, layer), bool),
  )


def _dealt(find, jobs: Job) -> Any:
  """Finds what a stack keeps, on each device of a mesh for its share."""
  mesh, k, axes = jax.sharding.get_abstract_mesh(), len(jobs.due), ()
  for axis in mesh.auto_axes:
    if mesh.shape[axis] > 1 and k % mesh.shape[axis] == 0:
      axes, k = (*axes, axis), k // mesh.shape[axis]
      # To all axes at once the compiler might go by way of the whole stack.
      g_mn = jax.lax.with_sharding_constraint(jobs.g_mn, P(axes, FREE, FREE))
      jobs = jobs._replace(g_mn=g_mn)
  share = functools.partial(jax.lax.map, find)
  if axes:
    places = {'in_specs': P(axes), 'out_specs': P(axes), 'axis_names': {*axes}}
    share = jax.shard_map(share, **places, check_vma=False)
  return share(jobs)


def _each(find, jobs: list[Job]) -> tuple[list[Kept], jax.Array]:
  """Finds matrix after matrix, without a stack of the gradients."""
  if len(jobs) == 1:
    kept, skip = find(*jobs)
    return [kept], skip
  pick = lambda i: jax.lax.switch(i, [lambda job=job: job for job in jobs])
  kept, skips = jax.lax.map(lambda i: find(pick(i)), jnp.arange(len(jobs)))
  each = [jax.tree.map(lambda x, i=i: x[i], kept) for i in range(len(jobs))]
  return each, jnp.sum(skips, dtype=jnp.int32)


def _find(keeper: Keeper, job: Job, first: jax.Array) -> tuple[Kept, jax.Array]:
  """Returns what is kept after a refresh and 0, or what was before and 1."""
  g_mn = full(job.g_mn)
  finite = jnp.all(jnp.isfinite(g_mn))
  # A decomposition of NaN may never end.
  g_mn = jnp.where(finite, g_mn, 0)
  # A basis has no scale; the gradient's square may leave float32's range.
  size = jnp.max(jnp.abs(g_mn))
  g_mn = g_mn / jnp.where(size > 0, size, 1)
  # Made here, not for each matrix alone, so that it is compiled once a shape.
  seed, *rest = job.seeds
  key = functools.reduce(jax.random.fold_in, rest, jax.random.key(seed))
  new = keeper.find(g_mn, job.kept, key, first)
  sound = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]
  # A seed is drawn whatever the gradient is.
  found = jnp.all(jnp.array(sound)) & (finite | isinstance(keeper, Seeds))
  kept = jax.tree.map(lambda a, b: jnp.where(found, a, b), new, job.kept)
  return kept, jnp.int32(~found)


def _by_side(plan, kept) -> tuple:
  return kept if len(plan.sides) > 1 else (kept,) * len(plan.sides)


def _joined(sides: list[Kept]) -> Any:
  """Inverts `_by_side`: one value rather than a tuple of one."""
  if not sides:
    return optax.MaskedNode()
  return sides[0] if len(sides) == 1 else tuple(sides)
