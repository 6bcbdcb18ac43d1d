"""Paths of parameters, and functions that select parameters by path.

`paths` returns the path of each leaf. The other functions match paths with
regexes and predicates, or look them up in the table of `names`.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from galore_optax import names

PyTree: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Optional:
  """Targets that may select no leaf; then only the inner optimizer runs.

  It is meant for programs whose trees do not always have a matrix. By default
  a selection without any leaf is an error, because it is nearly always one.
  Inside `Optional` a regex may match no path, neither in `targets` nor in
  `axes`. A selected leaf must still be a matrix that the rank fits.

  Example:
    >>> import galore_optax, jax.numpy as jnp
    >>> tx = galore_optax.galore(optax.sgd(1.0), targets=Optional())
    >>> updates, _ = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    >>> updates
    Array([-1., -1., -1.], dtype=float32)
  """

  targets: str | Sequence[str] | Callable[[str, Any], bool] | None = None
  """The targets: regexes, a predicate, or None for the default."""

  def __post_init__(self) -> None:
    """Raises ValueError unless the targets can select leaves."""
    _require_selection(self.targets, self.targets)


Targets: TypeAlias = (
  str | Sequence[str] | Callable[[str, Any], bool] | Optional | None
)
"""Selects weights: None for a default, regexes on whole paths, a predicate
`(path, leaf) -> bool`, or one of these in an `Optional`."""

# The key of the bases in a `GaloreState`.
BASIS = jax.tree_util.GetAttrKey('basis')


class Elsewhere(NamedTuple):
  """A pytree node without leaves that replaces a part of the model.

  The layer-wise step calls a transformation with one part of the tree at a
  time, and `Elsewhere` replaces all other parts. A regex in `targets` that
  matches no path of such a tree is not an error, because it may match a path of
  another part.
  """


def places(tree: PyTree) -> tuple[list[int], int]:
  """Returns the index of each leaf in the whole model, and the total count.

  Each `Elsewhere` counts as one leaf.

  >>> places({'a': 1, 'b': Elsewhere(), 'c': 2})
  ([0, 2], 3)
  """

  def is_elsewhere(node: Any) -> bool:
    return isinstance(node, Elsewhere)

  nodes = jax.tree.leaves(tree, is_leaf=is_elsewhere)
  return [i for i, x in enumerate(nodes) if not is_elsewhere(x)], len(nodes)


def is_part(tree: PyTree) -> bool:
  """Whether `tree` is a part of a model: it contains an `Elsewhere`.

  >>> is_part({'blocks': 1, 'embed': Elsewhere()})
  True
  """
  found, total = places(tree)
  return len(found) < total


def paths(tree: PyTree) -> list[str]:
  """Returns the path of each leaf, its keys joined by '/'.

  >>> paths({'blocks': {'q': {'kernel': 0}}, 'norm': 1})
  ['blocks/q/kernel', 'norm']
  """
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  ]


def owner(path: Any, owners: Sequence[Any]) -> int | None:
  """Returns the index of the parameter to which a leaf of state belongs.

  The path of the leaf contains the path of its parameter. If it contains the
  paths of several parameters, the result is the one that ends last, and of two
  with the same end the longer one. Earlier keys may be the indices of an
  `optax.chain`, which equal those of a list of parameters.

  In a basis, the parameter's path begins right after BASIS. The index of a
  projected side may follow it.

  Args:
    path: key path of a leaf of the state.
    owners: key paths of the parameters.

  Returns:
    An index in `owners`, or None if the leaf belongs to no parameter.
  """

  def starts(owner: Any) -> Iterable[int]:
    if BASIS in path:
      return [path.index(BASIS) + 1]
    return range(len(path) - len(owner) + 1)

  # (end of the parameter's path, its length, index of the parameter)
  found = [
    (start + len(owner), len(owner), i)
    for i, owner in enumerate(owners)
    for start in starts(owner)
    if path[start : start + len(owner)] == owner
  ]
  return max(found)[-1] if found else None


def is_matrix(path: str) -> bool:
  """Whether a path names no embedding, head, norm, scale or bias.

  >>> is_matrix('blocks/mlp/up/kernel'), is_matrix('LayerNorm_1/weight')
  (True, False)
  >>> is_matrix('multi_head_attention/query'), is_matrix('pos_embedding')
  (True, False)
  """
  return not (names.is_vector(path) or in_vocabulary(path))


def in_vocabulary(path: str) -> bool:
  """Whether a path names an embedding or a head.

  The size of such a weight is proportional to the vocabulary.

  >>> in_vocabulary('lm_head/kernel'), in_vocabulary('blocks/mlp/up/kernel')
  (True, False)
  """
  return names.is_embedding(path) or names.is_head(path)


def own_axes(path: str, ndim: int) -> tuple[int, ...]:
  """Returns the axes of one matrix, or one vector, of a leaf.

  All other axes are batch. A stack of norm scales [L, d] has the shape of a
  matrix, so the path decides whether a leaf consists of vectors.

  >>> own_axes('blocks/mlp/up/kernel', 3), own_axes('embed/embedding', 2)
  ((-2, -1), (-2, -1))
  >>> own_axes('blocks/mlp_norm/scale', 2), own_axes('temperature', 0)
  ((-1,), ())
  """
  return tuple(range(-min(1 if names.is_vector(path) else 2, ndim), 0))


def chosen(targets: Targets, tree: PyTree) -> list[bool]:
  """Returns for each leaf of `tree` whether `targets` selects it.

  None selects no leaf: the default rule belongs to the caller.

  Raises:
    ValueError: a regex is malformed, or matches no path of a whole tree and the
      targets are not an `Optional`.
  """
  chosen_by = required(targets)
  if callable(chosen_by):
    pairs = zip(paths(tree), jax.tree.leaves(tree), strict=True)
    return [bool(chosen_by(path, leaf)) for path, leaf in pairs]
  is_one = isinstance(chosen_by, str)
  patterns = [chosen_by] if is_one else list(chosen_by or ())
  return matched(patterns, tree, optional=isinstance(targets, Optional))


def required(
  targets: Targets,
) -> str | Sequence[str] | Callable[[str, Any], bool] | None:
  """Returns the targets without `Optional`.

  >>> required(Optional('.*/kernel')), required(None)
  ('.*/kernel', None)
  """
  return targets.targets if isinstance(targets, Optional) else targets


def check_targets(targets: Any) -> None:
  """Raises ValueError unless `targets` has the type `Targets`.

  >>> check_targets(['.*/kernel'])
  """
  _require_selection(required(targets), targets)


def _require_selection(selection: Any, given: Any) -> None:
  """Raises ValueError, about `given`, unless a value can select leaves."""
  if not _is_selection(selection):
    rule = (
      'None, a regex, regexes, a predicate (path, leaf) -> bool, or an Optional'
      ' of one of these'
    )
    raise ValueError(f'targets must be {rule}, got {given!r}')


def _is_selection(value: Any) -> bool:
  """Whether a value is None, a regex, regexes, or a predicate."""
  if value is None or isinstance(value, str) or callable(value):
    return True
  if isinstance(value, Mapping) or not isinstance(value, Collection):
    return False
  return all(isinstance(regex, str) for regex in value)


def heads(tree: PyTree) -> list[bool]:
  """Returns for each leaf of `tree` whether it belongs to the output head.

  The bias of the head belongs to it. If no path of the model names a head, the
  model is tied, and its embeddings are the head. The paths include those of
  `Elsewhere` and `optax.MaskedNode` nodes, which replace leaves of the model.

  >>> heads({'embed': 0, 'lm_head': 1}), heads({'embed': 0, 'up': 1})
  ([False, True], [True, False])
  >>> heads({'embed': 0, 'lm_head': Elsewhere()})
  [False]
  """

  def is_hole(node: Any) -> bool:
    return isinstance(node, Elsewhere | optax.MaskedNode)

  whole = paths(jax.tree.map(lambda _: 0, tree, is_leaf=is_hole))
  named = any(map(names.is_head, whole))
  of_head = names.is_head if named else in_vocabulary
  return [of_head(path) for path in paths(tree)]


def matched(
  patterns: Sequence[str],
  tree: PyTree,
  *,
  option: str = 'targets',
  optional: bool = False,
) -> list[bool]:
  """Returns for each leaf of `tree` whether a regex matches its whole path.

  Args:
    patterns: regexes on paths.
    tree: parameters; only paths are read.
    option: name of the option in error messages.
    optional: whether a regex may match no path.

  Raises:
    ValueError: a regex is malformed, or matches no path of a whole tree and is
      not optional.

  >>> matched(['.*/kernel'], {'up': {'bias': 0, 'kernel': 1}})
  [False, True]
  """
  found = paths(tree)
  try:
    regexes = [re.compile(pattern) for pattern in patterns]
  except re.error as error:
    what = f'{error.pattern!r} is no regular expression'
    raise ValueError(f'{option}: {what}: {error}') from error
  unused = [r.pattern for r in regexes if not any(map(r.fullmatch, found))]
  if unused and found and not (optional or is_part(tree)):
    rule = 'match no parameter; a regex must match a whole path. Paths:'
    raise ValueError(f'{option} {unused} {rule} {", ".join(found)}')
  return [any(regex.fullmatch(name) for regex in regexes) for name in found]
