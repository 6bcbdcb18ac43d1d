"""Measures `init` and compilation for a model of 224 separate matrices.

`python -m tests.bench.many_matrices` prints the table: for each preset the CPU
seconds of `init`, `jax.eval_shape(init)`, `describe` and `state_shardings`, and
of tracing and compiling an update. The model has the matrices of a 7B model
with unstacked layers: 32 layers of four [d, d], two [d, f] and one [f, d]. The
sizes are smaller, because only the number of matrices matters. CPU seconds of
the process are printed, and not the time, so that other programs disturb less.
Caches are cleared before each measurement. `optax.adamw` and
`optax.contrib.muon` are measured in the same run.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.table
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

import galore_optax
from galore_optax import galore

NUM_LAYERS, D, F, RANK = 32, 128, 344, 32
RATE = 1e-3
OPTIONS: dict[str, Any] = {'rank': RANK, 'subspace': 'power'}

TRANSFORMATIONS: dict[str, Callable[[], Any]] = {
  'optax.adamw': lambda: optax.adamw(RATE),
  'optax.contrib.muon': lambda: optax.contrib.muon(RATE),
  'galore_adamw': lambda: galore_optax.galore_adamw(RATE, **OPTIONS),
  'galore_adamw_8bit': lambda: galore_optax.galore_adamw_8bit(RATE, **OPTIONS),
  'galore_adafactor': lambda: galore_optax.galore_adafactor(RATE, **OPTIONS),
  'galore_muon': lambda: galore_optax.galore_muon(RATE, **OPTIONS),
  'frugal': lambda: galore_optax.frugal(RATE),
  'fira': lambda: galore_optax.fira(RATE, **OPTIONS),
  'apollo': lambda: galore_optax.apollo(RATE, rank=RANK),
  'apollo_mini': lambda: galore_optax.apollo_mini(RATE),
  'lomo': lambda: galore_optax.lomo(RATE),
  'adalomo': lambda: galore_optax.adalomo(RATE),
  'scale_sgd': lambda: galore_optax.scale_sgd(RATE),
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
  """Returns the CPU seconds of a call, with empty caches of JAX."""
  jax.clear_caches()
  start = time.process_time()
  f()
  return time.process_time() - start


def measure(make: Callable[[], Any], params: Any) -> list[float]:
  """Returns the CPU seconds of each column; each has its own transformation."""
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


def main() -> None:
  """Measures the transformations and prints the table."""
  parser = argparse.ArgumentParser(description='Measures init and compilation.')
  parser.add_argument('names', nargs='*', default=list(TRANSFORMATIONS))
  table = rich.table.Table(
    'CPU seconds', 'init', 'eval_shape', 'describe', 'shardings', 'compile'
  )
  params = model()
  for name in parser.parse_args().names:
    values = measure(TRANSFORMATIONS[name], params)
    print(name, *(f'{x:.2f}' for x in values), flush=True)
    table.add_row(name, *(f'{x:.2f}' for x in values))
  Console().print(table)


if __name__ == '__main__':
  main()
