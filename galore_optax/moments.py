"""Moments at a refresh: rules that keep, reset or rotate the inner's state.

The moments of an inner optimizer are fields of NamedTuples. The rules find them
by the names of these fields. The rules 'reset' and 'rotate' refuse an inner at
`init` if its state has arrays under other names.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax.checks import check_decay, check_one_of
from galore_optax.projection import Projection, Whole
from galore_optax.quantized.array import (
  dequantize_tree,
  is_quantized,
  quantized_full,
)
from galore_optax.quantized.state import quantize_tree

FIRST = ('mu', 'trace', 'ema')
"""Fields of first moments in optax's states."""

SECOND = ('nu',)
"""Fields of second moments in optax's states."""

ZEROED = {
  *FIRST,
  *SECOND,
  *('v', 'v_row', 'v_col', 'nu_max', 'm', 'n', 'g'),
}
"""Fields that are zero at first. `reset` sets them to zero again."""

COUNTS = {'count', 't'}
"""Counters of moments. `reset` restarts the bias correction with them."""

CONSTANTS = {'ns_coeffs'}
"""Fields with numbers that no gradient changes."""

Rotation: TypeAlias = Callable[[jax.Array, int], jax.Array]
"""`(low, power) -> low`: the product with C = P_new P_old^T, its entries raised
to a power."""


@dataclasses.dataclass(frozen=True)
class Rotate:
  """Maps the moments from the old basis to the new one.

  With C = P_new P_old^T the first moment mu becomes C mu. The second moment nu
  becomes |C^2 (nu - mu^2) + (C mu)^2|, where mu and nu are corrected for bias,
  and C^2 has the squared entries of C.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(
    ...   optax.adam(0.1, b2=0.95), moments=Rotate(b1=0.9, b2=0.95))

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024.
  """

  b1: float = 0.9
  """Decay rate of the inner's first moment."""
  b2: float = 0.999
  """Decay rate of the inner's second moment."""

  def __post_init__(self) -> None:
    """Raises ValueError unless both decay rates are in [0, 1)."""
    check_decay(b1=self.b1, b2=self.b2)

  def __call__(
    self, state: Any, treedef: Any, rotations: Sequence[Rotation | None]
  ) -> Any:
    """Returns the inner's state in the new basis.

    Args:
      state: state of the inner optimizer.
      treedef: structure of the parameters.
      rotations: one for each leaf; None if the leaf is not projected.
    """

    def of_node(node: Any) -> Any:
      fields = [f for f in FIRST + SECOND if f in node._fields]
      columns = [treedef.flatten_up_to(getattr(node, f)) for f in fields]
      count = getattr(node, 'count', None)
      new = [
        self._rotated(dict(zip(fields, old, strict=True)), rotate, count)
        for rotate, *old in zip(rotations, *columns, strict=True)
      ]
      return node._replace(
        **{
          f: treedef.unflatten([moments[f] for moments in new]) for f in fields
        }
      )

    return _map_moments(of_node, state)

  def _rotated(
    self, old: dict[str, Any], rotate: Rotation | None, count: Any
  ) -> dict[str, Any]:
    """Returns the rotated moments of one leaf, by field."""
    # Each of two inners has masks instead of the other's leaves.
    if rotate is None or optax.MaskedNode in map(type, old.values()):
      return old
    new, mu, rotated_mu = dict(old), 0.0, 0.0
    for f in FIRST:
      if f in old:
        mu = dequantize_tree(old[f])
        rotated_mu = rotate(mu, 1)
        new[f] = quantize_tree(rotated_mu, old[f])
    if 'nu' in old:
      w1, w2 = 1.0, 1.0
      # Bias corrections. An inner without a counter does not correct.
      if count is not None:
        w1, w2 = (1 - b ** jnp.maximum(count, 1) for b in (self.b1, self.b2))
      variance = rotate(dequantize_tree(old['nu']) / w2 - (mu / w1) ** 2, 2)
      nu = w2 * jnp.abs(variance + (rotated_mu / w1) ** 2)
      new['nu'] = quantize_tree(nu, old['nu'])
    return new


Moments: TypeAlias = Literal['keep', 'reset', 'rotate'] | Rotate
"""The rule of a refresh; 'rotate' is `Rotate()`, with Adam's decay rates."""


def checked(rule: Any, *, staggered: bool) -> Any:
  """Returns 'keep', 'reset' or a `Rotate`.

  Args:
    rule: one of `Moments`.
    staggered: whether each matrix has refresh steps of its own.

  Raises:
    ValueError: the rule is unknown, or it is 'reset' and `staggered` is true.

  >>> checked('rotate', staggered=True)
  Rotate(b1=0.9, b2=0.999)
  """
  if isinstance(rule, Rotate):
    return rule
  check_one_of(('keep', 'reset', 'rotate'), moments=rule)
  if rule == 'reset' and staggered:
    why = "moments='reset' restarts a counter of all matrices, so they cannot"
    raise ValueError(f'{why} take turns; give an integer gap, keep or rotate')
  return Rotate() if rule == 'rotate' else rule


def check(rule: Any, state: Any) -> None:
  """Raises ValueError if the state has moments that a rule does not support."""
  known, listing = {*FIRST, *SECOND}, 'mu, trace and nu'
  if rule == 'reset':
    state, known = state.inner_states['projected'], ZEROED
    listing = ', '.join(sorted(known))
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    names = {getattr(key, 'name', None) for key in path}
    if rule != 'keep' and x.ndim and not names & (known | CONSTANTS):
      raise ValueError(
        f'moments={rule!r} knows the moments {listing}, got'
        f' {jax.tree_util.keystr(path)}; use another of keep, reset and rotate'
      )


def check_shapes(
  plans: Sequence[Projection | Whole], tree: Any, state: Any
) -> None:
  """Raises ValueError if a moment of a projected leaf has another rank.

  Args:
    plans: one for each leaf.
    tree: parameters or gradients; only its paths are read.
    state: state of the inner optimizer.
  """
  keys = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  plan_of = dict(zip(keys, plans, strict=True))
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    if not ZEROED.intersection(getattr(key, 'name', None) for key in path):
      continue
    owners = (plan_of.get(path[i:]) for i in range(len(path)))
    plan = next((p for p in owners if p is not None), None)
    shape = jnp.shape(x)
    if not isinstance(plan, Projection) or len(shape) != len(plan.low_shape):
      continue
    if shape != plan.low_shape:
      raise ValueError(
        f'the state has for {plan.path} a moment'
        f' {jax.tree_util.keystr(path)} of shape {shape}, and rank'
        f' {plan.rank} needs {plan.low_shape}. It was saved with another rank'
        ' or side: restore it with the options of that run, or start with'
        ' tx.init(params)'
      )


def reset(state: Any) -> Any:
  """Returns the state with its moments and their counters set to zero.

  A counter in a NamedTuple with moments restarts (Adam's). Other counters go on
  (those of a learning-rate schedule).

  Example:
    >>> params = {'w': jnp.ones((3, 5))}
    >>> inner = optax.adam(lambda count: 0.1)
    >>> _, state = inner.update(params, inner.init(params))
    >>> adam, schedule = reset(state)
    >>> int(adam.count), int(schedule.count), adam.mu['w'].sum()
    (0, 1, Array(0., dtype=float32))
  """

  def of_node(node: Any) -> Any:
    fields = (ZEROED | COUNTS).intersection(node._fields)
    zeros = {
      f: jax.tree.map(_zeros, getattr(node, f), is_leaf=is_quantized)
      for f in fields
    }
    return node._replace(**zeros)

  return _map_moments(of_node, state)


def reset_projected(state: Any) -> Any:
  """Returns the state of two inners; that of the projected leaves is reset."""
  inner_states = dict(state.inner_states)
  inner_states['projected'] = reset(inner_states['projected'])
  return state._replace(inner_states=inner_states)


def _map_moments(f: Callable[[Any], Any], state: Any) -> Any:
  """Returns the state with f(node) for each NamedTuple that has moments."""

  def has_moments(node: Any) -> bool:
    return bool(ZEROED.intersection(getattr(node, '_fields', ())))

  return jax.tree.map(
    lambda node: f(node) if has_moments(node) else node,
    state,
    is_leaf=has_moments,
  )


def _zeros(x: Any) -> Any:
  """Returns an array of zeros like an array or a quantized array."""
  if not is_quantized(x):
    return jnp.zeros_like(x)
  return quantized_full(x.shape, 0.0, code=x.code, block_size=x.block_size)
