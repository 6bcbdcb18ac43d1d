"""Which weights are projected, on which side, at which rank.

A `Planner` holds the options. Called with a tree of parameters, it returns a
`Projection` or a `Whole` for each leaf. The module `projection` defines both.
The table in `names` gives kind and axes of a leaf.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias, get_args

import jax
import jax.numpy as jnp

from galore_optax import checks, names, paths, projection
from galore_optax.projection import Projection, SharedBasis, Whole, are_axes

Plan: TypeAlias = Projection | Whole

PROJECTED: tuple[names.Kind, ...] = ('attention', 'convolution', 'matrix')
"""Kinds of leaves that are projected if `targets` is None."""


@dataclasses.dataclass(frozen=True)
class Planner:
  """Decides how each leaf is projected. `galore` documents the options."""

  rank: int | float
  """Number of basis vectors, or a share of the projected side."""
  side: projection.Side = 'std'
  """The projected side."""
  targets: paths.Targets = None
  """Regexes on paths, a predicate, or None for the default."""
  axes: Mapping[str, projection.Axes] | None = None
  """Input and output axes of kernels, by regexes on their paths."""
  by_coordinates: bool = False
  """Whether a basis selects coordinates; the rank may then be as large as the
  projected side."""
  made: dict[Any, list[Plan]] = dataclasses.field(
    default_factory=dict, compare=False, repr=False
  )
  """Cache: the plans of each tree structure with its shapes and kinds of
  dtypes."""

  def __post_init__(self) -> None:
    """Raises ValueError for an option that cannot fit any weight."""
    object.__setattr__(self, 'rank', _checked_rank(self.rank))
    checks.check_one_of(get_args(projection.Side), side=self.side)
    paths.check_targets(self.targets)
    rule = (
      'a mapping from regexes to input and output axes, such as'
      " {'.*/proj/kernel': (0, (1, 2))}"
    )
    checks.require(rule, _is_axes_or_none, axes=self.axes)

  def __call__(self, tree: Any) -> list[Plan]:
    """Returns the plan of each leaf of `tree`.

    Args:
      tree: parameters or gradients; only paths, shapes and dtypes are read.

    Raises:
      ValueError: a target does not match any leaf or does not fit the rank, or
        no leaf is selected.
    """
    leaves, treedef = jax.tree.flatten(tree)
    key = treedef, tuple((tuple(x.shape), _is_real(x)) for x in leaves)
    if key not in self.made:
      self.made[key] = self._plan(tree, leaves)
    return self.made[key]

  def _plan(self, tree: Any, leaves: list[Any]) -> list[Plan]:
    optional = isinstance(self.targets, paths.Optional)
    axes = list(self.axes or {})
    paths.matched(axes, tree, option='axes', optional=optional)
    plans = list(map(self._candidate, paths.paths(tree), leaves))
    if plans and not (optional or paths.is_part(tree)):
      self._check_shared(plans)
    if paths.required(self.targets) is None:
      final = list(map(self._if_default, plans))
      is_empty = not any(isinstance(p, Projection) for p in final)
    else:
      chosen = paths.chosen(self.targets, tree)
      final = list(map(self._if_chosen, leaves, plans, chosen))
      is_empty = not any(chosen)
    if plans and is_empty and not (optional or paths.is_part(tree)):
      raise ValueError(self._nothing_selected(plans))
    return final

  def _candidate(self, path: str, x: Any) -> Plan:
    """Returns the plan of a leaf if it is selected.

    A leaf with fewer than two axes, without elements, or whose dtype is not
    real floating, cannot be projected.
    """
    shape = tuple(x.shape)
    if not _is_real(x):
      return Whole(path, shape, f'not floating: {x.dtype}')
    if 0 in shape:
      return Whole(path, shape, 'empty')
    found = names.of(path, shape)
    if len(shape) < 2:
      is_named = found.kind != 'matrix'
      other = 'vector' if shape else 'scalar'
      return Whole(path, shape, found.label if is_named else other)
    axes, shared, side = found.axes, (), self.side
    reason = found.label
    given = self._given(path, shape)
    if given is not None:
      axes, shared = _named_axes(given, path, shape)
      reason = f'{found.kind}, by axes'
    if isinstance(given, SharedBasis):
      side = given.side or side
      num = math.prod(shape[axis] for axis in shared)
      reason = f'{reason}: a basis for {num} matrices'
    leaf = Projection(path, shape, axes, (), (), reason, shared=shared)
    sides = projection.projected_sides(side, *leaf.matrix_shape[-2:])
    leaf = dataclasses.replace(leaf, sides=sides)
    return dataclasses.replace(leaf, ranks=self._ranks(leaf))

  def _ranks(self, leaf: Projection) -> tuple[int, ...]:
    """Returns the number of basis vectors of each projected side."""
    if not isinstance(self.rank, float):
      return (self.rank,) * len(leaf.sides)
    sizes = [leaf.matrix_shape[side] for side in leaf.sides]
    if not leaf.shared:
      # Both bases of a matrix come from one decomposition of it, so they have
      # the same rank. Bases that are shared come from two unfoldings.
      sizes = [max(sizes)] * len(sizes)
    return tuple(
      min(max(1, int(self.rank * size + 0.5)), largest)
      for size, largest in zip(sizes, self._largest_ranks(leaf), strict=True)
    )

  def _largest_ranks(self, leaf: Projection) -> list[int]:
    """Returns the largest rank of each projected side.

    It is min(i, o) for a matrix, and min(m, K n) for K matrices that share a
    basis. For coordinates it is the length of the projected side.
    """
    shape = leaf.matrix_shape
    num = leaf.num_matrices // leaf.num_bases
    largest = [
      shape[side]
      if self.by_coordinates
      else min(shape[side], num * shape[-3 - side])
      for side in leaf.sides
    ]
    return largest if leaf.shared else [min(largest)] * len(largest)

  def _given(self, path: str, shape: tuple[int, ...]) -> projection.Axes | None:
    """Returns the first value of the option `axes` for a leaf, or None."""
    for pattern, axes in (self.axes or {}).items():
      if re.fullmatch(pattern, path) and _applies(axes, path, shape):
        return axes
    return None

  def _check_shared(self, plans: list[Plan]) -> None:
    """Raises ValueError if a `SharedBasis()` applies to no convolution."""
    for pattern, axes in (self.axes or {}).items():
      of_pattern = [p for p in plans if re.fullmatch(pattern, p.path)]
      if not any(_applies(axes, p.path, p.shape) for p in of_pattern):
        shapes = ', '.join(f'{p.path} {p.shape}' for p in of_pattern)
        raise ValueError(
          f'axes {pattern!r}: SharedBasis() is for convolutions, and the table'
          f' of names has none there: give SharedBasis(input, output, shared).'
          f' Parameters: {shapes}'
        )

  def _if_default(self, p: Plan) -> Plan:
    """Returns the final plan of a leaf if `targets` is None."""
    if isinstance(p, Whole):
      return p
    found = names.of(p.path, p.shape)
    if found.kind not in PROJECTED:
      return Whole(p.path, p.shape, found.label)
    least = 1 if isinstance(self.rank, float) else self.rank
    size = self._smaller_side(p)
    if size > least:
      return dataclasses.replace(p, reason=p.reason + self._remark(p))
    reason = f'rank {least} >= {size}{self._remark(p)}'
    too_small = found.kind != 'convolution'
    return Whole(p.path, p.shape, reason, too_small=too_small)

  def _smaller_side(self, p: Projection) -> int:
    """Returns the side that the rank must not reach by default.

    Coordinates may be of a matrix with one column, which `axes` names. Then it
    is a side of the convolution in the table, or one of the last two axes.
    """
    if not self.by_coordinates:
      return min(p.matrix_shape[-2:])
    found = names.of(p.path, p.shape)
    if not found.taps:
      return min(p.shape[-2:])
    table = dataclasses.replace(p, axes=found.axes, shared=())
    return min(table.matrix_shape[-2:])

  def _if_chosen(self, leaf: Any, p: Plan, yes: bool) -> Plan:
    """Returns the final plan of a leaf that `targets` selects, or not.

    Raises:
      ValueError: the leaf is selected, but it is not a matrix, or the rank does
        not fit it.
    """
    if not yes:
      return Whole(p.path, p.shape, 'not selected by targets')
    of = f'{p.path} of shape {p.shape}'
    if isinstance(p, Whole):
      rule = 'is no matrix, two axes of real numbers. Leave it out of targets'
      raise ValueError(f'{of} and dtype {leaf.dtype} {rule}')
    largest = min(self._largest_ranks(p))
    if isinstance(self.rank, int) and self.rank > largest:
      raise ValueError(f'rank must be in 1..{largest} for {of}, got {p.rank!r}')
    reason = f'{p.reason}, selected by targets{self._remark(p)}'
    return dataclasses.replace(p, reason=reason)

  def _remark(self, p: Projection) -> str:
    """Returns a remark on a leaf that is a stack of small matrices, or ''.

    A batch axis that is longer than both sides of the matrix is rarely one of
    layers or experts. More likely the table does not have the name.
    """
    matrix = p.matrix_shape[-2:]
    if self._given(p.path, p.shape) is not None:
      return ''
    if max(p.batch, default=0) <= max(matrix):
      return ''
    return f'; {p.num_matrices:,} matrices of {matrix}, see axes='

  def _at_most(self, plans: list[Plan]) -> str:
    """Returns words for the largest rank that projects some leaf, if any."""
    sizes = [
      self._smaller_side(p)
      for p in plans
      if isinstance(p, Projection) and paths.is_matrix(p.path)
    ]
    largest = max(sizes, default=1) - 1
    return f' to at most {largest}' if largest else ''

  def _nothing_selected(self, plans: list[Plan]) -> str:
    """Returns the message for a tree in which no leaf is selected."""
    shapes = ', '.join(f'{p.path} {p.shape}' for p in plans)
    shapes = f'Parameters: {shapes}'
    remedy = 'or allow it by targets=galore_optax.Optional(...)'
    if self.targets is not None:
      return f'targets select no parameter: correct them, {remedy}. {shapes}'
    return (
      f'rank {self.rank} projects no parameter: by default those with both'
      ' sides larger than rank, embeddings, heads, norms and biases excepted.'
      f' Lower rank{self._at_most(plans)} or name targets, {remedy}. {shapes}'
    )


def _is_real(x: Any) -> bool:
  """Whether an array is real floating, as a projected one must be."""
  return jnp.issubdtype(x.dtype, jnp.floating)


def _checked_rank(rank: Any) -> int | float:
  """Returns the rank as a Python number; raises ValueError if out of range."""
  rule = 'an integer >= 1 or a float in (0, 1], the share of the projected side'
  if checks.is_integer(rank) and rank >= 1:
    return int(rank)
  is_share = checks.is_number(rank) and not checks.is_integer(rank)
  # A NaN fails both comparisons.
  if is_share and 0 < rank <= 1:
    return float(rank)
  raise ValueError(f'rank must be {rule}, got {rank!r}')


def _is_axes_or_none(axes: Any) -> bool:
  """Whether a value maps strings to pairs of axes."""
  if axes is None:
    return True
  if not isinstance(axes, Mapping):
    return False
  return all(
    isinstance(regex, str) and _is_axes(value) for regex, value in axes.items()
  )


def _is_axes(value: Any) -> bool:
  """Whether a value is a `SharedBasis`, or a pair of axes."""
  if isinstance(value, SharedBasis):
    return True
  return (
    isinstance(value, tuple | list)
    and len(value) == 2
    and are_axes(value[0])
    and (value[1] is ... or are_axes(value[1]))
  )


def _applies(axes: projection.Axes, path: str, shape: tuple[int, ...]) -> bool:
  """Whether a value of the option `axes` is for a leaf that its regex matches.

  A `SharedBasis` without axes is for convolutions only.
  """
  if not isinstance(axes, SharedBasis) or axes.shared is not None:
    return True
  return bool(names.of(path, shape).taps)


def _named_axes(
  given: projection.Axes, path: str, shape: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]:
  """Returns input and output axes, and axes that share a basis.

  Args:
    given: a value of the option `axes`.
    path: path of the leaf.
    shape: shape of the leaf.

  Returns:
    `((input axes, output axes), shared axes)`, non-negative.

  Raises:
    ValueError: an axis is out of range or named twice.
  """
  ndim = len(shape)
  if not isinstance(given, SharedBasis):
    i, o, shared = _as_tuple(given[0]), given[1], ()
  elif given.shared is not None:
    i, o, shared = map(_as_tuple, (given.input, given.output, given.shared))
  else:
    found = names.of(path, shape)
    (i, o), shared = found.axes, found.taps
    i = tuple(axis for axis in i if axis not in shared)
  others = set(range(ndim)).difference(axis % ndim for axis in i)
  o = tuple(sorted(others)) if o is ... else _as_tuple(o)
  all_axes = i + o + shared
  used = {axis % ndim for axis in all_axes if -ndim <= axis < ndim}
  if len(used) != len(all_axes):
    raise ValueError(
      f'axes must be distinct and in {-ndim}..{ndim - 1} for {path} of'
      f' shape {shape}, got {given!r}'
    )
  i, o, shared = (tuple(x % ndim for x in axes) for axes in (i, o, shared))
  return (i, o), shared


def _as_tuple(axes: Any) -> tuple[int, ...]:
  """Returns one axis or several as a tuple."""
  return (axes,) if checks.is_integer(axes) else tuple(axes)
