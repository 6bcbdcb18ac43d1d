"""Fine-tunes Mistral-7B on openassistant-guanaco, on one GPU with 24 GB.

Source: a published recipe for transformers' `galore_adamw_8bit`. Rank 512, gap
200, scale 1.8, on the matrices of attention and mlp; weight decay 0.05; warm-up
in the first 0.2 of the steps.
Command: python -m train.finetune configs/mistral_7b_guanaco.py --checkpoint DIR
--corpus.train openassistant_best_replies_train.jsonl
Differences: the recipe does not use transformers' layer-wise optimizer, which
does not learn and does not support gradient accumulation. Here, updates are
layer-wise. A batch of 8 sequences is processed one sequence at a time, and the
projected gradients are summed. Updated weights are rounded stochastically.
Expected memory: 19.37 GiB on an RTX 4090, by the compiler's memory analysis
(make plan ARGS=configs/mistral_7b_guanaco.py, 30 November 2026, jax 0.10.2).
Expected time and result: unknown.
Status: not run yet.
"""

from models.llama import LlamaConfig
from train.config import Config, Layerwise
from train.data.chats import Chats
from train.method import Galore8bit

config = Config(
  # These are the sizes of mistralai/Mistral-7B-v0.1. With them, `make plan`
  # works without the checkpoint.
  model=LlamaConfig(
    vocab_size=32_000,
    width=4096,
    mlp_width=14_336,
    num_heads=32,
    num_layers=32,
    num_kv_heads=8,
    window=4096,
    norm_eps=1e-5,
    dtype='bfloat16',
    param_dtype='bfloat16',
    remat=True,
  ),
  corpus=Chats('openassistant_best_replies_train.jsonl'),
  optimizer=Galore8bit(
    rank=512,
    gap=200,
    scale=1.8,
    subspace='power',
    basis_bits=8,
    weight_decay=0.05,
  ),
  update=Layerwise(
    clip='previous', slices=32, weights='rounded', accumulate=8, sums='bfloat16'
  ),
  # Three epochs of 9,846 conversations, about two in a sequence.
  steps=1850,
  learning_rate=1e-5,
  warmup=0.2,
  batch_size=8,
  sequence_length=1024,
  eval_every=100,
  save_every=500,
  save_best=True,
)
