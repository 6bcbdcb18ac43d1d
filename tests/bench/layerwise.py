"""Compares layer-wise training of the quickstart with whole-tree training.

`python -m tests.bench.layerwise` trains configs/quickstart.py with 8-bit GaLore
four times, with the same steps, tokens and seed:

* with all gradients at once;
* layer by layer;
* layer by layer with four microbatches; a refresh uses the summed gradient;
* layer by layer with four parts, whose projected gradients are summed; a
  refresh uses only the gradient of the first part.

It prints the table and writes it to tests/bench/results/layerwise.json.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import rich.table
from rich.console import Console

from train.engine import metrics

CONFIG = 'configs/quickstart.py'
RESULTS = pathlib.Path(__file__).parent / 'results'

RULE = ['--optimizer', 'Galore8bit']
RULE += ['--optimizer.rank', '64', '--optimizer.gap', '50']
RULE += ['--optimizer.subspace', 'power']
LAYERWISE = [*RULE, '--update', 'Layerwise']

STEPS = {
  'whole tree': RULE,
  'layer-wise': LAYERWISE,
  'layer-wise, 4 microbatches': [*LAYERWISE, '--microbatches', '4'],
  'layer-wise, 4 summed parts': [*LAYERWISE, '--update.accumulate', '4'],
}

RATE = 0.01
"""Peak learning rate of all four runs."""


def run(
  directory: pathlib.Path, arguments: list[str], rate: float
) -> list[dict]:
  """Trains once and returns the lines of metrics.jsonl."""
  command = [sys.executable, '-m', 'train.pretrain', CONFIG, *arguments]
  command += ['--learning-rate', str(rate), '--run', str(directory)]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
  return metrics.read(directory / 'metrics.jsonl')


def summary(lines: list[dict]) -> dict[str, float]:
  """Returns the final validation metrics and the mean seconds of a step."""
  speeds = [line for line in lines if 'tokens_per_second' in line]
  seconds = [line['tokens'] / line['tokens_per_second'] for line in speeds]
  last = next(line for line in reversed(lines) if 'validation_loss' in line)
  return {
    'bits_per_byte': last['validation_bits_per_byte'],
    'perplexity': last['validation_perplexity'],
    'seconds': float(np.mean(seconds)),
  }


def main() -> None:
  """Trains all runs, prints the table and writes it."""
  rows = []
  with tempfile.TemporaryDirectory() as scratch:
    for name, arguments in STEPS.items():
      directory = pathlib.Path(scratch) / name.replace(' ', '-')
      lines = run(directory, arguments, RATE)
      last = next(x for x in reversed(lines) if 'validation_loss' in x)
      loss = last['validation_loss']
      first = rows[0]['loss'] if rows else loss
      row = {'step': name, 'loss': loss, 'ratio': loss / first}
      rows.append(row | summary(lines))
      print(rows[-1], flush=True)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'layerwise.json').write_text(json.dumps(rows, indent=1) + '\n')
  table = rich.table.Table(
    'step', 'validation loss', 'ratio', 'bits per byte', 's / step'
  )
  for row in rows:
    table.add_row(
      row['step'],
      f'{row["loss"]:.4f}',
      f'{row["ratio"]:.4f}',
      f'{row["bits_per_byte"]:.4f}',
      f'{row["seconds"]:.3f}',
    )
  Console().print(table)


if __name__ == '__main__':
  main()
