"""When bases are due, and how those of a tree are found anew.

A unit is one matrix: a stack of L layers is L units. What is kept for a leaf is
a `kept` value with the leaf's batch axes in front, a pair of them for side
'full', or a MaskedNode where the leaf is whole.

Axes: k matrices of a stack, m projected side, n other side, r rank.
"""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths, projection
from galore_optax.checks import check_count
from galore_optax.precision import full
from galore_optax.projection import Basis, Projection, Whole
from galore_optax.subspace.kept import Keeper, Kept, Seeds

GOLDEN = 0.618033988749895
"""Multiples of it, modulo one, never come close to each other."""


@dataclasses.dataclass(frozen=True)
class Staggered:
  """A gap at which the matrices take turns, so that no step pays for all.

  All are found at step 0, and then each every `gap` steps.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(optax.adam(0.1), gap=Staggered(200))
  """

  gap: int
  """Updates from one refresh of a matrix to its next."""


Gap: TypeAlias = int | Staggered
"""Updates between refreshes: of all matrices at once, or in turns."""


class Phase(NamedTuple):
  """Where the matrices of a leaf stand in the order of turns."""

  number_k: jax.Array
  """[k], int32: the number of each matrix; of layer 0 in a layer-wise step."""
  stride: jax.Array
  """[], int32: numbers from one layer to the next in a layer-wise step."""


class Job(NamedTuple):
  """One matrix whose basis may be due."""

  g_mn: Any
  kept: Kept
  key: jax.Array
  due: jax.Array


def checked_gap(gap: Any) -> Gap:
  """Returns a gap with a Python integer in it; ValueError for what is none."""
  steps = gap.gap if isinstance(gap, Staggered) else gap
  try:
    check_count(gap=steps)
  except ValueError as error:
    raise ValueError(
      f'gap must be an integer >= 1, in optimizer steps, got {gap!r}'
    ) from error
  return Staggered(int(steps)) if isinstance(gap, Staggered) else int(steps)


def phases(plans: Sequence[Projection | Whole], tree: Any, gap: Gap) -> Any:
  """Returns a tree of `Phase`s for matrices that take turns; () for others."""
  if not isinstance(gap, Staggered):
    return ()
  at, total = paths.places(tree)
  return jax.tree.structure(tree).unflatten(
    [
      Phase(
        jnp.int32(place) + total * jnp.arange(p.num_matrices, dtype=jnp.int32),
        jnp.int32(total * p.num_matrices),
      )
      if isinstance(p, Projection)
      else optax.MaskedNode()
      for p, place in zip(plans, at, strict=True)
    ]
  )


def is_due(
  gap: Gap, phase: Any, count: jax.Array, layer: jax.Array | int
) -> jax.Array:
  """Whether any matrix is due: [], bool."""
  if isinstance(gap, int):
    return count % gap == 0
  nodes = jax.tree.leaves(phase, is_leaf=_is_phase)
  due = [jnp.any(_due_k(gap, p, count, layer)) for p in nodes if _is_phase(p)]
  return jnp.any(jnp.array(due, bool))


def _is_phase(x: Any) -> bool:
  return isinstance(x, Phase)


def _refreshes_k(gap: Gap, phase: Any, count: Any, layer: Any) -> jax.Array:
  """How many refreshes of each matrix came before `count` updates."""
  if isinstance(gap, int):
    return count // gap
  turn_k = (phase.number_k + phase.stride * layer) * GOLDEN % 1
  offset_k = 1 + jnp.int32(turn_k * gap.gap)
  return (count - offset_k) // gap.gap + 1


def _due_k(gap: Gap, phase: Any, count: Any, layer: Any) -> jax.Array:
  """Which matrices are due, bool."""
  before, now = (_refreshes_k(gap, phase, c, layer) for c in (count - 1, count))
  return (before != now) | (count == 0)


def first_kept(keeper: Keeper, plan: Projection | Whole, dtype: Any) -> Any:
  """Returns what the state keeps for a leaf before its first refresh."""
  if isinstance(plan, Whole):
    return optax.MaskedNode()

  def of_side(side: int) -> Kept:
    one = keeper.first(plan.rank, plan.matrix_shape[side], dtype)
    return jax.tree.map(
      lambda x: jnp.broadcast_to(x, plan.batch + x.shape), one
    )

  return _as_kept([of_side(side) for side in plan.sides])


def basis_of(
  keeper: Keeper, plan: Projection | Whole, kept: Any, dtype: Any
) -> Basis:
  """Returns the basis of each projected side of a leaf."""
  if isinstance(plan, Whole):
    return ()
  return tuple(
    keeper.rows(one, plan.rank, plan.matrix_shape[side], dtype)
    for one, side in zip(_by_side(plan, kept), plan.sides, strict=True)
  )


def changed(
  gap: Gap, plan: Projection, phase: Any, count: jax.Array, layer: Any
) -> jax.Array:
  """Returns which matrices have a new basis and had one before: [..., 1, 1]."""
  if isinstance(gap, int):
    return (count > 0).reshape((1,) * len(plan.matrix_shape))
  due_k = _due_k(gap, phase, count, layer) & (count > 0)
  return due_k.reshape(*plan.batch, 1, 1)


def refreshed(
  keeper: Keeper,
  plans: Sequence[Projection | Whole],
  grads: Sequence[jax.Array],
  kept: Sequence[Any],
  phase: Sequence[Any],
  *,
  gap: Gap,
  count: jax.Array,
  layer: jax.Array | int,
) -> tuple[list[Any], jax.Array]:
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

  def find(job: Job) -> tuple[Kept, jax.Array]:
    one = lambda: _find(keeper, job, count == 0)
    if isinstance(gap, int):
      return one()
    return jax.lax.cond(job.due, one, lambda: (job.kept, jnp.int32(0)))

  alone, results = collections.defaultdict(list), {}
  for i, p in enumerate(plans):
    if isinstance(p, Whole):
      continue
    for number, one in enumerate(_by_side(p, kept[i])):
      job = _job(p, number, grads[i], one, gap, phase[i], count, layer)
      if p.num_matrices > 1:
        results[i, number] = jax.lax.map(find, job)
      else:
        job = jax.tree.map(lambda x: x[0], job)
        alone[_shapes(job)].append(((i, number), job))
  for jobs in alone.values():
    places, of_one_shape = zip(*jobs, strict=True)
    results |= zip(places, _each(find, of_one_shape), strict=True)

  def joined(i: int, p: Projection | Whole) -> Any:
    if isinstance(p, Whole):
      return kept[i]
    sides = [results[i, number][0] for number in range(len(p.sides))]
    like = _by_side(p, kept[i])
    return _as_kept(
      [
        jax.tree.map(lambda x, old: x.reshape(old.shape), new, old)
        for new, old in zip(sides, like, strict=True)
      ]
    )

  skips = [jnp.sum(skip, dtype=jnp.int32) for _, skip in results.values()]
  return [joined(i, p) for i, p in enumerate(plans)], sum(skips, jnp.int32(0))


def _job(p, number, g, kept, gap, phase, count, layer) -> Job:
  """Returns the matrices of a leaf as a job with a leading axis [k, ...]."""
  k = p.num_matrices
  g_io = projection.to_matrix(p, g).reshape(k, *p.matrix_shape[-2:])
  flat = lambda x: x.reshape(k, *x.shape[len(p.batch) :])
  # The path names the leaf: a number would change with the part of the tree.
  path = zlib.crc32(p.path.encode())
  key = jax.random.fold_in(jax.random.key(number), path)
  index_k = jnp.arange(k) + layer * k
  refreshes_k = _refreshes_k(gap, phase, count, layer)
  fold = jax.vmap(jax.random.fold_in)
  due = _due_k(gap, phase, count, layer)
  return Job(
    g_mn=projection.orient(g_io, p.sides[number]),
    kept=jax.tree.map(flat, kept),
    key=fold(
      fold(jnp.broadcast_to(key, (k,)), index_k),
      jnp.broadcast_to(refreshes_k, (k,)),
    ),
    due=jnp.broadcast_to(due, (k,)),
  )


def _each(
  find: Callable[[Job], Any], jobs: Sequence[Job]
) -> list[tuple[Kept, jax.Array]]:
  """Finds matrix after matrix, without a stack of the gradients."""
  if len(jobs) == 1:
    return [find(jobs[0])]
  pick = lambda i: jax.lax.switch(i, [lambda job=job: job for job in jobs])
  found = jax.lax.map(lambda i: find(pick(i)), jnp.arange(len(jobs)))
  return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(jobs))]


def _shapes(job: Job) -> Any:
  leaves, treedef = jax.tree.flatten(job)
  return treedef, tuple((x.shape, x.dtype) for x in leaves)


def _find(keeper: Keeper, job: Job, first: jax.Array) -> tuple[Kept, jax.Array]:
  """Returns what is kept after a refresh and 0, or what was before and 1."""
  g_mn = full(job.g_mn)
  finite = jnp.all(jnp.isfinite(g_mn))
  # A decomposition of NaN may never end.
  g_mn = jnp.where(finite, g_mn, 0)
  # A basis has no scale; the gradient's square may leave float32's range.
  size = jnp.max(jnp.abs(g_mn))
  g_mn = g_mn / jnp.where(size > 0, size, 1)
  new = keeper.find(g_mn, job.kept, job.key, first)
  # A seed is drawn whatever the gradient is.
  found = _is_finite(new) & (finite | isinstance(keeper, Seeds))
  kept = jax.tree.map(lambda a, b: jnp.where(found, a, b), new, job.kept)
  return kept, jnp.int32(~found)


def _is_finite(kept: Kept) -> jax.Array:
  """Whether no number in it is a NaN."""
  floats = [
    jnp.all(jnp.isfinite(x))
    for x in jax.tree.leaves(kept)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  return jnp.all(jnp.array(floats, bool))


def _by_side(plan: Projection, kept: Any) -> Sequence[Any]:
  return kept if len(plan.sides) > 1 else (kept,)


def _as_kept(sides: list[Any]) -> Any:
  """Returns what the state keeps: one value rather than a tuple of one."""
  return sides[0] if len(sides) == 1 else tuple(sides)
