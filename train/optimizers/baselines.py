"""Presets that the methods of `galore_optax` are compared with."""

from typing import Any

import jax
import optax

import galore_optax
from galore_optax.precision import in_float32


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """AdamW on whole gradients, with float32 moments.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
  """
  return in_float32(
    optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  )


def adam_8bit(
  learning_rate: optax.ScalarOrSchedule,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """Adam on whole gradients, with moments quantized to 8 bits in blocks.

  Args:
    learning_rate: a number, or a schedule of the step.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment.
  """
  adam = optax.adam(learning_rate, b1=b1, b2=b2, eps=eps)
  return galore_optax.quantize_state(adam)


def optax_galore(
  learning_rate: optax.ScalarOrSchedule,
  *,
  rank: int = 128,
  update_proj_gap: int = 200,
  scale: float = 1.0,
  weight_decay: float = 0.0,
) -> optax.GradientTransformation:
  """optax.contrib.galore, with a state that can be saved.

  For a leaf that it does not project, optax.contrib.galore keeps an array of
  size zero, which Orbax refuses to save. Such leaves get Adam instead, with the
  same updates.

  Args:
    learning_rate: a number, or a schedule of the step.
    rank: number of basis vectors of each weight with two axes.
    update_proj_gap: number of updates between two refreshes of the basis.
    scale: multiplies every update.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
  """
  projected = optax.contrib.galore(
    learning_rate,
    rank=rank,
    update_proj_gap=update_proj_gap,
    scale=scale,
    weight_decay=weight_decay,
  )
  plain = optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )

  def labels(params: Any) -> Any:
    return jax.tree.map(
      lambda w: 'projected' if w.ndim == 2 else 'plain', params
    )

  tx = optax.partition(
    {'projected': skipping_empty(projected), 'plain': plain}, labels
  )
  return masking_none(tx)


def skipping_empty(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns a transformation that leaves a tree without arrays as it is.

  optax.contrib.galore raises for such a tree.
  """

  def update(
    updates: Any, state: optax.OptState, params: Any = None
  ) -> tuple[Any, optax.OptState]:
    if not jax.tree.leaves(updates):
      return updates, state
    return tx.update(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


def masking_none(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Returns a transformation that receives `MaskedNode` instead of None.

  None marks a frozen weight. optax.contrib.galore would treat it as an array.
  """

  def masked(tree: Any) -> Any:
    return jax.tree.map(
      lambda x: optax.MaskedNode() if x is None else x,
      tree,
      is_leaf=lambda x: x is None,
    )

  def init(params: Any) -> optax.OptState:
    return tx.init(masked(params))

  def update(
    updates: Any, state: optax.OptState, params: Any = None
  ) -> tuple[Any, optax.OptState]:
    structure = jax.tree.structure(updates)
    weights = None if params is None else masked(params)
    updates, state = tx.update(masked(updates), state, weights)
    return structure.unflatten(jax.tree.leaves(updates)), state

  return optax.GradientTransformation(init, update)
