"""This module holds how leaves of a parameter tree are chosen by path."""

import collections
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import optax

PyTree: TypeAlias = Any

Targets: TypeAlias = (
  str | Sequence[str] | Callable[[str, jax.Array], bool] | None
)
"""Names weights: None (by shape), regexes, or a predicate `(path, leaf)`."""

VECTOR = re.compile(r'\w*norm\w*|ln_\w*|scale|bias')
"""Path components of vectors; with more axes, such a leaf is a stack."""

NOT_A_MATRIX = re.compile(
  r'embed\w*|lm_head|head|logits|wte|wpe|' + VECTOR.pattern
)
"""Path components of leaves that `targets=None` never projects."""

HEAD = re.compile(r'lm_head|head|logits|unembed\w*')
"""Path components of the head, which makes logits of the residual stream."""

EMBEDDING = re.compile(r'\w*embed\w*|wte|wpe')
"""Path components of embeddings, where none of `HEAD` is among them."""

VALUE = jax.tree_util.GetAttrKey('value')


@jax.tree_util.register_pytree_node_class
class Elsewhere:
  """A leafless node that says: this part of the model is updated elsewhere.

  A layer-wise step shows a transformation one part of the tree at a time;
  where the rest would be stands an `Elsewhere`, so that a target which names
  a weight of another part is no mistake.
  """

  def tree_flatten(self) -> tuple[tuple[()], None]:
    """Returns no children."""
    return (), None

  @classmethod
  def tree_unflatten(cls, aux: None, children: tuple[()]) -> 'Elsewhere':
    """Returns a new node."""
    del aux, children
    return cls()


def places(tree: PyTree) -> tuple[list[int], int]:
  """Returns the place of each leaf in the whole model, and how many it has.

  >>> places({'a': 1, 'b': Elsewhere(), 'c': 2})
  ([0, 2], 3)
  """
  is_elsewhere = lambda node: isinstance(node, Elsewhere)
  nodes = jax.tree.leaves(tree, is_leaf=is_elsewhere)
  return [i for i, x in enumerate(nodes) if not is_elsewhere(x)], len(nodes)


def paths(tree: PyTree) -> list[str]:
  """Returns the path of each leaf, its keys joined by '/'.

  >>> paths({'blocks': {'q': {'kernel': 0}}, 'norm': 1})
  ['blocks/q/kernel', 'norm']
  """
  keys = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  parents = collections.Counter(path[:-1] for path in keys)
  return [
    jax.tree_util.keystr(
      # An NNX variable is a node around one leaf, which its optimizer shows at
      # init and takes off at update.
      path[:-1] if path[-1:] == (VALUE,) and parents[path[:-1]] == 1 else path,
      simple=True,
      separator='/',
    )
    for path in keys
  ]


def is_part(tree: PyTree) -> bool:
  """Whether some of the model that `tree` belongs to is elsewhere.

  >>> is_part({'blocks': 1, 'embed': Elsewhere()})
  True
  """
  nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Elsewhere))
  return any(isinstance(node, Elsewhere) for node in nodes)


def named_as_matrix(path: str) -> bool:
  """Whether no component of `path` names an embedding, head, norm or bias.

  >>> named_as_matrix('blocks/mlp/up/kernel')
  True
  >>> named_as_matrix('blocks/mlp_norm/scale')
  False
  """
  return not any(NOT_A_MATRIX.fullmatch(part) for part in path.split('/'))


def own_axes(path: str, ndim: int) -> tuple[int, ...]:
  """Returns the axes of one matrix, or vector, of a leaf; others are batch.

  By its shape a stack of norm scales [L, d] is a matrix; its path says not.

  >>> own_axes('blocks/mlp/up/kernel', 3), own_axes('embed/embedding', 2)
  ((-2, -1), (-2, -1))
  >>> own_axes('blocks/mlp_norm/scale', 2), own_axes('temperature', 0)
  ((-1,), ())
  """
  is_vector = any(VECTOR.fullmatch(part) for part in path.split('/'))
  return tuple(range(-min(1 if is_vector else 2, ndim), 0))


def heads(tree: PyTree) -> list[bool]:
  """Returns which leaves of `tree` are the head, bias included.

  Where no path names a head the model is tied, and its embeddings are it. The
  whole model tells, what is elsewhere or masked included.

  >>> heads({'embed': 0, 'lm_head': 1}), heads({'embed': 0, 'up': 1})
  ([False, True], [True, False])
  >>> heads({'embed': 0, 'lm_head': Elsewhere()})
  [False]
  """
  is_hole = lambda node: isinstance(node, Elsewhere | optax.MaskedNode)
  whole = jax.tree.map(lambda _: 0, tree, is_leaf=is_hole)
  has_part = lambda pattern, path: any(map(pattern.fullmatch, path.split('/')))
  untied = any(has_part(HEAD, path) for path in paths(whole))
  return [has_part(HEAD if untied else EMBEDDING, path) for path in paths(tree)]


def matched(
  patterns: Sequence[str], tree: PyTree, *, option: str = 'targets'
) -> list[bool]:
  """Returns which leaves of `tree` a regex matches in full.

  Args:
    patterns: regexes on paths.
    tree: parameters; only paths are read.
    option: what an error calls the patterns.

  Raises:
    ValueError: a regex is malformed, or matches no path of a whole tree.

  >>> matched(['.*/kernel'], {'up': {'bias': 0, 'kernel': 1}})
  [False, True]
  """
  names = paths(tree)
  regexes = [_compiled(pattern, option) for pattern in patterns]
  unused = [
    regex.pattern for regex in regexes if not any(map(regex.fullmatch, names))
  ]
  if unused and names and not is_part(tree):
    raise ValueError(
      f'{option} {unused} match no parameter; a regex must match a whole path.'
      ' Paths: ' + ', '.join(names)
    )
  return [any(regex.fullmatch(name) for regex in regexes) for name in names]


def _compiled(pattern: str, option: str) -> re.Pattern[str]:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'{option}: {pattern!r} is no regular expression: {error}'
    ) from error
