"""LLaMA 1B on C4 with FRUGAL, in the setting of its paper.

Source: Zmushko et al. (arXiv 2411.07837), Table 2, and the authors' script for
1B: density 0.25, gap 200, learning rate 0.001 of Adam and of the signs, 500,000
steps of 512 x 256 tokens in cycles of 100,000, a tenth of each warm-up, no
clipping, float32 weights.
Command: python -m train.pretrain configs/frugal_1b.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: those of configs/frugal_60m.py.
Expected memory: 26.64 GiB on an H100, 3.23 of them optimizer state, by the
compiler (make plan ARGS='configs/frugal_1b.py --device h100', 26 November 2026,
jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 5.3e+20 operations, 975
hours at 150 TFLOP/s.
Expected number: validation perplexity 12.32 (with density 0 12.63; AdamW 12.02,
GaLore 13.64, BAdam 13.75).
Our number: not yet run.
"""

import dataclasses

from configs.frugal_60m import config as base
from models.llama import llama

config = dataclasses.replace(
  base,
  model=llama('1b', dtype='bfloat16', param_dtype='float32', remat=True),
  steps=500_000,
  microbatches=32,
  cycles=5,
  eval_batches=2441,  # 10 million tokens
)
