"""Reads the kernels of a program from XLA's text, and what each one costs.

XLA's own cost analysis counts the body of a loop once, and it is not available
for programs that are compiled for an absent GPU. `kernels` reads the text of
the optimized program instead, and counts a kernel in a loop once per iteration.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Kernel(NamedTuple):
  """An instruction that runs as a kernel of its own."""

  name: str
  """XLA's name of the instruction."""
  op: str
  """XLA's operation: 'fusion', 'copy', 'custom-call', ..."""
  parts: frozenset[str]
  """The operations that are fused into the kernel."""
  shape: str
  """XLA's shape of the result."""
  half_flops: float
  """Flops of matmuls of 16-bit numbers, in one launch."""
  flops: float
  """All other flops, in one launch."""
  bytes: int
  """Bytes read and written, in one launch."""
  times: int
  """Number of launches."""


class Instruction(NamedTuple):
  """An instruction, parsed from one line of the program."""

  name: str
  """XLA's name of the instruction."""
  op: str
  """XLA's operation."""
  shape: str
  """XLA's shape of the result. A tuple of shapes is in parentheses."""
  operands: tuple[str, ...]
  """Names of the operands. A parameter has its number instead."""
  rest: str
  """The rest of the line: the attributes."""
  is_root: bool
  """Whether its result is the result of the computation."""


Computation = dict[str, Instruction]
Program = dict[str, Computation]
Choose = Callable[..., tuple[Kernel, ...]]

VIEWS = frozenset(('bitcast', 'reshape', 'get-tuple-element'))
"""Operations that return their operand's memory under another shape or name."""

FREE = VIEWS | {
  'parameter',
  'constant',
  'tuple',
  'after-all',
  'opt-barrier',
  'partition-id',
  'replica-id',
  'domain',
  'add-dependency',
}
"""Operations that launch no kernel. The operations '*-done', which end an
asynchronous operation, launch none either."""

ARITHMETIC = {
  'abs',
  'add',
  'atan2',
  'cbrt',
  'ceil',
  'clamp',
  'cosine',
  'divide',
  'erf',
  'exponential',
  'exponential-minus-one',
  'floor',
  'log',
  'log-plus-one',
  'logistic',
  'maximum',
  'minimum',
  'multiply',
  'negate',
  'power',
  'remainder',
  'round-nearest-afz',
  'round-nearest-even',
  'rsqrt',
  'sign',
  'sine',
  'sqrt',
  'subtract',
  'tanh',
}
"""Operations that cost one flop per element of the result."""

SLICES = ('dynamic-slice', 'slice', 'gather')
"""Operations that read only as many bytes as they return."""

WRITES = {'dynamic-update-slice': 1, 'scatter': 2}
"""Operations that write in place. The value is the index of the operand that
they write."""

_ARRAY = re.compile(r'([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_HEADER = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r'(?:calls|to_apply)=%?([\w.\-]+)')
# A training step runs its update in this scope, if its gradients are finite.
_GATE = 'if_finite/cond"'
_BRANCHES = re.compile(
  r'(?:true_computation|false_computation)=%?([\w.\-]+)'
  r'|branch_computations=\{([^}]*)\}'
)


def kernels(text: str, *, choose: Choose = min) -> tuple[Kernel, ...]:
  """Returns the kernels that a program runs.

  In each conditional, only the branch that moves the fewest bytes is counted.
  In an optimizer's update that is the branch without a refresh. The conditional
  that skips a step with non-finite gradients is an exception: its update is
  counted. A loop of unknown length counts as one iteration.

  Args:
    text: text of the optimized program: `jax.stages.Compiled.as_text()`.
    choose: chooses the branch. `max` counts the branch that moves the most
      bytes.
  """
  program, entry = parse(text)
  return tuple(_run(program, entry, 1, choose))


def parse(text: str) -> tuple[Program, str]:
  """Returns the computations of a program by name, and the entry's name."""
  program: Program = {}
  body: Computation = {}
  entry = ''
  for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
    header = _HEADER.match(line)
    if header:
      body = {}
      program[header[1]] = body
      entry = header[1] if line.startswith('ENTRY') else entry
    elif line.startswith('  ') and ' = ' in line:
      instruction = _instruction(line)
      body[instruction.name] = instruction
  return program, entry


def _instruction(line: str) -> Instruction:
  """Parses a line of the form `%name = shape op(operands), attributes`."""
  head, rest = line.strip().split(' = ', 1)
  end = _closing(rest) + 1 if rest.startswith('(') else rest.index(' ')
  shape = rest[:end]
  rest = rest[end:].lstrip()
  op, rest = rest.split('(', 1)
  end = _closing('(' + rest) - 1
  operands = re.findall(r'%([\w.\-]+)', rest[:end]) or [rest[:end]]
  name = head.removeprefix('ROOT ').removeprefix('%')
  is_root = head.startswith('ROOT ')
  return Instruction(name, op, shape, tuple(operands), rest[end:], is_root)


def _closing(text: str) -> int:
  """Returns the index of the parenthesis that closes the one at index 0.

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
  """Yields the kernels that a computation runs, each with its launch count.

  Args:
    program: all computations, by name.
    name: of the computation.
    times: how often the computation runs.
    choose: chooses the branch of a conditional.
  """
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
  """Returns the bytes that kernels read and write in all their launches."""
  return sum(kernel.bytes * kernel.times for kernel in kernels)


def _inside(
  program: Program, body: Computation, x: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
  """Yields the operations of a kernel, each with the computation it is in."""
  yield body, x
  called = _CALLED.search(x.rest)
  if x.op == 'fusion' and called:
    body = program[called[1]]
    for y in body.values():
      yield from _inside(program, body, y)


def _flops(body: Computation, x: Instruction) -> tuple[float, float]:
  """Returns the flops of an operation: of 16-bit matmuls, and all others."""
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
  """Returns the flops of a matmul or attention: two per multiply-add."""
  if x.op == 'custom-call' and '"__cudnn$fmha' in x.rest:
    # The forward pass computes Q K^T and P V. The backward pass computes five
    # products: P again, dV, dP, dQ and dK. The kernel skips the half of the
    # scores that is masked, so two flops per multiply-add become one per score.
    dims = re.search(r'"intermediate_tensor_shape".*?\[([^\]]*)\]', x.rest)
    assert dims
    scores = math.prod(int(d) for d in re.findall(r'\d+', dims[1]))
    _, sizes = arrays(body[x.operands[0]].shape)[0]
    return (5 if 'Backward"' in x.rest else 2) * scores * sizes[-1]
  is_call = x.op == 'custom-call' and re.search(r'"__(cublas|onednn)\$', x.rest)
  if x.op != 'dot' and not is_call:
    return 0
  _, sizes = arrays(body[x.operands[0]].shape)[0]
  contracted = re.search(
    r'lhs_contracting_(?:dims=\{|dimensions":\[)([^}\]]*)', x.rest
  )
  # A oneDNN call does not list its contracted axes: it contracts the last axis.
  axes = re.findall(r'\d+', contracted[1]) if contracted else [len(sizes) - 1]
  _, result = arrays(x.shape)[0]
  return 2 * math.prod(result) * math.prod(sizes[int(i)] for i in axes)


def _bytes(program: Program, body: Computation, x: Instruction) -> int:
  """Returns the bytes that a kernel reads and writes."""
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
  """Returns the bytes that a fusion reads of its parameter `x`."""
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
  """Returns the bytes that a fusion with the root `x` writes."""
  if x.op == 'tuple':
    return sum(_written(body, body[name]) for name in x.operands)
  if x.op in VIEWS:
    return _written(body, body[x.operands[0]])
  if x.op in WRITES:
    return size(body[x.operands[WRITES[x.op]]].shape)
  return size(x.shape)


def arrays(shape: str) -> list[tuple[str, list[int]]]:
  """Returns the type and sizes of an array, or of each array of a tuple.

  >>> arrays('(f32[2,3]{1,0}, s32[])')
  [('f32', [2, 3]), ('s32', [])]
  """
  return [
    (dtype, [int(d) for d in dims.split(',') if d])
    for dtype, dims in _ARRAY.findall(shape)
  ]


def elements(shape: str) -> int:
  """Returns the number of elements of an array or a tuple of arrays.

  >>> elements('(f32[2,3]{1,0}, s32[])')
  7
  """
  return sum(math.prod(sizes) for _, sizes in arrays(shape))


def size(shape: str) -> int:
  """Returns the bytes of an array or a tuple of arrays.

  >>> size('(bf16[2,3]{1,0}, pred[5], s4[4])')
  19
  """
  return sum(
    math.prod(sizes) * _bits(dtype) // 8 for dtype, sizes in arrays(shape)
  )


def _bits(dtype: str) -> int:
  """Returns the number of bits of an element."""
  return 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
