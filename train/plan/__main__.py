"""Plans a run: what a training step needs on a GPU that is not there.

`python -m train.plan configs/llama_7b.py --device rtx4090` compiles the step
that `train.pretrain` runs for that config and prints where its bytes go.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import jax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from train.command import load, parse, user_errors
from train.config import Config
from train.plan import compare
from train.plan.cards import GPUS
from train.plan.footprint import Cards, Plan, make_plan

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Request:
  """Plans the memory of a training step. Several configs make one table."""

  program: ClassVar[str] = 'train.plan'
  config: Annotated[Config, tyro.conf.arg(name='')]
  """What would be trained."""
  device: Literal[*GPUS] = 'rtx4090'
  """The card."""
  devices: int = 1
  """Number of cards that share the step."""
  estimate: bool = False
  """Byte arithmetic alone, without the compiler: no temporaries."""
  compare: bool = False
  """Plan every method with this config."""
  plot: pathlib.Path | None = None
  """Write a bar for each of the paper's methods to this file."""
  json: bool = False
  """Print an object for one plan, a list for several."""


def main(argv: Sequence[str] | None = None) -> int:
  """Prints plans; returns the exit code."""
  # The plan needs no accelerator, and must not wait for one.
  jax.config.update('jax_platforms', 'cpu')
  with user_errors():
    requests = requested(sys.argv[1:] if argv is None else argv)
    plans = make_plans(requests)
    first = next(iter(requests.values()))
    if first.plot:
      compare.plot(plans, first.plot)
  single = not (first.compare or first.plot or len(plans) > 1)
  if first.json:
    objects = [plan.to_json() for plan in plans]
    print(json.dumps(objects[0] if single else objects))
  elif single:
    show(plans[0], Console())
  else:
    Console().print(table(plans))
  return 0


def requested(argv: Sequence[str]) -> dict[str, Request]:
  """Returns what the options ask for with each of the configs before them."""
  paths = list(itertools.takewhile(lambda x: not x.startswith('-'), argv))
  options = argv[len(paths) :]
  if not paths:
    parse(options, Request)
  requests = {}
  for path in paths:
    args = [path, *options, *fitting_microbatches(path, options)]
    requests[path] = parse(args, Request)
  return requests


def fitting_microbatches(path: str, options: Sequence[str]) -> list[str]:
  """Returns the option that lets a smaller batch be planned.

  A config's microbatches are for its own batch; of another batch as many are
  planned as divide it.
  """
  options = [part for option in options for part in option.split('=', 1)]
  sizes = [b for a, b in itertools.pairwise(options) if a == '--batch-size']
  if not sizes or not sizes[-1].isdigit() or '--microbatches' in options:
    return []
  microbatches = load(path).microbatches
  fitting = math.gcd(int(sizes[-1]), microbatches)
  return [] if fitting == microbatches else ['--microbatches', f'{fitting}']


def make_plans(requests: dict[str, Request]) -> list[Plan]:
  """Returns a plan for each config, or for each method with each config."""
  plans, console = [], Console(stderr=True)
  for path, request in requests.items():
    cards = Cards(request.device, request.devices, request.estimate)
    configs = {'': request.config}
    if request.compare:
      configs = compare.methods(request.config)
    if request.plot:
      configs = compare.bars(request.config)
    for method, config in configs.items():
      if not request.estimate:
        console.print(f'compiling {path} {method}', highlight=False)
      plans.append(make_plan(config, cards, path=path, method=method))
  return plans


def show(plan: Plan, console: Console) -> None:
  """Prints the tables of a plan."""
  table = Table(
    title=f'{plan.config}, {plan.batch_size} x {plan.sequence_length} tokens, '
    f'{where(plan)}',
    title_justify='left',
    box=box.SIMPLE_HEAD,
  )
  table.add_column('on each card' if plan.devices > 1 else 'what')
  table.add_column('GiB', justify='right')
  for name, size in plan.parts.items():
    table.add_row(name, gib(size))
  table.add_section()
  table.add_row('total', gib(plan.total_bytes), style='bold')
  table.add_row('capacity', gib(plan.capacity_bytes))
  table.add_row('fits', verdict(plan), style='bold')
  console.print(table)
  if plan.compiled is None:
    console.print(
      'estimate: exact for weights and state, no temporaries; so it'
    )
    console.print(
      'can say what does not fit, and only a compiled plan what does'
    )
    return
  console.print('the largest temporaries:')
  for buffer in plan.compiled.buffers:
    shapes = ', '.join(buffer.shapes)
    console.print(f'{buffer.bytes / 2**20:9.1f} MiB  {shapes}', markup=False)
  for row in plan.compiled.collectives:
    console.print(
      f'{row.op} {row.shape}: {row.count} x {row.bytes:,} bytes', markup=False
    )


def table(plans: Sequence[Plan]) -> Table:
  """Returns a table with a row for each plan, in GiB."""
  table = Table(
    title=f'GiB on each of {where(plans[0])}',
    title_justify='left',
    box=box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  several = {
    'config': [pathlib.Path(plan.config).stem for plan in plans],
    'method': [plan.method for plan in plans],
  }
  # What all rows have in common stands in no column.
  names = {k: v for k, v in several.items() if len(set(v)) > 1}
  for head in names:
    table.add_column(head)
  heads = ('weights', 'bases', 'moments', 'grads', 'kept', 'other', 'work')
  for head in (*heads, 'total', 'fits'):
    table.add_column(head, justify='right', no_wrap=True)
  for i, plan in enumerate(plans):
    layers, vocabulary, *sizes = plan.parts.values()
    sizes = [layers + vocabulary, *sizes, plan.total_bytes]
    decimals = [f'{size / GIB:.2f}' for size in sizes]
    table.add_row(*(v[i] for v in names.values()), *decimals, verdict(plan))
  return table


def verdict(plan: Plan) -> str:
  """Returns whether a plan fits; an estimate can only say that it does not."""
  return {True: 'yes', False: 'no', None: 'unknown'}[plan.fits]


def where(plan: Plan) -> str:
  """Returns the card's name, and how many."""
  name = GPUS[plan.device].name
  return name if plan.devices == 1 else f'{plan.devices} x {name}'


def gib(size: int) -> str:
  """Returns bytes in GiB, with three decimals.

  >>> gib(3 * 2**29)
  '1.500'
  """
  return f'{size / GIB:.3f}'


if __name__ == '__main__':
  # A step that comes out of a cache leaves no account of its buffers.
  jax.config.update('jax_enable_compilation_cache', False)
  sys.exit(main())
