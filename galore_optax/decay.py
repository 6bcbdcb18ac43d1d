"""Exact decoupled weight decay through a black-box inner optimizer.

The inner optimizer receives low-rank gradients. It cannot read the weights,
because they have another shape. If an inner reads params only for decoupled
weight decay, its update is `u(gradient) + slope * params`. So it runs once with
zeros for the projected weights, and one forward derivative of that run is the
slope. `galore` then adds the slope times the whole weight.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax.checks import check_params, is_zero
from galore_optax.precision import allclose
from galore_optax.projection import Projection, Whole, map_plans
from galore_optax.sharding import compile_time_eval
from galore_optax.trial import (
  NeedsFunctionError,
  RunOnce,
  Shared,
  Traced,
  map_once,
  reaches,
  require_values,
  try_update,
  warn_untried,
)

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
    >>> plans, w = [Projection('', (3, 5), ((0,), (1,)), (2,), (-2,))], jnp.ones
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
  zeros. Its states must be equal, and its updates must differ by one slope
  times the weight for every gradient. State that no update reads may differ:
  `optax.snapshot` and `optax.monitor` store measurements of the low-rank
  updates.

  Args:
    inner: the inner optimizer.
    plans: one for each leaf.
    params: parameters; only structure, numbers of axes and dtypes are read.

  An inner that requires an extra argument without a meaning to optax cannot be
  tried. A warning names the argument. If a hyperparameter is a tracer, nothing
  is compared.

  Raises:
    ValueError: the update of a projected leaf is not affine in the weight
      with one slope, another value depends on the weight, the inner does not
      have a forward derivative, or it calls a function of the weights.
  """
  if not any(map(_is_projected, plans)):
    return
  with compile_time_eval():
    *grads, w = (_filled(x, plans, params) for x in (*GRADIENTS, WEIGHTS))
  try:
    trial = _with_note(_Trial, inner, plans, w)
    with compile_time_eval():
      for count in COUNTS:
        # A learning rate of zero hides every difference: then the next count
        # is tried.
        runs = [_with_note(trial, g, count) for g in grads]
        if any([_compare(trial, *run) for run in runs]):
          return
  except NeedsFunctionError as error:
    raise ValueError(
      f'the inner calls {error}, a function of the whole weights (a line'
      ' search, or a Hessian), and of projected leaves it has only low-rank'
      f' gradients. {OUTSIDE}'
    ) from error
  except TypeError as error:
    warn_untried(error, 'it reads params for decoupled weight decay only')


def kinds(plans: Plans, params: Any) -> Hashable:
  """Returns all that `check` reads of the plans and the parameters.

  These are the structure of the tree, and for each leaf whether it is
  projected, the number of its axes, and its dtype.
  """
  treedef = jax.tree.structure(params)
  return treedef, tuple(map(_kind, plans, jax.tree.leaves(params)))


def _kind(p: Projection | Whole, x: Any) -> tuple[bool, int, Any]:
  """Returns all that `check` reads of one leaf."""
  ndim = len(p.low_shape) if isinstance(p, Projection) else x.ndim
  return _is_projected(p), ndim, jnp.promote_types(x.dtype, jnp.float32)


def _filled(values: Sequence[float], plans: Plans, params: Any) -> Any:
  """Returns a tree of arrays whose axes have length 2.

  Leaves of one kind are one array, so that the operations that are equal for
  them are computed once.
  """
  made: dict[Any, jax.Array] = {}

  def of_leaf(p: Projection | Whole, x: Any) -> jax.Array:
    kind = _, ndim, dtype = _kind(p, x)
    if kind not in made:
      made[kind] = jnp.asarray(np.resize(values, (2,) * ndim), dtype)
    return made[kind]

  return map_plans(of_leaf, plans, params)


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


class _Trial:
  """Runs an inner with the weights, and with zeros and the decay added.

  The inner is traced with the whole tree, once. All runs are one program, in
  which leaves that the inner treats alike are computed once.
  """

  def __init__(self, inner: Any, plans: Plans, weights: Any) -> None:
    """Traces the inner for gradients with the types of the weights."""
    self.plans = plans
    self.weights = weights
    self.projected = map_plans(lambda p, _: _is_projected(p), plans, weights)
    self.init = Traced(inner.init, weights)
    state = self.init.result
    self.update = Traced(
      functools.partial(try_update, inner), weights, state, weights
    )
    require_values(self.init, self.update)
    self.run = RunOnce(self._run)

  def __call__(self, grads: Any, count: int) -> tuple[Any, Any]:
    """Returns updates, and states before and after, for each of the two runs.

    Args:
      grads: the gradients.
      count: value of the counters in the state.
    """
    return self.run(grads, self.weights, count)

  def _run(self, grads: Any, weights: Any, count: Any) -> tuple[Any, Any]:
    zeros = map_once(_without_projected, self.projected, weights)
    state = with_counters_at(count, self.init(weights))
    other = with_counters_at(count, self.init(zeros))
    seen, after = self.update(grads, state, weights)
    values, form = Shared.of(zeros)
    forms: list[Shared] = []

    def of_zeros(values: list[Any]) -> tuple[list[Any], list[Any]]:
      updates, state = self.update(grads, other, form.rebuild(values))
      results = Shared.of(updates), Shared.of(state)
      forms[:] = [form for _, form in results]
      return results[0][0], results[1][0]

    directions = map_once(jnp.full_like, zeros, self.projected)
    by_value = zip(*map(jax.tree.leaves, (zeros, directions)), strict=True)
    tangents = list({id(x): tangent for x, tangent in by_value}.values())
    try:
      *results, then = jax.jvp(of_zeros, (values,), (tangents,), has_aux=True)
    except (TypeError, NotImplementedError) as error:
      raise ValueError(
        f'the inner has no forward derivative, from which its decay is'
        f' computed: {error}'
      ) from error
    unseen, slopes = map(forms[0].rebuild, results)
    expected = map_once(_with_decay, self.projected, unseen, slopes, weights)
    return (seen, state, after), (expected, other, forms[1].rebuild(then))


def _without_projected(is_projected: bool, w: jax.Array) -> jax.Array:
  return 0 * w if is_projected else w


def _with_decay(
  is_projected: bool, u: jax.Array, slope: jax.Array, w: jax.Array
) -> jax.Array:
  """Returns the update of a projected leaf plus the decay of its weight."""
  return u + slope.ravel()[0] * w if is_projected else u


def _compare(trial: _Trial, ours: Any, theirs: Any) -> bool:
  """Returns whether some projected leaf moved; raises if two runs differ."""
  depends = _first_difference(trial, ours, theirs)
  if depends is not None:
    raise ValueError(
      'the inner reads params for more than decoupled weight decay (a trust'
      ' ratio, a parameter scale, or decay that enters a momentum, perhaps),'
      f' which has no low-rank form: {depends} depends on them. Use one without'
      f' it, such as optax.adamw. {OUTSIDE}'
    )
  pairs = zip(trial.plans, jax.tree.leaves(ours[0]), strict=True)
  moved = {id(x): x for p, x in pairs if _is_projected(p)}
  return any(np.any(np.asarray(x)) for x in moved.values())


def _first_difference(
  trial: _Trial, ours: tuple[Any, Any, Any], theirs: tuple[Any, Any, Any]
) -> str | None:
  """Returns the name of the first value that differs between two runs.

  State that no update reads is not compared. Returns None if all are equal.
  """
  (seen, *states), (expected, *others) = ours, theirs
  # Equal leaves are one array, and each pair of arrays is compared once.
  compared: dict[tuple[int, int], bool] = {}

  def is_close(x: Any, y: Any) -> bool:
    key = id(x), id(y)
    if key not in compared:
      compared[key] = allclose(x, y)
    return compared[key]

  pairs = zip(trial.plans, *map(jax.tree.leaves, (seen, expected)), strict=True)
  for p, x, y in pairs:
    if not is_close(x, y):
      return f'its update of {p.path}'
  differ = [
    path
    for state, other in zip(states, others, strict=True)
    for (path, x), (_, y) in zip(_by_path(state), _by_path(other), strict=True)
    if not is_close(x, y)
  ]
  if not differ or not _is_read(trial.update, {*differ}):
    return None
  return f'its state{differ[0]}'


def _by_path(tree: Any) -> list[tuple[str, Any]]:
  """Returns the leaves of a tree with their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path), x) for path, x in leaves]


def _is_read(update: Traced, some: set[str]) -> bool:
  """Whether updates or other state depend on the state at the paths `some`."""
  if update.closed is None:
    # Nothing is known about an inner that reads values in Python.
    return True
  grads, state, weights = update.args
  updates, new = update.result
  chosen = [path in some for path, _ in _by_path(state)]
  after = [path in some for path, _ in _by_path(new)]
  others = [[False] * len(jax.tree.leaves(x)) for x in (grads, weights)]
  found = reaches(update.closed.jaxpr, others[0] + chosen + others[1])
  outputs = [False] * len(jax.tree.leaves(updates)) + after
  return any(x and not one for x, one in zip(found, outputs, strict=True))


def with_counters_at(count: int | jax.Array, state: Any) -> Any:
  """Returns a state whose integer scalars, its counters, are `count`."""

  def of_leaf(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    is_count = x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.full_like(x, count) if is_count else x

  return map_once(of_leaf, state)


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
