"""Measures the time and the captured energy of each subspace finder.

`python -m tests.bench.subspace` prints the table, and writes it with a plot to
tests/bench/results/. The energy of a basis P for a gradient g is |P g|^2,
divided by the energy of the exact SVD's basis. `PowerIteration` starts from the
basis of an earlier gradient; another row measures it without an earlier basis.

Axes: m projected side, n other side, r rank.
"""

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from rich.console import Console

from galore_optax import Gram, PowerIteration, Randomized, RandomOrthogonal, Svd
from models.llama import Layers, llama
from train.data.batches import batches
from train.data.corpus import Chitchat
from train.data.tokenizer import train_tokenizer

RESULTS = pathlib.Path(__file__).parent / 'results'

SIZES = [
  (512, 1376, 128),
  (768, 2048, 256),
  (1024, 2736, 256),
  (4096, 4096, 1024),
]

FINDERS = {
  'Svd()': Svd(),
  'Gram()': Gram(),
  'Randomized()': Randomized(),
  'PowerIteration()': PowerIteration(),
  'PowerIteration(), first': PowerIteration(),
  'RandomOrthogonal()': RandomOrthogonal(),
}


def power_law(m: int, n: int, seed: int) -> jax.Array:
  """Returns an m x n matrix with singular values k^-0.7, plus 10% noise.

  Only the noise depends on the seed.
  """
  rng = np.random.default_rng(0)
  left, _ = np.linalg.qr(rng.normal(size=(m, m)))
  right, _ = np.linalg.qr(rng.normal(size=(n, m)))
  signal = (left * np.arange(1, m + 1) ** -0.7) @ right.T
  noise = np.random.default_rng(seed).normal(size=(m, n))
  noise *= 0.1 * np.linalg.norm(signal) / np.linalg.norm(noise)
  return jnp.asarray(signal + noise, jnp.float32)


def gradients_60m() -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns the gradients of two weights of the 60M model, for two batches.

  The model has its initial weights. A batch is 4 x 128 tokens of
  chitchat-dataset.
  """
  documents = Chitchat().open('train')
  tokenizer = train_tokenizer(
    documents.stream(seed=0, repeat=False), vocab_size=4096
  )
  stream = batches(
    documents, tokenizer, batch_size=4, sequence_length=128, seed=0
  )
  layers = Layers(llama('60m', vocab_size=4096))
  params = jax.jit(layers.init)(jax.random.key(0))
  gradient = jax.jit(jax.grad(lambda p, batch: layers(p, batch)[0]))
  first, second = (gradient(params, next(stream))['blocks'] for _ in range(2))

  def pick(layers: Any, part: str, name: str) -> jax.Array:
    """Returns the gradient of a weight in the fourth layer."""
    return jax.tree.leaves(layers[part][name])[0][3]

  names = {'60M mlp/up': ('mlp', 'up'), '60M attention/q': ('attention', 'q')}
  return {
    name: (pick(first, *keys), pick(second, *keys))
    for name, keys in names.items()
  }


def measure(
  earlier_mn: jax.Array, g_mn: jax.Array, r: int, rounds: int
) -> list[dict]:
  """Returns a row for each finder, with the median time of all rounds.

  Each round times all finders.

  Args:
    earlier_mn: an earlier gradient, whose basis is the previous basis.
    g_mn: the gradient.
    r: rank of the bases.
    rounds: number of rounds.
  """
  key, none_rm = jax.random.key(0), jnp.zeros((r, g_mn.shape[0]))
  compiled = {
    name: jax.jit(finder.__call__).lower(g_mn, none_rm, key).compile()
    for name, finder in FINDERS.items()
  }
  # The basis of the earlier gradient, from which a warm start begins.
  old_rm = compiled['Gram()'](earlier_mn, none_rm, key).block_until_ready()
  times = {name: [] for name in FINDERS}
  bases = {}
  for _ in range(rounds):
    for name, find in compiled.items():
      previous_rm = none_rm if name.endswith('first') else old_rm
      in_a_row = []
      for _ in range(2 if len(g_mn) > 2000 else 6):
        start = time.perf_counter()
        bases[name] = find(g_mn, previous_rm, key).block_until_ready()
        in_a_row.append(time.perf_counter() - start)
      # After a finder ends, the threads of its solver keep the cores busy for a
      # while and slow the next finder. Drop the first half of its runs.
      times[name] += in_a_row[len(in_a_row) // 2 :]
  energy = {k: float(jnp.sum((b @ g_mn) ** 2)) for k, b in bases.items()}
  slowest = statistics.median(times['Svd()'])
  return [
    {
      'finder': name,
      'milliseconds': 1e3 * statistics.median(times[name]),
      'times_faster': slowest / statistics.median(times[name]),
      'energy': energy[name] / energy['Svd()'],
    }
    for name in FINDERS
  ]


def main() -> None:
  """Measures all cases, prints the table and writes it with the plot."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  cases = {
    f'power law {m} x {n}, r {r}': (
      power_law(m, n, 1),
      power_law(m, n, 2),
      r,
    )
    for m, n, r in SIZES
  }
  for name, (earlier, g) in gradients_60m().items():
    cases[f'{name} {g.shape[0]} x {g.shape[1]}, r 128'] = (earlier, g, 128)
  rows = []
  for case, (earlier, g, r) in cases.items():
    rounds = 2 if g.shape[0] > 2000 else arguments.rounds
    rows += [{'case': case, **row} for row in measure(earlier, g, r, rounds)]
    print(case, 'measured', flush=True)
  show(rows)
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / 'subspace.json').write_text(json.dumps(rows, indent=1) + '\n')
  plot(rows)


def show(rows: list[dict]) -> None:
  """Prints the table."""
  table = rich.table.Table('case', 'finder', 'ms', 'times faster', 'energy')
  for row in rows:
    table.add_row(
      row['case'],
      row['finder'],
      f'{row["milliseconds"]:.1f}',
      f'{row["times_faster"]:.1f}',
      f'{row["energy"]:.5f}',
    )
  Console().print(table)


def plot(rows: list[dict]) -> None:
  """Draws the missed energy against the time, with a panel for each case."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  cases = list(dict.fromkeys(row['case'] for row in rows))
  figure, grid = plt.subplots(
    2,
    -(-len(cases) // 2),
    figsize=(9.6, 6),
    sharex=True,
    sharey=True,
    layout='constrained',
  )
  markers = dict(zip(FINDERS, 'osD^vX', strict=True))
  for axes, case in zip(grid.flat, cases, strict=False):
    axes.axvline(10, color='0.8', linewidth=1)
    axes.axhline(0.01, color='0.8', linewidth=1)
    for row in rows:
      if row['case'] == case:
        # Differences below 1e-7 are rounding errors.
        missed = max(1 - row['energy'], 1e-7)
        name = row['finder']
        axes.plot(row['times_faster'], missed, markers[name], label=name)
    axes.set(title=case, xscale='log', yscale='log')
    axes.title.set_size(9)
    axes.tick_params(labelsize=8)
  figure.supxlabel(
    'speed-up over the exact SVD (higher is better; the line is at 10)',
    fontsize=9,
  )
  figure.supylabel(
    "missed share of the SVD's energy (lower is better; the line is at 1%)",
    fontsize=9,
  )
  handles, labels = grid.flat[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc='outside upper center', ncols=3, fontsize=9
  )
  figure.savefig(RESULTS / 'subspace.png', dpi=200)


if __name__ == '__main__':
  main()
