"""LLaMA 7B on C4 with FRUGAL, in the setting of its paper.

Source: Zmushko et al. (arXiv 2411.07837), the authors' script for 7B: signs
alone on the matrices (density 0), Adam on the rest, learning rate 0.0005, 0.3
of it on the matrices, 150,000 steps of 512 x 256 tokens, a tenth of them
warm-up, gradients clipped at 1, bfloat16.
Command: python -m train.pretrain configs/frugal_7b.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: documents are packed here, and there each is cut or padded to 256
tokens; the tokenizer is trained on C4 here, and is T5's there.
Expected memory: 53.56 GiB on an H100, 1.96 of them optimizer state, by the
compiler (make plan ARGS='configs/frugal_7b.py --device h100', 26 November 2026,
jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 7.9e+20 operations, 1472
hours at 150 TFLOP/s.
Expected number: unknown. Our number: not yet run.
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
