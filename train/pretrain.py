"""Pre-trains a model: `python -m train.pretrain configs/quickstart.py`.

Parses and checks (`train.command`), prepares a run (`train.run`) of a task
(`train.task`), and hands both to the loop (`train.loop`).
"""

from train import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import dataclasses
import itertools
import pathlib
import shlex
import sys
from collections.abc import Sequence

import grain
import jax
from rich.console import Console
from rich.table import Table

from train import checkpoint, loop, machine, metrics, report
from train import run as run_lib
from train import step as step_lib
from train.command import parse, source, user_errors
from train.config import Config, differences
from train.data.corpus import Documents
from train.data.tokenizer import Tokenizer, train_tokenizer
from train.run import Run
from train.sample import continuations
from train.step import State
from train.task import (
  Task,
  Text,
  array_shapes,
  language_model,
  stored_layers,
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """All that training needs, checked; nothing is written yet."""

  config: Config
  run: Run
  source: Run | None
  """The run whose checkpoint this one starts from; itself, if resumed."""
  task: Task
  init: step_lib.Init
  step: step_lib.Step
  text: Text
  batches: grain.DatasetIterator
  memory: Table
  tensorboard: bool


def main(argv: Sequence[str] | None = None) -> int:
  """Trains; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  console = Console()
  machine.cache_compilations()
  with user_errors():
    setup = prepare(argv)
    console.print(setup.memory)
    console.print(machine.describe(), highlight=False)
    state = begin(setup)
  try:
    return train(setup, state, console, path=argv[0])
  except FloatingPointError as error:
    print(f'error: {error}', file=sys.stderr)
    if checkpoint.exists(setup.run.checkpoints_path):
      slower = [
        '--branch',
        '--learning-rate',
        f'{setup.config.learning_rate / 2:g}',
      ]
      print(
        'the checkpoints before it are intact; to go on from the newest with '
        f'half the learning rate:\n{command(argv[0], setup.run, *slower)}',
        file=sys.stderr,
      )
  except OSError as error:
    print(f'error: {error}', file=sys.stderr)
  return 1


def command(path: str, run: Run, *options: str) -> str:
  """Returns a command line that goes on from a run, for the user to copy."""
  words = ['python', '-m', 'train.pretrain', path, '--run', str(run.directory)]
  return shlex.join([*words, *options])


def prepare(argv: Sequence[str]) -> Setup:
  """Checks everything that a user can get wrong."""
  found = source(argv)
  launch = parse(
    argv, default=None if found is None else lambda path: found.config()
  )
  config, name = launch.config, pathlib.Path(argv[0]).stem
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
  task = language_model(config)
  init, step = step_lib.build(config, task)
  memory = report.memory_table(
    array_shapes(config, task),
    jax.eval_shape(task.init, jax.random.key(0)),
    config.transformation(),
    type(config.optimizer).__name__,
    task.trained,
  )
  documents = config.corpus.open('train')
  held_out = config.corpus.open('validation')
  tokenizer = (
    found.tokenizer() if found else prepare_tokenizer(config, documents)
  )
  text = Text(documents, held_out, tokenizer)
  return Setup(
    config=config,
    run=where,
    source=found,
    task=task,
    init=init,
    step=step,
    text=text,
    batches=task.batches(text),
    memory=memory,
    tensorboard=launch.tensorboard,
  )


def check_branch(source: Run, config: Config) -> None:
  """Raises ValueError where a config cannot start from a run's checkpoint."""
  if not checkpoint.exists(source.checkpoints_path):
    raise FileNotFoundError(
      f'no checkpoint in {source.checkpoints_path} to start from: leave out '
      '--branch to begin anew'
    )
  theirs = source.config()
  differ = differences(theirs, config)
  if 'tokenizer' in differ or shapes(theirs) != shapes(config):
    raise ValueError(
      f'--branch cannot start from {source.directory}, whose state or text is '
      f'another one: {run_lib.listed(differ)}. Leave out what changes the model'
      ' or what the optimizer keeps, or begin anew without --branch'
    )


def shapes(config: Config) -> State:
  """Returns the shapes of a config's state."""
  init, _ = step_lib.build(config, language_model(config))
  return jax.eval_shape(init, jax.random.key(0))


def prepare_tokenizer(config: Config, documents: Documents) -> Tokenizer:
  """Returns the tokenizer that is named, or one trained on the documents."""
  vocab_size = config.model.vocab_size
  if config.tokenizer is None:
    sample = documents.stream(seed=0, repeat=False)
    return train_tokenizer(sample, vocab_size=vocab_size)
  tokenizer = Tokenizer.load(config.tokenizer)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f'model.vocab_size must be at least {tokenizer.vocab_size}, the number '
      f'of ids in {config.tokenizer}, got {vocab_size}'
    )
  return tokenizer


def begin(setup: Setup) -> State:
  """Returns the state to start from, and writes the run's first files."""
  config, source, where = setup.config, setup.source, setup.run
  key = jax.random.key(config.seed)
  state = None
  if source and checkpoint.exists(source.checkpoints_path):
    with checkpoint.opened(source.checkpoints_path) as manager:
      like = jax.eval_shape(setup.init, key)
      state = checkpoint.restore(manager, like, setup.batches)
  setup.batches.start_prefetch()  # while the step compiles
  if state is None:
    state = jax.jit(setup.init)(key)
  if source == where:
    where.write(config)
  elif source is None:
    where.create(config, setup.text.tokenizer)
  else:
    if int(state.step) >= config.steps:
      raise ValueError(
        f'steps must be more than {int(state.step)}, which {source.directory} '
        f'has done, got {config.steps}'
      )
    where.branch(source, config)
    with checkpoint.opened(where.checkpoints_path) as manager:
      checkpoint.save(manager, state, setup.batches, config)
  return state


def train(setup: Setup, state: State, console: Console, *, path: str) -> int:
  """Trains to the last step, or until a signal; returns the exit code."""
  config, where, task = setup.config, setup.run, setup.task
  console.print(f'run: {where.directory}', highlight=False)
  with (
    signals.asked() as stop,
    checkpoint.opened(where.checkpoints_path) as manager,
    metrics.opened(
      where.metrics_path, step=int(state.step), tensorboard=setup.tensorboard
    ) as log,
  ):
    state = loop.train(
      state,
      config,
      step=setup.step,
      batches=setup.batches,
      validate=task.evaluate(setup.text),
      save=lambda state: checkpoint.save(manager, state, setup.batches, config),
      log=log,
      console=console,
      stop=stop,
      unit=task.unit,
    )
  if stop.signal is None:
    metrics.plot(where.metrics_path, where.curves_path, str(where.directory))
    show_samples(setup, state, console)
    console.print(f'curves: {where.curves_path}', highlight=False)
  else:
    console.print(
      f'stopped and saved at step {int(state.step)}; to go on:\n'
      f'{command(path, where, "--resume")}',
      highlight=False,
      soft_wrap=True,
    )
  return stop.code


def show_samples(setup: Setup, state: State, console: Console) -> None:
  """Prints three held-out documents' beginnings, and how the model goes on."""
  config, text = setup.config, setup.text
  documents = text.validation.stream(seed=config.seed, repeat=False)
  prompts = [document[:60] for document in itertools.islice(documents, 3)]
  texts = continuations(
    stored_layers(config),
    state.params,
    text.tokenizer,
    prompts,
    window=config.sequence_length,
    seed=config.seed,
  )
  for prompt, said in zip(prompts, texts, strict=True):
    console.rule('sample', align='left')
    console.print(prompt, style='bold', end='', markup=False, highlight=False)
    console.print(said, markup=False, highlight=False)
  console.rule()


if __name__ == '__main__':
  sys.exit(main())
