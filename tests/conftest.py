"""Strict flags for every test: eight CPU devices, no silent broadcasting."""

import gc
import importlib.util
import mmap
import os
import pathlib

import jax
import jaxlib

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Operations then hold one line of the source instead of a whole traceback,
# which takes a tenth of the time of lowering.
jax.config.update('jax_include_full_tracebacks_in_locations', False)

# What is timed of the reference is imported where that is installed.
if not importlib.util.find_spec('galore_torch'):
  collect_ignore = ['bench/card/theirs.py', 'bench/speed/theirs.py']

# They halve the time of compilation, which is most of the time of most tests.
QUICK_FLAGS = {
  'xla_cpu_use_fusion_emitters': 'false',
  'xla_cpu_parallel_codegen_split_count': '1',
}


def pytest_configure(config):
  pin_worker()
  # Tests with the markers optimized, parity and card check speed, memory and
  # numbers of the programs that users run.
  selected = config.option.markexpr
  quick = 'not slow' in selected or 'not optimized' in selected
  jax.config.update('jax_disable_most_optimizations', quick)
  if quick:
    # XLA reads them when it first compiles.
    flags = [f'--{k}={v}' for k, v in QUICK_FLAGS.items() if known(k)]
    os.environ['XLA_FLAGS'] = ' '.join(
      [os.environ.get('XLA_FLAGS', ''), *flags]
    )


def pin_worker() -> None:
  """Gives each worker of pytest-xdist cores of its own.

  XLA starts a thread for each core of a process. Workers that share their cores
  take a tenth more time.
  """
  workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
  if workers == 1 or not hasattr(os, 'sched_setaffinity'):
    return
  cores = sorted(os.sched_getaffinity(0))
  index = int(os.environ['PYTEST_XDIST_WORKER'].removeprefix('gw'))
  if len(cores) >= workers:
    os.sched_setaffinity(0, cores[index::workers])


def pytest_collection_finish() -> None:
  # The modules that collection imported stay. A full collection of garbage
  # would visit their million objects each time.
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


def known(flag):
  """Whether this XLA has a flag: one that it has not ends the process."""
  for path in pathlib.Path(jaxlib.__file__).parent.glob('*.so'):
    with path.open('rb') as file:
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        # The names of fields that are flags no more are there too, in texts.
        if library.find(flag.encode() + b'\0') >= 0:
          return True
  return False
