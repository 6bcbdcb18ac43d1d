"""Time and captured energy of each subspace finder.

`python -m tests.bench.subspace` prints the table, and writes it with a plot to
tests/bench/results/. Energy is |P g|^2 over that of the exact SVD's basis; a
finder that starts from the previous basis gets that of an earlier gradient.

Axes: m projected side, n other side, r rank.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from rich.console import Console

from galore_optax import (
  Gram,
  PowerIteration,
  Randomized,
  RandomOrthogonal,
  Svd,
  subspace,
)
from models.llama import Layers, llama
from train.corpus import Chitchat
from train.data import batches
from train.tokenizer import train_tokenizer

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
  'RandomOrthogonal()': RandomOrthogonal(),
}


def power_law(m: int, n: int, seed: int) -> jax.Array:
  """Returns singular values k^-0.7 and a tenth of noise, new in each seed."""
  rng = np.random.default_rng(0)
  left, _ = np.linalg.qr(rng.normal(size=(m, m)))
  right, _ = np.linalg.qr(rng.normal(size=(n, m)))
  signal = (left * np.arange(1, m + 1) ** -0.7) @ right.T
  noise = np.random.default_rng(seed).normal(size=(m, n))
  noise *= 0.1 * np.linalg.norm(signal) / np.linalg.norm(noise)
  return jnp.asarray(signal + noise, jnp.float32)


def gradients_60m() -> dict[str, tuple[jax.Array, jax.Array]]:
  """Returns two real gradients of weights of the 60M model, of two batches.

  The weights are fresh, the text is Chitchat's, 4 x 128 tokens a batch.
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
  pick = lambda blocks, *keys: jax.tree.leaves(
    blocks[keys[0]][keys[1]], is_leaf=None
  )[0][3]
  names = {'60M mlp/up': ('mlp', 'up'), '60M attention/q': ('attention', 'q')}
  return {
    name: (pick(first, *keys), pick(second, *keys))
    for name, keys in names.items()
  }


def measure(
  earlier_mn: jax.Array, g_mn: jax.Array, r: int, rounds: int
) -> list[dict]:
  """Returns a row for each finder; rounds are interleaved, times medians."""
  key, m = jax.random.key(0), g_mn.shape[0]
  compiled = {
    name: jax.jit(lambda *args, finder=finder: subspace.find(finder, *args))
    for name, finder in FINDERS.items()
  }
  none_rm = jnp.zeros((r, m))
  # What a warm start begins with: the exact basis of the earlier gradient.
  old_rm = compiled['Svd()'](earlier_mn, none_rm, key)
  times = {name: [] for name in FINDERS}
  bases = {}
  for count in range(rounds + 1):
    for name, find in compiled.items():
      start = time.perf_counter()
      bases[name] = find(g_mn, old_rm, key).block_until_ready()
      if count or (name == 'Svd()' and m > 2000):
        times[name].append(time.perf_counter() - start)
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
  """Measures, prints, writes."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=5)
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
    rounds = 1 if g.shape[0] > 2000 else arguments.rounds
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
  """Draws energy lost over time."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  for name in FINDERS:
    mine = [row for row in rows if row['finder'] == name]
    axes.scatter(
      [row['times_faster'] for row in mine],
      [row['energy'] for row in mine],
      label=name,
    )
  axes.set(
    xscale='log',
    xlabel='times faster than the SVD',
    ylabel="share of the SVD's energy",
  )
  axes.legend()
  figure.savefig(RESULTS / 'subspace.png', dpi=120)


if __name__ == '__main__':
  main()
