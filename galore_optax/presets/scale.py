"""SCALE: plain gradients, normalised by column; momentum on the head alone.

The method with the least state that follows Adam in pretraining. LOMO, which
keeps nothing at all, is in `presets.lomo`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.checks import (
  check_decay,
  check_learning_rate,
  check_not_negative,
)
from galore_optax.decay import add_decayed_weights
from galore_optax.precision import in_float32, rms


def scale_sgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  vector_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  """SGD on columns of unit size, with momentum where the logits are made.

  Each column of a kernel's gradient is divided by its root mean square over
  the inputs, each column of an embedding's [V, d] by that over the tokens: the
  second to last axis, any axes before it are batch. The head's gradient is
  replaced by its moving average first. Where no path names a head (lm_head,
  head, logits, unembed) the model is tied, and its embedding is the head: it
  has the momentum, and is normalised as an embedding. Norm scales, biases and
  stacks of them, known by path, go through AdamW.

  State: one float32 momentum of the head, and Adam's two of each vector.

  Args:
    learning_rate: a number, or a schedule of the step.
    momentum: decay of the head's moving average, without bias correction.
    weight_decay: decoupled, times the learning rate, on every leaf; of a
      vector times its own learning rate.
    vector_learning_rate: the same for vectors; None: `learning_rate`. A number
      does not follow a schedule of the other.

  Example:
    >>> tx = scale_sgd(0.5)
    >>> params = {'w': jnp.array([[3.0, 0.0], [-3.0, 0.01]])}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print(updates['w'].round(4))
    [[-0.5    -0.    ]
     [ 0.5    -0.7071]]

  References:
    Glentis et al., `A Minimalist Optimizer Design for LLM Pretraining
    <https://arxiv.org/abs/2506.16659>`_, 2025.
  """
  if vector_learning_rate is None:
    vector_learning_rate = learning_rate
  check_decay(momentum=momentum)
  check_not_negative(weight_decay=weight_decay)
  check_learning_rate(
    learning_rate=learning_rate, vector_learning_rate=vector_learning_rate
  )
  decayed = add_decayed_weights(weight_decay)
  matrix = optax.chain(
    optax.stateless_with_tree_map(lambda g, _: _unit_columns(g)),
    decayed,
    optax.scale_by_learning_rate(learning_rate),
  )
  rules: dict[Any, optax.GradientTransformation] = {
    'matrix': matrix,
    'head': optax.chain(optax.ema(momentum, debias=False), matrix),
    'vector': optax.chain(
      optax.scale_by_adam(),
      decayed,
      optax.scale_by_learning_rate(vector_learning_rate),
    ),
  }
  return in_float32(optax.partition(rules, _kinds))


def _unit_columns(g_io: Any) -> jax.Array:
  """Returns [..., i, o] with each column over its root mean square."""
  return g_io / jnp.maximum(rms(g_io, (-2,)), 1e-8)


def _kinds(tree: Any) -> Any:
  """Returns the name of the rule for each leaf."""
  leaves, treedef = jax.tree.flatten(tree)
  named = zip(paths.paths(tree), leaves, paths.heads(tree), strict=True)
  return treedef.unflatten(
    [
      'vector'
      if len(paths.own_axes(path, leaf.ndim)) < 2
      else 'head'
      if is_head
      else 'matrix'
      for path, leaf, is_head in named
    ]
  )
