"""Counts the flops that a transformer needs for an update.

A multiply-add counts as two flops. Recomputation that saves memory does not
count, nor does the optimizer.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import flax.traverse_util
import jax

PyTree: TypeAlias = Any


def transformer(
  params: PyTree,
  trained: PyTree,
  *,
  rows: int,
  length: int,
  seen: int,
  width: int,
  num_layers: int,
  is_product: Callable[[str], bool],
) -> float:
  """Returns the flops of an update of a transformer.

  A token is multiplied with N weights in the forward pass (2 N flops). In the
  backward pass its gradient is multiplied with these weights (2 N), and with
  its activations for the N_t trained weights (2 N_t). If all weights are
  trained, these are 6 N flops. Attention over a row adds 12 L S D for each
  token, where S is the number of tokens that it attends to and D is the width
  of all heads: two products in the forward pass and twice as many in the
  backward pass, masked ones included.

  Args:
    params: the parameters or their shapes, with low-rank factors. A leaf with
      three axes or more is a stack of matrices, which counts.
    trained: a tree of bools: whether each parameter is trained.
    rows: number of rows in the batch.
    length: number of tokens in a row.
    seen: S, the number of tokens that a token attends to.
    width: D, the width of all heads.
    num_layers: L, the number of layers.
    is_product: whether the leaf of a path that is not a stack is multiplied
      with the tokens. Embeddings that are looked up are not.

  References:
    Chowdhery et al., `PaLM <https://arxiv.org/abs/2204.02311>`_, 2022.
  """
  flat: dict[str, Any] = flax.traverse_util.flatten_dict(params, sep='/')
  moves: dict[str, Any] = flax.traverse_util.flatten_dict(trained, sep='/')
  rate = 12 * num_layers * seen * width
  for path, w in flat.items():
    if w.ndim > 2 or is_product(path):
      rate += (6 if moves[path] else 4) * w.size
  return float(rows * length * rate)


def element_bytes(dtype: str) -> int:
  """Returns the bytes of a number of a data type.

  >>> element_bytes('bfloat16')
  2
  """
  return jax.numpy.dtype(dtype).itemsize
