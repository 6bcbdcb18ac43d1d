"""Fine-tunes a checkpoint of transformers:

  python -m train.finetune configs/chat.py --checkpoint DIR \\
    --corpus.train chats.jsonl

The model, the tokenizer and the chat's template come from the checkpoint, the
weights go back into such a directory by `train.export`. `train.training` does
the work.
"""

from train import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import ClassVar

from rich.console import Console

from train import training
from train.command import Launch
from train.data.batches import shown
from train.step import State
from train.training import Setup


@dataclasses.dataclass(frozen=True)
class Finetune(Launch):
  """Fine-tunes a checkpoint of transformers."""

  program: ClassVar[str] = 'train.finetune'


def main(argv: Sequence[str] | None = None) -> int:
  """Trains; returns the exit code."""
  return training.main(
    sys.argv[1:] if argv is None else argv,
    Finetune,
    before=show_example,
    after=show_export,
  )


def show_example(setup: Setup, console: Console) -> None:
  """Prints one example, coloured by what is scored."""
  if setup.config.checkpoint is None:
    raise ValueError(
      'fine-tuning starts from a checkpoint: name a directory of transformers '
      'with --checkpoint; train.pretrain starts from random weights'
    )
  config, text = setup.config, setup.text
  table = shown(
    text.train,
    text.tokenizer,
    sequence_length=config.sequence_length,
    seed=config.seed,
  )
  console.print(table)


def show_export(setup: Setup, state: State, console: Console) -> None:
  """Prints how the weights become a checkpoint of transformers."""
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
