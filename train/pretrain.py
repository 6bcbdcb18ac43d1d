"""Pre-trains a model: `python -m train.pretrain configs/quickstart.py`."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence

import grain
import jax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

from models.llama import Layers
from train import checkpoint, evaluate, loop, metrics, report, run
from train import step as step_lib
from train.command import Launch, parse, user_errors
from train.config import Config
from train.data.batches import batches
from train.data.documents import Documents
from train.data.tokenizer import Tokenizer, train_tokenizer
from train.run import Run
from train.sample import continuations
from train.step import State


@dataclasses.dataclass(frozen=True)
class Setup:
  """All that training needs, checked, and not yet begun."""

  run: Run
  config: Config
  layers: Layers
  tokenizer: Tokenizer
  batches: grain.DatasetIterator
  held_out: Documents
  memory: Table


def main(argv: Sequence[str] | None = None) -> int:
  """Trains; returns the exit code."""
  with user_errors():
    launch, name = parse(sys.argv[1:] if argv is None else argv)
    setup = prepare(launch, name)
    if not launch.resume:
      setup.run.create(setup.config, setup.tokenizer)
  try:
    train(setup, Console(), tensorboard=launch.tensorboard)
  except (FloatingPointError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


def prepare(launch: Launch, name: str) -> Setup:
  """Checks everything that a user can get wrong, and writes nothing."""
  config = launch.config
  if launch.tensorboard:
    metrics.event_writer()
  if launch.resume:
    where = run.old(launch.run, name)
    where.check(config)
  else:
    where = run.new(launch.run, name)
  layers, tx = step_lib.model(config), config.transformation()
  key = jax.random.key(config.seed)
  shapes = jax.eval_shape(layers.init, key)
  stored = jax.eval_shape(lambda: step_lib.init_params(config, key))
  memory = report.memory_table(
    shapes, stored, tx, type(config.optimizer).__name__
  )
  documents = config.corpus.open('train')
  held_out = config.corpus.open('validation')
  tokenizer = (
    where.tokenizer() if launch.resume else prepare_tokenizer(config, documents)
  )
  return Setup(
    run=where,
    config=config,
    layers=layers,
    tokenizer=tokenizer,
    batches=batches(
      documents,
      tokenizer,
      batch_size=config.batch_size,
      sequence_length=config.sequence_length,
      seed=config.seed,
    ),
    held_out=held_out,
    memory=memory,
  )


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


def train(setup: Setup, console: Console, *, tensorboard: bool) -> None:
  """Trains to the last step, or until a signal; then shows what came out."""
  config, layers, where = setup.config, setup.layers, setup.run
  console.print(setup.memory)
  console.print(f'run: {where.directory}')
  sums = evaluate.make_sums(layers)
  held_out = evaluate.held_out(
    config, setup.held_out, setup.tokenizer, config.eval_batches
  )
  init, step = step_lib.build(config)
  with checkpoint.opened(where.checkpoints_path) as manager:
    state = begin(setup, init, manager)
    with metrics.opened(
      where.metrics_path, step=int(state.step), tensorboard=tensorboard
    ) as log:
      state = loop.train(
        state,
        config,
        step=step,
        batches=setup.batches,
        validate=lambda params: evaluate.evaluate(sums, params, held_out),
        save=lambda state: checkpoint.save(
          manager, state, setup.batches, config
        ),
        log=log,
        console=console,
      )
  if int(state.step) < config.steps:
    console.print(
      f'stopped and saved at step {int(state.step)}; to go on, repeat the '
      f'command with --run {where.directory} --resume'
    )
    return
  metrics.plot(where.metrics_path, where.curves_path, str(where.directory))
  show_samples(setup, state, console)
  console.print(f'curves: {where.curves_path}')


def begin(
  setup: Setup, init: step_lib.Init, manager: ocp.CheckpointManager
) -> State:
  """Returns the newest state, or the first one where none was saved."""
  key = jax.random.key(setup.config.seed)
  fresh = lambda: init(key)
  if manager.latest_step() is None:
    return jax.jit(fresh)()
  return checkpoint.restore(manager, jax.eval_shape(fresh), setup.batches)


def show_samples(setup: Setup, state: State, console: Console) -> None:
  """Prints three held-out documents' beginnings, and how the model goes on."""
  documents = setup.held_out.stream(seed=setup.config.seed, repeat=False)
  prompts = [text[:60] for text in itertools.islice(documents, 3)]
  texts = continuations(
    setup.layers,
    state.params,
    setup.tokenizer,
    prompts,
    window=setup.config.sequence_length,
    seed=setup.config.seed,
  )
  for prompt, text in zip(prompts, texts, strict=True):
    console.rule('sample', align='left')
    console.print(prompt, style='bold', end='', markup=False, highlight=False)
    console.print(text, markup=False, highlight=False)
  console.rule()


if __name__ == '__main__':
  sys.exit(main())
