"""Which weights are projected, on which side, at which rank.

A `Planner` holds what the user asked for; called with a tree of parameters, it
returns a `Projection` or a `Whole` for each leaf. The numbers of a plan are in
`projection`.
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

# Attention kernels that keep their heads apart: [d, heads, head_dim].
MANY_HEADS = re.compile(r'(?:.*/)?(query|key|value|out)(?:/kernel)?')


@dataclasses.dataclass(frozen=True)
class Planner:
  """What a `galore` projects; `galore` documents the options."""

  rank: int | float
  side: projection.Side = 'std'
  targets: paths.Targets = None
  axes: Mapping[str, projection.Axes] | None = None
  # Whether a basis is of coordinates, of which there may be more than rank.
  by_coordinates: bool = False
  # The plan of each tree that was seen: made once, at `init`.
  made: Any = dataclasses.field(default_factory=dict, compare=False, repr=False)

  def __post_init__(self) -> None:
    """Raises ValueError for an option that fits no weight."""
    object.__setattr__(self, 'rank', _checked_rank(self.rank))
    checks.check_one_of(get_args(projection.Side), side=self.side)
    paths.check_targets(self.targets)
    rule = (
      'a mapping from regexes to input and output axes, such as'
      " {'.*/proj/kernel': (0, (1, 2))}"
    )
    checks.require(rule, _is_axes_or_none, axes=self.axes)

  def __call__(self, tree: Any) -> list[Plan]:
    """Returns how each leaf of `tree` is projected.

    Args:
      tree: parameters or gradients; only paths, shapes and dtypes are read.

    Raises:
      ValueError: a target matches nothing or does not fit the rank, or
        nothing at all is selected.
    """
    leaves, treedef = jax.tree.flatten(tree)
    key = treedef, tuple(tuple(leaf.shape) for leaf in leaves)
    if key not in self.made:
      self.made[key] = self._plan(tree, leaves)
    return self.made[key]

  def _plan(self, tree, leaves) -> list[Plan]:
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

  def _candidate(self, path, x) -> Plan:
    """Returns how a leaf would be projected, if it is a real matrix."""
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

  def _largest_rank(self, leaf) -> int:
    """Returns the rank of a gradient, or the number of its coordinates."""
    sides = leaf.sides if self.by_coordinates else (-2, -1)
    return min(leaf.matrix_shape[side] for side in sides)

  def _axes(self, path, shape):
    ndim = len(shape)
    for pattern, axes in (self.axes or {}).items():
      if not re.fullmatch(pattern, path):
        continue
      i, o = _as_tuple(axes[0]), axes[1]
      others = set(range(ndim)).difference(axis % ndim for axis in i)
      o = tuple(sorted(others)) if o is ... else _as_tuple(o)
      used = {axis % ndim for axis in i + o if -ndim <= axis < ndim}
      rule = f'distinct and in {-ndim}..{ndim - 1} for {path} of shape {shape}'
      distinct = len(used) == len(i + o)
      checks.require(rule, lambda _, yes=distinct: yes, axes=axes)
      return tuple(x % ndim for x in i), tuple(x % ndim for x in o)
    return _axes_of_heads(path, shape) or ((ndim - 2,), (ndim - 1,))

  def _is_default(self, p) -> bool:
    """Whether a leaf is projected where no targets are named."""
    if isinstance(p, Whole) or not paths.is_matrix(p.path):
      return False
    shape = p.shape if self.by_coordinates else p.matrix_shape
    return min(shape[-2:]) > (1 if isinstance(self.rank, float) else self.rank)

  def _selected(self, leaf, p, yes) -> Plan:
    """Returns the plan of a leaf; ValueError for a target that does not fit."""
    if not yes or self.targets is None:
      return p if yes else Whole(p.path, p.shape)
    of = f'{p.path} of shape {p.shape}'
    if isinstance(p, Whole):
      rule = 'is no matrix, two axes of real numbers. Leave it out of targets'
      raise ValueError(f'{of} and dtype {leaf.dtype} {rule}')
    largest = self._largest_rank(p)
    checks.require(f'in 1..{largest} for {of}', largest.__ge__, rank=p.rank)
    return p

  def _nothing_selected(self, plans) -> str:
    shapes = ', '.join(f'{p.path} {p.shape}' for p in plans)
    if self.targets is not None:
      return f'targets select no parameter. Parameters: {shapes}'
    return (
      f'rank {self.rank} projects no parameter: by default those with both'
      ' last axes larger than rank, embeddings, heads, norms and biases'
      f' excepted. Lower rank or name targets. Parameters: {shapes}'
    )


def _axes_of_heads(path, shape):
  """Returns input and output axes of a kernel [d, heads, head_dim] or back.

  Not of a stack [L, in, out] under such a name, whose first axis is short.
  """
  match = MANY_HEADS.fullmatch(path)
  if match is None or len(shape) < 3:
    return None
  a, b, c = range(len(shape) - 3, len(shape))
  if match[1] == 'out':
    return ((a, b), (c,)) if shape[a] * shape[b] == shape[c] else None
  return ((a,), (b, c)) if shape[a] > shape[b] else None


def _checked_rank(rank) -> int | float:
  kind = int if checks.is_integer(rank) else float
  rule = 'an integer >= 1 or a float in (0, 1], the share of the projected side'
  # A NaN or an infinity is no share.
  fits = lambda x: x >= 1 if kind is int else 0 < x <= 1
  checks.require(rule, lambda x: checks.is_number(x) and fits(x), rank=rank)
  return kind(rank)


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
  if isinstance(axes, tuple | list):
    return all(map(checks.is_integer, axes))
  return checks.is_integer(axes)


def _as_tuple(axes: Any) -> tuple[int, ...]:
  return (axes,) if checks.is_integer(axes) else tuple(axes)
