"""LLaMA 350M on C4 with FRUGAL, in the setting of its paper.

Source: Zmushko et al. (arXiv 2411.07837), Table 2, and the authors' script for
350M: density 0.25, gap 200, learning rate 0.001 of Adam and of the signs,
300,000 steps of 512 x 256 tokens in cycles of 60,000, a tenth of each warm-up,
no clipping, float32 weights.
Command: python -m train.pretrain configs/frugal_350m.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: those of configs/frugal_60m.py.
Expected memory: 12.27 GiB on an RTX 4090, 1.05 of them optimizer state, by the
compiler (make plan ARGS=configs/frugal_350m.py, 26 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 8.7e+19 operations, 161
hours at 150 TFLOP/s.
Expected number: validation perplexity 14.79 (with density 0 15.03; AdamW 14.43,
GaLore 16.37, BAdam 16.41).
Our number: not yet run.
"""

import dataclasses

from configs.frugal_60m import config as base
from models.llama import llama

config = dataclasses.replace(
  base,
  model=llama('350m', dtype='bfloat16', param_dtype='float32'),
  steps=300_000,
  microbatches=16,
  cycles=5,
  eval_batches=1221,  # 10 million tokens
)
