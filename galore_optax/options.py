"""This module holds the options of one `galore` and what they select."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax import moments as moments_lib
from galore_optax import paths as selection
from galore_optax import projection as projection_lib
from galore_optax import residual as residual_lib
from galore_optax.static import check_static
from galore_optax.subspace import finders as subspace_lib
from galore_optax.subspace.refresh import Staggered
from galore_optax.subspace.turns import Turns

Projection = projection_lib.Projection


COORDINATES = (subspace_lib.Coordinates, Turns)
"""Finders of coordinates, of which there may be more than a matrix has rank."""


@dataclasses.dataclass(frozen=True)
class Options:
  """The checked options of `galore`, which documents them."""

  rank: int | float
  gap: int | Staggered
  scale: float
  side: str
  subspace: str | subspace_lib.Subspace
  residual: str | residual_lib.Residual | None
  moments: str
  targets: selection.Targets
  axes: Mapping[str, projection_lib.Axes] | None

  def __post_init__(self) -> None:
    """Raises ValueError for an option that fits no weight."""
    steps = self.gap.gap if isinstance(self.gap, Staggered) else self.gap
    check_static(rank=self.rank, gap=steps)
    if not _is_rank(self.rank):
      raise ValueError(
        'rank must be an integer >= 1 or a float in (0, 1], the share of the'
        f' projected side, got {self.rank!r}'
      )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
      raise ValueError(
        f'gap must be an integer >= 1, in optimizer steps, got {self.gap!r}'
      )
    if isinstance(self.gap, Staggered) and self.moments == 'reset':
      raise ValueError(
        "moments='reset' restarts a counter that all matrices share, so they"
        " cannot take turns; use an integer gap, 'keep' or 'rotate'"
      )
    _one_of('side', self.side, projection_lib.SIDES)
    _one_of('moments', self.moments, moments_lib.MOMENTS)
    if not callable(self.subspace):
      _one_of('subspace', self.subspace, tuple(subspace_lib.SUBSPACES))
    if self.residual is not None and not callable(self.residual):
      _one_of('residual', self.residual, tuple(residual_lib.RESIDUALS))

  @property
  def finder(self) -> subspace_lib.Subspace:
    """The subspace finder, a short name resolved."""
    if isinstance(self.subspace, str):
      return subspace_lib.SUBSPACES[self.subspace]
    return self.subspace

  @property
  def rule(self) -> residual_lib.Residual | None:
    """The residual rule, a short name resolved."""
    if isinstance(self.residual, str):
      return residual_lib.RESIDUALS[self.residual]
    return self.residual

  def projections(self, tree: Any) -> list[Projection | None]:
    """Returns how each leaf of `tree` is projected; None for the others.

    Args:
      tree: parameters or gradients; only paths, shapes and dtypes are read.

    Raises:
      ValueError: a target matches nothing or does not fit the rank, or
        nothing at all is selected.
    """
    names, leaves = selection.paths(tree), jax.tree.leaves(tree)
    selection.matched(list(self.axes or {}), tree, option='axes')
    candidates = [
      self._candidate(name, leaf)
      for name, leaf in zip(names, leaves, strict=True)
    ]
    if self.targets is None:
      chosen = [
        candidate is not None
        and selection.named_as_matrix(name)
        and self._fits_default(candidate)
        for name, candidate in zip(names, candidates, strict=True)
      ]
    else:
      chosen = self._named(names, leaves, tree)
      for name, leaf, c, yes in zip(
        names, leaves, candidates, chosen, strict=True
      ):
        if yes:
          self._check_fits(name, leaf, c)
    if names and not any(chosen) and not selection.is_part(tree):
      raise ValueError(self._nothing_selected(names, leaves))
    return [
      c if yes else None for c, yes in zip(candidates, chosen, strict=True)
    ]

  def _named(self, names, leaves, tree) -> list[bool]:
    targets = self.targets
    if callable(targets):
      pairs = zip(names, leaves, strict=True)
      return [bool(targets(name, leaf)) for name, leaf in pairs]
    patterns = [targets] if isinstance(targets, str) else list(targets or ())
    return selection.matched(patterns, tree)

  def _candidate(self, path: str, x: Any) -> Projection | None:
    """Returns how a leaf would be projected, None if it is no real matrix."""
    if len(x.shape) < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
      return None
    leaf = Projection(path, tuple(x.shape), self._axes(path, x.shape), 1, ())
    *_, i, o = leaf.matrix_shape
    sides = projection_lib.projected_sides(self.side, i, o)
    rank = self.rank
    if isinstance(rank, float):
      longest = max(leaf.matrix_shape[side] for side in sides)
      rank = max(1, int(rank * longest + 0.5))
      rank = min(rank, self._largest_rank(leaf.matrix_shape, sides))
    return dataclasses.replace(leaf, rank=rank, sides=sides)

  def _largest_rank(self, shape: tuple[int, ...], sides: tuple[int, ...]):
    """Returns the rank of a gradient, or the number of its coordinates."""
    if isinstance(self.finder, COORDINATES):
      return min(shape[side] for side in sides)
    return min(shape[-2:])

  def _axes(self, path: str, shape: tuple[int, ...]):
    ndim = len(shape)
    for pattern, axes in (self.axes or {}).items():
      if re.fullmatch(pattern, path):
        i, o = _as_tuple(axes[0]), axes[1]
        if o is ...:
          inputs = {axis % ndim for axis in i}
          o = tuple(axis for axis in range(ndim) if axis not in inputs)
        o = _as_tuple(o)
        used = {axis % ndim for axis in i + o if -ndim <= axis < ndim}
        if len(used) < len(i + o):
          raise ValueError(
            f'axes must be distinct and in {-ndim}..{ndim - 1} for {path} of'
            f' shape {tuple(shape)}, got {axes!r}'
          )
        return tuple(x % ndim for x in i), tuple(x % ndim for x in o)
    return (ndim - 2,), (ndim - 1,)

  def _fits_default(self, projection: Projection) -> bool:
    by_coordinates = isinstance(self.finder, COORDINATES)
    shape = projection.shape if by_coordinates else projection.matrix_shape
    shorter = min(shape[-2:])
    if isinstance(self.rank, float):
      return shorter > 1
    return shorter > self.rank

  def _check_fits(self, path: str, x: Any, projection: Projection | None):
    shape = tuple(x.shape)
    if projection is None:
      raise ValueError(
        f'{path} of shape {shape} and dtype {x.dtype} is a target but no'
        ' matrix: it needs two axes of real numbers. Leave it out of targets'
      )
    largest = self._largest_rank(projection.matrix_shape, projection.sides)
    if projection.rank > largest:
      raise ValueError(
        f'rank must be in 1..{largest} for {path} of shape {shape},'
        f' got {projection.rank}'
      )

  def _nothing_selected(self, names, leaves) -> str:
    shapes = ', '.join(
      f'{name} {tuple(leaf.shape)}'
      for name, leaf in zip(names, leaves, strict=True)
    )
    if self.targets is None:
      return (
        f'rank {self.rank} projects no parameter: by default those with both'
        ' last axes larger than rank, embeddings, heads, norms and biases'
        f' excepted. Lower rank or name targets. Parameters: {shapes}'
      )
    return f'targets select no parameter. Parameters: {shapes}'


def _is_rank(rank: Any) -> bool:
  if isinstance(rank, bool):
    return False
  if isinstance(rank, int):
    return rank >= 1
  return isinstance(rank, float) and 0 < rank <= 1


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
  if value not in known:
    raise ValueError(f'{name} must be one of {", ".join(known)}, got {value!r}')


def _as_tuple(axes) -> tuple[int, ...]:
  return (axes,) if isinstance(axes, int) else tuple(axes)
