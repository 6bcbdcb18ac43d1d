"""This module holds the public figures of some GPUs, as XLA wants them."""

import dataclasses
from typing import NamedTuple


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
  ),
  'rtx3090': Gpu(
    name='NVIDIA GeForce RTX 3090',
    capability=(8, 6),
    cores=82,
    memory_bytes=25_438_126_080,
    bandwidth=936.096e9,
    clock_ghz=1.695,
    l2_bytes=6 * 2**20,
  ),
  'a100-40': Gpu(
    name='NVIDIA A100-SXM4-40GB',
    capability=(8, 0),
    cores=108,
    memory_bytes=42_405_855_232,
    bandwidth=1555.2e9,
    clock_ghz=1.41,
    l2_bytes=40 * 2**20,
  ),
  'a100-80': Gpu(
    name='NVIDIA A100-SXM4-80GB',
    capability=(8, 0),
    cores=108,
    memory_bytes=85_097_971_712,
    bandwidth=2039.0e9,
    clock_ghz=1.41,
    l2_bytes=40 * 2**20,
  ),
  'h100': Gpu(
    name='NVIDIA H100 80GB HBM3',
    capability=(9, 0),
    cores=132,
    memory_bytes=85_045_542_912,
    bandwidth=3352.32e9,
    clock_ghz=1.98,
    l2_bytes=50 * 2**20,
  ),
}
"""The cards that a plan knows by name."""
