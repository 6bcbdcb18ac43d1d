"""LLaMA 350M on C4 with SCALE, in the setting of its paper.

Source: Glentis et al. (arXiv 2506.16659), the table of the authors' README, and
their script for 350M: learning rate 0.001, momentum 0.9 of the head, 60,000
steps of 512 x 256 tokens, a tenth of them warm-up, no clipping, bfloat16.
Command: python -m train.pretrain configs/scale_350m.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: documents are packed here, and there each is cut or padded to 256
tokens; the tokenizer is trained on C4 here, and is T5's there; their evaluation
divides by one batch too many, so that its perplexities are too low. Compare
with AdamW (--optimizer AdamW --learning-rate 0.001) by the side.
Expected memory: 9.47 GiB on an RTX 4090, 0.12 of them optimizer state, by the
compiler (make plan ARGS=configs/scale_350m.py, 26 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 1.7e+19 operations, 32
hours at 150 TFLOP/s.
Expected number: validation perplexity 16.32 (Adam 18.77, Muon 16.70, GaLore
19.37, Fira 16.82, APOLLO 16.75).
Our number: not yet run.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import ScaleSgd

config = Config(
  model=llama('350m', dtype='bfloat16', param_dtype='bfloat16'),
  corpus=Tfds('c4/en'),
  optimizer=ScaleSgd(momentum=0.9),
  steps=60_000,
  learning_rate=0.001,
  batch_size=512,
  sequence_length=256,
  microbatches=16,
  clip_norm=None,
  eval_every=1000,
  eval_batches=1221,  # 10 million tokens
  save_every=1000,
)
