"""Pre-trains LLaMA 350M on C4 with FRUGAL, as in the FRUGAL paper.

Source: Zmushko et al. (arXiv 2411.07837), Table 2, and the authors' script for
350M. Density 0.25, gap 200, learning rate 0.001 for both Adam and signSGD;
300,000 steps of 512 x 256 tokens, in learning-rate cycles of 60,000 steps, the
first tenth of each warm-up; no clipping; float32 weights.
Command: python -m train.pretrain configs/frugal_350m.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: as in configs/frugal_60m.py.
Expected memory: 12.27 GiB on an RTX 4090, of which 1.05 GiB is optimizer state,
by the compiler's memory analysis (make plan ARGS=configs/frugal_350m.py, 26
November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 8.7e+19 floating-point
operations, 161 hours at 150 TFLOP/s.
Expected result: validation perplexity 14.79 in the paper (15.03 with density 0;
AdamW 14.43, GaLore 16.37, BAdam 16.41).
Status: not run yet.
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
