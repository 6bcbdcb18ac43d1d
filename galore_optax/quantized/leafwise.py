"""The update of a quantized state, leaf after leaf and piece after piece."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax.quantized import dataflow
from galore_optax.quantized.array import (
  Quantized,
  as_rows,
  dequantize,
  quantize,
  quantize_rows,
  requantize,
  rows_shape,
)
from galore_optax.quantized.dataflow import Op, Program

# A leaf of so many elements is updated in pieces: in a loop, because only the
# temporaries of loops are sure to share memory from leaf to leaf.
DIVIDE_FROM = 2**20
# Elements of a piece: 16 MiB of float32 a moment.
PIECE_SIZE = 2**22
# Operations by which an inner can leave its state as it was.
_CHOICES = {'cond', 'select_n'}


class Slot(NamedTuple):
  """An output of the update and the input that it replaces."""

  output: int
  home: int


class Unit(NamedTuple):
  """What is updated at once: a leaf, or leaves that depend on each other."""

  ops: list[Op]
  slots: list[Slot]


def update(f: Callable, updates: Any, state: Any, params: Any) -> Any:
  """Runs an optax update function on a state with `Quantized` nodes.

  Args:
    f: `update(updates, state, params)` of a transformation that knows no
      `Quantized`.
    updates: gradients.
    state: its state, in which `Quantized` nodes stand for arrays.
    params: parameters or None.

  Returns:
    The updates, in the dtype of the gradients, and the new state.
  """
  grads, grads_def = jax.tree.flatten(updates)
  olds, state_def = jax.tree.flatten(state, is_leaf=_is_quantized)
  floats = [
    jax.eval_shape(dequantize, x) if _is_quantized(x) else x for x in olds
  ]
  program, _ = dataflow.trace(f, updates, state_def.unflatten(floats), params)
  inputs = [*grads, *olds, *jax.tree.leaves(params)]
  values = dict(zip(program.inputs, inputs, strict=True)) | program.consts
  homes = program.inputs[: len(grads) + len(olds)]
  slots = [Slot(*pair) for pair in zip(program.outputs, homes, strict=True)]
  results = _run(program, slots, values)
  news = [results[slot] for slot in slots]
  return (
    grads_def.unflatten(news[: len(grads)]),
    state_def.unflatten(news[len(grads) :]),
  )


def _is_quantized(x: Any) -> bool:
  return isinstance(x, Quantized)


def _run(
  program: Program, slots: list[Slot], values: dict[int, Any]
) -> dict[Slot, Any]:
  """The new value of every slot; `values` are the inputs and constants."""
  coded = [i for i in program.inputs if _is_quantized(values[i])]
  masks = dataflow.sources(program, coded)
  bits = {number: 1 << i for i, number in enumerate(coded)}
  reads = {s: masks[s.output] | bits.get(s.home, 0) for s in slots}
  known = _shared(program, slots, masks)
  dataflow.run(program, dataflow.needed(program, known), values)
  results, last = {}, None
  for mask in _disjoint(reads.values()):
    members = [s for s in slots if reads[s] & mask]
    ops = dataflow.needed(program, [s.output for s in members], known)
    news = _run_unit(program, Unit(ops, members), values, last)
    last = news
    results.update(zip(members, news, strict=True))
  rest = [s for s in slots if s not in results]
  ops = dataflow.needed(program, [s.output for s in rest], known)
  news = _compute(program, Unit(ops, rest), values)
  return results | dict(zip(rest, news, strict=True))


def _shared(program: Program, slots: list[Slot], masks: list[int]) -> set[int]:
  """Values that no quantized leaf has a part in, to be computed only once.

  Elementwise ones (a gradient times a clipping factor) are left out: as part
  of the unit that reads them they need no memory.
  """
  shared = set()
  for op in dataflow.needed(program, [s.output for s in slots]):
    is_array = program.avals[op.outputs[0]].shape != ()
    is_part = is_array and dataflow.is_elementwise(program, op)
    if not is_part and not any(masks[number] for number in op.outputs):
      shared.update(op.outputs)
  return shared


def _disjoint(masks: Iterable[int]) -> list[int]:
  """Joins bit sets that overlap."""
  joined = []
  for mask in masks:
    for other in [x for x in joined if x & mask]:
      joined.remove(other)
      mask |= other
    joined += [mask] if mask else []
  return joined


def _run_unit(
  program: Program, unit: Unit, values: dict[int, Any], last: Any
) -> list[Any]:
  """The new values of a unit's slots, computed after `last` is."""
  numbers = {i for op in unit.ops for i in op.inputs}
  numbers |= {i for slot in unit.slots for i in slot}
  values = {i: values[i] for i in numbers if i in values}
  if last is not None:
    codes = {i: x for i, x in values.items() if _is_quantized(x)}
    # Without it the compiler may dequantize every leaf at the start.
    codes, _ = jax.lax.optimization_barrier((codes, last))
    values |= codes
  if _is_divisible(program, unit, values):
    return _compute_in_pieces(program, unit, values)
  return _compute(program, unit, values)


def _compute(
  program: Program,
  unit: Unit,
  values: dict[int, Any],
  shape: tuple[int, ...] | None = None,
) -> list[Any]:
  """The new values of a unit's slots; `shape` is that of a piece, if any."""
  floats = {
    i: dequantize(x) if _is_quantized(x) else x for i, x in values.items()
  }
  after = dict(floats)
  dataflow.run(program, unit.ops, after, shape)
  may_skip = any(op.eqn.primitive.name in _CHOICES for op in unit.ops)
  store = quantize if shape is None else quantize_rows

  def finish(slot):
    old, new = values[slot.home], after[slot.output]
    if not _is_quantized(old):
      return jnp.asarray(new, jax.typeof(old).dtype)
    if may_skip:
      return requantize(new, floats[slot.home], old)
    return store(new, code=old.code, block_size=old.block_size)

  return [
    values[slot.home] if slot.output == slot.home else finish(slot)
    for slot in unit.slots
  ]


def _is_divisible(program: Program, unit: Unit, values: dict[int, Any]) -> bool:
  """Whether a unit is one large leaf whose elements ignore each other."""
  numbers = {i for op in unit.ops for i in op.inputs + op.outputs}
  numbers |= {i for slot in unit.slots for i in slot}
  shapes = {program.avals[i].shape for i in numbers} - {()}
  if len(shapes) > 1 or math.prod(min(shapes)) < DIVIDE_FROM:
    return False
  codes = next(x for x in values.values() if _is_quantized(x))
  if rows_shape(codes)[0] < 2:
    return False
  # A loop over a sharded axis would gather it on every device.
  meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(values)]
  is_local = all(mesh.size <= 1 for mesh in meshes)
  return is_local and all(
    dataflow.is_elementwise(program, op) for op in unit.ops
  )


def _compute_in_pieces(
  program: Program, unit: Unit, values: dict[int, Any]
) -> list[Any]:
  """As `_compute`, a few rows at a time, written where the old values were."""
  codes = next(x for x in values.values() if _is_quantized(x))
  num_rows, num_columns = rows_shape(codes)
  is_array = lambda i: program.avals[i].shape != ()

  def view(x):
    if _is_quantized(x):
      return as_rows(x)
    return jnp.reshape(x, (num_rows, num_columns))

  views = {i: view(x) if is_array(i) else x for i, x in values.items()}
  homes = [slot.home for slot in unit.slots]
  size = _piece_size(num_rows, num_columns)

  def compute(start, size, news):
    now = views | dict(zip(homes, news, strict=True))
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
    parts = {
      i: jax.tree.map(cut, x) if is_array(i) else x for i, x in now.items()
    }
    return _compute(program, unit, parts, (size, num_columns))

  # A piece is written before the next one is read: with both in one step the
  # compiler copies the whole array to keep the old values readable.
  def body(i, carry):
    news, last = carry
    news = _paste(news, last, jnp.maximum(i - 1, 0) * size)
    return news, compute(i * size, size, news)

  news = [views[home] for home in homes]
  count = num_rows // size
  first = jax.tree.map(lambda x: x[:size], news)
  news, last = jax.lax.fori_loop(0, count, body, (news, first))
  news = _paste(news, last, (count - 1) * size)
  if num_rows % size:
    start = count * size
    news = _paste(news, compute(start, num_rows - start, news), start)
  return [
    _unview(new, values[home]) for home, new in zip(homes, news, strict=True)
  ]


def _paste(arrays: Any, rows: Any, start: Any) -> Any:
  paste = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)
  return jax.tree.map(paste, arrays, rows)


def _piece_size(num_rows: int, num_columns: int) -> int:
  """Rows of a piece: at least two pieces, if possible equal ones."""
  limit = max(1, min(num_rows // 2, PIECE_SIZE // num_columns))
  for size in range(limit, limit // 4, -1):
    if num_rows % size == 0:
      return size
  return limit


def _unview(rows: Any, like: Any) -> Any:
  leaves = zip(jax.tree.leaves(rows), jax.tree.leaves(like), strict=True)
  shaped = [x.reshape(old.shape) for x, old in leaves]
  return jax.tree.unflatten(jax.tree.structure(like), shaped)
