"""What a run survives: SIGKILLs at random moments, and a fault of each kind.

`python -m tests.bench.faults --kills 50` trains the tiny config of the tests
once undisturbed, and once killed again and again: while it starts, between two
steps, in a save. The last checkpoints of both must be equal bit by bit, the
position in the data and the log too, and no kill may cost a checkpoint. Then
files are damaged, a disk is full or may not be written, and SIGTERM comes while
the step compiles or a save is written. The results go to
tests/bench/results/faults.json. What follows `--` is passed on to each run, as
in `--devices 8 -- --mesh.fsdp 8 --batch-size 16`.
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
from train import checkpoint
from train.run import Run

RESULTS = pathlib.Path(__file__).parent / 'results' / 'faults.json'
STEPS_A_KILL = 60
SAVE_EVERY = 20
MOMENTS = ('start', 'step', 'save')


@dataclasses.dataclass(frozen=True)
class Program:
  """The training program with a config, as a process of its own."""

  config: str
  steps: int
  options: Sequence[str] = ()
  devices: int = 1

  def start(self, run: Run) -> subprocess.Popen:
    """Starts it, or lets it go on where there is a run already."""
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
    """Runs it to the last step; returns what it said of errors."""
    process = self.start(run)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return err


def wait(process: subprocess.Popen, until: Callable[[], bool]) -> None:
  """Waits for a moment of a process that must not end before."""
  while not until():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.001)


def saving(run: Run) -> bool:
  """Whether a checkpoint is being written."""
  return any(run.checkpoints_path.glob('*.orbax-checkpoint-tmp'))


def kill(
  process: subprocess.Popen, run: Run, moment: str, draw: random.Random
) -> None:
  """Kills a process at a moment: as it starts, between steps, in a save."""
  before = logged(run)
  grown = lambda num: logged(run) >= before + num
  most = STEPS_A_KILL - SAVE_EVERY
  if moment == 'start':
    end = time.monotonic() + draw.uniform(0, 8)
    wait(process, lambda: time.monotonic() > end or grown(most))
  elif moment == 'save':
    # What the kill before left does not count.
    for left in run.checkpoints_path.glob('*.orbax-checkpoint-tmp'):
      shutil.rmtree(left, ignore_errors=True)
    wait(process, lambda: saving(run))
    time.sleep(draw.uniform(0, 0.1))
  else:
    # A resumed run first drops the lines after its checkpoint.
    more = draw.randint(1, most)
    wait(process, lambda: grown(more))
  process.kill()
  process.communicate()


def logged(run: Run) -> int:
  """Returns the number of lines that were logged."""
  if not run.metrics_path.exists():
    return 0
  return run.metrics_path.read_bytes().count(b'\n')


def equal(run: Run, whole: Run) -> None:
  """Raises AssertionError where two runs differ in a bit."""
  (ours, position), (theirs, its_position) = saved(run), saved(whole)
  chex.assert_trees_all_equal(ours, theirs)
  assert position == its_position
  assert lines(run) == lines(whole)


def kills(program: Program, run: Run, num: int, seed: int = 0) -> dict:
  """Kills a run so many times, lets it end, and returns what was counted."""
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
  """Returns a fault: the newest checkpoint's largest file is damaged."""

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
  """Returns the largest file of an item of a checkpoint."""
  files = [x for x in (path / item).rglob('*') if x.is_file()]
  return max(files, key=lambda x: x.stat().st_size)


def truncate(path: pathlib.Path) -> None:
  """Takes a file's last byte."""
  path.write_bytes(path.read_bytes()[:-1])


def flip(path: pathlib.Path) -> None:
  """Changes one bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@contextlib.contextmanager
def disk(*options: str) -> Iterator[pathlib.Path]:
  """Yields a small disk of its own; CalledProcessError without the rights."""
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
  """The disk is full after the first checkpoint, and has room again."""
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
  """The run's directory may not be written."""
  with disk('-o', 'ro') as sealed:
    process = program.start(Run(sealed / 'run'))
    _, err = process.communicate(timeout=600)
  assert process.returncode == 2 and err.count('\n') == 1, err
  return err


def stopped(
  moment: Callable[[subprocess.Popen, Run], None],
) -> Callable[[Program, Run, Run], str]:
  """Returns a fault: SIGTERM comes at a moment."""

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
  """Tries every fault; returns what the program said, by fault."""
  whole = Run(directory / 'whole')
  program.finish(whole)
  found = {}
  for number, (name, fault) in enumerate(FAULTS.items()):
    try:
      said = fault(program, Run(directory / str(number)), whole)
    except subprocess.CalledProcessError as error:
      said = f'not tried, as {error.cmd[0]} needs rights: {error.stderr}'
    found[name] = ' '.join(str(said).replace(str(directory), '.').split())
    print(f'{name}: {found[name]}', flush=True)
  return found


def main() -> None:
  """Runs all, and writes the results."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('options', nargs='*')
  args = parser.parse_args()
  # For what is read of the runs here.
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
