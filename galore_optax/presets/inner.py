"""Shared parts of the presets: GaLore's Adam and checks of inner optimizers.

A preset multiplies the update by the learning rate as its last step. Its inner
optimizer is therefore a `scale_by_...` transformation without a learning rate.
Otherwise two learning rates would multiply the update. `with_decay_and_rate`
adds weight decay and the learning rate to such transformations, as in `frugal`
and `muon`.
"""

import functools
from collections.abc import Hashable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks, decay, paths, trial
from galore_optax.precision import in_float32, one_element
from galore_optax.sharding import compile_time_eval
from galore_optax.trial import (
  RunOnce,
  Shared,
  Traced,
  require_values,
  try_update,
  warn_untried,
)

# A short name, or a transformation without a learning rate.
Inner: TypeAlias = (
  Literal['adam', 'lion', 'sgdm'] | optax.GradientTransformation
)

# The short names of `Inner`; the transformations have optax's defaults.
INNERS: dict[str, optax.GradientTransformation] = {
  'adam': optax.scale_by_adam(),
  'lion': optax.scale_by_lion(),
  'sgdm': optax.trace(0.9),
}


def scale_by_galore_adam(
  *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6
) -> optax.GradientTransformation:
  """Rescales by Adam with `eps` added before the bias correction.

  The update is `sqrt(1 - b2^t) / (1 - b1^t) * mu / (sqrt(nu) + eps)`. It equals
  that of `optax.scale_by_adam` with `eps / sqrt(1 - b2^t)` as its eps.

  Args:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the root of the second moment.

  Example:
    >>> tx = scale_by_galore_adam(eps=0.0)
    >>> params = {'w': jnp.array([3.0, -4.0])}
    >>> tx.update(params, tx.init(params))[0]['w'].round(4)
    Array([ 1., -1.], dtype=float32)

  References:
    Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014, end of
    section 2, which merges both bias corrections into the step size.
  """
  checks.check_decay(b1=b1, b2=b2)
  checks.check_not_negative(eps=eps)

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    factor = bias_correction(b1, b2, count)

    def scaled(m: jax.Array, v: jax.Array) -> jax.Array:
      return factor * m / (jnp.sqrt(v) + eps)

    state = optax.ScaleByAdamState(count=count, mu=mu, nu=nu)
    return jax.tree.map(scaled, mu, nu), state

  return optax.GradientTransformation(optax.scale_by_adam().init, update_fn)


def require_no_learning_rate(
  inner: Inner,
) -> optax.GradientTransformationExtraArgs:
  """Returns an inner optimizer whose `init` raises if it has a learning rate.

  The inner optimizer and its moments are computed in float32 at least.

  Args:
    inner: 'adam', 'lion', 'sgdm', or a transformation.

  Raises:
    ValueError: the name is unknown; at `init`, the update for a gradient of one
      is negative, which means that the transformation is a whole optimizer
      with a learning rate.

  Example:
    >>> tx = require_no_learning_rate('sgdm')
    >>> g = {'w': jnp.ones(2)}
    >>> tx.update(g, tx.init(g))[0]
    {'w': Array([1., 1.], dtype=float32)}
  """
  named = INNERS.get(inner) if isinstance(inner, str) else inner
  if not isinstance(named, optax.GradientTransformation):
    names = ', '.join(INNERS)
    raise ValueError(
      f'inner must be one of {names} or a transformation without learning rate,'
      f' got {inner!r}'
    )
  tx = in_float32(named)
  passed: set[Hashable] = set()

  def init_fn(params: optax.Params) -> optax.OptState:
    # Skip the check for a part of a model. The layer-wise step initializes the
    # whole model before it initializes the parts.
    kinds = trial.kinds(params)
    if kinds not in passed and not paths.is_part(params):
      _check_no_learning_rate(named, params)
      passed.add(kinds)
    return tx.init(params)

  return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def _check_no_learning_rate(
  inner: optax.GradientTransformation, params: optax.Params
) -> None:
  """Raises ValueError if an update has the opposite sign of the gradient."""
  with compile_time_eval():
    zeros = one_element(params, 0.0)
    ones = one_element(params, 1.0)
  try:
    init = Traced(inner.init, zeros)
    update = Traced(
      functools.partial(try_update, inner), ones, init.result, zeros
    )
    require_values(init, update)

    def updates_at(count: Any, ones: Any, zeros: Any) -> Any:
      state = decay.with_counters_at(count, init(zeros))
      return update(ones, state, zeros)[0]

    run = RunOnce(updates_at)
    with compile_time_eval():
      # A learning-rate schedule may be zero at one step, which hides its sign.
      # Hence several counts are tried.
      for count in decay.COUNTS:
        values, _ = Shared.of(run(count, ones, zeros))
        updates = [x.item() for x in values]
        least = min(updates, default=0.0)
        if least < 0:
          raise ValueError(
            'the inner has a learning rate of its own (it makes'
            f' {least:.3g} of a gradient of one), and the preset multiplies by'
            " learning_rate after it; give 'adam', 'lion', 'sgdm' or such as"
            ' optax.scale_by_adam()'
          )
        if any(x > 0 for x in updates):
          return
  except TypeError as error:
    warn_untried(error, 'it has no learning rate of its own')


def check_numbers(
  learning_rate: optax.ScalarOrSchedule, weight_decay: float
) -> None:
  """Raises ValueError unless learning rate and weight decay are valid.

  >>> check_numbers(learning_rate=lambda count: 0.1, weight_decay=0.1)
  """
  checks.check_learning_rate(learning_rate=learning_rate)
  checks.check_not_negative(weight_decay=weight_decay)


def with_decay_and_rate(
  learning_rate: optax.ScalarOrSchedule,
  weight_decay: float,
  *rules: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Chains rules, decoupled weight decay, and minus the learning rate.

  >>> w = jnp.ones(1)
  >>> tx = with_decay_and_rate(0.5, 0.25, optax.scale_by_sign())
  >>> tx.update(3 * w, tx.init(w), w)[0]
  Array([-0.625], dtype=float32)
  """
  check_numbers(learning_rate, weight_decay)
  decayed = decay.add_decayed_weights(weight_decay)
  down = optax.scale_by_learning_rate(learning_rate)
  return optax.chain(*rules, decayed, down)


def bias_correction(b1: float, b2: float, count: Any) -> jax.Array:
  """Returns Adam's factor `sqrt(1 - b2^t) / (1 - b1^t)` after t updates.

  Args:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    count: number t of updates.

  >>> bias_correction(0.5, 0.75, 1).round(4)
  Array(1., dtype=float32, weak_type=True)
  """

  def one_minus_power(decay_rate: float) -> jax.Array:
    # `1 - decay_rate**count` would lose digits if the decay rate is close to
    # one.
    return -jnp.expm1(count * jnp.log1p(decay_rate - 1.0))

  return jnp.sqrt(one_minus_power(b2)) / one_minus_power(b1)
