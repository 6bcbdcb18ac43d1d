"""LLaMA 1B on C4 with SCALE, in the setting of its paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 1B: learning rate 0.0002, momentum 0.9 of the head, 100,000
steps of 512 x 256 tokens, a tenth of them warm-up, no clipping, bfloat16.
Command: python -m train.pretrain configs/scale_1b.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: those of configs/scale_60m.py, and vectors have rate 0.001 there,
and that of the matrices here.
Expected memory: 10.80 GiB on an RTX 4090, 0.24 of them optimizer state, by the
compiler (make plan ARGS=configs/scale_1b.py, 26 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 1.1e+20 operations, 195
hours at 150 TFLOP/s.
Expected number: validation perplexity 14.25 (Adam 16.52, Muon 14.18, GaLore
15.57, Fira 15.10, APOLLO 14.20).
Our number: not yet run.
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
