"""Measures the data loader without training, in tokens per second.

`python -m tests.bench.loader` reads, tokenizes and packs the quickstart's
dialogues from memory, from a .jsonl file and from a text file. It prints the
tokens per second, also as a multiple of the training speed of the 60M model on
two cores (`MODEL`); the goal is a factor of 20. The results are written to
tests/bench/results/loader.json.
"""

import itertools
import json
import pathlib
import tempfile
import time

import rich.table
from rich.console import Console

from train.data.batches import batches
from train.data.corpus import Chitchat, Documents, TextFiles
from train.data.tokenizer import Tokenizer
from train.engine.command import load
from train.tasks.text import prepare_tokenizer

CONFIG = 'configs/quickstart.py'
RESULTS = pathlib.Path(__file__).parent / 'results'

MODEL = 560
"""Approximate tokens per second of training configs/llama_60m.py on 2 cores."""

SECONDS = 20.0
"""Each source is measured for at least this time."""

WARM_UP = 3
"""Batches that are not timed, because the loader prefetches some batches."""

SEPARATOR = '\n<|endoftext|>\n'


def sources(directory: pathlib.Path) -> dict[str, Chitchat | TextFiles]:
  """Returns the same dialogues from memory and from files."""
  texts = list(Chitchat().open('train').stream(seed=0, repeat=False))
  lines, plain = directory / 'train.jsonl', directory / 'train.txt'
  lines.write_text(''.join(json.dumps({'text': x}) + '\n' for x in texts))
  plain.write_text(SEPARATOR.join(texts))
  return {
    'Chitchat': Chitchat(),
    'TextFiles, .jsonl': TextFiles(str(lines)),
    'TextFiles, .txt': TextFiles(str(plain), separator=SEPARATOR),
  }


def measure(
  documents: Documents, tokenizer: Tokenizer, seconds: float
) -> float:
  """Returns the tokens per second that the loader produces from a corpus."""
  made = batches(
    documents, tokenizer, batch_size=8, sequence_length=256, seed=0
  )
  for _ in itertools.islice(made, WARM_UP):
    pass
  count, start = 0, time.perf_counter()
  while (spent := time.perf_counter() - start) < seconds:
    count += next(made)['inputs'].size
  return count / spent


def main() -> None:
  """Measures all sources, prints the table and writes it."""
  config, rows = load(CONFIG), []
  with tempfile.TemporaryDirectory() as scratch:
    for name, corpus in sources(pathlib.Path(scratch)).items():
      documents = corpus.open('train')
      tokenizer = prepare_tokenizer(config, documents)
      rate = measure(documents, tokenizer, SECONDS)
      row = {'source': name, 'vocab_size': tokenizer.vocab_size}
      row |= {'tokens_per_second': rate, 'times': rate / MODEL}
      rows.append(row)
      print(row, flush=True)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'loader.json').write_text(json.dumps(rows, indent=1) + '\n')
  table = rich.table.Table('source', 'tokens / s', 'times the 60M model')
  for row in rows:
    rate, times = row['tokens_per_second'], row['times']
    table.add_row(row['source'], f'{rate:,.0f}', f'{times:.0f}')
  Console().print(table)


if __name__ == '__main__':
  main()
