"""Pre-trains LLaMA 7B on C4 with SCALE, as in the SCALE paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 7B. Learning rate 0.0001, momentum 0.9 for the head only;
150,000 steps of 512 x 256 tokens, the first tenth of them warm-up; no clipping;
bfloat16.
Command: python -m train.pretrain configs/scale_7b.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: as in configs/scale_60m.py. In addition, the script trains vectors
(norms) with learning rate 0.001; here they have that of the matrices.
Expected memory: 51.57 GiB on an H100, of which 0.49 GiB is optimizer state, by
the compiler's memory analysis (make plan ARGS='configs/scale_7b.py --device
h100', 26 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 7.9e+20 floating-point
operations, 1472 hours at 150 TFLOP/s.
Expected result: validation perplexity 12.59 in the paper after 150,000 steps
and 17.99 after 40,000 (APOLLO 13.02 and 17.55).
Status: not run yet.
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
