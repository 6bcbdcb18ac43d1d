"""Public specifications of GPUs, and compilation for GPUs that are absent.

XLA's CUDA compiler needs a description of a GPU (`Gpu`), but not the GPU. Its
buffer assignment lists the memory that a step would allocate (`compile_step`).
The compiler is installed in the environment that `make plan` uses.
"""

import contextlib
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

from train.engine.mesh import Mesh, grid
from train.plan import program

PyTree = Any


class Core(NamedTuple):
  """Limits of a streaming multiprocessor."""

  threads: int
  """Largest number of resident threads."""
  shared_bytes: int
  """Bytes of shared memory."""
  fpus: int
  """Number of float32 units."""


CORES = {
  (8, 0): Core(threads=2048, shared_bytes=164 * 1024, fpus=64),
  (8, 6): Core(threads=1536, shared_bytes=100 * 1024, fpus=128),
  (8, 9): Core(threads=1536, shared_bytes=100 * 1024, fpus=128),
  (9, 0): Core(threads=2048, shared_bytes=228 * 1024, fpus=128),
}
"""Streaming multiprocessors, by CUDA compute capability."""


@dataclasses.dataclass(frozen=True)
class Gpu:
  """Public specifications of a GPU, which decide the code that XLA emits."""

  name: str
  """The vendor's name for it."""
  capability: tuple[int, int]
  """CUDA compute capability."""
  cores: int
  """Number of streaming multiprocessors."""
  memory_bytes: int
  """Memory that the driver reports, in bytes."""
  bandwidth: float
  """Memory bandwidth, in bytes per second."""
  clock_ghz: float
  """Boost clock, in GHz."""
  l2_bytes: int
  """Size of the second-level cache, in bytes."""
  half_flops: float
  """Flops per second of dense bfloat16 matmuls on tensor cores, accumulated in
  float32."""

  @property
  def flops(self) -> float:
    """Flops per second of float32 matmuls, which JAX computes in TF32."""
    return self.half_flops / 2

  @property
  def target_config(self) -> str:
    """XLA's description of the GPU, as protocol buffer text."""
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


GpuName: TypeAlias = Literal['rtx4090', 'rtx3090', 'a100-40', 'a100-80', 'h100']
"""The keys of `GPUS`, for the command line."""

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
"""The GPUs that a plan can name, by short name.

Source: NVIDIA's architecture white papers: Ada, Ampere GA102, A100, H100 (SXM).
"""


class Buffer(NamedTuple):
  """A piece of the temporary memory, and the arrays that share it."""

  bytes: int
  """Size of the piece."""
  shapes: tuple[str, ...]
  """XLA's shapes of its largest arrays, which use it one after another."""


class Collective(NamedTuple):
  """Collective operations of one kind and shape."""

  op: str
  """XLA's name of the operation, such as 'all-reduce'."""
  shape: str
  """XLA's shape of the result on one device."""
  count: int
  """Number of instructions in the program. An instruction in a loop counts
  once."""
  bytes: int
  """Size of one result."""


class Compiled(NamedTuple):
  """XLA's buffer assignment for one device, and its collective operations."""

  argument_bytes: int
  """Size of the arguments."""
  output_bytes: int
  """Size of the outputs."""
  alias_bytes: int
  """Size of the outputs that are written in place, into donated arguments."""
  temp_bytes: int
  """Size of the temporary memory."""
  program_bytes: int
  """Length of the optimized program's text, a measure of the size of its
  code."""
  buffers: tuple[Buffer, ...]
  """The largest pieces of the temporary memory, largest first."""
  collectives: tuple[Collective, ...]
  """Collective operations of the program."""

  @property
  def total_bytes(self) -> int:
    """Peak of the memory that the step allocates through XLA."""
    held = self.argument_bytes + self.output_bytes - self.alias_bytes
    return held + self.temp_bytes


def topology_mesh(gpu: Gpu, sizes: Mesh | None = None) -> jax.sharding.Mesh:
  """Returns a mesh of absent GPUs; its default size is one.

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
  """Makes JAX trace as if the cuDNN of `Gpu.target_config` were installed.

  Before JAX emits a call of a cuDNN kernel, it checks the version of cuDNN,
  which may be absent here. This context replaces that check. XLA compiles such
  a call without cuDNN, because the kernel is opaque to it.
  """

  def version() -> int:
    return 90_800

  found = fused_attention_stablehlo.check_cudnn_version
  fused_attention_stablehlo.check_cudnn_version = version
  try:
    yield
  finally:
    fused_attention_stablehlo.check_cudnn_version = found


def optimized(step: Any, *arguments: PyTree) -> str:
  """Compiles a step and returns the text of XLA's optimized program."""
  return _text(_lowered(step, arguments).compile())


def compile_step(step: Any, *arguments: PyTree) -> Compiled:
  """Compiles a step for the GPUs that its arguments are placed on.

  Nothing is allocated: the arguments are `jax.ShapeDtypeStruct`s with shardings
  on a mesh of `topology_mesh`.

  Args:
    step: a jitted function. Donated arguments are reused for outputs.
    *arguments: its abstract arguments.

  Returns:
    The memory that the program would allocate on each device.
  """
  lowered = _lowered(step, arguments)
  with tempfile.TemporaryDirectory() as folder:
    compiled = lowered.compile(compiler_options={'xla_dump_to': folder})
    buffers = _largest_buffers(pathlib.Path(folder))
  memory = compiled.memory_analysis()
  assert memory is not None  # XLA's GPU compiler always returns an analysis.
  text = _text(compiled)
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


def _text(compiled: jax.stages.Compiled) -> str:
  text = compiled.as_text()
  assert text is not None  # XLA's GPU compiler always returns the text.
  return text


def _largest_buffers(
  folder: pathlib.Path, count: int = 10
) -> tuple[Buffer, ...]:
  """Reads the largest buffers from the buffer assignment that XLA dumped.

  Arrays at the same offset of the temporary memory share one buffer.
  """
  name = '*gpu_after_optimizations-buffer-assignment.txt'
  (path,) = folder.glob(name)
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
