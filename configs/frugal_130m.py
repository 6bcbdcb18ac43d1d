"""LLaMA 130M on C4 with FRUGAL, in the setting of its paper.

Source: Zmushko et al. (arXiv 2411.07837), Table 2, and the authors' script for
130M: density 0.25, gap 200, learning rate 0.001 of Adam and of the signs,
200,000 steps of 512 x 256 tokens in cycles of 20,000, a tenth of each warm-up,
no clipping, float32 weights.
Command: python -m train.pretrain configs/frugal_130m.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: those of configs/frugal_60m.py.
Expected memory: 4.69 GiB on an RTX 4090, 0.52 of them optimizer state, by the
compiler (make plan ARGS=configs/frugal_130m.py, 26 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 2.1e+19 operations, 39
hours at 150 TFLOP/s.
Expected number: validation perplexity 18.60 (with density 0 18.90; AdamW 18.13,
GaLore 20.11, BAdam 20.34).
Our number: not yet run.
"""

import dataclasses

from configs.frugal_60m import config as base
from models.llama import llama

config = dataclasses.replace(
  base,
  model=llama('130m', dtype='bfloat16', param_dtype='float32'),
  microbatches=16,
  cycles=10,
  eval_batches=1221,  # 10 million tokens
)
