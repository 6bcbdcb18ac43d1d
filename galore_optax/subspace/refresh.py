"""Refreshes: when the bases of a tree are due, and the loop that finds them.

Each matrix has a basis of its own: a stack of L layers is L matrices. Matrices
of axes that share a basis, such as the taps of a convolution, count as one
matrix: their unfolding. The state stores for a leaf the `Stored` value of one
matrix with the leaf's other batch axes in front; a pair of such values if both
sides are projected; and a MaskedNode if the leaf is not projected. `by_side`
and `joined` convert between this form and a tuple over sides.

Axes: k matrices of a stack, m projected side, n other side, r rank.
"""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import paths, projection
from galore_optax.checks import is_integer
from galore_optax.precision import at_least_float32
from galore_optax.projection import Basis, Projection, Whole
from galore_optax.subspace.store import BasisStore, Stored, StoredSeed
from galore_optax.unstack import unstack

GOLDEN = 0.618033988749895
"""Multiples of this number, modulo one, are spread evenly over [0, 1)."""

MOST_IN_LOOP = 2**24
"""Largest number of elements of the bases that one loop computes from seeds."""


@dataclasses.dataclass(frozen=True)
class Staggered:
  """A gap with which each matrix has refresh steps of its own.

  So no step pays for all refreshes. All bases are found at step 0, and each of
  them again every `gap` steps. The offsets of the matrices are spread over the
  gap.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(optax.adam(0.1), gap=Staggered(200))
  """

  gap: int
  """Number of updates between two refreshes of a matrix."""


Gap: TypeAlias = int | Staggered
"""Number of updates between refreshes; `Staggered` spreads the refreshes."""


class Phase(NamedTuple):
  """Numbers of a leaf's matrices; they determine the staggered offsets."""

  number_k: jax.Array
  """[k], int32: the number of each matrix; of layer 0 in a layer-wise step."""
  stride: jax.Array
  """[], int32: difference of the numbers of two layers in a layer-wise step."""


class Job(NamedTuple):
  """One matrix whose basis may be due, or a stack [k, ...] of them."""

  g_mn: jax.Array
  """The gradient, the projected side first."""
  stored: Stored
  """The stored value of its basis."""
  seeds: tuple[jax.Array, ...]
  """uint32 numbers that determine its random key."""
  due: jax.Array
  """bool: whether the basis is due."""


Find: TypeAlias = Callable[[Job], tuple[Stored, jax.Array]]
"""`(job) -> (stored, skipped)`: refreshes one matrix if it is due. `skipped` is
1 if the previous basis was kept because a value was not finite."""


def checked_gap(gap: Any) -> Gap:
  """Returns a gap as a Python integer or a `Staggered` with one.

  Raises:
    ValueError: the gap is not an integer >= 1.
  """
  steps = gap.gap if isinstance(gap, Staggered) else gap
  if not is_integer(steps) or steps < 1:
    raise ValueError(
      f'gap must be an integer >= 1, in optimizer steps, got {gap!r}'
    )
  return Staggered(int(steps)) if isinstance(gap, Staggered) else int(steps)


def phases(plans: Sequence[Projection | Whole], tree: Any, gap: Gap) -> Any:
  """Returns a tree of `Phase`s if the gap is staggered; otherwise `()`."""
  if not isinstance(gap, Staggered):
    return ()
  places, total = paths.places(tree)

  def phase(p: Projection | Whole, place: int) -> Any:
    if isinstance(p, Whole):
      return optax.MaskedNode()
    number_k = place + total * jnp.arange(p.num_bases, dtype=jnp.int32)
    return Phase(number_k, jnp.int32(total * p.num_bases))

  return jax.tree.structure(tree).unflatten(map(phase, plans, places))


def is_due(gap: Gap, phase: Any, count: jax.Array, layer: Any) -> jax.Array:
  """Returns whether any basis is due at step `count`: [], bool."""
  if isinstance(gap, int):
    return count % gap == 0
  nodes = jax.tree.leaves(phase, is_leaf=lambda x: isinstance(x, Phase))
  due = [jnp.any(_due_k(gap, node, count, layer)) for node in nodes]
  return jnp.any(jnp.array(due, bool))


def _refreshes_k(gap: Gap, phase: Any, count: Any, layer: Any) -> Any:
  """Returns the number of each matrix's latest refresh at step `count`.

  The refresh of step 0 has number 0.
  """
  if isinstance(gap, int):
    return count // gap
  fraction_k = (phase.number_k + phase.stride * layer) * GOLDEN % 1
  offset_k = 1 + jnp.int32(fraction_k * gap.gap)
  return (count - offset_k) // gap.gap + 1


def _due_k(gap: Gap, phase: Any, count: Any, layer: Any) -> Any:
  """Returns which matrices are due at step `count`, bool."""
  before = _refreshes_k(gap, phase, count - 1, layer)
  now = _refreshes_k(gap, phase, count, layer)
  return (before != now) | (count == 0)


def first_stored(
  store: BasisStore, plan: Projection | Whole, dtype: Any
) -> Any:
  """Returns the state's value of a leaf before its first refresh."""
  if isinstance(plan, Whole):
    return optax.MaskedNode()
  sizes = [plan.matrix_shape[side] for side in plan.sides]
  pairs = zip(plan.ranks, sizes, strict=True)
  firsts = [store.first(r, m, dtype) for r, m in pairs]
  return jax.tree.map(
    lambda x: jnp.broadcast_to(x, plan.bases + x.shape), joined(firsts)
  )


def check_stored(
  store: BasisStore,
  plans: Sequence[Projection | Whole],
  stored: Sequence[Any],
  dtypes: Sequence[Any],
) -> None:
  """Raises ValueError if the stored value of a leaf does not fit its plan.

  `flax.serialization` restores arrays of any shape, so a state that was saved
  with another rank would otherwise be used at that rank.

  Args:
    store: the store of bases.
    plans: one for each leaf.
    stored: the state's value of each leaf.
    dtypes: dtypes of the weights.
  """
  known: dict[Any, Any] = {}
  for p, one, dtype in zip(plans, stored, dtypes, strict=True):
    if one is None:
      raise ValueError(
        f'there is a gradient for {p.path}, but tx.init received no floating'
        ' array there: pass params to tx.update, or start with tx.init(params)'
        ' of the parameters that have gradients'
      )
    kind = _kind(p), dtype
    if kind not in known:
      first = functools.partial(first_stored, store, p, dtype)
      known[kind] = _shapes(jax.eval_shape(first))
    (_, got), (_, want) = pair = _shapes(one), known[kind]
    if pair[0] != pair[1]:
      raise ValueError(
        f'the state has for {p.path} of shape {p.shape} a basis of shapes'
        f' {got}, and rank {p.rank} needs {want}. It was saved with another'
        ' rank, side or subspace: restore it with the options of that run, or'
        ' start with tx.init(params)'
      )


def _kind(p: Projection | Whole) -> Any:
  """Returns all of a plan that determines the shapes of its bases."""
  if isinstance(p, Whole):
    return None
  return p.ranks, p.sides, p.matrix_shape, p.bases


def _shapes(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
  """Returns the structure of a tree, and the shapes of its leaves."""
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [jnp.shape(x) for x in leaves]


def bases_of(
  store: BasisStore,
  plans: Sequence[Projection | Whole],
  stored: Sequence[Any],
  dtypes: Sequence[Any],
) -> list[Basis]:
  """Returns for each leaf the basis of each projected side.

  Bases that are computed from seeds share one loop for each shape, so that
  their program is compiled once for each shape and not for each leaf.

  Args:
    store: the store of bases.
    plans: one for each leaf. The result of a leaf that is not projected is
      empty.
    stored: the state's value of each leaf.
    dtypes: dtypes of the weights.
  """
  sides = {
    (i, number): (p.ranks[number], p.matrix_shape[side], dtypes[i], *p.bases)
    for i, p in enumerate(plans)
    if isinstance(p, Projection)
    for number, side in enumerate(p.sides)
  }
  alike: dict[Any, list[tuple[int, int]]] = collections.defaultdict(list)
  if isinstance(store, StoredSeed):
    for place, (rank, m, dtype, *bases) in sides.items():
      if not bases:
        alike[rank, m, dtype].append(place)
  found: dict[tuple[int, int], jax.Array] = {}
  for (rank, m, dtype), places in alike.items():
    # The bases of one loop exist at the same time.
    most = max(1, MOST_IN_LOOP // (rank * m))
    for start in range(0, len(places), most):
      some = places[start : start + most]
      if len(some) == 1:
        continue
      seeds = [by_side(plans[i], stored[i])[number] for i, number in some]
      rows = store.rows(jnp.stack(seeds), rank, m, dtype)
      found |= zip(some, unstack(rows, len(some)), strict=True)

  def of_side(i: int, number: int) -> jax.Array:
    if (i, number) in found:
      return found[i, number]
    rank, m, dtype, *_ = sides[i, number]
    return store.rows(by_side(plans[i], stored[i])[number], rank, m, dtype)

  return [
    tuple(of_side(i, number) for number in range(len(p.sides)))
    for i, p in enumerate(plans)
  ]


def changed(
  gap: Gap, plan: Projection, phase: Any, count: jax.Array, layer: Any
) -> jax.Array:
  """Returns which matrices replace an earlier basis: [..., 1, 1], bool."""
  due = _due_k(gap, phase, count, layer) & (count > 0)
  return jnp.broadcast_to(due, plan.num_bases).reshape(*plan.bases, 1, 1)


def find_bases(
  store: BasisStore,
  plans: Sequence[Projection | Whole],
  grads: Sequence[jax.Array],
  stored: Sequence[Any],
  phase: Sequence[Any],
  *,
  gap: Gap,
  count: jax.Array,
  layer: Any,
) -> tuple[list[Any], jax.Array]:
  """Finds the bases that are due.

  The matrices of a stack run one after another, so that there is scratch
  memory for one matrix only. Single matrices of the same shape share one loop,
  so that a finder is compiled once for each shape.

  Args:
    store: the store of bases.
    plans: one for each leaf.
    grads: gradients in the weights' shapes, one for each leaf.
    stored: the state's values, one for each leaf.
    phase: the `Phase` of each leaf if the gap is staggered.
    gap: number of updates between refreshes.
    count: [], int32: number of earlier updates.
    layer: index of the layer if the arguments are one layer of a stack.

  Returns:
    The new values, one for each leaf; and the number of matrices whose basis
    was kept because the gradient or the new basis was not finite: [], int32.
  """

  def find(job: Job) -> tuple[Stored, jax.Array]:
    if isinstance(gap, int):
      return _find_one(store, job, count == 0)
    return jax.lax.cond(
      job.due,
      lambda: _find_one(store, job, count == 0),
      lambda: (job.stored, jnp.int32(0)),
    )

  # By leaf and side.
  found: dict[tuple[int, int], Stored] = {}
  skips: list[jax.Array] = []
  # By structure, shapes and dtypes, then by leaf and side.
  single: dict[Any, dict[tuple[int, int], Job]]
  single = collections.defaultdict(dict)
  for i, p in enumerate(plans):
    for number, one in enumerate(by_side(p, stored[i])):
      jobs = _jobs(p, number, grads[i], one, gap, phase[i], count, layer)
      if len(jobs.due) > 1:
        found[i, number], skip_k = _find_in_stack(find, jobs)
        skips.append(jnp.sum(skip_k, dtype=jnp.int32))
      else:
        job = jax.tree.map(lambda x: x[0], jobs)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(job)]
        single[(jax.tree.structure(job), *shapes)][i, number] = job
  for alike in single.values():
    new, skip = _find_each(find, [*alike.values()])
    found.update(zip(alike, new, strict=True))
    skips.append(skip)
  by_leaf = [
    joined([found[i, number] for number in range(len(p.sides))])
    for i, p in enumerate(plans)
  ]
  new = jax.tree.map(lambda x, old: x.reshape(old.shape), by_leaf, [*stored])
  return new, sum(skips, jnp.int32(0))


def _jobs(
  p: Any,
  number: int,
  g: jax.Array,
  stored: Stored,
  gap: Gap,
  phase: Any,
  count: jax.Array,
  layer: Any,
) -> Job:
  """Returns one side of a leaf's matrices as a `Job` with an axis [k, ...]."""
  k, shared = p.num_bases, p.batch[len(p.bases) :]
  matrices = projection.to_matrix(p, g)
  g_kio = matrices.reshape(k, *shared, *p.matrix_shape[-2:])
  # The path identifies the leaf. Its position would depend on whether the tree
  # is the whole model or one part of it.
  path, index_k = zlib.crc32(p.path.encode()), jnp.arange(k) + layer * k
  seeds = number, path, index_k, _refreshes_k(gap, phase, count, layer)

  def for_each(x: Any, dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(x, dtype), k)

  return Job(
    g_mn=projection.unfold(g_kio, p.sides[number]),
    stored=jax.tree.map(
      lambda x: x.reshape(k, *x.shape[len(p.bases) :]), stored
    ),
    seeds=tuple(for_each(x, jnp.uint32) for x in seeds),
    due=for_each(_due_k(gap, phase, count, layer), bool),
  )


def _find_in_stack(find: Find, jobs: Job) -> tuple[Stored, jax.Array]:
  """Finds the bases of a stack; the devices of a mesh share the matrices."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    # Without `jax.set_mesh` the type of an array has its mesh.
    mesh = jax.typeof(jobs.g_mn).sharding.mesh
  k, axes = len(jobs.due), ()
  for axis in mesh.auto_axes:
    if mesh.shape[axis] > 1 and k % mesh.shape[axis] == 0:
      axes, k = (*axes, axis), k // mesh.shape[axis]
      # One axis at a time. For all axes at once the compiler may gather the
      # whole stack on every device.
      spec = P(axes, P.UNCONSTRAINED, P.UNCONSTRAINED)
      place = NamedSharding(mesh, spec)
      g_mn = jax.lax.with_sharding_constraint(jobs.g_mn, place)
      jobs = jobs._replace(g_mn=g_mn)
  find_share = functools.partial(jax.lax.map, find)
  if axes:
    find_share = jax.shard_map(
      find_share,
      mesh=mesh,
      in_specs=P(axes),
      out_specs=P(axes),
      axis_names={*axes},
      check_vma=False,
    )
  return find_share(jobs)


def _find_each(
  find: Find, jobs: Sequence[Job]
) -> tuple[list[Stored], jax.Array]:
  """Finds one basis after another, without a stacked copy of the gradients."""
  if len(jobs) == 1:
    stored, skip = find(jobs[0])
    return [stored], skip

  def find_number(i: jax.Array) -> tuple[Stored, jax.Array]:
    return find(jax.lax.switch(i, [lambda job=job: job for job in jobs]))

  stored, skips = jax.lax.map(find_number, jnp.arange(len(jobs)))
  return unstack(stored, len(jobs)), jnp.sum(skips, dtype=jnp.int32)


def _find_one(
  store: BasisStore, job: Job, first: jax.Array
) -> tuple[Stored, jax.Array]:
  """Returns the new value of one matrix and 0; on failure the old one and 1."""
  g_mn = at_least_float32(job.g_mn)
  finite = jnp.all(jnp.isfinite(g_mn))
  # A decomposition of NaN may never end.
  g_mn = jnp.where(finite, g_mn, 0)
  # A basis does not depend on the gradient's scale. Without scaling, the square
  # of the gradient may overflow or underflow in float32.
  size = jnp.max(jnp.abs(g_mn))
  g_mn = g_mn / jnp.where(size > 0, size, 1)
  # The key is made here, inside the loop, so that it is compiled once a shape.
  seed, *rest = job.seeds
  key = functools.reduce(jax.random.fold_in, rest, jax.random.key(seed))
  new = store.find(g_mn, job.stored, key, first)
  sound = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]
  # A random seed does not depend on the gradient.
  found = jnp.all(jnp.array(sound)) & (finite | isinstance(store, StoredSeed))
  stored = jax.tree.map(lambda a, b: jnp.where(found, a, b), new, job.stored)
  return stored, jnp.int32(~found)


def by_side(plan: Any, stored: Any) -> tuple[Stored, ...]:
  """Returns the state's value of a leaf as a tuple over projected sides."""
  return stored if len(plan.sides) > 1 else (stored,) * len(plan.sides)


def joined(sides: Sequence[Stored]) -> Any:
  """Returns the form of the state: one value, or a pair. Inverts `by_side`."""
  if not sides:
    return optax.MaskedNode()
  return sides[0] if len(sides) == 1 else tuple(sides)
