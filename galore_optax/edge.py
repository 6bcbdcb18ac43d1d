"""The edge of the library: how public functions receive and return trees.

`at_init` and `at_update` wrap the two functions of a transformation, and
`at_edge` wraps a whole transformation. The functions inside receive opened
trees (see `containers`), and initial state is placed on the mesh of its weights
(see `sharding`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_optax import axis_names, containers, sharding


def at_init(
  init: Callable[..., Any], *, opened: Callable[[Any], Any] = containers.opened
) -> Callable[..., Any]:
  """Returns an `init` that accepts parameters in any containers.

  The state has the shardings of `state_shardings` if those of the parameters
  are known. If the boxes of the parameters have names of axes, the arrays of
  the state are in such boxes too, with the names of their own axes.

  Args:
    init: a function of opened parameters.
    opened: the function that opens them.
  """

  @functools.wraps(init)
  def init_fn(params: Any) -> Any:
    plain = opened(params)
    _check_some_array(params)
    state = sharding.placed(init)(plain)
    return axis_names.boxed_state(init, state, params)

  return init_fn


def at_update(update: Callable[..., Any]) -> Callable[..., Any]:
  """Returns an `update` that accepts trees in any containers.

  The updates have the containers of the gradients, and the next state has those
  of the state. Parameters without a gradient are ignored, and so are gradients
  of parameters that are not trained.

  Args:
    update: `(updates, state, params, **extra_args) -> (updates, state)` of
      opened trees.
  """

  @functools.wraps(update)
  def update_fn(
    updates: Any, state: Any, params: Any = None, **extra_args: Any
  ) -> tuple[Any, Any]:
    grads, weights = containers.trained_together(
      containers.opened(updates), containers.opened(params)
    )
    plain = containers.unboxed(state)
    new, after = update(grads, plain, weights, **extra_args)
    new = containers.closed(new, updates)
    return new, containers.reboxed(after, state)

  return update_fn


def at_edge(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns a transformation that accepts trees in any containers.

  >>> tx = at_edge(optax.sgd(0.5))
  >>> params = {'w': 3.0, 'act': abs}
  >>> tx.update({'w': 1.0, 'act': None}, tx.init(params), params)[0]
  {'act': None, 'w': Array(-0.5, dtype=float32)}
  """
  tx = optax.with_extra_args_support(tx)
  return optax.GradientTransformationExtraArgs(
    at_init(tx.init), at_update(tx.update)
  )


def _check_some_array(params: Any) -> None:
  """Raises TypeError if a tree has leaves, but none of them is an array."""
  leaves = jax.tree.leaves(params)
  if leaves and not any(map(containers.is_array, leaves)):
    types = ', '.join(sorted({type(x).__name__ for x in leaves}))
    raise TypeError(
      f'params must be a tree of arrays, got leaves of type {types}. A class is'
      ' a tree if it is registered in JAX (jax.tree_util.register_dataclass)'
    )
