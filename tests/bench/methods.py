"""Every method on the quickstart's corpus, each at its best learning rate.

`python -m tests.bench.methods` trains a small LLaMA with each method: on seed
0 at three learning rates, and at further ones while the best is the first or
the last; then at the best on seeds 1 and 2. All runs see the same tokens. It
writes each run to tests/bench/results/methods.json as it ends and skips those
that are there, so that a stopped bench goes on; and then the table to
methods.md. `--only` takes some methods, the other options another size.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.markdown import Markdown

from models.llama import Layers, LlamaConfig
from train.data.batches import batches, validation_batches
from train.data.corpus import Chitchat
from train.data.tokenizer import train_tokenizer
from train.method import CLASSES, METHODS
from train.step import State, init, make_step
from train.task import perplexity

RESULTS = pathlib.Path(__file__).parent / 'results'
SEEDS = (0, 1, 2)
MAX_RATES = 5
"""Rates tried of a method, however far the best one is."""
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Size:
  """What all runs share; results of another size do not mix."""

  width: int = 128
  """Of the model; its mlp is 2.75 times as wide, and it has four layers."""
  vocab_size: int = 2048
  steps: int = 100
  batch_size: int = 4
  sequence_length: int = 128
  eval_batches: int = 16
  gap: int = 50
  """Steps between two subspaces."""

  @property
  def rank(self) -> int:
    """A quarter of the width: a quarter of Adam's moments."""
    return self.width // 4

  def layers(self) -> Layers:
    """Returns the model."""
    return Layers(
      LlamaConfig(
        vocab_size=self.vocab_size,
        width=self.width,
        mlp_width=self.width * 11 // 4,
        num_heads=4,
        num_layers=4,
      )
    )


class Rule(NamedTuple):
  """A transformation at learning rate 1, and where its best rate may be."""

  make: Callable[[], optax.GradientTransformation]
  rates: tuple[float, ...]


SMALL, LARGE = (1e-3, 3e-3, 0.01), (3e-3, 0.01, 0.03)

RATES = {
  **dict.fromkeys(('AdamW', 'Adam8bit', 'Frugal', 'Badam'), SMALL),
  **{'AdaLomo': (0.03, 0.1, 0.3), 'Lomo': (0.1, 0.3, 1.0)},
}
"""Rates to begin with; those of a method that is not here are LARGE."""

VARIANTS = {
  'GaLore, rotate': ('Galore', {'moments': 'rotate'}),
  'FRUGAL, columns': ('Frugal', {'subspace': 'columns'}),
  'FRUGAL, power': ('Frugal', {'subspace': 'power'}),
  'Fira, 8 bits': ('Fira', {'bits': 8}),
  'APOLLO, 8 bits': ('Apollo', {'bits': 8}),
}
"""What is measured beside each method of `train.method`."""


def methods(size: Size) -> dict[str, Rule]:
  """Returns what is compared, by its name in the table."""
  ours = {row.title: (name, {}) for name, row in METHODS.items()}
  shared = {
    **{'rank': size.rank, 'density': 0.25, 'gap': size.gap},
    'update_proj_gap': size.gap,
    # In the place of a hundred steps a layer: every layer has some turns.
    **{'switch_every': 10, 'train_rest': True},
  }
  found = {}
  for title, (name, own) in {**ours, **VARIANTS}.items():
    known = {field.name for field in dataclasses.fields(CLASSES[name])}
    given = {key: shared[key] for key in shared if key in known} | own
    make = functools.partial(CLASSES[name](**given).build, 1.0)
    found[title] = Rule(make, RATES.get(name, LARGE))
  return found


class Bench:
  """The data, and a run of a method on it."""

  def __init__(self, size: Size):
    """Trains the tokenizer."""
    self.size, self.layers = size, size.layers()
    self.documents = Chitchat().open('train')
    self.tokenizer = train_tokenizer(
      self.documents.stream(seed=0, repeat=False), vocab_size=size.vocab_size
    )
    shape = dict(
      batch_size=size.batch_size, sequence_length=size.sequence_length
    )
    self.held_out = list(
      validation_batches(
        Chitchat().open('validation'),
        self.tokenizer,
        num_batches=size.eval_batches,
        **shape,
      )
    )
    self.batches = functools.cache(
      lambda seed: [
        batch
        for batch, _ in zip(
          batches(self.documents, self.tokenizer, seed=seed, **shape),
          range(size.steps),
          strict=False,
        )
      ]
    )
    self.loss = jax.jit(self.layers)

  def compiled(self, method: Rule) -> tuple[Callable, Callable]:
    """Returns `key -> state` and `(state, batch, rate) -> (state, metrics)`."""

    def optimizer(rate: Any) -> tuple[optax.GradientTransformation, Callable]:
      # Without decay an update is proportional to its learning rate, so one
      # compiled step serves all rates.
      schedule = lambda count: rate * self.shape(count)
      clip = optax.clip_by_global_norm(1.0)
      scale = optax.scale_by_schedule(schedule)
      return optax.chain(clip, method.make(), scale), schedule

    def start(key: jax.Array) -> State:
      return init(self.layers.init(key), optimizer(1.0)[0])

    def step(state: State, batch: Any, rate: Any) -> tuple[State, Any]:
      tx, schedule = optimizer(rate)
      return make_step(self.layers, tx, schedule=schedule)(state, batch)

    start, step = jax.jit(start), jax.jit(step, donate_argnums=0)
    # Compiling is no part of a run's time.
    jax.block_until_ready(
      step(start(jax.random.key(0)), self.batches(0)[0], 0.1)
    )
    return start, step

  def shape(self, count: Any) -> Any:
    """Returns the learning rate's share of its highest one."""
    steps = self.size.steps
    return optax.warmup_cosine_decay_schedule(
      0.0,
      1.0,
      warmup_steps=round(0.1 * steps),
      decay_steps=steps,
      end_value=0.1,
    )(count)

  def run(
    self, start: Callable, step: Callable, rate: float, seed: int
  ) -> dict[str, float]:
    """Trains once; returns what the table shows of it."""
    state = jax.block_until_ready(start(jax.random.key(seed)))
    clock = time.perf_counter()
    for batch in self.batches(seed):
      state, metrics = step(state, batch, rate)
    loss = float(metrics['loss'])
    seconds = (time.perf_counter() - clock) / self.size.steps
    held_out = perplexity(self.loss, state.params, batches=self.held_out)
    bits = held_out['bits_per_byte']
    return {
      # JSON has no infinity: a run that is not finite is as bad as can be.
      'bits_per_byte': bits if math.isfinite(bits) else 99.0,
      'loss': loss if math.isfinite(loss) else 99.0,
      'seconds': seconds,
    }

  def state_bytes(self, method: Rule) -> int:
    """Returns the bytes of a method's state."""
    shapes = jax.eval_shape(self.layers.init, jax.random.key(0))
    state = jax.eval_shape(lambda params: method.make().init(params), shapes)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def next_run(
  rates: tuple[float, ...], found: dict[tuple[float, int], float]
) -> tuple[float, int] | None:
  """Returns the next (rate, seed) to run, None where all is known.

  Args:
    rates: to try at first.
    found: bits per byte by rate and seed.

  >>> next_run((0.01, 0.03), {(0.01, 0): 3.0})
  (0.03, 0)
  >>> next_run((0.01, 0.03), {(0.01, 0): 3.0, (0.03, 0): 2.0})
  (0.1, 0)
  >>> next_run((0.01,), {(0.01, 0): 2.0, (0.03, 0): 3.0, (0.003, 0): 3.0})
  (0.01, 1)
  """
  tuned = {rate for rate, seed in found if seed == 0}
  for rate in rates:
    if rate not in tuned:
      return rate, 0
  best = best_rate(found)
  place = LADDER.index(best)
  for rate in LADDER[max(place - 1, 0) : place + 2]:
    if rate not in tuned and len(tuned) < MAX_RATES:
      return rate, 0
  missing = (seed for seed in SEEDS if (best, seed) not in found)
  return next(((best, seed) for seed in missing), None)


def best_rate(found: dict[tuple[float, int], float]) -> float:
  """Returns the rate that was best on seed 0.

  >>> best_rate({(0.1, 0): 3.0, (0.2, 0): 2.0, (0.1, 1): 1.0})
  0.2
  """
  tuned = {rate: bits for (rate, seed), bits in found.items() if seed == 0}
  return min(tuned, key=lambda rate: tuned[rate])


def by_rate_and_seed(runs: list[dict]) -> dict[tuple[float, int], float]:
  """Returns the bits per byte of one method's runs."""
  return {(run['rate'], run['seed']): run['bits_per_byte'] for run in runs}


def row(name: str, runs: list[dict]) -> dict[str, Any]:
  """Returns the table's line of one method: its runs at the best rate."""
  rate = best_rate(by_rate_and_seed(runs))
  bits = [run['bits_per_byte'] for run in runs if run['rate'] == rate]
  return {
    'method': name,
    'rate': rate,
    'mean': float(np.mean(bits)),
    'least': min(bits),
    'most': max(bits),
    'seeds': len(bits),
    'state_bytes': runs[0]['state_bytes'],
  }


NOTE = """
A hundred steps of a small model rank methods by how fast they start: nothing
here says which is best in the end. Nor does the order of GaLore and AdamW say
which is better: `scale` gives the low-rank methods a second learning rate for
their matrices, and AdamW has one for all weights. State bytes are exact.
"""


def markdown(
  size: Size, rows: list[dict[str, Any]], date: datetime.date
) -> str:
  """Returns the page of results: caption, table, what it says."""
  shapes = jax.eval_shape(size.layers().init, jax.random.key(0))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  lines = [
    '# Every method on a small model',
    '',
    f'{date:%-d %B %Y}: `.venv/bin/python -m tests.bench.methods`.',
    f'A LLaMA of {count:,} parameters, {size.steps} steps of {size.batch_size}'
    f' x {size.sequence_length} tokens, rank {size.rank} or density 0.25, a'
    f' new subspace every {size.gap} steps; validation bits per byte at the'
    ' best learning rate of seed 0, mean and range over seeds.',
    '',
    '| method | learning rate | bits per byte | range | seeds | state bytes |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  for found in sorted(rows, key=lambda found: found['mean']):
    lines.append(
      f'| {found["method"]} | {found["rate"]:g} | {found["mean"]:.3f} |'
      f' {found["least"]:.3f} - {found["most"]:.3f} | {found["seeds"]} |'
      f' {found["state_bytes"]:,} |'
    )
  return '\n'.join(lines) + '\n' + NOTE


def load(path: pathlib.Path, size: Size) -> list[dict[str, Any]]:
  """Returns the runs of an earlier bench, which must be of this size."""
  if not path.exists():
    return []
  saved = json.loads(path.read_text())
  if saved['size'] != dataclasses.asdict(size):
    raise ValueError(
      f'{path} holds runs of {saved["size"]}, not of'
      f' {dataclasses.asdict(size)}: move it away or name another --results'
    )
  return saved['runs']


def save(path: pathlib.Path, text: str) -> None:
  """Writes a file at once, so that a stop leaves the old one."""
  new = path.with_suffix('.new')
  new.write_text(text)
  new.replace(path)


def main() -> None:
  """Trains what is missing, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  for field in dataclasses.fields(Size):
    flag = f'--{field.name.replace("_", "-")}'
    parser.add_argument(flag, type=int, default=field.default)
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  parser.add_argument('--only', nargs='+', help='names of methods')
  arguments = vars(parser.parse_args())
  directory, only = arguments.pop('results'), arguments.pop('only')
  size = Size(**arguments)
  directory.mkdir(parents=True, exist_ok=True)
  path = directory / 'methods.json'
  runs = load(path, size)
  bench = Bench(size)
  for name, method in methods(size).items():
    if only and name not in only:
      continue
    mine = [run for run in runs if run['method'] == name]
    compiled = None
    while (due := next_run(method.rates, by_rate_and_seed(mine))) is not None:
      compiled = compiled or bench.compiled(method)
      rate, seed = due
      mine.append(
        {'method': name, 'rate': rate, 'seed': seed}
        | bench.run(*compiled, rate, seed)
        | {'state_bytes': bench.state_bytes(method)}
      )
      runs.append(mine[-1])
      content = {'size': dataclasses.asdict(size), 'runs': runs}
      save(path, json.dumps(content, indent=1) + '\n')
      print(mine[-1], flush=True)
  names = dict.fromkeys(run['method'] for run in runs)
  rows = [row(n, [r for r in runs if r['method'] == n]) for n in names]
  page = markdown(size, rows, datetime.date.today())
  save(directory / 'methods.md', page)
  Console().print(Markdown(page))


if __name__ == '__main__':
  main()
