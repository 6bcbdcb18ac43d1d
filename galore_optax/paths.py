"""Paths of weights: regexes on them, and what their names say.

`paths` is where to begin. A name says whether a leaf is a matrix or a vector,
and a regex or a predicate on paths picks leaves.
"""

import collections
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import optax

from galore_optax.checks import require

PyTree: TypeAlias = Any

# Names weights: None (by shape), regexes, or a predicate `(path, leaf)`.
Targets: TypeAlias = str | Sequence[str] | Callable[[str, Any], bool] | None

# Words of vectors; with more axes, such a leaf is a stack of them.
VECTOR = re.compile(r'\w*norm\w*|ln|scale|bias')

TABLE = re.compile(r'(un)?embed\w*|wte|wpe')  # words of embeddings

# Components of heads; in `multi_head_attention` the word means another.
HEAD = re.compile(r'(\w+_)?(head|logits)|unembed\w*')

VALUE = jax.tree_util.GetAttrKey('value')
BASIS = jax.tree_util.GetAttrKey('basis')


class Elsewhere(NamedTuple):
  """A leafless node that says: this part of the model is updated elsewhere.

  A layer-wise step shows a transformation one part of the tree at a time;
  where the rest would be stands an `Elsewhere`, so that a target which names
  a weight of another part is no mistake.
  """


def places(tree: PyTree) -> tuple[list[int], int]:
  """Returns the place of each leaf in the whole model, and how many it has.

  >>> places({'a': 1, 'b': Elsewhere(), 'c': 2})
  ([0, 2], 3)
  """
  is_elsewhere = lambda node: isinstance(node, Elsewhere)
  nodes = jax.tree.leaves(tree, is_leaf=is_elsewhere)
  return [i for i, x in enumerate(nodes) if not is_elsewhere(x)], len(nodes)


def is_part(tree: PyTree) -> bool:
  """Whether some of the model that `tree` belongs to is elsewhere.

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
  keys = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  parents = collections.Counter(path[:-1] for path in keys)
  show = lambda key: jax.tree_util.keystr(key, simple=True, separator='/')
  # An NNX variable is a node around one leaf, which its optimizer shows at init
  # and takes off at update.
  is_variable = lambda key: key[-1:] == (VALUE,) and parents[key[:-1]] == 1
  return [show(key[:-1] if is_variable(key) else key) for key in keys]


def owner(path: Any, owners: Sequence[Any]) -> int | None:
  """Returns which parameter a leaf of state is of: its path comes last.

  In a basis it comes right after BASIS.

  Of two that end together it is the longer; a chain's own indices, which a
  list of parameters shares, come first.
  """
  starts = lambda owner: range(len(path) - len(owner) + 1)
  if BASIS in path:
    starts = lambda owner: [path.index(BASIS) + 1]
  found = [
    (start + len(owner), len(owner), i)
    for i, owner in enumerate(owners)
    for start in starts(owner)
    if path[start : start + len(owner)] == owner
  ]
  return max(found, default=(None,))[-1]


def is_matrix(path: str) -> bool:
  """Whether no part of a path names an embedding, head, norm or bias.

  >>> is_matrix('blocks/mlp/up/kernel'), is_matrix('LayerNorm_1/weight')
  (True, False)
  >>> is_matrix('multi_head_attention/query'), is_matrix('pos_embedding')
  (True, False)
  """
  return not (is_vector(path) or _has_word(TABLE, path) or is_head(path))


def is_vector(path: str) -> bool:
  """Whether a part of a path names a norm, a scale or a bias.

  >>> is_vector('blocks/attention/q_bias'), is_vector('biased/kernel')
  (True, False)
  """
  return _has_word(VECTOR, path)


def is_head(path: str) -> bool:
  """Whether a component of a path names the head of a model.

  >>> is_head('lm_head/kernel'), is_head('heads/0')
  (True, False)
  """
  return any(HEAD.fullmatch(part.lower()) for part in path.split('/'))


def in_vocabulary(path: str) -> bool:
  """Whether a weight grows with the vocabulary: an embedding or a head.

  >>> in_vocabulary('lm_head/kernel'), in_vocabulary('blocks/mlp/up/kernel')
  (True, False)
  """
  return _has_word(TABLE, path) or is_head(path)


def _has_word(word: re.Pattern[str], path: str) -> bool:
  """Whether a word of some component matches: LayerNorm_1 has layer, norm."""
  snake = re.sub(r'(?<=[a-z])(?=[A-Z])', '_', path).lower()
  return any(word.fullmatch(part) for part in re.split(r'[^a-z]+', snake))


def own_axes(path: str, ndim: int) -> tuple[int, ...]:
  """Returns the axes of one matrix, or vector, of a leaf; others are batch.

  By its shape a stack of norm scales [L, d] is a matrix; its path says not.

  >>> own_axes('blocks/mlp/up/kernel', 3), own_axes('embed/embedding', 2)
  ((-2, -1), (-2, -1))
  >>> own_axes('blocks/mlp_norm/scale', 2), own_axes('temperature', 0)
  ((-1,), ())
  """
  return tuple(range(-min(1 if is_vector(path) else 2, ndim), 0))


def chosen(targets: Targets, tree: PyTree) -> list[bool]:
  """Returns which leaves of `tree` some regexes match or a predicate takes.

  Raises:
    ValueError: a regex is malformed, or matches no path of a whole tree.
  """
  if callable(targets):
    return list(map(bool, map(targets, paths(tree), jax.tree.leaves(tree))))
  patterns = [targets] if isinstance(targets, str) else list(targets or ())
  return matched(patterns, tree)


def check_targets(targets: Any) -> None:
  """Raises ValueError unless `targets` is of the type `Targets`.

  >>> check_targets(['.*/kernel'])
  """
  rule = 'None, a regex, regexes, or a predicate (path, leaf) -> bool'
  require(rule, _is_targets, targets=targets)


def _is_targets(targets: Any) -> bool:
  if targets is None or isinstance(targets, str) or callable(targets):
    return True
  if isinstance(targets, Mapping) or not isinstance(targets, Collection):
    return False
  return all(isinstance(regex, str) for regex in targets)


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
  whole = paths(jax.tree.map(lambda _: 0, tree, is_leaf=is_hole))
  of_head = is_head if any(map(is_head, whole)) else in_vocabulary
  return [of_head(path) for path in paths(tree)]


def matched(patterns: Sequence[str], tree, *, option='targets') -> list[bool]:
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
  found = paths(tree)
  try:
    regexes = [re.compile(pattern) for pattern in patterns]
  except re.error as error:
    what = f'{error.pattern!r} is no regular expression'
    raise ValueError(f'{option}: {what}: {error}') from error
  unused = [r.pattern for r in regexes if not any(map(r.fullmatch, found))]
  if unused and found and not is_part(tree):
    rule = 'match no parameter; a regex must match a whole path. Paths:'
    raise ValueError(f'{option} {unused} {rule} {", ".join(found)}')
  return [any(regex.fullmatch(name) for regex in regexes) for name in found]
