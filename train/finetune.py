"""Fine-tunes a checkpoint of transformers:

  python -m train.finetune configs/chat.py --checkpoint DIR \\
    --corpus.train chats.jsonl

The model, the tokenizer and the chat template come from the checkpoint.
`train.export` writes the trained weights in the same format.
`train.engine.training` does the work. `--seeds 5` trains with five seeds, one
after another, and prints the mean and spread of their best validations.
"""

from train.engine import cluster, signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import ClassVar

from rich.console import Console

from train.data.classifier_metrics import spread
from train.engine import metrics, training
from train.engine.command import (
  Continued,
  Launch,
  check_least,
  load,
  parse_some,
  user_errors,
)
from train.engine.step import State
from train.engine.task import Metrics
from train.engine.training import Setup


@dataclasses.dataclass(frozen=True)
class Finetune(Launch):
  """Fine-tunes a checkpoint of transformers."""

  program: ClassVar[str] = 'train.finetune'
  seeds: int = 1
  """Number of runs, with the seeds --seed, --seed + 1 and so on."""


@dataclasses.dataclass(frozen=True)
class Seeds(Continued):
  """The options that decide which runs a command line starts."""

  seeds: int = 1
  """Number of runs."""
  seed: int | None = None
  """Seed of the first run; None is the config's."""


def main(argv: Sequence[str] | None = None) -> int:
  """Fine-tunes a model once for each seed; returns the exit code."""
  argv = sys.argv[1:] if argv is None else argv
  found = []

  def after(setup: Setup, state: State, console: Console) -> None:
    show_export(setup, state, console)
    if cluster.leads():
      found.append(best(setup))

  with user_errors():
    commands = of_seeds(argv)
  for one in commands:
    code = training.main(one, Finetune, before=show_example, after=after)
    if code:
      return code
  for name in found[0] if len(found) > 1 else ():
    values = [validation[name] for validation in found]
    Console().print(f'best {name}: {spread(values)}', highlight=False)
  return 0


def of_seeds(argv: Sequence[str]) -> list[Sequence[str]]:
  """Returns a command line for each seed.

  >>> of_seeds(['a.py', '--seeds', '2', '--seed', '7'])[1]
  ['a.py', '--seeds', '2', '--seed', '8']
  """
  asked, rest = parse_some(Seeds, argv)
  check_least(1, seeds=asked.seeds)
  if asked.seeds == 1:
    return [argv]
  if asked.run or asked.resume or asked.branch:
    raise ValueError(
      f'--seeds {asked.seeds} starts as many new runs: leave out --run, '
      '--resume and --branch, or go on with the runs one by one'
    )
  first = asked.seed
  if first is None:
    first = load(argv[0]).seed
  return [
    [*rest, '--seeds', str(asked.seeds), '--seed', str(seed)]
    for seed in range(first, first + asked.seeds)
  ]


def best(setup: Setup) -> Metrics:
  """Returns the metrics of the best validation of a run."""
  start = 'validation_'
  validations = [
    {
      name.removeprefix(start): value
      for name, value in line.items()
      if name.startswith(start)
    }
    for line in metrics.read(setup.run.metrics_path)
  ]
  return min(filter(None, validations), key=setup.task.score)


def show_example(setup: Setup, console: Console) -> None:
  """Prints an example of the data, with the scored tokens in colour.

  Raises:
    ValueError: the config has no checkpoint.
  """
  if setup.config.checkpoint is None:
    raise ValueError(
      'fine-tuning starts from a checkpoint: name a directory of transformers '
      'with --checkpoint; train.pretrain starts from random weights'
    )
  console.print(setup.task.example(setup.data))


def show_export(setup: Setup, state: State, console: Console) -> None:
  """Prints the command that exports the weights for transformers."""
  del state
  run = setup.run.directory
  words = ['python', '-m', 'train.export', str(run), f'{run}/export']
  console.print(
    f'to write it for transformers: {shlex.join(words)}',
    highlight=False,
    soft_wrap=True,
  )


if __name__ == '__main__':
  sys.exit(main())
