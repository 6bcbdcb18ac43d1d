"""Pre-trains LLaMA 1B on C4 with SCALE, as in the SCALE paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 1B. Learning rate 0.0002, momentum 0.9 for the head only;
100,000 steps of 512 x 256 tokens, the first tenth of them warm-up; no clipping;
bfloat16.
Command: python -m train.pretrain configs/scale_1b.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: as in configs/scale_60m.py. In addition, the script trains vectors
(norms) with learning rate 0.001; here they have that of the matrices.
Expected memory: 10.80 GiB on an RTX 4090, of which 0.24 GiB is optimizer state,
by the compiler's memory analysis (make plan ARGS=configs/scale_1b.py, 26
November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 1.1e+20 floating-point
operations, 195 hours at 150 TFLOP/s.
Expected result: validation perplexity 14.25 in the paper (Adam 16.52, Muon
14.18, GaLore 15.57, Fira 15.10, APOLLO 14.20).
Status: not run yet.
"""

import dataclasses

from configs.scale_60m import config as base
from models.llama import llama

config = dataclasses.replace(
  base,
  model=llama('1b', dtype='bfloat16', param_dtype='bfloat16', remat=True),
  steps=100_000,
  learning_rate=0.0002,
  microbatches=32,
  eval_batches=2441,  # 10 million tokens
)
