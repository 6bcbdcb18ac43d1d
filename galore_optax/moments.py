"""What a refresh does to the inner state: keep it, reset it, or rotate it.

The moments of an inner are fields of NamedTuples, known by their names; what
stands beside them under another name is refused at `init`. No inner is run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax.checks import check_decay
from galore_optax.quantized.array import Quantized, dequantize, full, quantize

# Fields of first and of second moments in optax's states.
FIRST, SECOND = ('mu', 'trace', 'ema'), ('nu',)

# Fields that start at zero, and that a reset takes back there.
ZEROED = {
  *FIRST,
  *SECOND,
  *('v', 'v_row', 'v_col', 'nu_max', 'm', 'n', 'g'),
}

# Counters of moments: a bias correction starts anew with them.
COUNTS = {'count', 't'}

CONSTANTS = {'ns_coeffs'}  # fields of numbers that no gradient changes

# `turn(x, power)`, the product with C = P_new P_old^T, its entries to a power;
# None for a leaf that is not projected.
Turn: TypeAlias = Callable[[jax.Array, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Rotate:
  """Carries the moments from the old basis to the new one.

  With C = P_new P_old^T the first moment becomes C mu. The second follows its
  variance: with both corrected for bias, |C^2 (nu - mu^2) + (C mu)^2|, where
  C^2 has the squared entries of C.

  Example:
    >>> import galore_optax
    >>> tx = galore_optax.galore(
    ...   optax.adam(0.1, b2=0.95), moments=Rotate(b1=0.9, b2=0.95))

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024.
  """

  b1: float = 0.9  # decay of the inner's first moment
  b2: float = 0.999  # decay of its second moment

  def __post_init__(self) -> None:
    """Raises ValueError for what is no decay."""
    check_decay(b1=self.b1, b2=self.b2)

  def check(self, state: Any) -> None:
    """Raises ValueError where a moment is neither mu, trace, ema nor nu."""
    _check(state, {*FIRST, *SECOND}, 'rotate', 'mu, trace and nu')

  def __call__(
    self, state: Any, treedef: Any, turns: Sequence[Turn | None]
  ) -> Any:
    """Returns the inner state in the new basis.

    Args:
      state: of the inner.
      treedef: of the parameters.
      turns: of each leaf.
    """

    def of_node(node: Any) -> Any:
      if not _is_moments(node):
        return node
      fields = [f for f in FIRST + SECOND if f in node._fields]
      rows = zip(
        *(treedef.flatten_up_to(getattr(node, f)) for f in fields), strict=True
      )
      count = getattr(node, 'count', None)
      new = [
        # Of two inners each has masks where the other's leaves are.
        leaf
        if turn is None or isinstance(leaf[0], optax.MaskedNode)
        else self._turned(fields, leaf, turn, count)
        for leaf, turn in zip(rows, turns, strict=True)
      ]
      columns = zip(fields, zip(*new, strict=True), strict=True)
      return node._replace(**{f: treedef.unflatten(c) for f, c in columns})

    return jax.tree.map(of_node, state, is_leaf=_is_moments)

  def _turned(self, fields, leaf, turn, count) -> tuple[Any, ...]:
    """Returns the moments of one leaf, turned."""
    old = dict(zip(fields, leaf, strict=True))
    new = dict(old)
    first = next((f for f in FIRST if f in old), None)
    mu = 0.0 if first is None else _read(old[first])
    if first is not None:
      new[first] = _stored(turn(mu, 1), old[first])
    if 'nu' in old:
      # Bias corrections; without a count the inner makes none.
      w1, w2 = (
        1.0 if count is None else 1 - b ** jnp.maximum(count, 1)
        for b in (self.b1, self.b2)
      )
      turned = 0.0 if first is None else turn(mu, 1) / w1
      spread = turn(_read(old['nu']) / w2 - (mu / w1) ** 2, 2)
      new['nu'] = _stored(w2 * jnp.abs(spread + turned**2), old['nu'])
    return tuple(new[f] for f in fields)


# What a refresh does to moments; 'rotate' is `Rotate()`, Adam's decays.
Moments: TypeAlias = Literal['keep', 'reset', 'rotate'] | Rotate


def check_resets(state: Any) -> None:
  """Raises ValueError where a reset of the state would miss a moment."""
  _check(state, ZEROED, 'reset', ', '.join(sorted(ZEROED)))


def reset(state: Any) -> Any:
  """Returns the state with moments, and their counters, at zero.

  A counter beside moments (Adam's) restarts; one that stands alone (a
  learning-rate schedule's) goes on.

  Example:
    >>> params = {'w': jnp.ones((3, 5))}
    >>> inner = optax.adam(lambda count: 0.1)
    >>> _, state = inner.update(params, inner.init(params))
    >>> adam, schedule = reset(state)
    >>> int(adam.count), int(schedule.count), adam.mu['w'].sum()
    (0, 1, Array(0., dtype=float32))
  """

  def of_node(node: Any) -> Any:
    if not _is_moments(node):
      return node
    fields = [f for f in node._fields if f in ZEROED | COUNTS]
    zero = {
      f: jax.tree.map(_zeros, getattr(node, f), is_leaf=_is_stored)
      for f in fields
    }
    return node._replace(**zero)

  return jax.tree.map(of_node, state, is_leaf=_is_moments)


def reset_low(state: Any) -> Any:
  """Returns the state of two inners with that of the 'low' leaves reset."""
  low = state.inner_states['low']
  return state._replace(inner_states={**state.inner_states, 'low': reset(low)})


def _check(state: Any, known: set[str], name: str, listing: str) -> None:
  inside = lambda path, names: any(
    getattr(key, 'name', None) in names for key in path
  )
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    if x.ndim and not inside(path, known | CONSTANTS):
      raise ValueError(
        f"moments='{name}' knows the moments {listing}, got"
        f' {jax.tree_util.keystr(path)}; use another of keep, reset and rotate'
      )


def _is_moments(node: Any) -> bool:
  return bool(ZEROED & set(getattr(node, '_fields', ())))


def _is_stored(x: Any) -> bool:
  return isinstance(x, Quantized)


def _zeros(x: Any) -> Any:
  if not _is_stored(x):
    return jnp.zeros_like(x)
  return full(x.shape, 0.0, code=x.code, block_size=x.block_size)


def _read(moment: Any) -> jax.Array:
  return dequantize(moment) if _is_stored(moment) else moment


def _stored(new: jax.Array, old: Any) -> Any:
  """Returns `new`, in 8 bits if `old` is."""
  if not _is_stored(old):
    return new
  return quantize(new, code=old.code, block_size=old.block_size)
