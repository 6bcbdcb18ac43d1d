"""The PyTorch workloads of the speed benchmark.

They use the LLaMA of transformers and the optimizers of galore-torch, both
unmodified. The functions return `run, notes` as in `tests.bench.speed.ours`.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from galore_torch import GaLoreAdamW, GaLoreAdamW8bit
from transformers import LlamaConfig, LlamaForCausalLM

from models import llama as llama_lib
from models.llama import llama
from tests.bench.speed.ours import BATCH, GAP, RANK, TIME

Run = Callable[[], Any]


def model(size: str) -> LlamaForCausalLM:
  """Returns the transformers model with one of our named sizes."""
  ours = llama(size)
  return transformer(ours, ours.num_layers)


def transformer(
  ours: llama_lib.LlamaConfig, num_layers: int
) -> LlamaForCausalLM:
  """Returns the transformers model for our config, with `num_layers` layers."""
  torch.manual_seed(0)
  config = LlamaConfig(
    vocab_size=ours.vocab_size,
    hidden_size=ours.width,
    intermediate_size=ours.mlp_width,
    num_attention_heads=ours.num_heads,
    num_hidden_layers=num_layers,
    use_cache=False,
  )
  return LlamaForCausalLM(config).train()


def optimizer(
  name: str, named: dict[str, torch.nn.Parameter], gap: int, rank: int = RANK
) -> torch.optim.Optimizer:
  """Returns an optimizer of galore-torch, or PyTorch's fused AdamW."""
  if name == 'AdamW':
    return torch.optim.AdamW(named.values(), lr=0.01, fused=True)
  matrices = {k: p for k, p in named.items() if 'attn' in k or 'mlp' in k}
  rest = [p for k, p in named.items() if k not in matrices]
  low = dict(rank=rank, update_proj_gap=gap, scale=0.25, proj_type='std')
  groups = [{'params': rest}, {'params': list(matrices.values())} | low]
  if name == '8-bit GaLore':
    return GaLoreAdamW8bit(groups, lr=0.01)
  return GaLoreAdamW(groups, lr=0.01, no_deprecation_warning=True)


def step(name: str, size: str) -> tuple[Run, dict[str, Any]]:
  """Returns a run of the whole step: forward, backward and update."""
  start = time.perf_counter()
  net = model(size)
  tx = optimizer(name, dict(net.named_parameters()), GAP)
  tokens = torch.randint(0, net.config.vocab_size, (BATCH, TIME))
  ready = time.perf_counter()

  def run() -> None:
    net(input_ids=tokens, labels=tokens).loss.backward()
    tx.step()
    tx.zero_grad()

  run()
  first = time.perf_counter() - ready
  return run, {'init': ready - start, 'first': first, 'tokens': BATCH * TIME}


def update(
  name: str, size: str, gap: str = str(GAP)
) -> tuple[Run, dict[str, Any]]:
  """Returns a run of the optimizer's update, between two refreshes."""
  named = dict(model(size).named_parameters())
  tx = optimizer(name, named, int(gap))
  for w in named.values():
    w.grad = torch.sin(1 + w.detach())
  # This step contains the first refresh.
  tx.step()
  return tx.step, {}
