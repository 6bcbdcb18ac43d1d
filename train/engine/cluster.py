"""Several processes that train together, each with its own devices.

With one process, these functions do nothing or return their argument.
"""

import datetime
import hashlib
import os

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils


def leads() -> bool:
  """Whether this process prints and writes files for all of them."""
  return jax.process_index() == 0


def announce(line: str) -> None:
  """Prints a line in the first process only."""
  if leads():
    print(line, flush=True)


def join_cluster() -> None:
  """Connects to the other processes of a cluster; call it before using devices.

  JAX detects SLURM, Open MPI, an indexed job of Kubernetes and a TPU pod. For
  other clusters, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID. Without a cluster, this does nothing.

  Raises:
    ValueError: one of the three variables is missing.
  """
  if jax.distributed.is_initialized() or not _in_cluster():
    return
  given = {}
  if 'JAX_COORDINATOR_ADDRESS' in os.environ:
    for name in ('num_processes', 'process_id'):
      value = os.environ.get(f'JAX_{name.upper()}', '')
      if value.isdigit():
        given[name] = int(value)
      elif value or not _detected():
        raise ValueError(
          f'JAX_{name.upper()} must be a number beside JAX_COORDINATOR_ADDRESS,'
          f' got {value!r}: set it in each process, or unset both'
        )
  # JAX's own handler of SIGTERM would replace this program's handler.
  jax.config.update('jax_enable_preemption_service', False)
  # On CPUs, processes can deadlock if they start several queued programs in
  # different orders.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  jax.distributed.initialize(**given)


def _in_cluster() -> bool:
  """Whether the environment describes a cluster."""
  return 'JAX_COORDINATOR_ADDRESS' in os.environ or _detected()


def _detected() -> bool:
  """Whether JAX detects a cluster by itself."""
  # JAX would restrict a process to one GPU in a SLURM job with a single task.
  if os.environ.get('SLURM_NTASKS') == '1':
    return False
  # Every pod runs in Kubernetes, but only pods of an indexed job have an index.
  indexed = 'JOB_COMPLETION_INDEX' in os.environ
  return any(
    kind.is_env_present()
    for kind in ClusterEnv._cluster_types
    if (kind.name != 'k8s' or indexed) and not kind.opt_in_only_method
  )


def together(moment: str) -> None:
  """Waits until all processes have reached a point, identified by its name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(moment)


def agree(what: str, content: bytes) -> None:
  """Waits for the other processes and compares their data.

  Args:
    what: name of the data, for the message.
    content: the data of this process.

  Raises:
    ValueError: the data differ between processes.
  """
  if jax.process_count() == 1:
    return
  ours = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
  theirs = multihost_utils.process_allgather(ours)
  if (theirs != ours).any():
    raise ValueError(
      f'{what} must be the same in all {jax.process_count()} processes, and '
      'differ: start all of them with the same files and options'
    )


def clock() -> datetime.datetime:
  """Returns the local time of the first process, the same in all processes."""
  now = datetime.datetime.now().replace(microsecond=0)
  if jax.process_count() == 1:
    return now
  # Other processes may be in other time zones.
  parts = np.array(now.timetuple()[:6], np.int32)
  found = multihost_utils.broadcast_one_to_all(parts)
  year, month, day, hour, minute, second = map(int, found)
  return datetime.datetime(year, month, day, hour, minute, second)


def largest_of_all(number: int | None) -> int | None:
  """Returns the largest number in any process; None if all are 0 or None.

  The training loop exchanges the numbers of signals by it, since all processes
  must leave the loop after the same step.
  """
  if jax.process_count() == 1:
    return number
  found = multihost_utils.process_allgather(np.int32(number or 0))
  return int(found.max()) or None
