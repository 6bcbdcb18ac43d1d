"""LLaMA-7B with layer-wise 8-bit GaLore, for one card of 24 GB.

Source: Zhao et al., GaLore, 2024: rank 1024, gap 500, scale 0.25, learning
rate 0.005, batch 512, 256 tokens, 150,000 steps, bfloat16. Here the weights'
sums are rounded stochastically, bases are stored in blocks of 8 bits, clipping
is by the global norm of the step before, and a batch is 16 sequences. The
paper's batch goes in parts, whose projected gradients are summed: add
--batch-size 512 --update.accumulate 32 --update.sums bfloat16.

Command: python -m train.pretrain configs/llama_7b.py
(c4/en prepared by TFDS; --corpus.data-dir says where)
Expected memory: 18.83 GiB on an RTX 4090, with --batch-size 2 17.73 GiB, by the
compiler (make plan ARGS=configs/llama_7b.py, 26 November 2026, jax
0.10.2); on 25 November 12.96 GiB with --optimizer Lomo --batch-size 1
--sequence-length 512.
Expected time: not measured.
Expected number: perplexity 14.65 after 19.7 B tokens of C4, in batches of 512
sequences (the paper).
Our number: not yet run.
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
