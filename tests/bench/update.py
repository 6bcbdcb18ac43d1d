"""Time of one optimizer update beside the peers', and of its compilation.

`.venv-parity/bin/python -m tests.bench.update` (`make parity` makes that
environment; elsewhere galore-torch is left out) updates the weights of the 60M
model between two refreshes, at rank 128 in float32, in interleaved rounds. It
prints medians, their ratio to galore-torch's, the compile time of each, and
that of 224 separate matrices, where a finder is compiled once for each shape.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax as go
from models.llama import Layers, llama

RANK = 128


def transformations() -> dict[str, optax.GradientTransformation]:
  """Returns what is compared, ours and optax's."""
  return {
    'galore_adamw': go.galore_adamw(0.01, rank=RANK),
    'galore_adamw_8bit': go.galore_adamw_8bit(0.01, rank=RANK),
    'galore_adafactor': go.galore_adafactor(0.01, rank=RANK),
    'galore_muon': go.galore_muon(0.01, rank=RANK),
    'fira': go.fira(0.01, rank=RANK),
    'apollo': go.apollo(0.01, rank=RANK),
    'frugal, columns': go.frugal(0.01, subspace='columns'),
    'scale_sgd': go.scale_sgd(0.01),
    'optax.adamw': optax.adamw(0.01),
  }


def compiled(
  tx: optax.GradientTransformation, params
) -> tuple[Callable, float]:
  """Returns `update()`, past its refresh, and the seconds of compilation."""
  step = jax.jit(
    lambda g, state, params: tx.update(g, state, params), donate_argnums=1
  )
  grads = jax.tree.map(lambda x: jnp.sin(jnp.float32(1) + x), params)
  state = jax.jit(tx.init)(params)
  start = time.perf_counter()
  step = step.lower(grads, state, params).compile()
  seconds = time.perf_counter() - start
  held = [step(grads, state, params)[1]]  # The refresh.

  def update() -> None:
    _updates, held[0] = jax.block_until_ready(step(grads, held[0], params))

  return update, seconds


def torch_galore(params) -> Callable:
  """Returns `update()` of the unmodified reference on the same weights."""
  import torch
  from galore_torch import GaLoreAdamW

  torch.set_num_threads(2)
  layers = params['blocks']
  stacks = [np.asarray(x) for x in jax.tree.leaves(layers)]
  rest = {k: v for k, v in params.items() if k != 'blocks'}
  tensor = lambda x: torch.nn.Parameter(torch.tensor(np.array(x)))
  matrices = [tensor(w.T) for x in stacks if x.ndim == 3 for w in x]
  others = [tensor(w) for x in stacks if x.ndim < 3 for w in x]
  others += [tensor(np.asarray(x)) for x in jax.tree.leaves(rest)]
  galore = dict(rank=RANK, update_proj_gap=200, scale=0.25, proj_type='std')
  groups = [{'params': others}, {'params': matrices, **galore}]
  optimizer = GaLoreAdamW(groups, lr=0.01, no_deprecation_warning=True)
  for w in matrices + others:
    w.grad = torch.sin(1 + w.detach())
  optimizer.step()  # The refresh.
  return optimizer.step


def separate(finder: str) -> float:
  """Returns the seconds to compile an update of 224 separate matrices."""
  shapes = [(64, 64)] * 4 + [(64, 192)] * 3
  params = {
    f'layer{i}': {f'w{j}': jnp.zeros(s) for j, s in enumerate(shapes)}
    for i in range(32)
  }
  tx = go.galore(optax.adam(1e-3), rank=16, subspace=finder)
  state = tx.init(params)
  start = time.perf_counter()
  jax.jit(tx.update).lower(params, state).compile()
  return time.perf_counter() - start


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser('python -m tests.bench.update')
  parser.add_argument('--rounds', type=int, default=15)
  args = parser.parse_args()
  model = Layers(llama('60m'))
  params = jax.jit(model.init)(jax.random.key(0))
  runs, compiles = {}, {}
  for name, tx in transformations().items():
    runs[name], compiles[name] = compiled(tx, params)
  if importlib.util.find_spec('galore_torch'):
    runs['galore-torch'] = torch_galore(params)
  times = {name: [] for name in runs}
  for _ in range(args.rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      times[name].append(time.perf_counter() - start)
  medians = {name: float(np.median(x)) for name, x in times.items()}
  peer = medians.get('galore-torch', float('nan'))
  for name, seconds in medians.items():
    print(
      f'{name:20} {seconds:.3f} s, {seconds / peer:.2f} of galore-torch,'
      f' compiled in {compiles.get(name, 0):.1f} s'
    )
  for finder in ('svd', 'gram', 'power'):
    print(
      f'224 separate matrices, {finder}: compiled in {separate(finder):.1f} s'
    )


if __name__ == '__main__':
  main()
