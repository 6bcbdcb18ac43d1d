"""What a refresh does to the inner state: keep it, reset it, or rotate it.

The moments of an inner are fields of NamedTuples, known by their names; what
stands beside them under another name is refused at `init`. No inner is run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax.checks import check_decay, check_one_of
from galore_optax.quantized.array import full, is_coded, unpacked
from galore_optax.quantized.state import repacked

# Fields of first and of second moments in optax's states.
FIRST, SECOND = ('mu', 'trace', 'ema'), ('nu',)

# Fields that start at zero, and that a reset takes back there.
ZEROED = {*FIRST, *SECOND, *'v v_row v_col nu_max m n g'.split()}

# Counters of moments: a bias correction starts anew with them.
COUNTS = {'count', 't'}

CONSTANTS = {'ns_coeffs'}  # fields of numbers that no gradient changes


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

  def __call__(self, state: Any, treedef: Any, turns: Sequence) -> Any:
    """Returns the inner state in the new basis.

    Args:
      state: of the inner.
      treedef: of the parameters.
      turns: of each leaf `turn(x, power)`, the product with C, its entries to a
        power; None of a leaf that is not projected.
    """

    def of_node(node):
      fields = [f for f in FIRST + SECOND if f in node._fields]
      columns = [treedef.flatten_up_to(getattr(node, f)) for f in fields]
      count = getattr(node, 'count', None)
      rows = zip(turns, *columns, strict=True)
      new = [self._turned(fields, old, turn, count) for turn, *old in rows]
      column = lambda f: treedef.unflatten([moments[f] for moments in new])
      return node._replace(**{f: column(f) for f in fields})

    return _each_node(of_node, state)

  def _turned(self, fields, old, turn, count):
    """Returns the moments of one leaf, turned, by their names."""
    old = dict(zip(fields, old, strict=True))
    # Of two inners each has masks where the other's leaves are.
    if turn is None or optax.MaskedNode in map(type, old.values()):
      return old
    new, mu, turned = dict(old), 0.0, 0.0
    for f in FIRST:
      if f in old:
        mu = unpacked(old[f])
        turned = turn(mu, 1)
        new[f] = repacked(turned, old[f])
    if 'nu' in old:
      w1, w2 = 1.0, 1.0
      # Bias corrections; without a count the inner makes none.
      if count is not None:
        w1, w2 = (1 - b ** jnp.maximum(count, 1) for b in (self.b1, self.b2))
      spread = turn(unpacked(old['nu']) / w2 - (mu / w1) ** 2, 2)
      new['nu'] = repacked(w2 * jnp.abs(spread + (turned / w1) ** 2), old['nu'])
    return new


# What a refresh does to moments; 'rotate' is `Rotate()`, Adam's decays.
Moments: TypeAlias = Literal['keep', 'reset', 'rotate'] | Rotate


def checked(rule: Any, *, in_turns: bool) -> Any:
  """Returns 'keep', 'reset' or an object that rotates.

  >>> checked('rotate', in_turns=True)
  Rotate(b1=0.9, b2=0.999)
  """
  if isinstance(rule, Rotate):
    return rule
  check_one_of(('keep', 'reset', 'rotate'), moments=rule)
  if rule == 'reset' and in_turns:
    why = "moments='reset' restarts a counter of all matrices, so they cannot"
    raise ValueError(f'{why} take turns; give an integer gap, keep or rotate')
  return Rotate() if rule == 'rotate' else rule


def check(rule: Any, state: Any) -> None:
  """Raises ValueError where a rule would miss a moment of the state."""
  known, listing = {*FIRST, *SECOND}, 'mu, trace and nu'
  if rule == 'reset':
    state, known = state.inner_states['low'], ZEROED
    listing = ', '.join(sorted(known))
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    names = {getattr(key, 'name', None) for key in path}
    if rule != 'keep' and x.ndim and not names & (known | CONSTANTS):
      raise ValueError(
        f'moments={rule!r} knows the moments {listing}, got'
        f' {jax.tree_util.keystr(path)}; use another of keep, reset and rotate'
      )


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

  zeros = lambda tree: jax.tree.map(_zeros, tree, is_leaf=is_coded)

  def of_node(node):
    fields = (ZEROED | COUNTS).intersection(node._fields)
    return node._replace(**{f: zeros(getattr(node, f)) for f in fields})

  return _each_node(of_node, state)


def reset_low(state: Any) -> Any:
  """Returns the state of two inners with that of the 'low' leaves reset."""
  low = state.inner_states['low']
  return state._replace(inner_states={**state.inner_states, 'low': reset(low)})


def _each_node(f, state):
  """Returns the state with f(node) for its tuples of moments."""
  is_node = lambda node: bool(ZEROED.intersection(getattr(node, '_fields', ())))
  of = lambda node: f(node) if is_node(node) else node
  return jax.tree.map(of, state, is_leaf=is_node)


def _zeros(x):
  if not is_coded(x):
    return jnp.zeros_like(x)
  return full(x.shape, 0.0, code=x.code, block_size=x.block_size)
