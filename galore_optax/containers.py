"""Opening and closing the containers of parameters, gradients and state.

Libraries put arrays into boxes: `flax.nnx.Variable`, the partitioned boxes of
linen, the `NamedArray` of haliax. A tree may also have leaves that no optimizer
trains, such as functions, step counters and arrays of size zero. The modules of
this library see neither: every public function opens its trees with `opened`
and closes its results with `closed`. An opened tree has only floating arrays
that are not empty.

This module imports none of those libraries. It recognises a box by its methods.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


@runtime_checkable
class Variable(Protocol):
  """A variable of `flax.nnx`."""

  def get_metadata(self) -> Any:
    """Returns the metadata, such as the names of mesh axes."""
    ...

  def set_metadata(self, metadata: Any, /) -> None:
    """Replaces the metadata."""
    ...


@runtime_checkable
class AxisMetadata(Protocol):
  """A box of `flax.linen`, such as `Partitioned`."""

  def unbox(self) -> Any:
    """Returns the array, possibly with a sharding constraint."""
    ...

  def replace_boxed(self, val: Any) -> Any:
    """Returns the box around another array."""
    ...


@runtime_checkable
class NamedArray(Protocol):
  """An array of `haliax`, whose axes have names."""

  array: Any
  axes: Any

  def rename(self, renames: Any) -> Any:
    """Returns the array with other names of axes."""
    ...


def is_box(x: Any) -> bool:
  """Whether a node of a tree is a box.

  A box is a node around one array, or a mapping whose keys JAX does not see.
  """
  if isinstance(x, jax.Array | dict):
    return False
  if isinstance(x, Variable | AxisMetadata | NamedArray):
    # An object that JAX does not flatten is a leaf, whatever methods it has.
    return not jax.tree_util.all_leaves([x])
  return isinstance(x, Mapping) and _is_keyless(x)


def _is_keyless(x: Mapping[Any, Any]) -> bool:
  """Whether paths of leaves have numbers instead of the keys of a mapping.

  Haiku registers its immutable mapping in this way. The names of weights would
  not be known.
  """
  leaves = jax.tree_util.tree_leaves_with_path(x, is_leaf=lambda y: y is not x)
  unnamed = jax.tree_util.FlattenedIndexKey
  return any(isinstance(path[0], unnamed) for path, _ in leaves if path)


def opened(tree: Any) -> Any:
  """Returns parameters or gradients without boxes and without other leaves.

  Args:
    tree: parameters or gradients in any containers.

  Returns:
    The tree with the array of each box in its place, and with None for each
    leaf that is not trained: one that is not an array or a number, that does
    not have a floating or complex dtype, or that has no element.

  >>> opened({'w': 1.0, 'step': 3, 'act': abs, 'none': None})
  {'act': None, 'none': None, 'step': None, 'w': Array(1., dtype=float32)}
  """
  return _map_contents(lambda x: _as_array(x) if is_trained(x) else None, tree)


def unboxed(tree: Any) -> Any:
  """Returns a tree with the contents of each box in its place.

  >>> unboxed({'count': 3})
  {'count': 3}
  """
  return _map_contents(lambda x: x, tree)


def arrays(tree: Any) -> Any:
  """Returns a tree with None for each leaf that is not an array or a number.

  `jax.eval_shape` does not accept such leaves.

  >>> arrays({'w': 1.0, 'act': abs})
  {'act': None, 'w': 1.0}
  """
  return jax.tree.map(lambda x: x if is_array(x) else None, tree)


def is_array(x: Any) -> bool:
  """Whether a leaf is an array or a number.

  >>> is_array(jnp.ones(3)), is_array(2), is_array(abs)
  (True, True, False)
  """
  return hasattr(x, 'dtype') or isinstance(x, int | float | complex)


def is_trained(x: Any) -> bool:
  """Whether a leaf is a floating or complex array, or number, with elements.

  >>> is_trained(1.0), is_trained(jnp.arange(3)), is_trained(jnp.ones((0, 2)))
  (True, False, False)
  """
  if isinstance(x, float | complex):
    return True
  dtype, size = getattr(x, 'dtype', None), getattr(x, 'size', 0)
  return dtype is not None and size > 0 and jnp.issubdtype(dtype, jnp.inexact)


def closed(plain: Any, like: Any) -> Any:
  """Returns results in the containers of gradients.

  Args:
    plain: a tree with the structure of `opened(like)`.
    like: the gradients, in their containers.

  Returns:
    A tree with the structure of `like`. A leaf without a result has an update
    of zero; if it is not an array, it is returned unchanged.

  >>> closed({'w': 2.0, 'step': None}, {'w': 1.0, 'step': jnp.int32(3)})
  {'step': Array(0, dtype=int32), 'w': 2.0}
  """

  def of_leaf(x: Any, result: Any) -> Any:
    return _no_update(x) if result is None else result

  return _map_boxes(of_leaf, like, plain)


def reboxed(plain: Any, like: Any) -> Any:
  """Returns a tree with the boxes of another one around its arrays.

  Args:
    plain: a tree with the structure of `unboxed(like)`.
    like: a tree that may have boxes.

  >>> reboxed({'count': 4}, {'count': 3})
  {'count': 4}
  """
  if not has_boxes(like):
    return plain
  return _map_boxes(lambda _, result: result, like, plain)


def has_boxes(tree: Any) -> bool:
  """Whether a tree has a box.

  >>> has_boxes({'w': 1.0})
  False
  """
  return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def where_present(tree: Any, like: Any) -> Any:
  """Returns the leaves of a tree at the places where another tree has leaves.

  Args:
    tree: an opened tree, or None.
    like: an opened tree.

  >>> where_present({'w': 1.0, 'frozen': 2.0}, {'w': 3.0, 'frozen': None})
  {'frozen': None, 'w': 1.0}
  """
  if tree is None:
    return None
  return jax.tree.map(
    lambda x, y: None if x is None else y, like, tree, is_leaf=_is_none
  )


def trained_together(grads: Any, params: Any) -> tuple[Any, Any]:
  """Returns gradients and parameters at the places where there are both.

  Programs often pass the whole model as parameters, but take gradients of a
  part of it only. Others have gradients of integers, which are not trained.

  Args:
    grads: an opened tree.
    params: an opened tree, or None.

  >>> trained_together({'w': 3.0, 'frozen': None}, {'w': 1.0, 'frozen': 2.0})
  ({'frozen': None, 'w': 3.0}, {'frozen': None, 'w': 1.0})
  >>> trained_together({'w': 3.0, 'step': 0.0}, {'w': 1.0, 'step': None})
  ({'step': None, 'w': 3.0}, {'step': None, 'w': 1.0})
  """
  if params is None:
    return grads, None
  return where_present(grads, params), where_present(params, grads)


def contents(box: Any) -> tuple[Any, Callable[[Any], Any]]:
  """Returns the contents of a box, and a function that boxes other contents.

  No method of a box around an array is called: some of them add sharding
  constraints.
  """
  if isinstance(box, Mapping) and not isinstance(box, AxisMetadata):
    kind: Any = type(box)
    return dict(box), kind
  nodes, treedef = jax.tree.flatten(box, is_leaf=lambda x: x is not box)
  (inside,) = nodes
  return inside, lambda x: treedef.unflatten([x])


def _is_none(x: Any) -> bool:
  return x is None


def _map_contents(f: Callable[[Any], Any], tree: Any) -> Any:
  """Returns a tree with f(leaf) for each leaf, also of boxes, without boxes."""

  def of_node(x: Any) -> Any:
    return _map_contents(f, contents(x)[0]) if is_box(x) else f(x)

  return jax.tree.map(of_node, tree, is_leaf=is_box)


def _map_boxes(f: Callable[[Any, Any], Any], like: Any, plain: Any) -> Any:
  """Returns `like` with f(leaf, result) for each leaf, inside the same boxes.

  Args:
    f: a function of a leaf of `like` and the result at its place.
    like: a tree that may have boxes.
    plain: a tree of results without boxes. A result may be None.
  """
  nodes, treedef = jax.tree.flatten(like, is_leaf=is_box)

  def of_node(x: Any, result: Any) -> Any:
    if not is_box(x):
      return f(x, result)
    inside, boxed = contents(x)
    return boxed(_map_boxes(f, inside, result))

  return treedef.unflatten(map(of_node, nodes, treedef.flatten_up_to(plain)))


def _as_array(x: Any) -> Any:
  """Returns a number as an array; other values stay as they are."""
  if hasattr(x, 'dtype'):
    return x
  # The dtype is given so that the array is not weakly typed.
  return jnp.asarray(x, jnp.result_type(x))


def _no_update(x: Any) -> Any:
  """Returns the update of a leaf that is not trained."""
  dtype = getattr(x, 'dtype', None)
  if dtype is None:
    return x
  if dtype == jax.dtypes.float0:
    # The gradient of integers. Python and JAX cannot add it to anything.
    return jnp.zeros(x.shape, bool)
  is_number = any(
    jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_)
  )
  return jnp.zeros_like(x) if is_number else x
