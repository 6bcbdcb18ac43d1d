"""The PyTorch workloads of the GPU benchmark.

They use unmodified transformers and galore-torch. Each workload is a generator
as in `tests.bench.card.ours`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import __version__ as VERSION

from tests.bench.card.ours import timed
from tests.bench.speed import theirs
from train.engine.command import load

CARD = 'cuda' if torch.cuda.is_available() else 'cpu'
# JAX also multiplies float32 matrices on a GPU in TF32 by default.
torch.backends.cuda.matmul.allow_tf32 = True


def step(steps: str, optimizer: str, path: str) -> Iterator[dict[str, Any]]:
  """Measures a step with a config's model, batch, microbatches and rank."""
  config = load(path)
  net, tx = made(config, optimizer)
  size = config.batch_size // config.microbatches
  shape = (config.microbatches, size, config.sequence_length)
  tokens = torch.randint(0, 128, shape, device=CARD)
  yield {}

  def run() -> None:
    for part in tokens:
      loss = net(input_ids=part, labels=part).loss / config.microbatches
      loss.backward()
    tx.step()
    tx.zero_grad()

  yield measured(run, int(steps)) | {'tokens': tokens.numel()}


def update(
  steps: str, optimizer: str, path: str, dtype: str, layers: str
) -> Iterator[dict[str, Any]]:
  """Measures an optimizer update of the config's model with fewer layers."""
  net, tx = made(load(path), optimizer, dtype, int(layers))
  grads = [torch.randn_like(w) for w in net.parameters()]
  yield {}

  def run() -> None:
    # The 8-bit optimizer replaces `w.grad` with the projected gradient.
    for w, grad in zip(net.parameters(), grads, strict=True):
      w.grad = grad
    tx.step()

  elements = sum(w.numel() for w in net.parameters())
  yield measured(run, int(steps)) | {'elements': elements}


def made(
  config: Any, optimizer: str, dtype: str = 'bfloat16', layers: int = 0
) -> tuple[Any, torch.optim.Optimizer]:
  """Returns the transformers model of a config on the GPU and its optimizer."""
  net = theirs.transformer(config.model, layers or config.model.num_layers)
  net = net.to(CARD, getattr(torch, dtype))
  if config.model.remat and not layers:
    net.gradient_checkpointing_enable()
  rank = getattr(config.optimizer, 'rank', 0)
  named = dict(net.named_parameters())
  return net, theirs.optimizer(optimizer, named, 500, rank)


def measured(run: Callable[[], Any], steps: int) -> dict[str, Any]:
  """Returns the seconds of a run and the peak memory of the GPU."""
  on_card = CARD == 'cuda'

  def wait(_: Any) -> None:
    if on_card:
      torch.cuda.synchronize()

  return timed(run, wait, steps) | {
    'device': torch.cuda.get_device_name() if on_card else 'cpu',
    'software': f'torch {torch.__version__}, transformers {VERSION}',
    'peak_bytes': torch.cuda.max_memory_allocated() if on_card else None,
  }
