"""Cards that are not there: their public figures, and compiling for them.

XLA's CUDA compiler needs a description of a card (`Gpu`), not the card: its
buffer assignment says what a step allocates (`compile_step`). `make plan` runs
in an environment that has the compiler.
"""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from train.mesh import Mesh, grid
from train.plan import program

PyTree = Any


class Core(NamedTuple):
  """A streaming multiprocessor."""

  threads: int  # resident
  shared_bytes: int  # of shared memory
  fpus: int  # float32 units


CORES = {
  (8, 0): Core(threads=2048, shared_bytes=164 * 1024, fpus=64),
  (8, 6): Core(threads=1536, shared_bytes=100 * 1024, fpus=128),
  (8, 9): Core(threads=1536, shared_bytes=100 * 1024, fpus=128),
  (9, 0): Core(threads=2048, shared_bytes=228 * 1024, fpus=128),
}
"""By CUDA compute capability."""


@dataclasses.dataclass(frozen=True)
class Gpu:
  """The public figures of a card that decide what XLA emits for it."""

  name: str
  """As the vendor writes it."""
  capability: tuple[int, int]
  """CUDA compute capability."""
  cores: int
  """Streaming multiprocessors."""
  memory_bytes: int
  """Memory that the driver reports."""
  bandwidth: float
  """Bytes per second."""
  clock_ghz: float
  """Boost clock."""
  l2_bytes: int
  """Second-level cache."""
  half_flops: float
  """Flops per second of tensor cores: bfloat16 summed in float32, dense."""

  @property
  def flops(self) -> float:
    """The same of float32, which JAX has them round to 19 bits (TF32)."""
    return self.half_flops / 2

  @property
  def target_config(self) -> str:
    """XLA's description of the card, as protocol buffer text."""
    major, minor = self.capability
    core = CORES[self.capability]
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32
        shared_memory_per_block: 49152
        shared_memory_per_core: {core.shared_bytes}
        threads_per_core_limit: {core.threads}
        core_count: {self.cores} fpus_per_core: {core.fpus}
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {int(self.bandwidth)}
        l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
        device_memory_size: {self.memory_bytes}
        shared_memory_per_block_optin: {core.shared_bytes - 1024}
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 8 }}
      runtime_version {{ major: 12 minor: 9 }}
      device_description_str: "{self.name}"
    """


GPUS = {
  'rtx4090': Gpu(
    name='NVIDIA GeForce RTX 4090',
    capability=(8, 9),
    cores=128,
    memory_bytes=25_386_352_640,
    bandwidth=1008.096e9,
    clock_ghz=2.52,
    l2_bytes=72 * 2**20,
    half_flops=165.2e12,
  ),
  'rtx3090': Gpu(
    name='NVIDIA GeForce RTX 3090',
    capability=(8, 6),
    cores=82,
    memory_bytes=25_438_126_080,
    bandwidth=936.096e9,
    clock_ghz=1.695,
    l2_bytes=6 * 2**20,
    half_flops=71.0e12,
  ),
  'a100-40': Gpu(
    name='NVIDIA A100-SXM4-40GB',
    capability=(8, 0),
    cores=108,
    memory_bytes=42_405_855_232,
    bandwidth=1555.2e9,
    clock_ghz=1.41,
    l2_bytes=40 * 2**20,
    half_flops=312e12,
  ),
  'a100-80': Gpu(
    name='NVIDIA A100-SXM4-80GB',
    capability=(8, 0),
    cores=108,
    memory_bytes=85_097_971_712,
    bandwidth=2039.0e9,
    clock_ghz=1.41,
    l2_bytes=40 * 2**20,
    half_flops=312e12,
  ),
  'h100': Gpu(
    name='NVIDIA H100 80GB HBM3',
    capability=(9, 0),
    cores=132,
    memory_bytes=85_045_542_912,
    bandwidth=3352.32e9,
    clock_ghz=1.98,
    l2_bytes=50 * 2**20,
    half_flops=989.4e12,
  ),
}
"""The cards that a plan knows by name.

Source: NVIDIA's architecture white papers: Ada, Ampere GA102, A100, H100 (SXM).
"""


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


def topology_mesh(gpu: Gpu, sizes: Mesh | None = None) -> jax.sharding.Mesh:
  """Returns a mesh of absent cards, by default of one.

  Raises:
    RuntimeError: the compiler is not installed.
  """
  sizes = sizes or Mesh()
  try:
    topology = topologies.get_topology_desc(
      platform='cuda',
      topology_name='',
      target_config=gpu.target_config,
      topology=f'{sizes.size}x1x1',
    )
  except (RuntimeError, NotImplementedError, ValueError) as error:
    raise RuntimeError(
      "compiling for a GPU needs JAX's CUDA compiler, which has an environment"
      " of its own: make plan ARGS='configs/llama_7b.py'"
    ) from error
  return grid(sizes, topology.devices)


@contextlib.contextmanager
def cudnn() -> Iterator[None]:
  """Has JAX trace as where the cuDNN of `Gpu.target_config` is installed.

  XLA takes its kernels for calls whose inside it need not know, so that they
  compile without it; but JAX asks for its version before it makes one.
  """
  found = fused_attention_stablehlo.check_cudnn_version
  fused_attention_stablehlo.check_cudnn_version = lambda: 90_800
  try:
    yield
  finally:
    fused_attention_stablehlo.check_cudnn_version = found


def optimized(step: Any, *arguments: PyTree) -> str:
  """Returns the text of the program that XLA makes of a step to compile."""
  return _lowered(step, arguments).compile().as_text()


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
  lowered = _lowered(step, arguments)
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


def _lowered(step: Any, arguments: tuple[PyTree, ...]) -> jax.stages.Lowered:
  return step.trace(*arguments).lower(lowering_platforms=('cuda',))


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
    Collective(op, shape, count, program.size(shape))
    for (op, shape), count in sorted(counts.items())
  )
