"""Measures how `Staggered` shortens the slowest step of the 60M model.

`python -m tests.bench.staggered` trains the model with each subspace finder,
once with `gap=200`, which refreshes all bases in the same step, and once with
`gap=Staggered(200)`, which spreads the refreshes over the gap. It prints the
table and writes it to tests/bench/results/staggered.json. The runs are
interleaved step by step and repeated `--rounds` times. The time of a step is
the minimum over these rounds, because other programs can only slow it down.
Every run finds all its bases at step 0, so this step is reported separately.
The text is chitchat-dataset.
"""

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import optax
import rich.table
from rich.console import Console

from galore_optax import Staggered
from models.llama import Layers, llama
from train.data.batches import Batch, batches
from train.data.corpus import Chitchat
from train.data.tokenizer import train_tokenizer
from train.engine import step as training
from train.method import METHODS

RESULTS = pathlib.Path(__file__).parent / 'results'

MODEL = llama('60m', vocab_size=4096)
SUBSPACES = ('svd', 'gram')
RATE = 0.005


def text(batch_size: int, sequence_length: int) -> Iterator[Batch]:
  """Returns an endless iterator over batches."""
  documents = Chitchat().open('train')
  tokenizer = train_tokenizer(
    documents.stream(seed=0, repeat=False), vocab_size=MODEL.vocab_size
  )
  return batches(
    documents,
    tokenizer,
    batch_size=batch_size,
    sequence_length=sequence_length,
    seed=0,
  )


def start(
  subspace: str, gap: int | Staggered, batch: Batch
) -> tuple[Callable, training.State]:
  """Returns the compiled step and the initial state of one run."""
  layers = Layers(MODEL)
  preset = METHODS['Galore'].preset
  tx = preset(RATE, rank=128, gap=gap, subspace=subspace)
  state = training.init(layers.init(jax.random.key(0)), tx)
  step = training.make_step(layers, tx, schedule=optax.constant_schedule(RATE))
  return step.lower(state, batch).compile(), state


def timed(
  step: Callable, state: training.State, batch: Batch
) -> tuple[training.State, float]:
  """Returns the state after a step, and the seconds of the step."""
  begin = time.perf_counter()
  state, _ = jax.block_until_ready(step(state, batch))
  return state, time.perf_counter() - begin


def measure(
  gap: int, steps: int, stream: Iterator[Batch], subspaces: Sequence[str]
) -> dict[tuple[str, bool], list[float]]:
  """Returns the seconds of each step, by `(subspace, is staggered)`."""
  first = next(stream)
  runs = {
    (subspace, in_turns): start(
      subspace, Staggered(gap) if in_turns else gap, first
    )
    for subspace in subspaces
    for in_turns in (False, True)
  }
  states = {kind: state for kind, (_, state) in runs.items()}
  seconds = {kind: [] for kind in runs}
  for count in range(steps):
    batch = next(stream) if count else first
    for kind, (step, _) in runs.items():
      states[kind], duration = timed(step, states[kind], batch)
      seconds[kind].append(duration)
    if count % 50 == 0:
      print('step', count, flush=True)
  return seconds


def least(
  rounds: Sequence[dict[tuple[str, bool], list[float]]],
) -> dict[tuple[str, bool], list[float]]:
  """Returns the minimum over rounds of the seconds of each step.

  >>> least([{('svd', True): [3.0, 1.0]}, {('svd', True): [2.0, 9.0]}])
  {('svd', True): [2.0, 1.0]}
  """
  return {
    kind: [min(times) for times in zip(*(r[kind] for r in rounds), strict=True)]
    for kind in rounds[0]
  }


def summary(
  gap: int, seconds: dict[tuple[str, bool], list[float]]
) -> list[dict]:
  """Returns a table row for each run.

  `times_lower` is the slowest step with `gap` divided by the slowest step of
  this run; both leave out step 0.
  """
  rows = []
  for (subspace, in_turns), all_seconds in seconds.items():
    first, *later = all_seconds
    at_once = max(seconds[subspace, False][1:])
    rows.append(
      {
        'subspace': subspace,
        'gap': f'Staggered({gap})' if in_turns else str(gap),
        'first': first,
        'median': statistics.median(later),
        'mean': statistics.mean(later),
        'slowest': max(later),
        'slowest_at': 1 + later.index(max(later)),
        'times_lower': at_once / max(later),
      }
    )
  return rows


def show(rows: list[dict]) -> None:
  """Prints the table."""
  columns = ('subspace', 'gap', 'step 0', 'median', 'slowest')
  table = rich.table.Table(
    *columns, 'at step', 'times lower', title='Seconds per step'
  )
  for row in rows:
    times = (row[key] for key in ('first', 'median', 'slowest'))
    table.add_row(
      row['subspace'],
      row['gap'],
      *(f'{x:.3f}' for x in times),
      str(row['slowest_at']),
      f'{row["times_lower"]:.1f} x',
    )
  Console().print(table)


def main() -> None:
  """Measures all runs, prints the table and writes it."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--gap', type=int, default=200)
  parser.add_argument('--batch-size', type=int, default=1)
  parser.add_argument('--sequence-length', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--subspaces', nargs='+', default=SUBSPACES)
  options = parser.parse_args()
  rounds = []
  for _ in range(options.rounds):
    stream = text(options.batch_size, options.sequence_length)
    rounds.append(
      measure(options.gap, options.steps, stream, options.subspaces)
    )
  rows = summary(options.gap, least(rounds))
  show(rows)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'staggered.json').write_text(
    json.dumps({**vars(options), 'rows': rows}, indent=1) + '\n'
  )


if __name__ == '__main__':
  main()
