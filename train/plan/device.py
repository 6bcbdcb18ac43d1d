"""This module holds compiling a step for a GPU that is not there.

XLA's CUDA compiler needs a description of the card, not the card: its buffer
assignment says what a step allocates. `pip install 'galore-optax[plan]'`
brings the compiler.
"""

import math
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from train.plan.cards import Gpu

PyTree = Any


class Buffer(NamedTuple):
  """A piece of the temporary memory and what lies in it."""

  bytes: int  # its size
  shapes: tuple[str, ...]  # XLA's shapes, as many as take turns in it


class Collective(NamedTuple):
  """Collective operations of one kind and shape."""

  op: str  # 'all-reduce', ...
  shape: str  # XLA's result shape, of one device
  count: int  # instructions in the program; one in a loop counts once
  bytes: int  # of one result


class Compiled(NamedTuple):
  """What XLA's buffer assignment says of one device."""

  argument_bytes: int
  output_bytes: int
  alias_bytes: int  # outputs that are arguments, written in place
  temp_bytes: int
  program_bytes: int  # the optimized program as text: grows with its code
  buffers: tuple[Buffer, ...]  # the largest temporaries first
  collectives: tuple[Collective, ...]

  @property
  def total_bytes(self) -> int:
    """Peak of what the step allocates through XLA."""
    held = self.argument_bytes + self.output_bytes - self.alias_bytes
    return held + self.temp_bytes


def topology_mesh(gpu: Gpu, *, devices: int = 1) -> jax.sharding.Mesh:
  """Returns a mesh of absent cards, axis 'data'.

  Raises:
    RuntimeError: the compiler is not installed.
  """
  try:
    topology = topologies.get_topology_desc(
      platform='cuda',
      topology_name='',
      target_config=gpu.target_config,
      topology=f'{devices}x1x1',
    )
  except (RuntimeError, NotImplementedError, ValueError) as error:
    raise RuntimeError(
      'compiling for a GPU needs the CUDA compiler of JAX: '
      "pip install 'galore-optax[plan]'"
    ) from error
  return jax.sharding.Mesh(np.array(topology.devices), ('data',))


def compile_step(step: Any, *arguments: PyTree) -> Compiled:
  """Compiles a step for the cards that its arguments are placed on.

  Nothing is allocated: the arguments are `jax.ShapeDtypeStruct`s with
  shardings on a mesh of `topology_mesh`.

  Args:
    step: a jitted function, donation included.
    *arguments: its abstract arguments.

  Returns:
    What the compiler would allocate on each device.
  """
  lowered = step.trace(*arguments).lower(lowering_platforms=('cuda',))
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile(compiler_options={'xla_dump_to': folder})
    buffers = _largest_buffers(pathlib.Path(folder))
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  return Compiled(
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    program_bytes=len(text),
    buffers=buffers,
    collectives=_collectives(text),
  )


def _largest_buffers(
  folder: pathlib.Path, count: int = 10
) -> tuple[Buffer, ...]:
  """Reads XLA's buffer assignment; pieces that share an offset take turns."""
  (path,) = folder.glob('*gpu_after_optimizations-buffer-assignment.txt')
  pieces: dict[int, dict[str, int]] = {}
  in_temp = False
  for line in path.read_text().splitlines():
    if line.startswith('allocation '):
      in_temp = 'preallocated-temp' in line
    value = _VALUE.match(line)
    if in_temp and value:
      size, offset, shape = value.groups()
      pieces.setdefault(int(offset), {})[shape] = int(size)
  buffers = []
  for shapes in pieces.values():
    largest = max(shapes.values())
    names = [shape for shape, size in shapes.items() if size == largest]
    buffers.append(Buffer(largest, tuple(names)))
  return tuple(sorted(buffers, key=lambda b: -b.bytes)[:count])


_VALUE = re.compile(
  r'\s*value: <\d+ \S+ @0> \(size=(\d+),offset=(\d+)\): ([a-z0-9]+\[[\d,]*\])'
)
_COLLECTIVE = re.compile(
  r' = \(?([a-z]+\d+\[[\d,]*\]).* (all-reduce|all-gather|reduce-scatter|'
  r'all-to-all|collective-permute)(?:-start)?\('
)


def _collectives(text: str) -> tuple[Collective, ...]:
  """Counts the collective operations of an optimized program."""
  counts: dict[tuple[str, str], int] = {}
  for line in text.splitlines():
    found = _COLLECTIVE.search(line)
    if found:
      shape, op = found.groups()
      counts[op, shape] = counts.get((op, shape), 0) + 1
  return tuple(
    Collective(op, shape, count, _shape_bytes(shape))
    for (op, shape), count in sorted(counts.items())
  )


def _shape_bytes(shape: str) -> int:
  """Returns the bytes of an XLA shape.

  >>> _shape_bytes('bf16[32,8]')
  512
  """
  dtype, dims = shape.rstrip(']').split('[')
  bits = 8 if dtype == 'pred' else int(re.findall(r'\d+', dtype)[0])
  return math.prod(int(d) for d in dims.split(',') if d) * bits // 8
