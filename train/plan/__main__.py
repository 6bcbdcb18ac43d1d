"""Plans a run: the memory or cost of its training step on an absent GPU.

`python -m train.plan configs/llama_7b.py --device rtx4090` compiles the step
that `train.pretrain` runs for that config and prints how many bytes each part
of it takes. With `--cost` it prints the arithmetic, memory traffic and kernels
of the step instead.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import jax
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from train.config import Config
from train.engine.command import load, parse, user_errors
from train.plan import compare
from train.plan.bill import ESTIMATED, Bill, make_bill
from train.plan.cards import GPUS, GpuName
from train.plan.footprint import Cards, Plan, make_plan

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Request:
  """Plans the memory of a training step. Several configs share one table."""

  program: ClassVar[str] = 'train.plan'
  config: Annotated[Config, tyro.conf.arg(name='')]
  """Config to plan."""
  device: GpuName = 'rtx4090'
  """GPU to plan for."""
  devices: int | None = None
  """Number of GPUs, a short form of --mesh.fsdp; None uses the config's own."""
  estimate: bool = False
  """Only add up bytes from shapes: no compiler, and no temporaries."""
  compare: bool = False
  """Plan every method with this config."""
  cost: bool = False
  """Print flops, bytes moved and kernels of the update and the step, and an
  estimate of their times, instead of memory."""
  plot: pathlib.Path | None = None
  """Write a bar chart of the paper's methods to this file."""
  json: bool = False
  """Print JSON: an object for one plan, a list for several."""


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the requested plans and returns the exit code."""
  # Planning needs no accelerator. Without this line JAX would initialize one.
  jax.config.update('jax_platforms', 'cpu')
  with user_errors():
    requests = requested(sys.argv[1:] if argv is None else argv)
    first = next(iter(requests.values()))
    check(first)
    made: list[Any] = []
    for config, cards, names in planned(requests):
      make = make_bill if first.cost else make_plan
      made.append(make(config, cards, **names))
    if first.plot:
      compare.plot(made, first.plot)
  single = not (first.compare or first.plot or len(made) > 1)
  if first.json:
    objects = [one.to_json() for one in made]
    print(json.dumps(objects[0] if single else objects))
  elif first.cost:
    show_bills(made, Console())
  elif single:
    show(made[0], Console())
  else:
    Console().print(table(made))
  return 0


def check(request: Request) -> None:
  """Raises ValueError for options that exclude each other."""
  if request.cost and (request.estimate or request.plot):
    raise ValueError(
      '--cost needs compiled programs, which --estimate excludes, and --plot '
      'draws memory, not cost: leave one of them out'
    )


def requested(argv: Sequence[str]) -> dict[str, Request]:
  """Parses the options once for each of the config paths that precede them.

  Returns:
    The request for each path.
  """
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
  """Returns the options that fit the microbatches to another batch size.

  The microbatches of a config divide its own batch. If the options set another
  batch size and no microbatches, the greatest common divisor of the two
  replaces the config's microbatches.
  """
  options = [part for option in options for part in option.split('=', 1)]
  # Options may be spelled with underscores instead of hyphens.
  options = [x.replace('_', '-') if x[:2] == '--' else x for x in options]
  sizes = [b for a, b in itertools.pairwise(options) if a == '--batch-size']
  if not sizes or not sizes[-1].isdigit() or '--microbatches' in options:
    return []
  microbatches = load(path).microbatches
  fitting = math.gcd(int(sizes[-1]), microbatches)
  return [] if fitting == microbatches else ['--microbatches', f'{fitting}']


def planned(
  requests: dict[str, Request],
) -> Iterator[tuple[Config, Cards, dict[str, str]]]:
  """Yields the config, the cards and the names of each plan to make.

  The names are the keyword arguments `path` and `method` of `make_plan`. With
  `--compare` or `--plot` there is one plan for each method and config.
  """
  console = Console(stderr=True)
  for path, request in requests.items():
    cards = Cards(request.device, request.devices, request.estimate)
    given = request.config.resolved()
    configs = {'': given}
    if request.compare:
      configs = compare.methods(given)
    if request.plot:
      configs = compare.bars(given)
    for method, config in configs.items():
      if not request.estimate:
        console.print(f'compiling {path} {method}', highlight=False)
      yield config, cards, {'path': path, 'method': method}


def show(plan: Plan, console: Console) -> None:
  """Prints the memory of one plan, and its largest temporaries if compiled."""
  table = Table(
    title=f'{plan.config}, {plan.batch}, {where(plan)}',
    title_justify='left',
    box=box.SIMPLE_HEAD,
  )
  table.add_column('on each GPU' if plan.devices > 1 else 'part')
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
      'estimate: exact for weights and state, but without temporaries:'
    )
    console.print('it can show that a step does not fit, but not that it fits')
    return
  console.print(ATTENTION[plan.attention])
  console.print('the largest temporaries:')
  for buffer in plan.compiled.buffers:
    shapes = ', '.join(buffer.shapes)
    console.print(f'{buffer.bytes / 2**20:9.1f} MiB  {shapes}', markup=False)
  for row in plan.compiled.collectives:
    console.print(
      f'{row.op} {row.shape}: {row.count} x {row.bytes:,} bytes', markup=False
    )


ATTENTION = {
  'cudnn': "attention: cuDNN's kernel; its own workspace is not included",
  'blockwise': 'attention: block by block',
  'none': 'attention: none',
}


def show_bills(bills: Sequence[Bill], console: Console) -> None:
  """Prints a table with one row for each program of each bill.

  For a single bill, it also prints the kernels that move the most bytes.
  """
  table, names = empty(f'between two refreshes, on {where(bills[0])}', bills)
  table.add_column('part')
  heads = ('Tflop', 'GB', 'B/weight', 'kernels', 'copies', 'transp.')
  times = [f'{key}, ms*' for key in ESTIMATED]
  for head in (*heads, *times):
    table.add_column(head, justify='right')
  for i, bill in enumerate(bills):
    for part, cost in bill.parts.items():
      table.add_row(
        *(v[i] for v in names.values()),
        part,
        f'{cost.flops / 1e12:.3f}',
        f'{cost.bytes / 1e9:.2f}',
        f'{cost.bytes * bill.devices / bill.elements:.1f}',
        *(f'{x:,}' for x in (cost.launches, cost.copies, cost.transposes)),
        *(f'{1e3 * cost.seconds(GPUS[key]):.1f}' for key in ESTIMATED),
      )
  console.print(table)
  console.print(ATTENTION[bills[0].attention])
  console.print(
    '* an estimate, and a lower bound: for each kernel the time of its flops '
    "or of its bytes, whichever is longer, at the GPU's public figures"
  )
  if len(bills) == 1:
    for part, cost in bills[0].parts.items():
      console.print(f'kernels of the {part} that move the most bytes:')
      for kernel in cost.largest():
        console.print(
          f'{kernel.bytes * kernel.times / 1e9:9.2f} GB  {kernel.times} x '
          f'{kernel.name}: {", ".join(sorted(kernel.parts))}',
          markup=False,
        )


def table(plans: Sequence[Plan]) -> Table:
  """Returns a table with one row for each plan, in GiB."""
  table, names = empty(f'GiB on each of {where(plans[0])}', plans)
  heads = ('weights', 'bases', 'moments', 'grads', 'kept', 'other', 'work')
  for head in (*heads, 'total', 'fits'):
    table.add_column(head, justify='right', no_wrap=True)
  for i, plan in enumerate(plans):
    parts = list(plan.parts.values())
    # The first two parts are weights: of the layers, and of the vocabulary.
    sizes = [sum(parts[:2]), *parts[2:], plan.total_bytes]
    decimals = [f'{size / GIB:.2f}' for size in sizes]
    table.add_row(*(v[i] for v in names.values()), *decimals, verdict(plan))
  return table


def empty(
  title: str, rows: Sequence[Plan | Bill]
) -> tuple[Table, dict[str, list[str]]]:
  """Returns a table without rows, and the cells of its name columns.

  The name columns are the config and the method. A column is left out if all
  rows have the same value.
  """
  table = Table(
    title=title,
    title_justify='left',
    box=box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  several = {
    'config': [pathlib.Path(row.config).stem for row in rows],
    'method': [row.method for row in rows],
  }
  names = {k: v for k, v in several.items() if len(set(v)) > 1}
  for head in names:
    table.add_column(head)
  return table, names


def verdict(plan: Plan) -> str:
  """Returns whether a plan fits; an estimate that fits is 'unknown'."""
  return {True: 'yes', False: 'no', None: 'unknown'}[plan.fits]


def where(plan: Plan | Bill) -> str:
  """Returns the GPU's name, and the number of GPUs if there are several."""
  name = GPUS[plan.device].name
  return name if plan.devices == 1 else f'{plan.devices} x {name}'


def gib(size: int) -> str:
  """Returns bytes in GiB, with three decimals.

  >>> gib(3 * 2**29)
  '1.500'
  """
  return f'{size / GIB:.3f}'


if __name__ == '__main__':
  # XLA writes no buffer assignment for a program from the compilation cache.
  jax.config.update('jax_enable_compilation_cache', False)
  sys.exit(main())
