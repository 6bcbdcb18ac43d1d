"""The devices, their memory, and JAX's cache of compiled programs."""

import os
import pathlib
import shutil

import jax

MEMORY_SHARE = 0.95
"""Fraction of a GPU's memory that JAX reserves; the driver needs the rest.

JAX's default of 0.75 would use only 17.7 GiB of a 24 GB card.
"""


def prepare() -> None:
  """Sets JAX's options unless the user has set them; call it first."""
  cache_compilations()
  names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
  if not any(name in os.environ for name in names):
    # JAX reads this when it makes the first array.
    os.environ[names[0]] = str(MEMORY_SHARE)


def describe() -> str:
  """Describes the devices, with advice if JAX does not use an NVIDIA card."""
  first = jax.devices()[0]
  line = f'device: {jax.device_count()} x {first.device_kind}'
  if first.platform != 'cpu' or not nvidia():
    return line
  platforms = jax.config.values['jax_platforms']
  if platforms:
    return (
      f'{line}, though an NVIDIA card is here: JAX_PLATFORMS is {platforms!r}'
    )
  return (
    f'{line}, though an NVIDIA card is here, as this JAX has no CUDA; run '
    '`make clean train`, which installs the one that has'
  )


def nvidia() -> bool:
  """Whether the machine has an NVIDIA card."""
  driver = pathlib.Path('/proc/driver/nvidia')
  return driver.exists() or shutil.which('nvidia-smi') is not None


def peak_flops(dtype: str) -> float | None:
  """Returns the peak flops per second of all devices; None if unknown.

  Args:
    dtype: data type of the matmuls, 'float32' or 'bfloat16'; see
      `train.plan.cards.Gpu`.
  """
  # Only GPUs have such a figure, so other programs need not import the table.
  from train.plan.cards import GPUS

  kind = jax.devices()[0].device_kind
  for gpu in GPUS.values():
    if gpu.name == kind:
      one = gpu.flops if dtype == 'float32' else gpu.half_flops
      return one * jax.device_count()
  return None


def peak_bytes() -> int | None:
  """Returns the peak memory of any local device; None if it is not reported."""
  found = [device.memory_stats() or {} for device in jax.local_devices()]
  name = 'peak_bytes_in_use'
  if not all(name in stats for stats in found):
    return None
  return max(stats[name] for stats in found)


def cache_compilations() -> None:
  """Turns on JAX's compilation cache, unless the user has set its directory."""
  if jax.config.values['jax_compilation_cache_dir'] is None:
    home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    cache = pathlib.Path(home).expanduser() / 'galore_optax' / 'jax'
    jax.config.update('jax_compilation_cache_dir', str(cache))
    # Also cache small programs: a start compiles about a hundred of them, which
    # takes seconds in all.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
