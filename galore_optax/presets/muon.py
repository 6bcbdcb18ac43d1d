"""Muon inside the subspace: a momentum of low rank, orthogonalised.

Muon itself is `optax.contrib.scale_by_muon`; here is what makes it an inner of
`galore`: which leaves are its own, which axes are a matrix, and its size.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import decay
from galore_optax.accumulation import accumulating
from galore_optax.galore import galore, names_options, projections_of
from galore_optax.static import check_range

# Of a low-rank gradient [..., r, n]: by default optax's axes are 0 and 1, and
# what has three goes to Adam.
MATRIX = optax.contrib.MuonDimensionNumbers(-2, -1)


@names_options('residual')
def galore_muon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  beta: float = 0.95,
  consistent_rms: float = 0.2,
  weight_decay: float = 0.0,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  **options: Any,
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Muon: Nesterov momentum of low rank, made orthogonal.

  The weights that are projected are Muon's, stacks of them matrix by matrix;
  all others (embedding, head, norms) go through AdamW. An orthogonal [r, n]
  has a root mean square of 1 / sqrt(max(r, n)), so that it is multiplied by
  `consistent_rms` sqrt(max(r, n)): by default each of the r directions moves as
  far as under Muon of the whole weight, whatever the rank, and a learning rate
  of `galore_adamw`, with its `scale`, is of the right order. (Muon's other
  factor, sqrt(out / in), would follow the rank here: sqrt(n / r).)

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, and one momentum of r o, float32.

  Args:
    learning_rate: a number, or a schedule of the step.
    beta: decay of the momentum.
    consistent_rms: root mean square of the low-rank update; 0.2 is AdamW's.
    weight_decay: decoupled, times the learning rate, on every leaf; of one
      that is not projected times that of Adam.
    adam_learning_rate: of what is not projected; None: `learning_rate`. A
      number does not follow a schedule of the other.
    **options: those of `galore`: rank, gap, scale, side, subspace, ...

  Example:
    >>> tx = galore_muon(0.01, rank=2, gap=10)
    >>> params = {'w': jnp.ones((3, 4, 6)), 'embed': jnp.ones((9, 4))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.tree.get(state, 'MuonState').mu['w'].shape
    (3, 2, 6)

  References:
    Jordan, `Muon <https://github.com/KellerJordan/Muon>`_, 2024; Liu et al.,
    `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_,
    2025, has the constant root mean square; Zhao et al., `GaLore
    <https://arxiv.org/abs/2403.03507>`_, 2024.
  """
  if adam_learning_rate is None:
    adam_learning_rate = learning_rate
  check_range(0, 1, beta=beta)
  check_range(
    *(0, math.inf),
    learning_rate=learning_rate,
    consistent_rms=consistent_rms,
    weight_decay=weight_decay,
    adam_learning_rate=adam_learning_rate,
  )
  muon = optax.contrib.scale_by_muon(
    beta=beta,
    weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MATRIX, tree),
  )
  resize = optax.stateless_with_tree_map(
    lambda u, _: consistent_rms * math.sqrt(max(jnp.shape(u)[-2:])) * u
  )
  decayed = decay.add_decayed_weights(weight_decay)
  rate = optax.scale_by_learning_rate
  rules: dict[Any, optax.GradientTransformation] = {
    'muon': optax.chain(muon, resize, decayed, rate(learning_rate)),
    'adam': optax.chain(
      optax.scale_by_adam(), decayed, rate(adam_learning_rate)
    ),
  }
  # Raises for an option out of range now, not at `init`.
  galore(residual=None, **options)

  def stage(tree: Any) -> Any:
    """Returns the transformation of trees like this one."""
    kinds = ['muon' if p else 'adam' for p in projections_of(tree, **options)]
    labels = jax.tree.structure(tree).unflatten(kinds)
    return galore(optax.partition(rules, labels), residual=None, **options)

  return accumulating(
    optax.GradientTransformationExtraArgs(
      lambda params: stage(params).init(params),
      lambda updates, state, params=None, **extra: stage(updates).update(
        updates, state, params, **extra
      ),
    ),
    lambda g, state, **extra: stage(g).begin(g, state, **extra),
    lambda g, state, **extra: stage(g).compress(g, state, **extra),
  )
