"""Measures `init` and compilation for a model of 224 separate matrices.

`python -m tests.bench.many_matrices` writes results/matrices.md: for each
preset the seconds of `init`, `jax.eval_shape(init)`, `describe` and
`state_shardings`, and of tracing and compiling an update. The model has the
matrices of a 7B model with unstacked layers: 32 layers of four [d, d], two [d,
f] and one [f, d]. The sizes are smaller, because only the number of matrices
matters. The caches of JAX are cleared before each measurement. `optax.adamw`
and `optax.contrib.muon` are measured in the same run.
"""

import argparse
import datetime
import functools
import inspect
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

import galore_optax
from galore_optax import galore
from train.method import METHODS

RESULTS = pathlib.Path(__file__).parent / 'results'
NUM_LAYERS, D, F, RANK = 32, 128, 344, 32
RATE = 1e-3
OPTIONS: dict[str, Any] = {'rank': RANK, 'subspace': 'power'}


def known_options(preset: Callable[..., Any]) -> dict[str, Any]:
  """Returns the options of this benchmark that a preset has."""
  names = inspect.signature(preset).parameters
  # FRUGAL has no rank, and keeps its default subspace.
  given = OPTIONS if 'rank' in names else {}
  return {name: x for name, x in given.items() if name in names}


TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
  'optax.adamw': lambda: optax.adamw(RATE),
  'optax.contrib.muon': lambda: optax.contrib.muon(RATE),
  **{
    row.preset.__name__: functools.partial(
      row.preset, RATE, **known_options(row.preset)
    )
    for row in METHODS.values()
    # BAdam requires a stack of layers. The baselines are above.
    if row.num_bytes is not None and row.name != 'Badam'
  },
  'chain(galore, adamw)': lambda: optax.chain(
    galore(**OPTIONS), optax.adamw(RATE)
  ),
  'quantize_state(adam)': lambda: galore_optax.quantize_state(optax.adam(RATE)),
}


def model() -> dict[str, Any]:
  """Returns the parameters."""
  shapes = {name: (D, D) for name in ('q', 'k', 'v', 'o')}
  shapes |= {'gate': (D, F), 'up': (D, F), 'down': (F, D)}
  return {
    f'layer_{i}': {
      name: {'kernel': jnp.ones(shape)} for name, shape in shapes.items()
    }
    for i in range(NUM_LAYERS)
  }


def seconds(f: Callable[[], Any]) -> float:
  """Returns the seconds of a call, with empty caches of JAX."""
  jax.clear_caches()
  start = time.perf_counter()
  jax.block_until_ready(f())
  return time.perf_counter() - start


def measure(make: Callable[[], Any], params: Any) -> list[float]:
  """Returns the seconds of each column; each has its own transformation."""
  mesh = jax.make_mesh((1,), ('x',))
  replicated = NamedSharding(mesh, PartitionSpec())
  shardings = jax.tree.map(lambda _: replicated, params)
  state = make().init(params)

  def compile_update() -> None:
    jax.jit(make().update).lower(params, state, params).compile()

  return [
    seconds(lambda: make().init(params)),
    seconds(lambda: jax.eval_shape(make().init, params)),
    seconds(lambda: galore_optax.describe(make(), params)),
    seconds(lambda: galore_optax.state_shardings(make(), params, shardings)),
    seconds(compile_update),
  ]


COLUMNS = ('init', 'eval_shape', 'describe', 'state_shardings', 'compile')

PAGE = """# Many separate matrices

Seconds of `init`, of `jax.eval_shape(init)`, `describe` and `state_shardings`,
and of tracing and compiling an update, for {count} matrices of 4 kinds (d {d},
f {f}, rank {rank}). Bases are found with 'power'. The caches of JAX are empty
before each call. The command is `.venv/bin/python -m tests.bench.many_matrices`
({date}, 2 cores, one run).

{table}
"""


def main() -> None:
  """Measures the transformations and writes the page."""
  parser = argparse.ArgumentParser(description='Measures init and compilation.')
  parser.add_argument('names', nargs='*', default=list(TRANSFORMATIONS))
  parser.add_argument('--results', type=pathlib.Path, default=RESULTS)
  args = parser.parse_args()
  params = model()
  # The first call of a process loads libraries.
  measure(TRANSFORMATIONS['optax.adamw'], params)
  rows = [('transformation', *COLUMNS), ('---',) * (len(COLUMNS) + 1)]
  for name in args.names:
    values = measure(TRANSFORMATIONS[name], params)
    rows.append((f'`{name}`', *(f'{x:.2f}' for x in values)))
    print(*rows[-1], flush=True)
  page = PAGE.format(
    count=7 * NUM_LAYERS,
    d=D,
    f=F,
    rank=RANK,
    date=f'{datetime.date.today():%-d %B %Y}',
    table='\n'.join(f'| {" | ".join(row)} |' for row in rows),
  )
  (args.results / 'matrices.md').write_text(page)


if __name__ == '__main__':
  main()
