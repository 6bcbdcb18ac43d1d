"""The line that replaces `optax.adamw`, and assertions about it in any program.

The tests of this folder repeat how public trainers call an optimizer. Each of
them names the project and its version.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util

import galore_optax as go
from tests.rounding import assert_same_program

RANK = 4


def line(rank: int = RANK) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation that stands in the place of `optax.adamw`."""
  return optax.chain(go.galore(rank=rank, gap=2), optax.adamw(1e-2))


def data(steps: int, shape: tuple[int, ...] = (8, 16), seed: int = 0) -> Any:
  """Returns inputs and targets for each step: a fixed linear function."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape).astype(np.float32)
  y = np.tanh(x @ rng.normal(size=(shape[-1], 16)).astype(np.float32))
  return [(jnp.asarray(x), jnp.asarray(y))] * steps


def unboxed(tree: Any) -> Any:
  """Returns a tree without the variables of NNX and the boxes of linen."""

  def is_box(x: Any) -> bool:
    return isinstance(x, nnx.Variable | nn.meta.AxisMetadata)

  def contents(x: Any) -> Any:
    if isinstance(x, nn.meta.AxisMetadata):
      return x.value
    return x.get_value() if isinstance(x, nnx.Variable) else x

  return jax.tree.map(contents, tree, is_leaf=is_box)


def plain(tree: Any) -> Any:
  """Returns parameters or gradients in any containers as nested dicts."""
  return traverse_util.unflatten_dict(by_path(tree), sep='/')


def assert_falls(losses: list[Any]) -> None:
  """Asserts that training lowered the loss."""
  assert np.all(np.isfinite(losses))
  assert losses[-1] < 0.9 * losses[0], losses


def assert_low_rank(state: Any, params: Any, tx: Any = None) -> None:
  """Asserts that the state has the shapes of that of a dict of arrays.

  Args:
    state: of the optimizer, in the trainer's containers.
    params: the parameters, in the trainer's containers.
    tx: the transformation; `line()` by default.
  """
  tx = tx or line()
  found = [x.shape for x in jax.tree.leaves(unboxed(state))]
  wanted = [
    x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, plain(params)))
  ]
  assert sorted(found) == sorted(wanted)
  whole = jax.eval_shape(optax.adamw(1e-2).init, plain(params))
  assert num_elements(state) < num_elements(whole)


def by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a tree without boxes by their paths.

  An NNX state of an optimizer keeps named tuples as dicts, whose leaves come in
  another order.
  """
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(unboxed(tree))
  }


def num_elements(tree: Any) -> int:
  return sum(np.prod(x.shape, dtype=int) for x in jax.tree.leaves(tree))


def assert_same_as_plain(
  params: Any,
  tx: Any = None,
  update: Callable[..., Any] | None = None,
) -> None:
  """Asserts that containers change neither the program nor the structure.

  `init` and `update` of parameters in containers trace to the operations on the
  arrays alone, in dicts. Updates have the structure of the gradients, and the
  new state that of the old one.

  Args:
    params: parameters in the trainer's containers.
    tx: the transformation; `line()` by default.
    update: how the trainer calls `tx.update`: a function of tx, gradients,
      state and parameters.
  """
  tx = tx or line()
  update = update or (lambda tx, *args: tx.update(*args))
  grads = jax.eval_shape(lambda tree: jax.tree.map(jnp.sin, tree), params)
  state = jax.eval_shape(tx.init, params)
  updates, new_state = jax.eval_shape(
    lambda *args: update(tx, *args), grads, state, params
  )
  assert jax.tree.structure(updates) == jax.tree.structure(grads)
  assert jax.tree.structure(new_state) == jax.tree.structure(state)
  dicts = plain(params), plain(grads)
  of_dicts = jax.eval_shape(tx.init, dicts[0])
  assert_same_program((tx.init, params), (tx.init, dicts[0]))
  assert_same_program(
    (lambda *args: update(tx, *args), grads, state, params),
    (tx.update, dicts[1], of_dicts, dicts[0]),
  )
