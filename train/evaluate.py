"""Validates the newest checkpoint of a run: `python -m train.evaluate RUN`."""

from train import signals

if __name__ == '__main__':
  signals.end_quietly()  # before the imports below, which take seconds

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

from train import checkpoint, machine, metrics
from train.command import check_least, user_errors
from train.run import Run
from train.task import Text, language_model


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the perplexity of a run's newest checkpoint."""
  parser = argparse.ArgumentParser(
    'python -m train.evaluate', description=main.__doc__
  )
  parser.add_argument('run', type=pathlib.Path, help='directory of the run')
  parser.add_argument(
    '--batches',
    type=int,
    help='number of batches (default: the whole validation split)',
  )
  args = parser.parse_args(argv)
  machine.cache_compilations()
  with user_errors():
    check_least(1, batches=args.batches)
    run = Run(args.run)
    config = dataclasses.replace(run.config(), eval_batches=args.batches)
    task = language_model(config)
    held_out = config.corpus.open('validation')
    evaluate = task.evaluate(Text(None, held_out, run.tokenizer()))
    params = checkpoint.restore_params(run.checkpoints_path, task)
  print(f'validation: {metrics.describe(evaluate(params))}')


if __name__ == '__main__':
  main()
