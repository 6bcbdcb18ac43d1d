"""A traced function as a flat list of operations that can be reordered.

An optimizer maps whole trees, yet hardly any operation of it reads more than
one leaf. `Program` shows which, so that a caller can run the operations leaf
by leaf, or on a few rows of a leaf: the very operations of the function, in
another order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

# Primitives that call another program once, with their own operands.
_CALLS = {'jit', 'pjit', 'closed_call', 'custom_jvp_call'}

# Out[i] depends on in[i] of each operand alone; operands that are scalars are
# broadcast. A primitive that is missing here costs memory, never exactness.
_ELEMENTWISE = frozenset(
  """
  abs add and cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2
  expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul
  ne neg nextafter not optimization_barrier or pow reduce_precision rem round
  rsqrt select_n sign sin sqrt square sub tanh xor
  """.split()
)


class Op(NamedTuple):
  """One primitive applied to numbered values."""

  eqn: JaxprEqn
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


class Program(NamedTuple):
  """A function as operations in order; values are numbers into `avals`."""

  ops: list[Op]
  """Calls to inner programs are inlined."""
  avals: list[Any]
  """Shape and dtype of each value."""
  consts: dict[int, Any]
  """Literals and captured arrays."""
  inputs: list[int]
  """The leaves of the arguments."""
  outputs: list[int]
  """The leaves of the result."""


def trace(f: Callable, *args: Any) -> tuple[Program, Any]:
  """Traces f; returns the program and the structure of its result."""
  closed, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
  return _flatten(closed), jax.tree.structure(shapes)


def _flatten(closed: ClosedJaxpr) -> Program:
  program = Program([], [], {}, [], [])
  program.inputs.extend(_new(program, v.aval) for v in closed.jaxpr.invars)
  program.outputs.extend(_inline(program, closed, program.inputs))
  return program


def _new(program: Program, aval: Any) -> int:
  program.avals.append(aval)
  return len(program.avals) - 1


def _inline(
  program: Program, closed: ClosedJaxpr, arguments: Sequence[int]
) -> list[int]:
  """Appends the operations of `closed`; returns its outputs."""

  def constant(aval, value):
    number = _new(program, aval)
    program.consts[number] = value
    return number

  numbers = dict(zip(closed.jaxpr.invars, arguments, strict=True))
  for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
    numbers[var] = constant(var.aval, value)

  def read(atom):
    if isinstance(atom, Literal):
      return constant(atom.aval, atom.val)
    return numbers[atom]

  for eqn in closed.jaxpr.eqns:
    inputs = tuple(map(read, eqn.invars))
    if eqn.primitive.name in _CALLS:
      params = eqn.params
      called = params['jaxpr'] if 'jaxpr' in params else params['call_jaxpr']
      outputs = _inline(program, called, inputs)
    else:
      outputs = [_new(program, v.aval) for v in eqn.outvars]
      program.ops.append(Op(eqn, inputs, tuple(outputs)))
    numbers.update(zip(eqn.outvars, outputs, strict=True))
  return [read(atom) for atom in closed.jaxpr.outvars]


def needed(
  program: Program, outputs: Iterable[int], known: Iterable[int] = ()
) -> list[Op]:
  """The operations that compute `outputs` from inputs and known values."""
  wanted, known, ops = set(outputs), set(known), []
  for op in reversed(program.ops):
    if wanted & (set(op.outputs) - known):
      ops.append(op)
      wanted.update(op.inputs)
  return ops[::-1]


def sources(program: Program, leaves: Sequence[int]) -> list[int]:
  """For each value, which leaves it depends on: bit i is `leaves[i]`."""
  masks = [0] * len(program.avals)
  for bit, leaf in enumerate(leaves):
    masks[leaf] |= 1 << bit
  for op in program.ops:
    mask = 0
    for number in op.inputs:
      mask |= masks[number]
    for number in op.outputs:
      masks[number] |= mask
  return masks


def is_broadcast(program: Program, op: Op) -> bool:
  """Whether `op` fills an array with a scalar."""
  is_fill = op.eqn.primitive.name == 'broadcast_in_dim'
  return is_fill and not program.avals[op.inputs[0]].shape


def is_elementwise(program: Program, op: Op) -> bool:
  """Whether `op` can be run on any part of an array."""
  shapes = {program.avals[number].shape for number in op.inputs + op.outputs}
  same = len(shapes - {()}) <= 1
  named = op.eqn.primitive.name in _ELEMENTWISE
  return same and (named or is_broadcast(program, op))


def fill_values(program: Program) -> list[Any]:
  """Per output, the number that fills it whatever the inputs, or None."""
  fills = dict(program.consts)
  for op in program.ops:
    if is_broadcast(program, op) and op.inputs[0] in fills:
      fills[op.outputs[0]] = fills[op.inputs[0]]
  scalar = lambda x: x if x is not None and jnp.ndim(x) == 0 else None
  return [scalar(fills.get(number)) for number in program.outputs]


# Not negative whatever the operands, or if all (any, one) of them are not.
_ALWAYS = {'abs', 'square', 'exp', 'exp2', 'sqrt', 'rsqrt', 'logistic'}
_IF_ALL = set(
  """
  add broadcast_in_dim ceil concatenate convert_element_type copy cbrt div
  dynamic_slice expand_dims floor integer_pow min mul pow reduce_max reduce_min
  reduce_precision reduce_sum reshape round slice squeeze transpose
  """.split()
)
_SIGNED_ARITHMETIC = {'neg', 'mul', 'div', 'sign'}


def _is_nonnegative(op: Op, known: set[int], is_setting: bool) -> bool:
  name, inputs = op.eqn.primitive.name, op.inputs
  if name in _ALWAYS:
    return True
  if name == 'mul' and inputs[0] == inputs[1]:
    return True
  if name == 'integer_pow' and op.eqn.params['y'] % 2 == 0:
    return True
  if name in ('max', 'clamp'):
    return inputs[0] in known or (name == 'max' and inputs[1] in known)
  if name == 'select_n':
    return known.issuperset(inputs[1:])
  if is_setting and name not in _SIGNED_ARITHMETIC:
    return True
  return name in _IF_ALL and known.issuperset(inputs)


def _of_branches(op: Op, known: set[int]) -> list[int]:
  """The outputs of a conditional that no branch makes negative."""
  operands = op.inputs[1:]
  proven = set(op.outputs)
  for closed in op.eqn.params['branches']:
    branch = _flatten(closed)
    pairs = zip(branch.inputs, operands, strict=True)
    inside = nonnegative(branch, [i for i, outer in pairs if outer in known])
    pairs = zip(branch.outputs, op.outputs, strict=True)
    proven &= {outer for i, outer in pairs if i in inside}
  return sorted(proven)


def nonnegative(program: Program, assumed: Iterable[int]) -> set[int]:
  """The values that cannot be negative if the `assumed` inputs are not.

  Scalar inputs, captured scalars that are traced, and scalars made from them
  alone by anything but a change of sign, are taken for settings (1 - b2) and
  count as not negative.
  """
  scalars = {i for i in program.inputs if not program.avals[i].shape}
  arrays = [i for i in program.inputs if i not in scalars]
  masks = sources(program, arrays)
  known = set(assumed) | scalars
  for number, value in program.consts.items():
    if jnp.ndim(value) == 0 and (isinstance(value, Tracer) or value >= 0):
      known.add(number)
  for op in program.ops:
    is_scalar = not program.avals[op.outputs[0]].shape
    is_setting = is_scalar and not masks[op.outputs[0]]
    if op.eqn.primitive.name == 'cond':
      known.update(_of_branches(op, known))
    elif _is_nonnegative(op, known, is_setting):
      known.update(op.outputs)
  return known


def run(
  program: Program,
  ops: Iterable[Op],
  values: dict[int, Any],
  shape: tuple[int, ...] | None = None,
) -> None:
  """Runs operations on `values`, which receives the results.

  Args:
    program: what the operations are part of.
    ops: operations whose inputs are in `values` or computed on the way.
    values: arrays by number.
    shape: where the operations are elementwise and `values` holds parts of
      the arrays, the shape of those parts.
  """
  for op in ops:
    inputs = [values[number] for number in op.inputs]
    is_part = shape is not None and program.avals[op.outputs[0]].shape != ()
    if is_part and is_broadcast(program, op):
      outputs = [jnp.broadcast_to(inputs[0], shape)]
    else:
      outputs = _evaluate(op.eqn, inputs)
    values.update(zip(op.outputs, outputs, strict=True))


def _evaluate(eqn: JaxprEqn, inputs: list[Any]) -> list[Any]:
  params, functions = eqn.primitive.get_bind_params(eqn.params), ()
  if isinstance(params, tuple):  # As JAX returned it until 2025.
    functions, params = params
  outputs = eqn.primitive.bind(*functions, *inputs, **params)
  return outputs if eqn.primitive.multiple_results else [outputs]
