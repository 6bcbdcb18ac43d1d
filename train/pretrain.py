"""Pre-trains a model: `python -m train.pretrain configs/quickstart.py`.

`train.engine.training` does the work. Finally, the model makes samples: a
language model continues three texts.
"""

from train.engine import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import sys
from collections.abc import Sequence

from rich.console import Console

from train.engine import training
from train.engine.command import Launch
from train.engine.step import State
from train.engine.training import Setup


def main(argv: Sequence[str] | None = None) -> int:
  """Pre-trains a model; returns the exit code."""
  return training.main(
    sys.argv[1:] if argv is None else argv,
    Launch,
    before=nothing,
    after=show_samples,
  )


def nothing(setup: Setup, console: Console) -> None:
  """Prints nothing before training."""
  del setup, console


def show_samples(setup: Setup, state: State, console: Console) -> None:
  """Prints samples of the trained model, if it has any."""
  for part in setup.task.samples(
    state.evaluated, setup.data, setup.run.directory
  ):
    console.print(part, highlight=False)


if __name__ == '__main__':
  sys.exit(main())
