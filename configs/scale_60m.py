"""Pre-trains LLaMA 60M on C4 with SCALE, as in the SCALE paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 60M. Learning rate 0.001, momentum 0.9 for the head only;
11,000 steps of 512 x 256 tokens, the first tenth of them warm-up; no clipping;
bfloat16.
Command: python -m train.pretrain configs/scale_60m.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: documents are packed here; the script cuts or pads each to 256
tokens. The tokenizer is trained on C4 here; the script uses that of T5. The
script's evaluation divides the loss by one batch too many, so that its
perplexities are too low. To compare, also train AdamW (--optimizer AdamW
--learning-rate 0.001).
Expected memory: 2.88 GiB on an RTX 4090, of which 0.06 GiB is optimizer state,
by the compiler's memory analysis (make plan ARGS=configs/scale_60m.py, 26
November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 5.0e+17 floating-point
operations, 0.9 hours at 150 TFLOP/s.
Expected result: validation perplexity 30.81 in the paper (Adam 30.05, Muon
28.86, GaLore 34.58, Fira 30.34, APOLLO 30.94).
Status: not run yet.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import ScaleSgd

config = Config(
  model=llama('60m', dtype='bfloat16', param_dtype='bfloat16'),
  corpus=Tfds('c4/en'),
  optimizer=ScaleSgd(momentum=0.9),
  steps=11_000,
  learning_rate=0.001,
  batch_size=512,
  sequence_length=256,
  microbatches=8,
  clip_norm=None,
  eval_every=1000,
  eval_batches=610,  # 10 million tokens
  save_every=1000,
)
