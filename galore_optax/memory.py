"""This module holds byte arithmetic: what a step holds, before it exists.

Everything is read off shapes (`jax.eval_shape`), so that it is exact and
allocates nothing.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax import paths as selection
from galore_optax.transform import GaloreState

PyTree = Any

VOCABULARY = re.compile(r'embed\w*|lm_head|head|logits|wte|wpe')
"""Path components of what grows with the vocabulary."""


class Account(NamedTuple):
  """Bytes, or elements, of parameters and optimizer state."""

  parameters: int  # weights that do not grow with the vocabulary
  vocabulary: int  # embeddings and head
  bases: int  # of the projections
  moments: int  # what the optimizer keeps of gradients, scales included
  counters: int  # integers: steps done

  @property
  def weights(self) -> int:
    """All weights."""
    return self.parameters + self.vocabulary

  @property
  def state(self) -> int:
    """All optimizer state."""
    return self.bases + self.moments + self.counters

  @property
  def total(self) -> int:
    """Weights and state."""
    return self.weights + self.state


def account(params: PyTree, state: PyTree) -> Account:
  """Returns the bytes of parameters and of a state for them.

  Args:
    params: arrays or their shapes.
    state: of any optimizer, layer-wise or not; `jax.eval_shape(tx.init,
      params)` makes one without allocating it.

  Example:
    >>> import optax
    >>> params = {'w': jnp.zeros((3, 5)), 'embed': jnp.zeros((7, 3))}
    >>> account(params, jax.eval_shape(optax.adam(0.1).init, params))
    Account(parameters=60, vocabulary=84, bases=0, moments=288, counters=4)
  """
  return _account(params, state, lambda x: x.size * x.dtype.itemsize)


def elements(params: PyTree, state: PyTree) -> Account:
  """Returns the same as `account` in elements, whatever their types.

  >>> import optax
  >>> params = {'w': jnp.zeros((3, 5), jnp.bfloat16)}
  >>> elements(params, jax.eval_shape(optax.adam(0.1).init, params)).moments
  30
  """
  return _account(params, state, lambda x: x.size)


def _account(params, state, size) -> Account:
  total = lambda leaves: sum(size(x) for x in leaves)
  weights = dict(
    zip(selection.paths(params), jax.tree.leaves(params), strict=True)
  )
  vocabulary = [w for path, w in weights.items() if in_vocabulary(path)]
  is_galore = lambda x: isinstance(x, GaloreState)
  nodes = jax.tree.leaves(state, is_leaf=is_galore)
  bases = jax.tree.leaves([n.basis for n in nodes if is_galore(n)])
  rest = jax.tree.leaves(
    [n._replace(basis=()) if is_galore(n) else n for n in nodes]
  )
  counters = [x for x in rest if _is_counter(x)]
  moments = [x for x in rest if not _is_counter(x)]
  return Account(
    parameters=total(weights.values()) - total(vocabulary),
    vocabulary=total(vocabulary),
    bases=total(bases),
    moments=total(moments),
    counters=total(counters),
  )


def in_vocabulary(path: str) -> bool:
  """Whether a weight is an embedding or a head.

  >>> in_vocabulary('lm_head/kernel'), in_vocabulary('blocks/mlp/up/kernel')
  (True, False)
  """
  return any(VOCABULARY.fullmatch(part) for part in path.split('/'))


def _is_counter(x: Any) -> bool:
  # Codes of quantized moments are integers too, but of 8 bits.
  return jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.itemsize > 1
