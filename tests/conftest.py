"""Configures JAX for all tests: eight CPU devices, no silent broadcasting."""

import gc
import importlib.util
import mmap
import os
import pathlib

import jax
import jaxlib
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# With this setting, each operation of a program records one source location
# instead of a whole traceback. Tracebacks would take a tenth of the lowering
# time.
jax.config.update('jax_include_full_tracebacks_in_locations', False)

# These benchmark modules import the PyTorch reference, galore_torch. Skip
# collecting them if it is not installed.
if not importlib.util.find_spec('galore_torch'):
  collect_ignore = ['bench/card/theirs.py', 'bench/speed/theirs.py']

# These XLA flags halve the compilation time, which dominates the run time of
# most tests.
QUICK_FLAGS = {
  'xla_cpu_use_fusion_emitters': 'false',
  'xla_cpu_parallel_codegen_split_count': '1',
}


def pytest_configure(config: pytest.Config) -> None:
  pin_worker()
  # Quick tests disable XLA's optimizations. Tests with the markers optimized,
  # parity and card need them, because they check the speed, memory and numbers
  # of programs as users compile them.
  selected = config.option.markexpr
  quick = 'not slow' in selected or 'not optimized' in selected
  jax.config.update('jax_disable_most_optimizations', quick)
  if quick:
    # XLA reads XLA_FLAGS when it first compiles a program, so setting it here
    # is early enough.
    flags = [f'--{k}={v}' for k, v in QUICK_FLAGS.items() if known(k)]
    os.environ['XLA_FLAGS'] = ' '.join(
      [os.environ.get('XLA_FLAGS', ''), *flags]
    )


def pin_worker() -> None:
  """Pins each pytest-xdist worker to its own CPU cores.

  XLA starts one thread per core that the process may use. Workers that share
  cores take a tenth more time.
  """
  workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
  if workers == 1 or not hasattr(os, 'sched_setaffinity'):
    return
  cores = sorted(os.sched_getaffinity(0))
  index = int(os.environ['PYTEST_XDIST_WORKER'].removeprefix('gw'))
  if len(cores) >= workers:
    os.sched_setaffinity(0, cores[index::workers])


def pytest_collection_finish() -> None:
  # Collection imports modules with about a million objects, which live until
  # the end. Freeze them, so that later garbage collections do not visit them.
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


def known(flag: str) -> bool:
  """Returns whether this version of XLA has a flag.

  XLA ends the process if XLA_FLAGS contains an unknown flag.
  """
  for path in pathlib.Path(jaxlib.__file__).parent.glob('*.so'):
    with path.open('rb') as file:
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        # The null byte matters. The library also contains the names of removed
        # flags, but only inside longer strings.
        if library.find(flag.encode() + b'\0') >= 0:
          return True
  return False
