"""Exact decoupled weight decay through a black-box inner optimizer.

The inner optimizer receives low-rank gradients. It cannot read the weights,
because they have another shape. If an inner reads params only for decoupled
weight decay, its update is `u(gradient) + slope * params`. So it runs once with
zeros for the projected weights, and one forward derivative of that run is the
slope. `galore` then adds the slope times the whole weight.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.checks import check_params, is_zero
from galore_optax.precision import allclose
from galore_optax.projection import Projection, Whole, map_plans
from galore_optax.sharding import compile_time_eval
from galore_optax.trial import NeedsFunctionError, reaches, try_update

Plans = Sequence[Projection | Whole]

COUNTS = (0, 1, 10, 100, 1_000)
"""Steps at which an inner is tried. A schedule may be zero at some of them."""

GRADIENTS = ((0.25, -1.0, 0.0, 0.5), (2.0, 1.0, 0.25, 3.0), (0.0,) * 4)
"""Entries of the 2 x 2 gradients with which an inner is tried."""
WEIGHTS = (0.5, -2.0, 1.5, -0.75)
"""Entries of the 2 x 2 weights with which an inner is tried."""

OUTSIDE = (
  'A part that needs whole weights goes outside, after a galore with its own'
  ' inner: optax.chain(galore(optax.adamw(lr), rank=512), part)'
)
"""The remedy for a part of an inner that needs whole weights."""


def run_inner(
  inner: optax.GradientTransformationExtraArgs,
  plans: Plans,
  low: Any,
  state: Any,
  params: Any,
  extra: dict[str, Any],
) -> tuple[Any, Any, Any]:
  """Runs the inner optimizer on low-rank gradients.

  Args:
    inner: the inner optimizer.
    plans: one for each leaf.
    low: low-rank gradients [..., r, n]; whole gradients of leaves that are not
      projected.
    state: state of the inner.
    params: the weights in their own shapes, or None.
    extra: extra arguments of the inner's update.

  Returns:
    The inner's updates; the slopes of its decay, a tree of scalars (zeros if it
    does not decay), or None without params; and its new state.

  Example:
    >>> plans, w = [Projection('', (3, 5), ((0,), (1,)), 2, (-2,))], jnp.ones
    >>> inner = optax.adamw(0.5, weight_decay=0.25)
    >>> inner = optax.with_extra_args_support(inner)
    >>> low = w((2, 5))
    >>> run_inner(inner, plans, low, inner.init(low), w((3, 5)), {})[1]
    Array(-0.125, dtype=float32)
  """
  if params is None:
    updates, state = inner.update(low, state, None, **extra)
    return updates, None, state
  at = map_plans(lambda p, w: p.inner_params(w), plans, params)
  updates, slopes, state = jax.jvp(
    lambda w: inner.update(low, state, w, **extra),
    (at,),
    (_direction(plans, at),),
    has_aux=True,
  )
  return updates, jax.tree.map(lambda x: x.ravel()[0], slopes), state


def _direction(plans: Plans, tree: Any) -> Any:
  """Returns the tangent of the weights: ones for projected leaves, else zeros.

  The inner receives other leaves themselves and decays them, so their slope is
  not needed.
  """
  return map_plans(lambda p, x: jnp.full_like(x, _is_projected(p)), plans, tree)


def _is_projected(plan: Projection | Whole) -> bool:
  return isinstance(plan, Projection)


def check(inner: Any, plans: Plans, params: Any) -> None:
  """Raises if the inner reads params for more than decoupled weight decay.

  The inner runs on weights of both signs whose axes have length 2, and again on
  zeros. Its states
  must be equal, and its updates must differ by one slope times the weight for
  every gradient. State that no update reads may differ: `optax.snapshot` and
  `optax.monitor` store measurements of the low-rank updates.

  Args:
    inner: the inner optimizer.
    plans: one for each leaf.
    params: parameters; only structure, numbers of axes and dtypes are read.

  Raises:
    ValueError: the update of a projected leaf is not affine in the weight
      with one slope, another value depends on the weight, the inner does not
      have a forward derivative, or it calls a function of the weights.
  """

  def filled(values: Sequence[float]) -> Any:
    def of_leaf(p: Projection | Whole, x: Any) -> jax.Array:
      ndim = x.ndim if isinstance(p, Whole) else len(p.low_shape)
      dtype = jnp.promote_types(x.dtype, jnp.float32)
      return jnp.resize(jnp.array(values, dtype), (2,) * ndim)

    return map_plans(of_leaf, plans, params)

  with compile_time_eval():
    grads, w = list(map(filled, GRADIENTS)), filled(WEIGHTS)
    # One program for all runs: compiling operation by operation takes seconds.
    both = jax.jit(functools.partial(_run_both, inner, plans))
    for count in COUNTS:
      try:
        # A learning rate of zero hides every difference: then the next count
        # is tried.
        runs = [_with_note(both, g, w, count) for g in grads]
        if any([_compare(inner, plans, w, *run) for run in runs]):
          return
      except NeedsFunctionError as error:
        raise ValueError(
          f'the inner calls {error}, a function of the whole weights (a line'
          ' search, or a Hessian), and of projected leaves it has only low-rank'
          f' gradients. {OUTSIDE}'
        ) from error
      except TypeError:
        # The inner needs extra arguments, which only `update` receives, or a
        # hyperparameter is a tracer and no values can be compared.
        return


def _with_note(run: Callable[..., Any], *args: Any) -> Any:
  """Returns run(*args); notes in an error of the inner how it was called."""
  try:
    return run(*args)
  except TypeError:
    # `check` handles it: the inner cannot be tried.
    raise
  except Exception as error:
    error.add_note(f'galore tried its inner on weights of 2 x 2. {OUTSIDE}')
    raise


def _run_both(
  inner: Any, plans: Plans, g: Any, weights: Any, count: Any
) -> tuple[Any, Any]:
  """Runs an inner with the weights, and with zeros and the decay added.

  Returns:
    For each of the two runs: the updates, and the states before and after.
  """
  zeros = map_plans(
    lambda p, x: 0 * x if _is_projected(p) else x, plans, weights
  )
  state = with_counters_at(count, inner.init(weights))
  other = with_counters_at(count, inner.init(zeros))
  seen, after = try_update(inner, g, state, weights)
  try:
    unseen, slopes, then = jax.jvp(
      functools.partial(try_update, inner, g, other),
      (zeros,),
      (_direction(plans, weights),),
      has_aux=True,
    )
  except (TypeError, NotImplementedError) as error:
    raise ValueError(
      f'the inner has no forward derivative, which tells its decay: {error}'
    ) from error
  expected = map_plans(
    lambda p, u, s, w: u + s.ravel()[0] * w if _is_projected(p) else u,
    plans,
    unseen,
    slopes,
    weights,
  )
  return (seen, state, after), (expected, other, then)


def _compare(
  inner: Any, plans: Plans, weights: Any, ours: Any, theirs: Any
) -> bool:
  """Returns whether some projected leaf moved; raises if two runs differ."""
  depends = _first_difference(inner, plans, weights, ours, theirs)
  if depends is not None:
    raise ValueError(
      'the inner reads params for more than decoupled weight decay (a trust'
      ' ratio, a parameter scale, or decay that enters a momentum, perhaps),'
      f' which has no low-rank form: {depends} depends on them. Use one without'
      f' it, such as optax.adamw. {OUTSIDE}'
    )
  moved = map_plans(
    lambda p, x: _is_projected(p) and bool(jnp.any(x)), plans, ours[0]
  )
  return any(jax.tree.leaves(moved))


def _first_difference(
  inner: optax.GradientTransformation,
  plans: Plans,
  weights: Any,
  ours: tuple[Any, Any, Any],
  theirs: tuple[Any, Any, Any],
) -> str | None:
  """Returns the name of the first value that differs between two runs.

  State that no update reads is not compared. Returns None if all are equal.
  """
  (seen, *states), (expected, *others) = ours, theirs
  pairs = zip(plans, *map(jax.tree.leaves, (seen, expected)), strict=True)
  for p, x, y in pairs:
    if not allclose(x, y):
      return f'its update of {p.path}'
  differ = [
    path
    for state, other in zip(states, others, strict=True)
    for (path, x), (_, y) in zip(_by_path(state), _by_path(other), strict=True)
    if not allclose(x, y)
  ]
  if not differ or not _is_read(inner, seen, states[-1], weights, {*differ}):
    return None
  return f'its state{differ[0]}'


def _by_path(tree: Any) -> list[tuple[str, Any]]:
  """Returns the leaves of a tree with their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path), x) for path, x in leaves]


def _is_read(
  inner: optax.GradientTransformation,
  grads: Any,
  state: Any,
  weights: Any,
  some: set[str],
) -> bool:
  """Whether updates or other state depend on the state at the paths `some`."""
  trace = jax.make_jaxpr(
    functools.partial(try_update, inner), return_shape=True
  )
  closed, (_, new) = trace(grads, state, weights)
  chosen = [path in some for path, _ in _by_path(state)]
  after = [path in some for path, _ in _by_path(new)]
  others = [[False] * len(jax.tree.leaves(x)) for x in (grads, weights)]
  found = reaches(closed.jaxpr, others[0] + chosen + others[1])
  outputs = [False] * len(others[0]) + after
  return any(x and not one for x, one in zip(found, outputs, strict=True))


def with_counters_at(count: int | jax.Array, state: Any) -> Any:
  """Returns a state whose integer scalars, its counters, are `count`."""

  def of_leaf(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    is_count = x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.full_like(x, count) if is_count else x

  return jax.tree.map(of_leaf, state)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: Any) -> Any:
  """Returns a learning rate, or the value of a schedule at a step.

  >>> rate_at(0.5, 3), rate_at(lambda count: 2 * count, 3)
  (0.5, 6)
  """
  return learning_rate(count) if callable(learning_rate) else learning_rate


def add_decayed_weights(weight_decay: float) -> optax.GradientTransformation:
  """Returns `optax.add_decayed_weights`; an identity if the decay is zero.

  Without decay, params are optional.

  >>> add_decayed_weights(0.0).update(jnp.ones(1), optax.EmptyState())[0]
  Array([1.], dtype=float32)
  """
  if is_zero(weight_decay):
    return optax.identity()
  return optax.add_decayed_weights(weight_decay)


def decay_updated_weights(
  learning_rate: optax.ScalarOrSchedule, *, weight_decay: float
) -> optax.GradientTransformation:
  """Decays the updated weights: w' = (w + u) (1 - lr decay).

  Args:
    learning_rate: a number, or a schedule of the step.
    weight_decay: the decay rate.

  Raises:
    ValueError: `update` is called without params, and the decay is not zero.

  Example:
    >>> tx = decay_updated_weights(0.5, weight_decay=0.5)
    >>> w = {'w': jnp.array(3.0)}
    >>> u, _ = tx.update({'w': jnp.array(1.0)}, tx.init(w), w)
    >>> w['w'] + u['w']
    Array(3., dtype=float32)
  """

  def init_fn(params: Any) -> optax.ScaleByScheduleState:
    del params
    return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

  def update_fn(
    updates: Any, state: Any, params: Any = None
  ) -> tuple[Any, optax.ScaleByScheduleState]:
    # Without decay, params are optional. A traced decay may be nonzero, so it
    # requires them.
    if not is_zero(weight_decay):
      check_params(params, 'weight decay')
      shrink = rate_at(learning_rate, state.count) * weight_decay
      updates = jax.tree.map(
        lambda u, w: u - (shrink * (w + u)).astype(u.dtype), updates, params
      )
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, optax.ScaleByScheduleState(count=count)

  return optax.GradientTransformation(init_fn, update_fn)
