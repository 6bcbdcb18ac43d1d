"""Exact decoupled weight decay through a black-box inner.

An inner sees the low-rank gradient, whose shape is not the weight's, so what
it would read from `params` is not there. If it reads them for decoupled decay
alone, its update is `u(gradient) + slope * params`: the low-rank part runs with
zeros for weights, and one forward derivative of that very run is the slope.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax.checks import is_zero
from galore_optax.projection import Projection, Whole

# Steps at which an inner is tried: at some, a schedule may be zero.
COUNTS = (0, 1, 10, 100, 1_000)

GRADIENTS = ((0.25, -1.0, 0.0, 0.5), (2.0, 1.0, 0.25, 3.0), (0.0,) * 4)
# Entries of the 2 x 2 gradients and weights that an inner is tried on.
WEIGHTS = (0.5, -2.0, 1.5, -0.75)


def through(
  inner: optax.GradientTransformationExtraArgs,
  plans: Sequence[Projection | Whole],
  low: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> tuple[Any, Any, Any]:
  """Runs the inner on low-rank gradients.

  Args:
    inner: the transformation.
    plans: of each leaf.
    low: projected gradients; itself of a leaf that is whole.
    state: of the inner.
    params: the weights in their own shapes, or None.
    extra_args: passed to the inner.

  Returns:
    Its updates, the slopes of its decay (a tree of scalars, None without
    params), its new state.

  Example:
    >>> plans, w = [Projection('', (3, 5), ((0,), (1,)), 2, (-2,))], jnp.ones
    >>> inner = optax.adamw(0.5, weight_decay=0.25)
    >>> inner = optax.with_extra_args_support(inner)
    >>> low = w((2, 5))
    >>> through(inner, plans, low, inner.init(low), w((3, 5)), {})[1]
    Array(-0.125, dtype=float32)
  """
  if params is None:
    updates, state = inner.update(low, state, None, **extra_args)
    return updates, None, state
  leaves, treedef = jax.tree.flatten(params)
  pairs = list(zip(plans, leaves, strict=True))
  at = treedef.unflatten([p.view(w) for p, w in pairs])
  along = treedef.unflatten([p.tangent(w) for p, w in pairs])
  updates, slopes, state = jax.jvp(
    lambda w: inner.update(low, state, w, **extra_args),
    (at,),
    (along,),
    has_aux=True,
  )
  return updates, jax.tree.map(lambda x: x.ravel()[0], slopes), state


def check(
  inner: optax.GradientTransformationExtraArgs,
  plans: Sequence[Projection | Whole],
  params: Any,
) -> None:
  """Raises if the inner reads params for more than decoupled decay.

  It is tried on 2 x 2 weights of both signs against zeros: its states must be
  equal, and its updates differ by one slope times the weight, whatever the
  gradient.

  Args:
    inner: the transformation.
    plans: of each leaf.
    params: parameters; only structure, ranks and types are read.

  Raises:
    ValueError: the update of a projected leaf is not affine in the weight
      with one slope, something else depends on it, or the inner has no forward
      derivative.
  """
  leaves, treedef = jax.tree.flatten(params)
  projected = [isinstance(p, Projection) for p in plans]

  def filled(values: Sequence[float]) -> list[jax.Array]:
    return [
      jnp.resize(
        jnp.array(values, jnp.promote_types(x.dtype, jnp.float32)),
        # What the inner sees of a weight has two axes beyond its batch.
        (2,) * (x.ndim if isinstance(p, Whole) else len(p.low_shape)),
      )
      for p, x in zip(plans, leaves, strict=True)
    ]

  with jax.ensure_compile_time_eval():
    for count in COUNTS:
      moved = False
      for values in GRADIENTS:
        g, w = treedef.unflatten(filled(values)), filled(WEIGHTS)
        try:
          moved |= _check_once(inner, g, w, projected, treedef, count)
        except (_NeedsMore, jax.errors.TracerArrayConversionError):
          # It needs extra args, which only `update` is given; or a
          # hyperparameter is traced, and nothing can be compared.
          return
      # With a learning rate of zero nothing can be seen: try the next.
      if moved:
        return


class _NeedsMore(Exception):
  """An inner's update needs arguments that nobody has at `init`."""


def _check_once(inner, g, w, projected, treedef, count: int) -> bool:
  """Checks one gradient at one step; returns whether any update moves."""
  blind = treedef.unflatten(
    [0 * x if yes else x for x, yes in zip(w, projected, strict=True)]
  )
  weights = treedef.unflatten(w)
  state, other = (at_count(count, inner.init(x)) for x in (weights, blind))
  try:
    seen, after = inner.update(g, state, weights)
  except TypeError as error:
    raise _NeedsMore from error
  along = treedef.unflatten(
    [jnp.full_like(x, yes) for x, yes in zip(w, projected, strict=True)]
  )
  try:
    unseen, slopes, other_after = jax.jvp(
      lambda w: inner.update(g, other, w), (blind,), (along,), has_aux=True
    )
  except (TypeError, NotImplementedError) as error:
    raise ValueError(
      'the weight decay of the inner is read off its forward derivative, and'
      f' it has none: {error}'
    ) from error
  rows = zip(
    *map(jax.tree.leaves, (seen, unseen, slopes)), w, projected, strict=True
  )
  moved, affine = False, True
  for x, y, slope, weight, yes in rows:
    expected = y + np.ravel(slope)[0] * weight if yes else y
    affine &= _close(x, expected)
    moved |= yes and bool(np.any(x))
  same = jax.tree.map(_close, (state, after), (other, other_after))
  if not (affine and all(jax.tree.leaves(same))):
    raise ValueError(
      'the inner transformation reads params for more than decoupled'
      ' weight decay (a trust ratio, a parameter scale, or decay that'
      ' enters a momentum, perhaps); the params of a projected weight have'
      ' no low-rank form. Use one without it, such as optax.adamw'
    )
  return moved


def at_count(count: int, state: Any) -> Any:
  """Returns a state with its integer scalars, the counters, at `count`."""
  is_count = lambda x: x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
  return jax.tree.map(
    lambda x: jnp.full_like(x, count) if is_count(x) else x,
    jax.tree.map(jnp.asarray, state),
  )


def _close(x: Any, y: Any) -> bool:
  """Whether two arrays agree, to 1e-4 of the largest number in them."""
  if not jnp.issubdtype(x.dtype, jnp.number):
    return True
  wide = jnp.promote_types(x.dtype, jnp.float32)
  x, y = np.asarray(x.astype(wide)), np.asarray(y.astype(wide))
  atol = 1e-4 * np.max(np.abs(np.nan_to_num(x)), initial=0)
  return np.allclose(x, y, rtol=1e-4, atol=atol, equal_nan=True)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
  """Returns a learning rate, or a schedule's at a step.

  >>> rate_at(0.5, 3), rate_at(lambda count: 2 * count, 3)
  (0.5, 6)
  """
  return learning_rate(count) if callable(learning_rate) else learning_rate


def add_decayed_weights(
  weight_decay: float,
) -> optax.GradientTransformation:
  """Returns optax's, which asks for no params where the decay is zero.

  >>> add_decayed_weights(0.0).update(jnp.ones(1), optax.EmptyState())[0]
  Array([1.], dtype=float32)
  """
  if is_zero(weight_decay):
    return optax.identity()
  return optax.add_decayed_weights(weight_decay)


def decay_updated_weights(
  learning_rate: optax.ScalarOrSchedule, *, weight_decay: float
) -> optax.GradientTransformation:
  """Decays the weights that the update makes: w' = (w + u) (1 - lr decay).

  Args:
    learning_rate: a number, or a schedule of the step.
    weight_decay: the decay.

  Example:
    >>> tx = decay_updated_weights(0.5, weight_decay=0.5)
    >>> w = {'w': jnp.array(3.0)}
    >>> u, _ = tx.update({'w': jnp.array(1.0)}, tx.init(w), w)
    >>> w['w'] + u['w']
    Array(3., dtype=float32)
  """

  def init_fn(params: optax.Params) -> optax.ScaleByScheduleState:
    del params
    return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

  def update_fn(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
    # No params are asked for where no decay is; a traced one may be any.
    if not is_zero(weight_decay):
      if params is None:
        raise ValueError(
          'weight decay needs params: tx.update(g, state, params)'
        )
      shrink = rate_at(learning_rate, state.count) * weight_decay
      updates = jax.tree.map(
        lambda u, w: u - (shrink * (w + u)).astype(u.dtype), updates, params
      )
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count=count)

  return optax.GradientTransformation(init_fn, update_fn)
