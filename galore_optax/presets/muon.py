"""GaLore with Muon: the momentum of the low-rank gradient is orthogonalised.

`scale_by_muon` is Muon's rule for stacks of matrices. `galore_muon` uses it as
the inner optimizer of `galore`.
"""

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.galore import Inners, galore
from galore_optax.options import names_options
from galore_optax.orthogonal import orthogonalise
from galore_optax.presets.galore_options import (
  GaloreOptions,
  with_rotate_decays,
)
from galore_optax.presets.inner import with_decay_and_rate


def scale_by_muon(beta: float = 0.95) -> optax.GradientTransformation:
  """Replaces the gradient by its orthogonalised Nesterov momentum.

  The result and the state equal those of `optax.contrib.scale_by_muon` within
  rounding. The last two axes of every leaf are a matrix. optax 0.2.8 computes
  ten matrix products with the whole matrix. `orthogonal.orthogonalise` computes
  four.

  Args:
    beta: decay rate of the momentum.

  Example:
    >>> tx = scale_by_muon()
    >>> g = {'w': jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    >>> updates, state = tx.update(g, tx.init(g))
    >>> print(f'{updates["w"][0, 0]:.1f} {updates["w"][1, 1]:.1f}')
    0.7 1.1

  References:
    Jordan, `Muon <https://github.com/KellerJordan/Muon>`_, 2024.
  """

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, Any]:
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    # Nesterov momentum as in optax: `mu` has the bias correction of the next
    # step.
    ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
    now = optax.tree.bias_correction(updates, beta, count)
    mixed = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
    state = state._replace(count=count, mu=mu)
    return jax.tree.map(orthogonalise, mixed), state

  init_fn = optax.contrib.scale_by_muon(beta=beta).init
  return optax.GradientTransformation(init_fn, update_fn)


@names_options(of=galore)
def galore_muon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  beta: float = 0.95,
  consistent_rms: float = 0.2,
  weight_decay: float = 0.0,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
  """GaLore with Muon: orthogonalised Nesterov momentum of low rank.

  Muon updates projected weights; the matrices of a stack are independent. AdamW
  updates all other leaves (embedding, head, norms). An orthogonal [r, n] matrix
  has a root mean square of 1 / sqrt(max(r, n)). It is multiplied by
  `consistent_rms` sqrt(max(r, n)), so that the size of an update in each of the
  r directions does not depend on the rank, and equals that of Muon without
  projection. A learning rate that suits `galore_adamw` with the same `scale`
  therefore has the right order of magnitude. Muon's other factor,
  sqrt(out / in), would be sqrt(n / r) here, and depend on the rank.

  State of a weight [i, o], i <= o: a basis of r i elements in the weight's
  dtype, and one momentum of r o, float32.

  Args:
    learning_rate: a number, or a schedule of the step.
    beta: decay rate of the momentum.
    consistent_rms: root mean square of the low-rank update; AdamW's is about
      0.2.
    weight_decay: decoupled, times the learning rate, on every leaf; leaves that
      are not projected use Adam's learning rate.
    adam_learning_rate: learning rate of leaves that are not projected; None
      means `learning_rate`. A number is constant, even if `learning_rate` is a
      schedule.
    **options: options of `galore`: rank, gap, scale, side, subspace, ...

  Example:
    >>> tx = galore_muon(0.01, rank=2, gap=10)
    >>> params = {'w': jnp.ones((3, 4, 6)), 'embed': jnp.ones((9, 4))}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> optax.tree.get(state, 'MuonState').mu['w'].shape
    (3, 2, 6)

  References:
    Jordan, `Muon <https://github.com/KellerJordan/Muon>`_, 2024; Liu et al.,
    `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_,
    2025, which introduces the constant root mean square; Zhao et al., `GaLore
    <https://arxiv.org/abs/2403.03507>`_, 2024.
  """
  checks.check_decay(beta=beta)
  checks.check_not_negative(consistent_rms=consistent_rms)

  def with_consistent_rms(u: Any, _: Any) -> jax.Array:
    return consistent_rms * math.sqrt(max(jnp.shape(u)[-2:])) * u

  muon = with_decay_and_rate(
    learning_rate,
    weight_decay,
    scale_by_muon(beta),
    optax.stateless_with_tree_map(with_consistent_rms),
  )
  rate = learning_rate if adam_learning_rate is None else adam_learning_rate
  checks.check_learning_rate(adam_learning_rate=rate)
  adam = with_decay_and_rate(rate, weight_decay, optax.scale_by_adam())
  return galore(Inners(muon, adam), **with_rotate_decays(options, beta))
