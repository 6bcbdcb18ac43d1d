"""Which weights are projected, on which side, at which rank.

A `Planner` holds the options. Called with a tree of parameters, it returns a
`Projection` or a `Whole` for each leaf. The module `projection` defines both.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeAlias, get_args

import jax
import jax.numpy as jnp

from galore_optax import checks, paths, projection
from galore_optax.projection import Projection, Whole

Plan: TypeAlias = Projection | Whole

MANY_HEADS = re.compile(r'(?:.*/)?(query|key|value|out)(?:/kernel)?')
"""Paths of attention kernels that may have a heads axis."""


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
  """Cache: the plans of each tree structure with its shapes."""

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
    key = treedef, tuple(tuple(leaf.shape) for leaf in leaves)
    if key not in self.made:
      self.made[key] = self._plan(tree, leaves)
    return self.made[key]

  def _plan(self, tree: Any, leaves: list[Any]) -> list[Plan]:
    names = paths.paths(tree)
    paths.matched(list(self.axes or {}), tree, option='axes')
    plans = list(map(self._candidate, names, leaves))
    if self.targets is None:
      chosen = list(map(self._is_default, plans))
    else:
      chosen = paths.chosen(self.targets, tree)
    if names and not any(chosen) and not paths.is_part(tree):
      raise ValueError(self._nothing_selected(plans))
    return list(map(self._selected, leaves, plans, chosen))

  def _candidate(self, path: str, x: Any) -> Plan:
    """Returns the plan of a leaf if it is selected.

    A leaf with fewer than two axes, or whose dtype is not real floating, cannot
    be projected.
    """
    shape = tuple(x.shape)
    if len(shape) < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
      return Whole(path, shape)
    leaf = Projection(path, shape, self._axes(path, shape), 1, ())
    sides = projection.projected_sides(self.side, *leaf.matrix_shape[-2:])
    leaf = dataclasses.replace(leaf, sides=sides)
    rank = self.rank
    if isinstance(rank, float):
      longest = max(leaf.matrix_shape[side] for side in sides)
      rank = min(max(1, int(rank * longest + 0.5)), self._largest_rank(leaf))
    return dataclasses.replace(leaf, rank=rank)

  def _largest_rank(self, leaf: Projection) -> int:
    """Returns min(i, o); for coordinates, the length of the projected side."""
    sides = leaf.sides if self.by_coordinates else (-2, -1)
    return min(leaf.matrix_shape[side] for side in sides)

  def _axes(
    self, path: str, shape: tuple[int, ...]
  ) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns input and output axes of a leaf, non-negative."""
    ndim = len(shape)
    for pattern, axes in (self.axes or {}).items():
      if not re.fullmatch(pattern, path):
        continue
      i, o = _as_tuple(axes[0]), axes[1]
      others = set(range(ndim)).difference(axis % ndim for axis in i)
      o = tuple(sorted(others)) if o is ... else _as_tuple(o)
      used = {axis % ndim for axis in i + o if -ndim <= axis < ndim}
      if len(used) != len(i + o):
        raise ValueError(
          f'axes must be distinct and in {-ndim}..{ndim - 1} for {path} of'
          f' shape {shape}, got {axes!r}'
        )
      return tuple(x % ndim for x in i), tuple(x % ndim for x in o)
    return _axes_of_heads(path, shape) or ((ndim - 2,), (ndim - 1,))

  def _is_default(self, p: Plan) -> bool:
    """Whether a leaf is projected if `targets` is None."""
    if isinstance(p, Whole) or not paths.is_matrix(p.path):
      return False
    shape = p.shape if self.by_coordinates else p.matrix_shape
    return min(shape[-2:]) > (1 if isinstance(self.rank, float) else self.rank)

  def _selected(self, leaf: Any, p: Plan, yes: bool) -> Plan:
    """Returns the final plan of a leaf.

    Raises:
      ValueError: the leaf is a target, but it is not a matrix, or the rank does
        not fit it.
    """
    if not yes or self.targets is None:
      return p if yes else Whole(p.path, p.shape)
    of = f'{p.path} of shape {p.shape}'
    if isinstance(p, Whole):
      rule = 'is no matrix, two axes of real numbers. Leave it out of targets'
      raise ValueError(f'{of} and dtype {leaf.dtype} {rule}')
    largest = self._largest_rank(p)
    if p.rank > largest:
      raise ValueError(f'rank must be in 1..{largest} for {of}, got {p.rank!r}')
    return p

  def _nothing_selected(self, plans: list[Plan]) -> str:
    """Returns the message for a tree in which no leaf is selected."""
    shapes = ', '.join(f'{p.path} {p.shape}' for p in plans)
    if self.targets is not None:
      return f'targets select no parameter. Parameters: {shapes}'
    return (
      f'rank {self.rank} projects no parameter: by default those with both'
      ' last axes larger than rank, embeddings, heads, norms and biases'
      f' excepted. Lower rank or name targets. Parameters: {shapes}'
    )


def _axes_of_heads(
  path: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  """Returns the axes of a kernel [d, heads, head_dim] or [heads, head_dim, d].

  Returns None for other kernels. A kernel with such a name is a stack [L, in,
  out] if its first axis is not longer than the second, or for 'out' if heads
  times head_dim is not the last axis.
  """
  match = MANY_HEADS.fullmatch(path)
  if match is None or len(shape) < 3:
    return None
  a, b, c = range(len(shape) - 3, len(shape))
  if match[1] == 'out':
    return ((a, b), (c,)) if shape[a] * shape[b] == shape[c] else None
  return ((a,), (b, c)) if shape[a] > shape[b] else None


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
    isinstance(regex, str)
    and isinstance(pair, tuple | list)
    and len(pair) == 2
    and _are_axes(pair[0])
    and (pair[1] is ... or _are_axes(pair[1]))
    for regex, pair in axes.items()
  )


def _are_axes(axes: Any) -> bool:
  """Whether a value is an integer or several of them."""
  if isinstance(axes, tuple | list):
    return all(map(checks.is_integer, axes))
  return checks.is_integer(axes)


def _as_tuple(axes: Any) -> tuple[int, ...]:
  """Returns one axis or several as a tuple."""
  return (axes,) if checks.is_integer(axes) else tuple(axes)
