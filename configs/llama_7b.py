"""Pre-trains LLaMA-7B with layer-wise 8-bit GaLore on one GPU with 24 GB.

Source: Zhao et al., GaLore, 2024 (arXiv 2403.03507). Rank 1024, gap 500, scale
0.25, learning rate 0.005, batches of 512 sequences of 256 tokens, 150,000
steps, bfloat16.
Command: python -m train.pretrain configs/llama_7b.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: updated weights are rounded stochastically, bases are stored with 8
bits per number, gradients are clipped by the global norm of the step before,
and a batch has 16 sequences. To train with the paper's batch, add --batch-size
512 --update.accumulate 32 --update.sums bfloat16, which splits it into parts
and sums their projected gradients.
Expected memory: 19.09 GiB on an RTX 4090, or 17.86 GiB with --batch-size 2, by
the compiler's memory analysis (make plan ARGS=configs/llama_7b.py, 30 November
2026, jax 0.10.2). 13.19 GiB with --optimizer Lomo --batch-size 1
--sequence-length 512.
Expected time: not measured.
Expected result: perplexity 14.65 in the paper, after 19.7 billion tokens of C4
in batches of 512 sequences.
Status: not run yet.
"""

from models.llama import llama
from train.config import Config, Layerwise
from train.data.corpus import Tfds
from train.method import Galore8bit

config = Config(
  model=llama('7b', dtype='bfloat16', param_dtype='bfloat16', remat=True),
  corpus=Tfds('c4/en'),
  optimizer=Galore8bit(rank=1024, gap=500, subspace='power', basis_bits=8),
  update=Layerwise(clip='previous', slices=32, weights='rounded'),
  steps=150_000,
  learning_rate=0.005,
  batch_size=16,
  sequence_length=256,
)
