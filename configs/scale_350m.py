"""Pre-trains LLaMA 350M on C4 with SCALE, as in the SCALE paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 350M. Learning rate 0.001, momentum 0.9 for the head only;
60,000 steps of 512 x 256 tokens, the first tenth of them warm-up; no clipping;
bfloat16.
Command: python -m train.pretrain configs/scale_350m.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: as in configs/scale_60m.py.
Expected memory: 9.47 GiB on an RTX 4090, of which 0.12 GiB is optimizer state,
by the compiler's memory analysis (make plan ARGS=configs/scale_350m.py, 26
November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 1.7e+19 floating-point
operations, 32 hours at 150 TFLOP/s.
Expected result: validation perplexity 16.32 in the paper (Adam 18.77, Muon
16.70, GaLore 19.37, Fira 16.82, APOLLO 16.75).
Status: not run yet.
"""

import dataclasses

from configs.scale_60m import config as base
from models.llama import llama

config = dataclasses.replace(
  base,
  model=llama('350m', dtype='bfloat16', param_dtype='bfloat16'),
  steps=60_000,
  microbatches=16,
  eval_batches=1221,  # 10 million tokens
)
