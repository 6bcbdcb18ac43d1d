"""Tests that training survives SIGKILLs at random moments and other faults.

`python -m tests.bench.faults --kills 50` trains the tiny config of the tests
twice. One run is undisturbed; the other is killed and resumed 50 times, while
it starts, between two steps, or during a save. The last checkpoints, the
positions in the data and the logs of both runs must be identical, and a kill
must not lose a finished checkpoint. Then each of the other faults is tried: a
damaged file, a full disk, a directory without write permission, and SIGTERM
during compilation or a save. The results are written to
tests/bench/results/faults.json. Options after `--` are passed to each run, for
example `--devices 8 -- --mesh.fsdp 8 --batch-size 16`.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import chex
import jax

from tests.train.program import lines, saved, write_config
from train.engine import checkpoint
from train.engine.run import Run

RESULTS = pathlib.Path(__file__).parent / 'results' / 'faults.json'
STEPS_A_KILL = 60
SAVE_EVERY = 20
MOMENTS = ('start', 'step', 'save')


@dataclasses.dataclass(frozen=True)
class Program:
  """Starts the training program with a config, in its own process."""

  config: str
  steps: int
  options: Sequence[str] = ()
  devices: int = 1

  def start(self, run: Run) -> subprocess.Popen:
    """Starts the run, or resumes it if it exists."""
    command = [sys.executable, '-m', 'train.pretrain', self.config]
    command += ['--run', str(run.directory)]
    if run.config_path.exists():
      command += ['--resume']
    else:
      command += ['--steps', str(self.steps), *self.options]
      command += ['--save-every', str(SAVE_EVERY), '--eval-every', '1000']
    flags = f'--xla_force_host_platform_device_count={self.devices}'
    return subprocess.Popen(
      command,
      env=os.environ | {'XLA_FLAGS': flags, 'PYTHONUNBUFFERED': '1'},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def finish(self, run: Run) -> str:
    """Trains to the last step and returns the program's error output."""
    process = self.start(run)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return err


def wait(process: subprocess.Popen, until: Callable[[], bool]) -> None:
  """Waits until `until()` is true; fails if the process ends before."""
  while not until():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.001)


def saving(run: Run) -> bool:
  """Returns whether an unfinished checkpoint exists."""
  return any(run.checkpoints_path.glob('*.orbax-checkpoint-tmp'))


def kill(
  process: subprocess.Popen, run: Run, moment: str, draw: random.Random
) -> None:
  """Kills a process at a random time in one of `MOMENTS`."""
  before = logged(run)

  def grown(num: int) -> bool:
    return logged(run) >= before + num

  most = STEPS_A_KILL - SAVE_EVERY
  if moment == 'start':
    end = time.monotonic() + draw.uniform(0, 8)
    wait(process, lambda: time.monotonic() > end or grown(most))
  elif moment == 'save':
    # Remove unfinished checkpoints of earlier kills; they would look like a
    # save in progress.
    for left in run.checkpoints_path.glob('*.orbax-checkpoint-tmp'):
      shutil.rmtree(left, ignore_errors=True)
    wait(process, lambda: saving(run))
    time.sleep(draw.uniform(0, 0.1))
  else:
    # A resumed run first deletes the lines that were logged after its
    # checkpoint, so more lines than before mean new steps.
    more = draw.randint(1, most)
    wait(process, lambda: grown(more))
  process.kill()
  process.communicate()


def logged(run: Run) -> int:
  """Returns the number of lines in the run's metrics file."""
  if not run.metrics_path.exists():
    return 0
  return run.metrics_path.read_bytes().count(b'\n')


def equal(run: Run, whole: Run) -> None:
  """Raises AssertionError unless two runs are identical.

  This compares the last checkpoints, the positions in the data and the logs.
  """
  (ours, position), (theirs, its_position) = saved(run), saved(whole)
  chex.assert_trees_all_equal(ours, theirs)
  assert position == its_position
  assert lines(run) == lines(whole)


def kills(program: Program, run: Run, num: int, seed: int = 0) -> dict:
  """Kills and resumes a run `num` times, then lets it finish.

  Returns:
    The number of kills, of kills at each moment, and of interrupted saves.

  Raises:
    AssertionError: a finished checkpoint is lost or damaged.
  """
  draw, newest = random.Random(seed), 0
  counts = dict.fromkeys(MOMENTS, 0)
  unfinished = 0
  for number in range(num):
    moment = MOMENTS[number % len(MOMENTS)]
    process = program.start(run)
    kill(process, run, moment, draw)
    assert process.returncode == -signal.SIGKILL
    counts[moment] += 1
    unfinished += saving(run)
    found = checkpoint.steps(run.checkpoints_path)
    last = max(found, default=0)
    assert last >= newest, f'checkpoint {newest} is lost, {last} is left'
    if last:
      wrong = checkpoint.fault(run.checkpoints_path / str(last))
      assert wrong is None, wrong
    newest = last
  program.finish(run)
  assert not (run.directory / 'damaged').exists()
  return {'kills': num, 'moments': counts, 'saves_cut_short': unfinished}


def damaged(
  harm: Callable[[pathlib.Path], None],
) -> Callable[[Program, Run, Run], str]:
  """Returns a fault that damages the largest file of the newest checkpoint."""

  def fault(program: Program, run: Run, whole: Run) -> str:
    shutil.copytree(whole.directory, run.directory)
    newest = run.checkpoints_path / str(program.steps)
    harm(largest(newest, 'params'))
    err = program.finish(run)
    assert f'checkpoint {program.steps} is damaged' in err
    equal(run, whole)
    return err

  return fault


def largest(path: pathlib.Path, item: str) -> pathlib.Path:
  """Returns the largest file of one item, such as `params`, in a checkpoint."""
  files = [x for x in (path / item).rglob('*') if x.is_file()]
  return max(files, key=lambda x: x.stat().st_size)


def truncate(path: pathlib.Path) -> None:
  """Removes the last byte of a file."""
  path.write_bytes(path.read_bytes()[:-1])


def flip(path: pathlib.Path) -> None:
  """Changes one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@contextlib.contextmanager
def disk(*options: str) -> Iterator[pathlib.Path]:
  """Mounts an empty file system with these options and yields its path.

  Raises:
    subprocess.CalledProcessError: the process has no permission to mount.
  """
  with tempfile.TemporaryDirectory() as directory:
    subprocess.run(
      ['mount', '-t', 'tmpfs', *options, 'tmpfs', directory],
      check=True,
      capture_output=True,
    )
    try:
      yield pathlib.Path(directory)
    finally:
      subprocess.run(['umount', '-l', directory], check=True)


def full_disk(program: Program, run: Run, whole: Run) -> str:
  """Fills the disk after the first checkpoint, and resumes with free space."""
  with disk('-o', 'size=16m') as small:
    here = Run(small / 'run')
    process = program.start(here)
    wait(process, lambda: checkpoint.exists(here.checkpoints_path))
    filler = small / 'filler'
    with contextlib.suppress(OSError), filler.open('wb', buffering=0) as file:
      while True:
        file.write(bytes(4096))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and 'Traceback' not in err, err
    filler.unlink()
    program.finish(here)
    equal(here, whole)
    return err


def unwritable(program: Program, run: Run, whole: Run) -> str:
  """Starts a run in a directory that cannot be written."""
  with disk('-o', 'ro') as sealed:
    process = program.start(Run(sealed / 'run'))
    _, err = process.communicate(timeout=600)
  assert process.returncode == 2 and err.count('\n') == 1, err
  return err


def stopped(
  moment: Callable[[subprocess.Popen, Run], None],
) -> Callable[[Program, Run, Run], str]:
  """Returns a fault that waits for a moment and then sends SIGTERM."""

  def fault(program: Program, run: Run, whole: Run) -> str:
    process = program.start(run)
    moment(process, run)
    process.terminate()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert 'Traceback' not in err, err
    program.finish(run)
    equal(run, whole)
    return err

  return fault


def compiling(process: subprocess.Popen, run: Run) -> None:
  """Waits until the step compiles."""
  del run
  assert any(line.startswith('run:') for line in process.stdout)
  time.sleep(0.3)


FAULTS = {
  'truncated': damaged(truncate),
  'flipped': damaged(flip),
  'missing': damaged(pathlib.Path.unlink),
  'full disk': full_disk,
  'unwritable directory': unwritable,
  'SIGTERM while the step compiles': stopped(compiling),
  'SIGTERM in a save': stopped(
    lambda process, run: wait(process, lambda: saving(run))
  ),
}


def faults(program: Program, directory: pathlib.Path) -> dict[str, str]:
  """Tries every fault and returns the program's error output for each."""
  whole = Run(directory / 'whole')
  program.finish(whole)
  found = {}
  for number, (name, fault) in enumerate(FAULTS.items()):
    try:
      said = fault(program, Run(directory / str(number)), whole)
    except subprocess.CalledProcessError as error:
      said = f'not tried, {error.cmd[0]} needs permission: {error.stderr}'
    found[name] = ' '.join(str(said).replace(str(directory), '.').split())
    print(f'{name}: {found[name]}', flush=True)
  return found


def main() -> None:
  """Kills runs, tries all faults and writes the results."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('options', nargs='*')
  args = parser.parse_args()
  # This process reads checkpoints, which need as many devices as the runs had.
  jax.config.update('jax_num_cpu_devices', args.devices)
  with tempfile.TemporaryDirectory() as name:
    directory = pathlib.Path(name)
    program = Program(
      config=write_config(directory),
      steps=STEPS_A_KILL * args.kills,
      options=args.options,
      devices=args.devices,
    )
    began = time.monotonic()
    whole, run = Run(directory / 'undisturbed'), Run(directory / 'killed')
    program.finish(whole)
    found = kills(program, run, args.kills, args.seed)
    equal(run, whole)
    print(f'equal after {found}', flush=True)
    short = dataclasses.replace(program, steps=3 * SAVE_EVERY)
    found |= {'devices': args.devices, 'faults': faults(short, directory)}
    found['seconds'] = round(time.monotonic() - began)
  results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  results[f'{args.devices} devices'] = found
  RESULTS.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
  main()
