"""How weights are stored between steps.

A stored weight is an array or a `Quantized`; the model computes with arrays.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax.accumulation import Accumulating, accumulating
from galore_optax.quantized.array import Quantized, dequantize, quantize_linear
from galore_optax.quantized.rounding import apply_updates_stochastic
from galore_optax.subspace.lazy import LazyBasis
from galore_optax.transform import GaloreState

PyTree = Any
Stored = Any


def is_stored(x: Any) -> bool:
  """Whether a node of a tree is one stored weight, though no array."""
  return isinstance(x, Quantized)


class Weights(NamedTuple):
  """How one weight is stored."""

  store: Callable[[jax.Array], Stored]
  """An initial weight, stored."""
  read: Callable[[Stored], jax.Array]
  """The array that the model computes with."""
  write: Callable[[Stored, jax.Array, jax.Array], Stored]
  """The stored weight plus an update; the key is for stochastic rounding."""


ARRAYS = Weights(
  store=lambda weight: weight,
  read=lambda stored: stored,
  write=lambda stored, update, key: optax.apply_updates(stored, update),
)
"""Weights are kept as they are, sums rounded to nearest."""

ROUNDED = Weights(
  store=lambda weight: weight,
  read=lambda stored: stored,
  write=apply_updates_stochastic,
)
"""bfloat16 weights whose sums are rounded stochastically."""


def quantized(
  *, bits: Literal[4, 8] = 8, group: int = 256, dtype: Any
) -> Weights:
  """Weights in blocks of integers, sums rounded stochastically.

  Weights of fewer than two axes beyond a stack's (norms, biases) stay arrays.

  Args:
    bits: of an element, 8 or 4.
    group: elements that share a float32 scale.
    dtype: of the arrays that the model computes with.

  Example:
    >>> weights = quantized(dtype=jnp.bfloat16)
    >>> stored = weights.store(jnp.ones((2, 4, 256)))
    >>> stored.nbytes, weights.read(stored).dtype
    (2080, dtype(bfloat16))
  """

  def store(weight):
    return quantize_linear(weight, bits=bits, group=group)

  def read(stored):
    if is_stored(stored):
      return dequantize(stored).astype(dtype)
    return stored

  def write(stored, update, key):
    if not is_stored(stored):
      return apply_updates_stochastic(stored, update, key)
    total = dequantize(stored) + update.astype(jnp.float32)
    return quantize_linear(total, bits=bits, group=group, key=key)

  return Weights(store, read, write)


def quantize_bases(
  tx: optax.GradientTransformation, *, bits: Literal[4, 8] = 4, group: int = 256
) -> optax.GradientTransformationExtraArgs:
  """Stores the bases of every `galore` in a transformation in few bits.

  A basis is quantized when it is found, and not again until the next one. It
  is an array only while its weight is updated: this is for a layer-wise step,
  where that is one weight at a time. Indices of coordinates, and how long a
  `Lazy` matrix waits, stay as they are.

  Args:
    tx: what holds a `galore`.
    bits: of an element, 8 or 4.
    group: elements that share a float32 scale.

  Example:
    >>> from galore_optax import galore, quantize_bases
    >>> tx = quantize_bases(galore(optax.sgd(0.1), rank=2))
    >>> tx.init({'w': jnp.ones((512, 512))}).basis['w'].nbytes
    528
  """
  tx = optax.with_extra_args_support(tx)

  def pack(basis):
    if not jnp.issubdtype(basis.dtype, jnp.floating):
      return basis
    return quantize_linear(basis, bits=bits, group=group)

  def init_fn(params):
    return _map_bases(lambda b: jax.tree.map(pack, b), tx.init(params))

  def unpacked(updates, state):
    """Returns the state with bases as arrays, in the gradients' dtypes."""
    grads, treedef = jax.tree.flatten(updates)

    def unpack(basis):
      nodes = zip(treedef.flatten_up_to(basis), grads, strict=True)
      read = lambda q, g: dequantize(q).astype(g.dtype) if is_stored(q) else q
      dense = [
        jax.tree.map(lambda q, g=g: read(q, g), node, is_leaf=is_stored)
        for node, g in nodes
      ]
      return treedef.unflatten(dense)

    return _map_bases(unpack, state)

  def repacked(new, dense, state):
    """Returns the new state, its bases packed where they are other ones."""

    def repack(old, before, basis):
      changed = jnp.any(basis != before)
      return jax.tree.map(
        lambda a, b: jnp.where(changed, a, b), pack(basis), old
      )

    triples = zip(_bases(state), _bases(dense), _bases(new), strict=True)
    packed = [
      jax.tree.map(repack, *triple, is_leaf=is_stored) for triple in triples
    ]
    return _replace_bases(new, packed)

  def update_fn(updates, state, params=None, **extra_args):
    dense = unpacked(updates, state)
    updates, new = tx.update(updates, dense, params, **extra_args)
    return updates, repacked(new, dense, state)

  new = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  if not isinstance(tx, Accumulating):
    return new

  def begin_fn(updates, state, **extra_args):
    dense = unpacked(updates, state)
    return repacked(tx.begin(updates, dense, **extra_args), dense, state)

  def compress_fn(updates, state, **extra_args):
    return tx.compress(updates, unpacked(updates, state), **extra_args)

  return accumulating(new, begin_fn, compress_fn)


def _is_galore(x: Any) -> bool:
  return isinstance(x, GaloreState)


def _bases(state: PyTree) -> list[PyTree]:
  nodes = jax.tree.leaves(state, is_leaf=_is_galore)
  return [_vectors(node.basis) for node in nodes if _is_galore(node)]


def _replace_bases(state: PyTree, bases: list[PyTree]) -> PyTree:
  rest = iter(bases)
  return _map_bases(lambda _: next(rest), state)


def _map_bases(f: Callable[[PyTree], PyTree], state: PyTree) -> PyTree:
  def replace(x):
    if not _is_galore(x):
      return x
    return x._replace(basis=_with_vectors(x.basis, f(_vectors(x.basis))))

  return jax.tree.map(replace, state, is_leaf=_is_galore)


def _is_one(x: Any) -> bool:
  return isinstance(x, LazyBasis) or is_stored(x)


def _vectors(basis: PyTree) -> PyTree:
  """Returns the bases themselves, without what `Lazy` keeps beside them."""
  strip = lambda x: x.basis if isinstance(x, LazyBasis) else x
  return jax.tree.map(strip, basis, is_leaf=_is_one)


def _with_vectors(basis: PyTree, vectors: PyTree) -> PyTree:
  """Inverts `_vectors`, with other bases."""
  dress = lambda x, v: x._replace(basis=v) if isinstance(x, LazyBasis) else v
  return jax.tree.map(dress, basis, vectors, is_leaf=_is_one)
