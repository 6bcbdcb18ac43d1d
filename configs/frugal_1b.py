"""Pre-trains LLaMA 1B on C4 with FRUGAL, as in the FRUGAL paper.

Source: Zmushko et al. (arXiv 2411.07837), Table 2, and the authors' script for
1B. Density 0.25, gap 200, learning rate 0.001 for both Adam and signSGD;
500,000 steps of 512 x 256 tokens, in learning-rate cycles of 100,000 steps, the
first tenth of each warm-up; no clipping; float32 weights.
Command: python -m train.pretrain configs/frugal_1b.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: as in configs/frugal_60m.py.
Expected memory: 26.64 GiB on an H100, of which 3.23 GiB is optimizer state, by
the compiler's memory analysis (make plan ARGS='configs/frugal_1b.py --device
h100', 26 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 5.3e+20 floating-point
operations, 975 hours at 150 TFLOP/s.
Expected result: validation perplexity 12.32 in the paper (12.63 with density 0;
AdamW 12.02, GaLore 13.64, BAdam 13.75).
Status: not run yet.
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
