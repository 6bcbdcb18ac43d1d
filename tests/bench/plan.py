"""Draws the memory of a training step of LLaMA-7B with several methods.

`python -m tests.bench.plan` draws tests/bench/results/plan_7b.png from
plan_7b.json. The record is the output of

  .venv-plan/bin/python -m train.plan configs/llama_7b.py --batch-size 2 \\
    --plot /tmp/plan.png --json

which compiles the steps for an RTX 4090 and needs no GPU (`make plan` creates
this environment). `--record` reads such an output from a file and stores it.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from train.plan.cards import GPUS

RESULTS = pathlib.Path(__file__).parent / 'results'

GIB = 2**30
KEYS = (
  'config',
  'method',
  'device',
  'batch_size',
  'sequence_length',
  'parameter_bytes',
  'vocabulary_bytes',
  'basis_bytes',
  'moment_bytes',
  'gradient_bytes',
  'capacity_bytes',
  'total_bytes',
)
"""The fields of a plan that the picture uses."""


def parts(plan: dict[str, Any]) -> dict[str, int]:
  """Returns the parts of a plan in bytes, by name.

  >>> plan = dict.fromkeys(KEYS, 1) | {'total_bytes': 9, 'gradient_bytes': 7}
  >>> parts(plan)['gradients'], parts(plan)['activations and temporaries']
  (5, 0)
  """
  found = {
    'weights': plan['parameter_bytes'] + plan['vocabulary_bytes'],
    'bases': plan['basis_bytes'],
    'moments': plan['moment_bytes'],
  }
  left = plan['total_bytes'] - sum(found.values())
  # The compiler may hold less than all gradients at the same time.
  found['gradients'] = min(plan['gradient_bytes'], left)
  found['activations and temporaries'] = left - found['gradients']
  return found


def draw(plans: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws a bar for each plan, with its parts and the GPU's memory."""
  figure = Figure(figsize=(8, 3.6), layout='constrained')
  axes = figure.subplots()
  names = [plan['method'] for plan in plans]
  split = [parts(plan) for plan in plans]
  left = [0.0] * len(plans)
  colors = ('0.6', 'tab:green', 'tab:blue', 'tab:orange', 'gold')
  for part, color in zip(split[0], colors, strict=True):
    sizes = [found[part] / GIB for found in split]
    axes.barh(names, sizes, left=left, label=part, color=color)
    left = [a + b for a, b in zip(left, sizes, strict=True)]
  for y, total in enumerate(left):
    axes.annotate(
      f'{total:.1f}',
      (total, y),
      (4, 0),
      textcoords='offset points',
      va='center',
      fontsize=9,
      bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1},
    )
  first = plans[0]
  capacity, gpu = first['capacity_bytes'] / GIB, GPUS[first['device']].name
  axes.axvline(
    capacity,
    color='black',
    linestyle='--',
    linewidth=1,
    label=f'usable memory of the GPU ({capacity:.1f} GiB)',
  )
  axes.invert_yaxis()
  axes.set_xlim(right=1.1 * max(left))
  axes.set_xlabel('GiB of a training step (lower is better)', fontsize=9)
  axes.tick_params(labelsize=9)
  axes.set_title(
    f'{first["config"]}, {first["batch_size"]} x {first["sequence_length"]} '
    f'tokens, {gpu}',
    fontsize=10,
  )
  axes.legend(fontsize=9, loc='lower right')
  figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> None:
  """Draws the picture from the record."""
  parser = argparse.ArgumentParser('python -m tests.bench.plan')
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  parser.add_argument(
    '--record', type=pathlib.Path, help='output of train.plan to store first'
  )
  args = parser.parse_args(argv)
  record = args.results / 'plan_7b.json'
  if args.record is not None:
    found = json.loads(args.record.read_text())
    kept = [{key: plan[key] for key in KEYS} for plan in found]
    record.write_text(json.dumps(kept, indent=1) + '\n')
  plans = json.loads(record.read_text())
  draw(plans, args.results / 'plan_7b.png')


if __name__ == '__main__':
  main()
