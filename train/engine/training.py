"""Runs a training program from its command line to the last step.

`prepare` checks everything that a user can get wrong and writes no file.
`begin` returns the first state, from a checkpoint or from random weights.
`train_and_report` passes both to the loop in `train.engine.loop`.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TypeAlias

import grain
import jax
from rich.console import Console
from rich.table import Table

from train.config import Config
from train.engine import checkpoint, cluster, loop, machine, metrics, signals
from train.engine import mesh as mesh_lib
from train.engine import run as run_lib
from train.engine import step as step_lib
from train.engine.command import Launch, parse, source, user_errors
from train.engine.config_json import differences
from train.engine.memory_table import memory_of
from train.engine.run import Run
from train.engine.step import State
from train.engine.task import Data, Metrics, PyTree, Task, task_of


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that training needs, checked before any file is written."""

  config: Config
  run: Run
  """The run's directory, which this program writes."""
  source: Run | None
  """The run whose checkpoint is continued: `run` itself if it is resumed."""
  task: Task
  init: step_lib.Init
  """`key -> state`, as `train.engine.step.build` returns it."""
  step: step_lib.Step
  """The step, jitted for the mesh."""
  places: State
  """Sharding of each array of the state."""
  data: Data
  batches: grain.DatasetIterator
  """The training batches, without end."""
  validate: Callable[[PyTree], Metrics]
  """Computes the metrics of the validation split from parameters."""
  memory: Table
  """Bytes of each parameter and its optimizer state, to print."""
  warnings: tuple[str, ...]
  """Warnings about data that the model would not learn as intended."""
  launch: Launch
  """The parsed command line."""


Before: TypeAlias = Callable[[Setup, Console], None]
After: TypeAlias = Callable[[Setup, State, Console], None]


def main(
  argv: Sequence[str], kind: type[Launch], *, before: Before, after: After
) -> int:
  """Runs a training program; returns the exit code.

  Args:
    argv: the arguments of the command line, starting with the config file.
    kind: the dataclass of the program's options.
    before: called before training, to print an example of the data or to check
      the setup; it may raise the errors that `prepare` raises.
    after: called with the last state, unless a signal stopped the training.
  """
  machine.prepare()
  with user_errors():
    cluster.join_cluster()
    console = Console(quiet=not cluster.leads())
    setup = prepare(argv, kind)
    before(setup, console)
    for text in setup.warnings:
      console.print(
        f'warning: {text}', markup=False, highlight=False, soft_wrap=True
      )
    console.print(setup.memory)
    console.print(machine.describe(), highlight=False)
    if jax.device_count() > 1:
      console.print(mesh_lib.used(setup.config.mesh), highlight=False)
    if setup.config.mesh.data > 1:
      console.print(step_lib.traffic(setup.config), highlight=False)
    state = begin(setup)
  try:
    return train_and_report(setup, state, console, after, path=argv[0])
  except FloatingPointError as error:
    print(f'error: {error}', file=sys.stderr)
    newest = checkpoint.newest_sound(setup.run.checkpoints_path)
    if newest is not None:
      rate = f'{setup.config.learning_rate / 2:g}'
      again = command(setup, argv[0], '--branch', '--learning-rate', rate)
      print(
        f'the last sound checkpoint is {newest}; to continue from it with half '
        f'the learning rate:\n{again}',
        file=sys.stderr,
      )
  except OSError as error:
    print(f'error: {error}', file=sys.stderr)
    # The system sets errno. `checkpoint.save` raises an OSError without errno,
    # whose message already contains this advice.
    if error.errno is not None and checkpoint.exists(
      setup.run.checkpoints_path
    ):
      print(
        'the checkpoints are as they were: make room, or fix the reported '
        f'problem, and continue with\n{command(setup, argv[0], "--resume")}',
        file=sys.stderr,
      )
  return 1


def command(setup: Setup, path: str, *options: str) -> str:
  """Returns a command line that continues a run, for the user to copy."""
  words = ['python', '-m', setup.launch.program, path]
  return shlex.join([*words, '--run', str(setup.run.directory), *options])


def prepare(argv: Sequence[str], kind: type[Launch] = Launch) -> Setup:
  """Checks everything that a user can get wrong, and writes no file.

  Args:
    argv: the arguments of the command line, starting with the config file.
    kind: the dataclass of the program's options.

  Raises:
    ValueError, OSError, ImportError: the user must change a value or a file, or
      install a package.
  """
  found = source(argv)
  default = None if found is None else lambda path: found.config()
  launch = parse(argv, kind, default)
  config = launch.config
  name = pathlib.Path(argv[0]).stem
  if found is None:
    config = config.resolved()
  if launch.tensorboard:
    metrics.event_writer()
  if found is None:
    where = run_lib.new(launch.run, name)
  elif launch.branch:
    where = run_lib.new(None, name)
    check_branch(found, config)
  else:
    where = found
    where.check(config)
  task = task_of(config)
  mesh = mesh_lib.devices(config.mesh)
  init, step = step_lib.build(config, task)
  places = step_lib.shardings(init, config, task, mesh)
  memory = memory_of(config, task)
  data = task.open(None if found is None else found.directory)
  return Setup(
    config=config,
    run=where,
    source=found,
    task=task,
    init=init,
    step=step_lib.placed(step, mesh, places),
    places=places,
    data=data,
    batches=task.batches(data),
    validate=task.evaluate(data),
    memory=memory,
    warnings=tuple(task.warnings(data)),
    launch=launch,
  )


def check_branch(source: Run, config: Config) -> None:
  """Checks that a config can start from a run's checkpoint.

  Raises:
    FileNotFoundError: the run has no checkpoint.
    ValueError: the tokenizer or the shapes of the state differ.
  """
  if not checkpoint.exists(source.checkpoints_path):
    raise FileNotFoundError(
      f'no checkpoint in {source.checkpoints_path} to start from: leave out '
      '--branch to start a new run'
    )
  theirs = source.config()
  differ = differences(theirs, config)
  if 'tokenizer' in differ or shapes(theirs) != shapes(config):
    raise ValueError(
      f'--branch cannot start from {source.directory}, whose state or text '
      f'differs: {run_lib.listed(differ)}. Leave out options that change the '
      'model or the optimizer state, or start a new run without --branch'
    )


def shapes(config: Config) -> State:
  """Returns the shapes of the training state of a config."""
  init, _ = step_lib.build(config, task_of(config))
  return jax.eval_shape(init, jax.random.key(0))


def begin(setup: Setup) -> State:
  """Returns the state to start from, and writes the run's first files.

  Raises:
    ValueError: the processes have different setups, or the checkpoint to branch
      from has already done `config.steps` steps.
  """
  config = setup.config
  source = setup.source
  where = setup.run
  key = jax.random.key(config.seed)
  places = setup.places
  agree(setup)
  state = None
  if source and checkpoint.exists(source.checkpoints_path):
    with checkpoint.reading(source.checkpoints_path) as manager:
      like = mesh_lib.at(jax.eval_shape(setup.init, key), places)
      state = checkpoint.restore(manager, like, setup.batches)
  setup.batches.start_prefetch()  # while the step compiles
  if state is None and config.checkpoint is not None:
    params = jax.device_put(setup.task.read(key), places.params)
    start = step_lib.starter(config, setup.task)
    state = jax.jit(start, donate_argnums=0, out_shardings=places)(params)
  elif state is None:
    state = jax.jit(setup.init, out_shardings=places)(key)
  branches = source not in (where, None)
  if branches and int(state.step) >= config.steps:
    raise ValueError(
      f'steps must be more than {int(state.step)}, which {source.directory} '
      f'has done, got {config.steps}'
    )
  if cluster.leads():
    write(setup)
  if branches:
    with checkpoint.opened(where.checkpoints_path) as manager:
      checkpoint.save(manager, state, setup.batches, config)
  return state


def agree(setup: Setup) -> None:
  """Checks that all processes would train the same.

  This also keeps every process from writing files until all processes have read
  the existing ones.

  Raises:
    ValueError: configs, runs or data differ.
  """
  words = repr((setup.config, setup.run, setup.source)).encode()
  cluster.agree(
    'config, run and tokenizer', words + setup.task.identity(setup.data)
  )


def write(setup: Setup) -> None:
  """Writes a new run's first files, or the changed config of a resumed run."""
  config = setup.config
  source = setup.source
  where = setup.run
  if source == where:
    where.write(config)
    return
  checkpoint_path = None
  if source is not None:
    where.continue_log(source)
    checkpoint_path = source.source()
  elif config.checkpoint is not None:
    checkpoint_path = pathlib.Path(config.checkpoint)
  where.directory.mkdir(parents=True, exist_ok=True)
  setup.task.save(setup.data, where.directory)
  where.create(config, checkpoint_path)


def train_and_report(
  setup: Setup, state: State, console: Console, after: After, *, path: str
) -> int:
  """Trains until the last step or a signal; returns the exit code.

  After the last step it also plots the losses and calls `after`.
  """
  config = setup.config
  where = setup.run
  leads = cluster.leads()
  console.print(f'run: {where.directory}', highlight=False)
  with (
    signals.asked() as stop,
    checkpoint.opened(where.checkpoints_path, begun=int(state.step)) as manager,
    metrics.opened(
      where.metrics_path,
      step=int(state.step),
      tensorboard=setup.launch.tensorboard,
    )
    if leads
    else contextlib.nullcontext(lambda step, values: None) as log,
  ):
    state = loop.train(
      state,
      config,
      step=setup.step,
      batches=setup.batches,
      validate=setup.validate,
      save=lambda state, score: checkpoint.save(
        manager, state, setup.batches, config, score
      ),
      best=checkpoint.best_score(manager),
      log=log,
      console=console,
      stop=stop,
      task=setup.task,
      profile=where.profile_path if setup.launch.profile else None,
    )
  if stop.signal is None:
    if leads:
      metrics.plot(
        where.metrics_path,
        where.curves_path,
        str(where.directory),
        setup.task.loss_label,
      )
    after(setup, state, console)
    console.print(
      f'curves: {where.curves_path}; a page about the run: '
      f'python -m train.report {where.directory}',
      highlight=False,
      soft_wrap=True,
    )
  else:
    console.print(
      f'stopped and saved at step {int(state.step)}; to go on:\n'
      f'{command(setup, path, "--resume")}',
      highlight=False,
      soft_wrap=True,
    )
  return stop.code
