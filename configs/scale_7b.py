"""LLaMA 7B on C4 with SCALE, in the setting of its paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 7B: learning rate 0.0001, momentum 0.9 of the head, 150,000
steps of 512 x 256 tokens, a tenth of them warm-up, no clipping, bfloat16.
Command: python -m train.pretrain configs/scale_7b.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: those of configs/scale_60m.py, and vectors have rate 0.001 there,
and that of the matrices here.
Expected memory: 51.57 GiB on an H100, 0.49 of them optimizer state, by the
compiler (make plan ARGS='configs/scale_7b.py --device h100', 26 November 2026,
jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 7.9e+20 operations, 1472
hours at 150 TFLOP/s.
Expected number: validation perplexity 12.59 after 150,000 steps, 17.99 after
40,000 (APOLLO 13.02 and 17.55).
Our number: not yet run.
"""

import dataclasses

from configs.scale_60m import config as base
from models.llama import llama

config = dataclasses.replace(
  base,
  model=llama('7b', dtype='bfloat16', param_dtype='bfloat16', remat=True),
  steps=150_000,
  learning_rate=0.0001,
  microbatches=64,
  eval_batches=4883,  # 10 million tokens
)
