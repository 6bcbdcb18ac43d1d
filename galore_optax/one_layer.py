"""The type of transformations that train one layer of a stack at a time.

`badam` returns one. The layer-wise step recognizes it by this type.

Axes: L layers, the leading axis of a stack.
"""

from collections.abc import Callable

import jax
import optax


class OneLayerRule(optax.GradientTransformationExtraArgs):
  """A transformation that trains one layer of a stack at a time.

  As a transformation it updates a whole tree. The layer-wise step, which
  receives the gradient layer by layer, uses the attributes instead: it applies
  `rule` to the layer being trained, and `rest` to each leaf outside the stack.
  """

  rule: optax.GradientTransformationExtraArgs
  """The transformation of one layer's weights."""
  rest: optax.GradientTransformationExtraArgs | None
  """The transformation of leaves outside the stack; None if they are frozen."""
  active: Callable[[jax.Array, int], jax.Array]
  """`(count, L) -> []`, int32: index of the layer to train at step `count`."""
  blocks: str
  """Regex on the paths of the stacked leaves [L, ...]."""
  check_blocks: Callable[[dict[str, bool]], None]
  """Receives for each path whether the leaf is stacked, and raises ValueError
  unless `blocks` matches exactly the stacked leaves."""
