"""Measures the effect of single design choices of GaLore on the loss.

`python -m configs.studies.ablations` trains the model of
`configs.studies.methods` on chitchat-dataset, with 1 M tokens for each run. The
base run is GaLore with the best two learning rates of that study. Each other
run changes one choice of it: the rounding of weights and moments, b1, b2, gap,
rank, scale, the moments at a refresh, the gradient that a refresh uses, the
projected side, the projected weights, or the axis of 8-bit blocks. Further runs
replace GaLore by Fira or APOLLO. A change may need another learning rate, so
each choice can run at 1, 1/3 and 3 times the base's rate for matrices, and the
table has the best of these runs. The base runs with three seeds, which measure
how much of a difference is random.

Each run is added to results/ablations.json when it ends. Runs that are in this
file are skipped, so an interrupted study continues. The table is written to
ablations.md. `--hours` limits the duration of a call and `--only`
selects groups of rows. A run uses the config of `configs.studies.methods`, with
the changes that are stored in its record.
"""

import argparse
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from configs.studies.comparison import command
from configs.studies.comparison.intervals import less
from configs.studies.comparison.results import firsts, machines
from configs.studies.comparison.runner import Runner as MethodRunner
from configs.studies.comparison.runs import Runs, save, until
from configs.studies.comparison.study import Job as MethodJob
from configs.studies.comparison.text import Size as ModelSize
from configs.studies.comparison.text import unshuffled
from configs.studies.methods import Methods
from galore_optax.precision import at_least_float32
from galore_optax.quantized.array import dequantize_tree, quantize
from train.config import Config, Layerwise
from train.engine import step as step_lib
from train.engine.task import task_of
from train.method import Apollo, Fira, Galore

CORPUS = 'chitchat'
FACTORS = (1.0, 1 / 3, 3.0)
"""The learning rates that are tried, relative to the base's for matrices."""

Rounding: TypeAlias = Callable[[str, jax.Array], jax.Array]
"""`(name of the moment, moment) -> rounded moment`, still in float32."""


class Choice(NamedTuple):
  """One row of the table: the difference to the unchanged method."""

  table: str
  """Name of the group of rows."""
  name: str
  changes: dict[str, Any]
  """New values of config fields, by the path of the field."""
  keeps: Rounding | None = None
  """Rounds the moments after each update; None keeps them exact."""
  factors: tuple[float, ...] = FACTORS
  """Learning rates that are tried, relative to the base's for matrices."""
  optimizer: Callable[..., Any] = Galore
  """Builds the method's config from rank, gap and scale."""


class Job(NamedTuple):
  """The settings that identify one run."""

  table: str
  name: str
  factor: float
  seed: int


def to_bfloat16(_: str, x: jax.Array) -> jax.Array:
  """Rounds a moment to bfloat16 and returns it in float32."""
  return at_least_float32(x.astype(jnp.bfloat16))


def to_8_bits(name: str, x: jax.Array, *, along: int = -1) -> jax.Array:
  """Rounds a moment to 8 bits, in blocks of 256 along one of the last two axes.

  Vectors and tensors with fewer than 4,096 elements are not rounded.
  """
  if x.ndim < 2 or x.size < 4096:
    return x
  code = 'unsigned' if name == 'nu' else 'signed'
  # Quantization forms blocks along the last axis.
  rows = jnp.swapaxes(x, -1, along)
  rounded = dequantize_tree(quantize(rows, code=code, block_size=256))
  return jnp.swapaxes(rounded, -1, along)


def second(keeps: Rounding) -> Rounding:
  """Returns a rounding that applies `keeps` to second moments only."""

  def rounded(name: str, x: jax.Array) -> jax.Array:
    return keeps(name, x) if name == 'nu' else x

  return rounded


BASE = Choice('base', 'GaLore', {})
_LAYERS = '.*(attention|mlp)/.*kernel'
_bfloat16 = {'model.param_dtype': 'bfloat16', 'model.dtype': 'bfloat16'}
_rounded = {'update': Layerwise(weights='rounded')}


def one(table: str, field: str, values: Sequence[Any]) -> list[Choice]:
  """Returns a choice for each value of one config field."""
  name = field.split('.')[-1]
  return [Choice(table, f'{name} {value}', {field: value}) for value in values]


def apollo(*, scale: float, **options: Any) -> Any:
  """Returns APOLLO with updates multiplied by `scale`, like GaLore's.

  APOLLO itself multiplies them by the square root of its scale.
  """
  return Apollo(scale=scale**2, **options)


CHOICES = [
  BASE,
  Choice('weights', 'computed in bfloat16', {'model.dtype': 'bfloat16'}),
  Choice('weights', 'bfloat16, sums to nearest', _bfloat16),
  Choice('weights', 'bfloat16, sums stochastic', _bfloat16 | _rounded),
  Choice('second moments', 'bfloat16, to nearest', {}, second(to_bfloat16)),
  Choice('second moments', '8 bits', {}, second(to_8_bits)),
  *one('second moments', 'optimizer.b2', (0.99, 0.95)),
  *one('first moments', 'optimizer.b1', (0.5, 0.0)),
  *one('gap', 'optimizer.gap', (100, 200, 500, 1000)),
  *one('rank', 'optimizer.rank', (8, 16, 64)),
  *(
    Choice('scale', f'scale {factor:g} of the base', {}, factors=(factor,))
    for factor in (0.1, 0.25, 0.5, 2.0)
  ),
  *one('moments at a refresh', 'optimizer.moments', ('reset', 'rotate')),
  Choice(
    'gradient of a refresh',
    'a quarter of the batch',
    {'update': Layerwise(accumulate=4)},
  ),
  *one('side', 'optimizer.side', ('reverse_std', 'left', 'right', 'full')),
  Choice(
    'projected',
    'embedding too',
    {'optimizer.targets': (_LAYERS, 'embed/embedding')},
  ),
  Choice(
    'projected', 'head too', {'optimizer.targets': (_LAYERS, 'lm_head/kernel')}
  ),
  Choice('both moments in 8 bits', 'blocks along n', {}, to_8_bits),
  Choice(
    'both moments in 8 bits',
    'blocks along r',
    {},
    functools.partial(to_8_bits, along=-2),
  ),
  *(
    Choice('scaled by channel', name, changes, optimizer=optimizer)
    for name, optimizer, changes in (
      ('Fira, outside at the rate of the rest', Fira, {}),
      ('APOLLO', apollo, {}),
      ('APOLLO, rank 64', apollo, {'optimizer.rank': 64}),
      ('APOLLO, b1 0', apollo, {'optimizer.b1': 0.0}),
      ('APOLLO, no limit', apollo, {'optimizer.limit': math.inf}),
    )
  ),
]


def changed(config: Any, changes: dict[str, Any]) -> Any:
  """Returns a copy of a dataclass with new values of fields, given by path.

  >>> changed(Galore(rank=8), {'rank': 4, 'gap': 50}).rank
  4
  """
  for path, value in changes.items():
    name, _, rest = path.partition('.')
    new = changed(getattr(config, name), {rest: value}) if rest else value
    config = dataclasses.replace(config, **{name: new})
  return config


def keeping(
  tx: optax.GradientTransformation, keeps: Rounding
) -> optax.GradientTransformation:
  """Returns a transformation that rounds its moments after each update."""

  def rounded(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    names = [getattr(key, 'name', None) for key in path]
    known = [name for name in names if name in ('mu', 'nu')]
    return keeps(known[0], x) if known else x

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = tx.update(updates, state, params)
    return updates, jax.tree_util.tree_map_with_path(rounded, state)

  return optax.GradientTransformation(tx.init, update)


class Size(NamedTuple):
  """Sizes that all runs share."""

  steps: int = 1000
  gap: int = 50
  seeds: int = 3
  model: ModelSize = ModelSize()


SIZE = Size()


class Runner:
  """Trains single runs."""

  def __init__(self, size: Size, rates: tuple[float, float]) -> None:
    """Stores the settings. The first run reads the text.

    Args:
      size: sizes that all runs share.
      rates: the base's learning rates of the matrices and of all other weights.
    """
    self.size, self.rates = size, rates
    self.methods = MethodRunner(Methods(size.model), pathlib.Path())

  def config(self, job: MethodJob, choice: Choice, factor: float) -> Config:
    """Returns the config of a run."""
    rank, scale = self.size.model.rank, factor * job.matrix / job.rest
    base = dataclasses.replace(
      self.methods.config(job),
      optimizer=choice.optimizer(rank=rank, gap=self.size.gap, scale=scale),
      learning_rate=job.rest,
    )
    return changed(base, choice.changes)

  def run(self, choice: Choice, factor: float, seed: int) -> dict[str, Any]:
    """Trains one run and returns its record."""
    jax.clear_caches()
    job = MethodJob(CORPUS, 'GaLore', *self.rates, seed, self.size.steps)
    config = self.config(job, choice, factor)
    task = task_of(config)
    start, step = step_lib.build(config, task)
    if choice.keeps is not None:
      step = step_lib.make_step(
        task.loss,
        keeping(config.transformation(), choice.keeps),
        schedule=config.schedule(),
      )
    state = start(jax.random.key(seed))
    for batch in self.methods.first_batches(job):
      state, _ = step(state, batch)
    score = jax.jit(self.methods.study.score(task))
    found = self.methods.measured(
      CORPUS, functools.partial(score, state.params)
    )
    return found | {'changes': repr(choice.changes)}


Done: TypeAlias = dict[Job, dict[str, Any]]


def todo(choices: Sequence[Choice], seeds: int) -> Iterator[tuple[Choice, Job]]:
  """Yields all runs: all choices at their first rate, then at the others."""
  for i in range(len(FACTORS)):
    for choice in choices:
      for factor in choice.factors[i : i + 1]:
        all_seeds = choice[:2] == BASE[:2] and factor == 1
        for seed in range(seeds if all_seeds else 1):
          yield choice, Job(choice.table, choice.name, factor, seed)


def page(size: Size, rates: tuple[float, float], done: Done) -> str:
  """Returns the results page in Markdown."""
  tokens = size.steps * size.model.batch_size * size.model.sequence_length

  def runs_of(choice: Choice) -> Done:
    return {job: run for job, run in done.items() if job[:2] == choice[:2]}

  def bits(run: tuple[Job, dict[str, Any]]) -> float:
    return run[1]['bits_per_byte']

  base = runs_of(BASE)
  seeds = [run['bits_per_byte'] for job, run in base.items() if job.factor == 1]
  lines = [
    '# Single design choices of GaLore',
    '',
    *unshuffled(size.model),
    'By `python -m configs.studies.ablations`, whose docstring explains the '
    f'runs: {len(done)} runs of {tokens:,} tokens of chitchat-dataset, on '
    f'{machines(done.values())}. The base is GaLore with rank '
    f'{size.model.rank} of {size.model.width}, gap {size.gap}, float32, and '
    f'learning rates {rates[0]:g} of the matrices and {rates[1]:g} of the '
    f'rest. It has {min(seeds):.4f} to {max(seeds):.4f} bits per byte with '
    f'{len(seeds)} seeds; lower is better. Each other row changes one choice. '
    'Its difference to the base is computed for the same rows of validation '
    'text and one seed, so the 95% interval does not include the variance '
    'between seeds. "Rates tried" counts the learning rates of the matrices '
    'from which the best is in the table.',
    '',
    '| group | choice | rate of matrices | rates tried | bits per byte |'
    ' minus the base |',
    '| --- | --- | --- | --- | --- | --- |',
  ]
  _, first = min(
    ((job, run) for job, run in base.items() if job.seed == 0), key=bits
  )
  for choice in CHOICES:
    found = {j: x for j, x in runs_of(choice).items() if j.seed == 0}
    if found:
      job, run = min(found.items(), key=bits)
      difference = '-' if choice is BASE else less(run['rows'], first['rows'])
      lines.append(
        f'| {choice.table} | {choice.name} | {rates[0] * job.factor:.3g} | '
        f'{len(found)} | {run["bits_per_byte"]:.4f} | {difference} |'
      )
  return '\n'.join([*lines, ''])


def known_rates(directory: pathlib.Path) -> tuple[float, float]:
  """Returns GaLore's best rates in the first round of the study `methods`."""
  methods = Methods()
  best = firsts(methods, command.runs_of(directory, methods).done)
  if 'GaLore' not in best:
    raise SystemExit(
      f'{directory}/methods.json has no rates of GaLore: run python -m '
      'configs.studies.methods --only GaLore first, or give --rates MATRICES '
      'REST'
    )
  return best['GaLore']['matrix'], best['GaLore']['rest']


def shared(size: Size, rates: tuple[float, float]) -> dict[str, Any]:
  """Returns the settings that all runs in a results file share."""
  model = dataclasses.asdict(size.model)
  return {'rates': rates, 'size': size._asdict() | {'model': model}}


def bench(
  directory: pathlib.Path,
  rates: tuple[float, float],
  *,
  size: Size = SIZE,
  choices: Sequence[Choice] = CHOICES,
  hours: float | None = None,
) -> None:
  """Trains the missing runs until the time is over, and writes the table."""
  runs = Runs(directory / 'ablations.json', Job, shared(size, rates))
  runner, every = Runner(size, rates), todo(choices, size.seeds)
  left = ((choice, job) for choice, job in every if job not in runs.done)
  for choice, job in until(left, hours):
    found = runner.run(choice, job.factor, job.seed)
    runs.add(job, found)
    print(f'{job}: {found["bits_per_byte"]:.4f} bits per byte', flush=True)
  if any(job[:2] == BASE[:2] for job in runs.done):
    save(directory / 'ablations.md', page(size, rates, runs.done))


def main(argv: Sequence[str] | None = None) -> None:
  """Trains the missing runs and writes the table."""
  parser = argparse.ArgumentParser('python -m configs.studies.ablations')
  parser.add_argument(
    '--hours', type=float, help='start no run after this time'
  )
  parser.add_argument('--results', type=pathlib.Path, default=command.RESULTS)
  parser.add_argument(
    '--rates',
    type=float,
    nargs=2,
    metavar=('MATRICES', 'REST'),
    help="default: GaLore's best rates of configs.studies.methods",
  )
  tables = [*dict.fromkeys(choice.table for choice in CHOICES)]
  parser.add_argument(
    '--only',
    nargs='+',
    choices=tables,
    default=tables,
    metavar='TABLE',
    help=f'groups of rows that run, from {", ".join(map(repr, tables))}',
  )
  args = parser.parse_args(argv)
  command.repeatable()
  rates = tuple(args.rates) if args.rates else known_rates(args.results)
  choices = [choice for choice in CHOICES if choice.table in args.only]
  bench(args.results, rates, choices=choices, hours=args.hours)


if __name__ == '__main__':
  main()
