"""A program as XLA optimized it: the kernels that it runs, and what each costs.

XLA's own cost analysis counts the body of a loop once, and has nothing to say
of a program for a card that is not there. `kernels` reads the text of either:
what runs in a loop is taken as often as the loop goes round.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Kernel(NamedTuple):
  """An instruction that runs by itself."""

  name: str  # XLA's
  op: str  # 'fusion', 'copy', 'custom-call', ...
  parts: frozenset[str]  # the operations in it
  shape: str  # XLA's, of the result
  half_flops: float  # of products of 16-bit numbers, at a time
  flops: float  # all others
  bytes: int  # read and written, at a time
  times: int  # that it runs


class Instruction(NamedTuple):
  """A line of the program."""

  name: str
  op: str
  shape: str  # of a tuple, in parentheses
  operands: tuple[str, ...]  # names; of a parameter, its number
  rest: str  # attributes
  is_root: bool


Computation = dict[str, Instruction]
Program = dict[str, Computation]
Choose = Callable[..., tuple[Kernel, ...]]

VIEWS = frozenset(('bitcast', 'reshape', 'get-tuple-element'))
"""Operations that take no time, of an array."""

FREE = VIEWS | {
  *('parameter', 'constant', 'tuple', 'after-all', 'opt-barrier'),
  *('partition-id', 'replica-id', 'domain', 'add-dependency'),
}
"""Operations that are no kernels. What ends an asynchronous one is another."""

ARITHMETIC = {
  *('add', 'subtract', 'multiply', 'divide', 'negate', 'abs', 'sign', 'power'),
  *('maximum', 'minimum', 'clamp', 'remainder', 'floor', 'ceil', 'sqrt'),
  *('rsqrt', 'cbrt', 'exponential', 'exponential-minus-one', 'log', 'tanh'),
  *('log-plus-one', 'logistic', 'sine', 'cosine', 'erf', 'atan2'),
  *('round-nearest-even', 'round-nearest-afz'),
}
"""Operations of a flop for each element of the result."""

SLICES = ('dynamic-slice', 'slice', 'gather')
"""Operations that read as much as they return."""

WRITES = {'dynamic-update-slice': 1, 'scatter': 2}
"""Operations that write in place; the operand with what they write."""

_ARRAY = re.compile(r'([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_HEADER = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r'(?:calls|to_apply)=%?([\w.\-]+)')
# A condition of `jax.named_scope('if_finite')`, which a step meets.
_GATE = 'if_finite/cond"'
_BRANCHES = re.compile(
  r'(?:true_computation|false_computation)=%?([\w.\-]+)'
  r'|branch_computations=\{([^}]*)\}'
)


def kernels(text: str, *, choose: Choose = min) -> tuple[Kernel, ...]:
  """Returns what a program runs.

  Of a conditional it is the branch that moves fewest bytes: of an optimizer's
  update, what happens between two refreshes; of one that waits for finite
  numbers, the update. A loop of unknown length goes
  round once.

  Args:
    text: of the optimized program: `jax.stages.Compiled.as_text()`.
    choose: `max` for the branch that moves most bytes instead.
  """
  program, entry = parse(text)
  return tuple(_run(program, entry, 1, choose))


def parse(text: str) -> tuple[Program, str]:
  """Returns the computations of a program by name, and the first one's name."""
  program, entry, body = {}, '', {}
  for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
    header = _HEADER.match(line)
    if header:
      body = program[header[1]] = {}
      entry = header[1] if line.startswith('ENTRY') else entry
    elif line.startswith('  ') and ' = ' in line:
      instruction = _instruction(line)
      body[instruction.name] = instruction
  return program, entry


def _instruction(line: str) -> Instruction:
  """Reads `%name = shape op(operands), attributes`."""
  head, rest = line.strip().split(' = ', 1)
  end = _closing(rest) + 1 if rest.startswith('(') else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  op, rest = rest.split('(', 1)
  end = _closing('(' + rest) - 1
  operands = re.findall(r'%([\w.\-]+)', rest[:end]) or [rest[:end]]
  name = head.removeprefix('ROOT ').removeprefix('%')
  is_root = head.startswith('ROOT ')
  return Instruction(name, op, shape, tuple(operands), rest[end:], is_root)


def _closing(text: str) -> int:
  """Returns where the parenthesis that text begins with is closed.

  >>> _closing('(a(b)c)d')
  6
  """
  depth = 0
  for i, character in enumerate(text):
    depth += {'(': 1, ')': -1}.get(character, 0)
    if not depth:
      return i
  raise ValueError(f'no end of {text[:80]!r}')


def _run(
  program: Program, name: str, times: int, choose: Choose
) -> Iterator[Kernel]:
  """Goes through what a computation runs."""
  body = program[name]
  for x in body.values():
    called = _CALLED.search(x.rest)
    if x.op == 'while':
      trips = _TRIPS.search(x.rest)
      inner = re.search(r'body=%?([\w.\-]+)', x.rest)
      assert inner
      rounds = int(trips[1] if trips else 1)
      yield from _run(program, inner[1], times * rounds, choose)
    elif x.op == 'conditional':
      found = ' '.join(map(''.join, _BRANCHES.findall(x.rest)))
      names = re.findall(r'[\w.\-]+', found)
      branches = [tuple(_run(program, x, times, choose)) for x in names]
      pick = max if _GATE in x.rest else choose
      yield from pick(branches, key=moved)
    elif x.op in ('call', 'async-start') and called:
      yield from _run(program, called[1], times, choose)
    elif x.op not in FREE and not x.op.endswith('-done'):
      inside = tuple(_inside(program, body, x))
      flops = [_flops(around, y) for around, y in inside]
      yield Kernel(
        name=x.name,
        op=x.op,
        parts=frozenset(y.op for _, y in inside) - FREE - {'fusion'},
        shape=x.shape,
        half_flops=sum(half for half, _ in flops),
        flops=sum(other for _, other in flops),
        bytes=_bytes(program, body, x),
        times=times,
      )


def moved(kernels: Sequence[Kernel]) -> int:
  """Returns the bytes that kernels read and write."""
  return sum(kernel.bytes * kernel.times for kernel in kernels)


def _inside(
  program: Program, body: Computation, x: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
  """Goes through the operations of a kernel, each with what is around it."""
  yield body, x
  called = _CALLED.search(x.rest)
  if x.op == 'fusion' and called:
    body = program[called[1]]
    for y in body.values():
      yield from _inside(program, body, y)


def _flops(body: Computation, x: Instruction) -> tuple[float, float]:
  """Returns the flops of an operation: of 16-bit products, and all others."""
  if x.op in ARITHMETIC:
    return 0, elements(x.shape)
  if x.op == 'reduce':
    return 0, elements(body[x.operands[0]].shape)
  flops = _product_flops(body, x)
  if not flops:
    return 0, 0
  is_half = body[x.operands[0]].shape.startswith(('bf16', 'f16'))
  return (flops, 0) if is_half else (0, flops)


def _product_flops(body: Computation, x: Instruction) -> float:
  """Returns the flops of a product: two for each pair of numbers that meet."""
  if x.op == 'custom-call' and '"__cudnn$fmha' in x.rest:
    # Q K^T and P V; backward, these two of five: P again, dV, dP, dQ and dK.
    # Half of the pairs are later, and skipped.
    dims = re.search(r'"intermediate_tensor_shape".*?\[([^\]]*)\]', x.rest)
    assert dims
    scores = math.prod(int(d) for d in re.findall(r'\d+', dims[1]))
    (_, sizes), *_ = arrays(body[x.operands[0]].shape)
    return (5 if 'Backward"' in x.rest else 2) * scores * sizes[-1]
  is_call = x.op == 'custom-call' and re.search(r'"__(cublas|onednn)\$', x.rest)
  if x.op != 'dot' and not is_call:
    return 0
  (_, sizes), *_ = arrays(body[x.operands[0]].shape)
  contracted = re.search(
    r'lhs_contracting_(?:dims=\{|dimensions":\[)([^}\]]*)', x.rest
  )
  # oneDNN's has none: it is the last.
  axes = re.findall(r'\d+', contracted[1]) if contracted else [len(sizes) - 1]
  (_, result), *_ = arrays(x.shape)
  return 2 * math.prod(result) * math.prod(sizes[int(i)] for i in axes)


def _bytes(program: Program, body: Computation, x: Instruction) -> int:
  """Returns what a kernel reads and writes."""
  called = _CALLED.search(x.rest)
  if x.op == 'fusion' and called:
    inner = program[called[1]]
    read = [
      _read(program, inner, y) for y in inner.values() if y.op == 'parameter'
    ]
    root = next(y for y in inner.values() if y.is_root)
    return sum(read) + _written(inner, root)
  if x.op in SLICES:
    return 2 * size(x.shape)
  if x.op in WRITES:
    return 2 * size(body[x.operands[WRITES[x.op]]].shape)
  operands = [body[name] for name in {*x.operands} if name in body]
  return size(x.shape) + sum(size(y.shape) for y in operands)


def _read(program: Program, body: Computation, x: Instruction) -> int:
  """Returns the bytes of a parameter of a fusion that are read."""
  total = 0
  for y in body.values():
    if x.name not in y.operands:
      continue
    at = y.operands.index(x.name)
    called = _CALLED.search(y.rest)
    if y.op in VIEWS:
      total += _read(program, body, y)
    elif y.op in SLICES and at == 0:
      total += size(y.shape)
    elif y.op == 'fusion' and called:
      inner = program[called[1]]
      parameters = [z for z in inner.values() if z.op == 'parameter']
      total += sum(
        _read(program, inner, z) for z in parameters if z.operands == (f'{at}',)
      )
    elif y.op not in WRITES or at > 0:
      return size(x.shape)
  return min(total, size(x.shape))


def _written(body: Computation, x: Instruction) -> int:
  """Returns the bytes that a fusion writes which ends with x."""
  if x.op == 'tuple':
    return sum(_written(body, body[name]) for name in x.operands)
  if x.op in VIEWS:
    return _written(body, body[x.operands[0]])
  if x.op in WRITES:
    return size(body[x.operands[WRITES[x.op]]].shape)
  return size(x.shape)


def arrays(shape: str) -> list[tuple[str, list[int]]]:
  """Returns type and sizes of an array, or of each of a tuple.

  >>> arrays('(f32[2,3]{1,0}, s32[])')
  [('f32', [2, 3]), ('s32', [])]
  """
  return [
    (dtype, [int(d) for d in dims.split(',') if d])
    for dtype, dims in _ARRAY.findall(shape)
  ]


def elements(shape: str) -> int:
  """Returns the number of elements of a shape.

  >>> elements('(f32[2,3]{1,0}, s32[])')
  7
  """
  return sum(math.prod(sizes) for _, sizes in arrays(shape))


def size(shape: str) -> int:
  """Returns the bytes of a shape.

  >>> size('(bf16[2,3]{1,0}, pred[5], s4[4])')
  19
  """
  return sum(
    math.prod(sizes) * _bits(dtype) // 8 for dtype, sizes in arrays(shape)
  )


def _bits(dtype: str) -> int:
  """Returns the size of an element."""
  return 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
