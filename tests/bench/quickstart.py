"""The quickstart under three optimizers, each at its best of three rates.

`python -m tests.bench.quickstart` trains nine runs of configs/quickstart.py
(same steps, tokens and seed), prints the table, and writes it with a plot to
tests/bench/results/quickstart.md. A step's seconds are a mean over the whole
run, refreshes included, of the fastest of the optimizer's three runs, which are
interleaved with those of the others: what else runs on a machine only adds.
"""

import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import rich.table
from matplotlib.figure import Figure
from rich.console import Console

import galore_optax
from models.llama import Layers
from train import metrics
from train.command import parse

RESULTS = pathlib.Path(__file__).parent / 'results'
CONFIG = 'configs/quickstart.py'

OPTIMIZERS = {
  'AdamW': (['--optimizer', 'AdamW'], (0.001, 0.003, 0.01)),
  'galore_optax': ([], (0.003, 0.01, 0.03)),
  'optax.contrib.galore': (
    ['--optimizer', 'OptaxGalore', '--optimizer.rank', '64']
    + ['--optimizer.update-proj-gap', '50'],
    (0.001, 0.003, 0.01),
  ),
}


NOTE = """\
These are records of bytes and seconds. The lower loss of GaLore is an artefact
of two learning rates against one: `scale=0.25` gives GaLore's matrices a
quarter of the rate that embedding, head and norms have, and AdamW's one rate
serves both. With a tenth of the rate on its matrices AdamW is ahead of GaLore
by 2.7% (one run by hand: this bench has no command for it yet).
`optax.contrib.galore` as it comes projects the embedding and the head alone: it
sees no matrix in stacked layers.
"""
"""What stands below the table until methods have two rates each."""


def run(
  directory: pathlib.Path, arguments: list[str], rate: float
) -> list[dict]:
  """Trains once; returns the lines of its metrics."""
  command = [sys.executable, '-m', 'train.pretrain', CONFIG, *arguments]
  command += ['--learning-rate', str(rate), '--run', str(directory)]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  return metrics.read(directory / 'metrics.jsonl')


def summary(lines: list[dict]) -> dict[str, float]:
  """Returns what the table shows of one run."""
  speeds = [line for line in lines if 'tokens_per_second' in line]
  seconds = [line['tokens'] / line['tokens_per_second'] for line in speeds]
  last = next(line for line in reversed(lines) if 'validation_loss' in line)
  return {
    'bits_per_byte': last['validation_bits_per_byte'],
    'perplexity': last['validation_perplexity'],
    'seconds': float(np.mean(seconds)),
  }


def state_bytes(arguments: list[str]) -> int:
  """Returns the bytes that an optimizer keeps of the quickstart's model."""
  config = parse([CONFIG, *arguments]).config
  shapes = jax.eval_shape(Layers(config.model).init, jax.random.key(0))
  rows = galore_optax.describe(config.transformation(), shapes)
  return sum(row.bytes for row in rows)


def main() -> None:
  """Trains, prints, writes."""
  runs: dict[str, dict[float, list[dict]]] = {name: {} for name in OPTIMIZERS}
  with tempfile.TemporaryDirectory() as scratch:
    for number in range(3):
      for name, (arguments, rates) in OPTIMIZERS.items():
        directory = pathlib.Path(scratch) / f'{name}-{number}'
        runs[name][rates[number]] = run(directory, arguments, rates[number])
        shown = summary(runs[name][rates[number]])
        print(f'{name} at {rates[number]}: {shown}', flush=True)
  rows = []
  for name, (arguments, rates) in OPTIMIZERS.items():
    found = {rate: summary(runs[name][rate]) for rate in rates}
    best = min(rates, key=lambda rate: found[rate]['bits_per_byte'])
    rows.append(
      {
        'optimizer': name,
        'learning_rate': best,
        **found[best],
        'seconds': min(x['seconds'] for x in found.values()),
        'state_bytes': state_bytes(arguments),
        'all_rates': {
          str(rate): found[rate]['bits_per_byte'] for rate in rates
        },
      }
    )
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'quickstart.json').write_text(json.dumps(rows, indent=1) + '\n')
  (RESULTS / 'quickstart.md').write_text(markdown(rows, datetime.date.today()))
  show(rows)
  plot(
    {
      row['optimizer']: runs[row['optimizer']][row['learning_rate']]
      for row in rows
    }
  )


def markdown(rows: list[dict], date: datetime.date) -> str:
  """Returns the page of results: what was run, the table, what it says."""
  lines = [
    '# The quickstart under three optimizers',
    '',
    f'{date:%-d %B %Y}: `.venv/bin/python -m tests.bench.quickstart`. Same',
    'steps, tokens and seed; each optimizer at its best of three learning',
    'rates; the seconds are those of the fastest of its runs.',
    '',
    '| optimizer | best rate | bits per byte | perplexity per token'
    ' | optimizer bytes | seconds a step | bits per byte at each rate |',
    '| --- | --- | --- | --- | --- | --- | --- |',
  ]
  for row in rows:
    rates = (f'{rate}: {x:.3f}' for rate, x in row['all_rates'].items())
    lines.append(
      f'| {row["optimizer"]} | {row["learning_rate"]} |'
      f' {row["bits_per_byte"]:.3f} | {row["perplexity"]:.1f} |'
      f' {row["state_bytes"]:,} | {row["seconds"]:.2f} | {", ".join(rates)} |'
    )
  lines += ['', NOTE, '![Loss curves](quickstart.png)', '']
  return '\n'.join(lines)


def show(rows: list[dict]) -> None:
  """Prints the table."""
  table = rich.table.Table(
    *('optimizer', 'best rate', 'bits per byte', 'perplexity'),
    *('state bytes', 's / step'),
  )
  for row in rows:
    table.add_row(
      row['optimizer'],
      f'{row["learning_rate"]}',
      f'{row["bits_per_byte"]:.3f}',
      f'{row["perplexity"]:.1f}',
      f'{row["state_bytes"]:,}',
      f'{row["seconds"]:.3f}',
    )
  Console().print(table)


def plot(best: dict[str, list[dict]]) -> None:
  """Draws the loss of each optimizer's best run."""
  figure = Figure(figsize=(7, 4), dpi=150, layout='constrained')
  axes = figure.subplots()
  for number, (name, lines) in enumerate(best.items()):
    color = f'C{number}'
    losses = [(x['step'], x['loss']) for x in lines if 'loss' in x]
    axes.plot(
      *zip(*losses, strict=True), color=color, alpha=0.35, linewidth=0.8
    )
    held_out = [
      (x['step'], x['validation_loss']) for x in lines if 'validation_loss' in x
    ]
    axes.plot(*zip(*held_out, strict=True), 'o-', color=color, label=name)
  axes.set(
    xlabel='step',
    ylabel='loss (nats per token)',
    title='Quickstart: training (thin) and validation',
  )
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(RESULTS / 'quickstart.png')


if __name__ == '__main__':
  main()
