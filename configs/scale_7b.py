"""LLaMA 7B on C4 with SCALE, in the setting of its paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 7B: learning rate 0.0001, momentum 0.9 of the head, 150,000
steps of 512 x 256 tokens, a tenth of them warm-up, no clipping, bfloat16.
Command: python -m train.pretrain configs/scale_7b.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: documents are packed here, and there each is cut or padded to 256
tokens; the tokenizer is trained on C4 here, and is T5's there; their evaluation
divides by one batch too many, so that its perplexities are too low. Compare
with AdamW (--optimizer AdamW --learning-rate 0.001) by the side. Vectors have
rate 0.001 there, and that of the matrices here.
Expected memory: 51.57 GiB on an H100, 0.49 of them optimizer state, by the
compiler (make plan ARGS='configs/scale_7b.py --device h100', 26 November 2026,
jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 7.9e+20 operations, 1472
hours at 150 TFLOP/s.
Expected number: validation perplexity 12.59 after 150,000 steps, 17.99 after
40,000 (APOLLO 13.02 and 17.55).
Our number: not yet run.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import ScaleSgd

config = Config(
  model=llama('7b', dtype='bfloat16', param_dtype='bfloat16', remat=True),
  corpus=Tfds('c4/en'),
  optimizer=ScaleSgd(momentum=0.9),
  steps=150_000,
  learning_rate=0.0001,
  batch_size=512,
  sequence_length=256,
  microbatches=64,
  clip_norm=None,
  eval_every=1000,
  eval_batches=4883,  # 10 million tokens
  save_every=1000,
)
