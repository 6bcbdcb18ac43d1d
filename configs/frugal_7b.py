"""Pre-trains LLaMA 7B on C4 with FRUGAL of density 0, as in the FRUGAL paper.

Source: Zmushko et al. (arXiv 2411.07837), the authors' script for 7B. SignSGD
on the matrices (density 0), Adam on all other weights; learning rate 0.0005,
multiplied by 0.3 for the matrices; 150,000 steps of 512 x 256 tokens, the first
tenth of them warm-up; gradients clipped at norm 1; bfloat16.
Command: python -m train.pretrain configs/frugal_7b.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: documents are packed here; the script cuts or pads each to 256
tokens. The tokenizer is trained on C4 here; the script uses that of T5.
Expected memory: 53.03 GiB on an H100, of which 1.96 GiB is optimizer state, by
the compiler's memory analysis (make plan ARGS='configs/frugal_7b.py --device
h100', 30 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 7.9e+20 floating-point
operations, 1472 hours at 150 TFLOP/s.
Expected result: unknown.
Status: not run yet.
"""

import dataclasses

from configs.frugal_60m import config as base
from models.llama import llama
from train.method import Frugal

config = dataclasses.replace(
  base,
  model=llama('7b', dtype='bfloat16', param_dtype='bfloat16', remat=True),
  optimizer=Frugal(density=0.0, residual_scale=0.3),
  steps=150_000,
  learning_rate=0.0005,
  microbatches=64,
  clip_norm=1.0,
  eval_batches=4883,  # 10 million tokens
  cycles=1,
)
