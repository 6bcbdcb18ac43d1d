"""Pre-trains LLaMA 130M on C4 with SCALE, as in the SCALE paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 130M. Learning rate 0.001, momentum 0.9 for the head only;
20,000 steps of 512 x 256 tokens, the first tenth of them warm-up; no clipping;
bfloat16.
Command: python -m train.pretrain configs/scale_130m.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: as in configs/scale_60m.py.
Expected memory: 3.65 GiB on an RTX 4090, of which 0.09 GiB is optimizer state,
by the compiler's memory analysis (make plan ARGS=configs/scale_130m.py, 26
November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 2.1e+18 floating-point
operations, 3.9 hours at 150 TFLOP/s.
Expected result: validation perplexity 22.57 in the paper (Adam 23.13, Muon
22.20, GaLore 25.31, Fira 22.96, APOLLO 22.93).
Status: not run yet.
"""

import dataclasses

from configs.scale_60m import config as base
from models.llama import llama

config = dataclasses.replace(
  base,
  model=llama('130m', dtype='bfloat16', param_dtype='bfloat16'),
  steps=20_000,
  microbatches=16,
  eval_batches=1221,  # 10 million tokens
)
