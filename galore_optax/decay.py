"""Exact decoupled weight decay through a black-box inner.

An inner sees the low-rank gradient, whose shape is not the weight's, so what
it would read from `params` is not there. If it reads them for decoupled decay
alone, its update is `u(gradient) + slope * params`: the low-rank part runs with
zeros for weights, and one forward derivative of that very run is the slope.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.checks import check_params, is_zero
from galore_optax.precision import close
from galore_optax.projection import Projection, Whole, each
from galore_optax.trial import NeedsFunctionError, reaches, try_update

# Steps at which an inner is tried: at some, a schedule may be zero.
COUNTS = (0, 1, 10, 100, 1_000)

GRADIENTS = ((0.25, -1.0, 0.0, 0.5), (2.0, 1.0, 0.25, 3.0), (0.0,) * 4)
# Entries of the 2 x 2 gradients and weights that an inner is tried on.
WEIGHTS = (0.5, -2.0, 1.5, -0.75)

# The remedy for a part of an inner that needs whole weights.
OUTSIDE = (
  'A part that needs whole weights goes outside, after a galore with its own'
  ' inner: optax.chain(galore(optax.adamw(lr), rank=512), part)'
)


def through(inner, plans, low, state, params, extra) -> tuple[Any, Any, Any]:
  """Runs the inner on low-rank gradients.

  Args:
    inner: the transformation.
    plans: of each leaf.
    low: projected gradients; itself of a leaf that is whole.
    state: of the inner.
    params: the weights in their own shapes, or None.
    extra: arguments passed to the inner.

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
    updates, state = inner.update(low, state, None, **extra)
    return updates, None, state
  at = each(lambda p, w: p.view(w), plans, params)
  along = _along(plans, at)
  update = lambda w: inner.update(low, state, w, **extra)
  updates, slopes, state = jax.jvp(update, (at,), (along,), has_aux=True)
  return updates, jax.tree.map(lambda x: x.ravel()[0], slopes), state


def _along(plans, tree):
  """Returns ones of projected leaves, along which the slope is taken.

  Of others zeros: decay of the inner acts on the weight itself.
  """
  return each(lambda p, x: jnp.full_like(x, _is_low(p)), plans, tree)


_is_low = lambda p: isinstance(p, Projection)


def check(inner: Any, plans: Sequence[Projection | Whole], params: Any) -> None:
  """Raises if the inner reads params for more than decoupled decay.

  It is tried on 2 x 2 weights of both signs against zeros: its states must be
  equal, and its updates differ by one slope times the weight, whatever the
  gradient. State that no update reads may differ: `optax.snapshot` and
  `optax.monitor` measure the low-rank updates that they see.

  Args:
    inner: the transformation.
    plans: of each leaf.
    params: parameters; only structure, ranks and types are read.

  Raises:
    ValueError: the update of a projected leaf is not affine in the weight
      with one slope, something else depends on it, the inner has no forward
      derivative, or it calls a function of the weights.
  """

  def filled(values):
    def of_leaf(p, x):
      # What the inner sees of a weight has two axes beyond its batch.
      ndim = x.ndim if isinstance(p, Whole) else len(p.low_shape)
      dtype = jnp.promote_types(x.dtype, jnp.float32)
      return jnp.resize(jnp.array(values, dtype), (2,) * ndim)

    return each(of_leaf, plans, params)

  with jax.ensure_compile_time_eval():
    grads, w = list(map(filled, GRADIENTS)), filled(WEIGHTS)
    # One program: operation by operation, compiling takes seconds.
    both = jax.jit(lambda *run: _run_both(inner, plans, *run))
    for count in COUNTS:
      try:
        # With a learning rate of zero nothing can be seen: try the next.
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
        # It needs extra args, which only `update` is given, or a hyperparameter
        # is traced, and nothing can be compared.
        return


def _with_note(run: Callable[..., Any], *args: Any) -> Any:
  """Returns run(*args); an error of the inner gets a note of its origin."""
  try:
    return run(*args)
  except TypeError:
    raise  # It means that the inner cannot be tried.
  except Exception as error:
    error.add_note(f'galore tried its inner on weights of 2 x 2. {OUTSIDE}')
    raise


def _run_both(inner, plans, g, weights, count):
  """Runs an inner with weights, and with zeros and the decay added.

  Returns of each the updates, and the states before and after.
  """
  blind = each(lambda p, x: 0 * x if _is_low(p) else x, plans, weights)
  along = _along(plans, weights)
  state, other = (at_count(count, inner.init(x)) for x in (weights, blind))
  seen, after = try_update(inner, g, state, weights)
  update = functools.partial(try_update, inner, g, other)
  try:
    unseen, slopes, then = jax.jvp(update, (blind,), (along,), has_aux=True)
  except (TypeError, NotImplementedError) as error:
    raise ValueError(
      f'the inner has no forward derivative, which tells its decay: {error}'
    ) from error
  decayed = lambda p, u, s, w: u + s.ravel()[0] * w if _is_low(p) else u
  expected = each(decayed, plans, unseen, slopes, weights)
  return (seen, state, after), (expected, other, then)


def _compare(inner, plans, weights, ours, theirs):
  """Compares two runs of an inner; returns whether they tell enough."""
  depends = _what_depends(inner, plans, weights, ours, theirs)
  if depends is not None:
    raise ValueError(
      'the inner reads params for more than decoupled weight decay (a trust'
      ' ratio, a parameter scale, or decay that enters a momentum, perhaps),'
      f' which has no low-rank form: {depends} depends on them. Use one without'
      f' it, such as optax.adamw. {OUTSIDE}'
    )
  moved = each(lambda p, x: _is_low(p) and bool(jnp.any(x)), plans, ours[0])
  return any(jax.tree.leaves(moved))


def _what_depends(
  inner: optax.GradientTransformation,
  plans: Sequence[Projection | Whole],
  weights: Any,
  ours: tuple[Any, Any, Any],
  theirs: tuple[Any, Any, Any],
) -> str | None:
  """Returns the first difference of two runs that matters; None for none."""
  (seen, *states), (expected, *others) = ours, theirs
  pairs = zip(plans, *map(jax.tree.leaves, (seen, expected)), strict=True)
  for p, x, y in pairs:
    if not close(x, y):
      return f'its update of {p.path}'
  differ = [
    path
    for state, other in zip(states, others, strict=True)
    for (path, x), (_, y) in zip(_by_path(state), _by_path(other), strict=True)
    if not close(x, y)
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
  """Whether updates, or the rest of the state, depend on some of the state."""
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


def at_count(count: int, state: Any) -> Any:
  """Returns a state with its integer scalars, the counters, at `count`."""

  def of_leaf(x):
    x = jnp.asarray(x)
    is_count = x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.full_like(x, count) if is_count else x

  return jax.tree.map(of_leaf, state)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
  """Returns a learning rate, or a schedule's at a step.

  >>> rate_at(0.5, 3), rate_at(lambda count: 2 * count, 3)
  (0.5, 6)
  """
  return learning_rate(count) if callable(learning_rate) else learning_rate


def add_decayed_weights(weight_decay: float) -> optax.GradientTransformation:
  """Returns optax's, which asks for no params where the decay is zero.

  >>> add_decayed_weights(0.0).update(jnp.ones(1), optax.EmptyState())[0]
  Array([1.], dtype=float32)
  """
  none = is_zero(weight_decay)
  return optax.identity() if none else optax.add_decayed_weights(weight_decay)


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

  init_fn = lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    # No params are asked for where no decay is; a traced one may be any.
    if not is_zero(weight_decay):
      check_params(params, 'weight decay')
      shrink = rate_at(learning_rate, state.count) * weight_decay
      decayed = lambda u, w: u - (shrink * (w + u)).astype(u.dtype)
      updates = jax.tree.map(decayed, updates, params)
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count=count)

  return optax.GradientTransformation(init_fn, update_fn)
