"""This module holds Adam as the GaLore reference computes it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def scale_by_galore_adam(
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
) -> optax.GradientTransformation:
  """Rescales by Adam with `eps` inside, before bias correction.

  `sqrt(1 - b2^t) / (1 - b1^t) * mu / (sqrt(nu) + eps)`, which is
  `optax.scale_by_adam` with `eps / sqrt(1 - b2^t)` for its eps.

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.

  Example:
    >>> tx = scale_by_galore_adam(eps=0.0)
    >>> params = {'w': jnp.array([3.0, -4.0])}
    >>> tx.update(params, tx.init(params))[0]['w']
    Array([ 1., -1.], dtype=float32)

  References:
    Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014, end of
    section 2, where the two corrections are merged into the step size.
  """

  def init_fn(params: optax.Params) -> optax.ScaleByAdamState:
    return optax.ScaleByAdamState(
      count=jnp.zeros([], jnp.int32),
      mu=optax.tree.zeros_like(params),
      nu=optax.tree.zeros_like(params),
    )

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    correction = _bias_correction(b1, b2, count)
    updates = jax.tree.map(
      lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu
    )
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init_fn, update_fn)


def _bias_correction(b1: float, b2: float, count: Any) -> jax.Array:
  root = jnp.sqrt(_one_minus_power(b2, count))
  return root / _one_minus_power(b1, count)


def _one_minus_power(decay: float, count: Any) -> jax.Array:
  """Returns `1 - decay**count`, with all its digits for a decay near one."""
  return -jnp.expm1(count * jnp.log1p(decay - 1.0))
