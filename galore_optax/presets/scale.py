"""SCALE: SGD on gradients with normalised columns, and momentum for the head.

It has the least state of the presets that match Adam in pretraining. LOMO,
which has no state, is in `presets.lomo`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, paths
from galore_optax.edge import at_edge
from galore_optax.options import names_options
from galore_optax.precision import in_float32, rms
from galore_optax.presets.inner import with_decay_and_rate


@names_options()
def scale_sgd(
  learning_rate: optax.ScalarOrSchedule,
  *,
  momentum: float = 0.9,
  weight_decay: float = 0.0,
  vector_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
  """SGD with normalised gradient columns, and momentum for the output head.

  Each column of a gradient is divided by its root mean square over the second
  to last axis. This axis has the inputs of a kernel [in, out], or the tokens of
  an embedding [V, d]. All axes before it are batch. The gradient of the head is
  replaced by its moving average before that. If no path names a head (lm_head,
  head, logits, unembed), the model is tied, and its embedding gets the
  momentum. AdamW updates vectors: norm scales, biases and stacks of them, which
  are recognized by their paths.

  State: one float32 momentum for the head, and Adam's two moments for vectors.

  Args:
    learning_rate: a number, or a schedule of the step.
    momentum: decay rate of the head's moving average, which has no bias
      correction.
    weight_decay: decoupled, times the learning rate, on every leaf; vectors use
      their own learning rate.
    vector_learning_rate: learning rate of vectors; None means `learning_rate`.
      A number is constant, even if `learning_rate` is a schedule.

  Example:
    >>> tx = scale_sgd(0.5)
    >>> params = {'w': jnp.array([[3.0, 0.01], [-3.0, 0.01]])}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> updates['w'].round(4)
    Array([[-0.5, -0.5],
           [ 0.5, -0.5]], dtype=float32)

  References:
    Glentis et al., `A Minimalist Optimizer Design for LLM Pretraining
    <https://arxiv.org/abs/2506.16659>`_, 2025.
  """
  checks.check_decay(momentum=momentum)

  def normalise_columns(g_io: Any, _: Any) -> jax.Array:
    return g_io / jnp.maximum(rms(g_io, (-2,)), 1e-8)

  matrix = with_decay_and_rate(
    learning_rate,
    weight_decay,
    optax.stateless_with_tree_map(normalise_columns),
  )
  rate = learning_rate if vector_learning_rate is None else vector_learning_rate
  checks.check_learning_rate(vector_learning_rate=rate)
  head = optax.chain(optax.ema(momentum, debias=False), matrix)
  vector = with_decay_and_rate(rate, weight_decay, optax.scale_by_adam())
  rules: dict[Any, Any] = {'matrix': matrix, 'head': head, 'vector': vector}
  return at_edge(in_float32(optax.partition(rules, _kinds)))


def _kinds(tree: Any) -> Any:
  """Returns a tree with the name of the rule for each leaf."""
  leaves, treedef = jax.tree.flatten(tree)
  kinds = map(_kind, paths.paths(tree), leaves, paths.heads(tree))
  return treedef.unflatten(kinds)


def _kind(path: str, x: Any, is_head: bool) -> str:
  """Returns the name of the rule for a leaf."""
  if len(paths.own_axes(path, x.ndim)) < 2:
    return 'vector'
  return 'head' if is_head else 'matrix'
