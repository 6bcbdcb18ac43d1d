"""What the program runs on, its memory, and its cache of compiled steps."""

import os
import pathlib
import shutil

import jax

MEMORY_SHARE = 0.95
"""Of a card's memory that the programs take; the rest is the driver's.

JAX's own default of 0.75 leaves 17.7 GiB of 24 GB.
"""


def prepare() -> None:
  """Sets what a program needs of JAX, unless the user did; called first."""
  cache_compilations()
  names = ('XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION')
  if not any(name in os.environ for name in names):
    # Read when the first array is made.
    os.environ[names[0]] = str(MEMORY_SHARE)


def describe() -> str:
  """Returns the device's name, and a remedy where a card is not used."""
  first = jax.devices()[0]
  line = f'device: {jax.device_count()} x {first.device_kind}'
  if first.platform != 'cpu' or not nvidia():
    return line
  if jax.config.jax_platforms:
    return (
      f'{line}, though an NVIDIA card is here: JAX_PLATFORMS is '
      f'{jax.config.jax_platforms!r}'
    )
  return (
    f'{line}, though an NVIDIA card is here, as this JAX has no CUDA; run '
    '`make clean train`, which installs the one that has'
  )


def nvidia() -> bool:
  """Whether the machine has a card of NVIDIA's."""
  driver = pathlib.Path('/proc/driver/nvidia')
  return driver.exists() or shutil.which('nvidia-smi') is not None


def peak_flops(dtype: str) -> float | None:
  """Returns the flops per second of all devices; None where that is unknown.

  Args:
    dtype: of the products, 'float32' or 'bfloat16'; see `train.plan.cards.Gpu`.
  """
  # Imported here: only a card has such a figure.
  from train.plan.cards import GPUS

  kind = jax.devices()[0].device_kind
  for gpu in GPUS.values():
    if gpu.name == kind:
      one = gpu.flops if dtype == 'float32' else gpu.half_flops
      return one * jax.device_count()
  return None


def peak_bytes() -> int | None:
  """Returns the most memory that a device here has held; None where untold."""
  found = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [stats.get('peak_bytes_in_use') for stats in found]
  return None if None in peaks else max(peaks)


def cache_compilations() -> None:
  """Lets JAX keep what it compiles, unless the user said where or not to."""
  if jax.config.jax_compilation_cache_dir is None:
    home = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    cache = pathlib.Path(home).expanduser() / 'galore_optax' / 'jax'
    jax.config.update('jax_compilation_cache_dir', str(cache))
    # A start compiles some hundred small programs too, for seconds in all.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
