"""LLaMA 350M on C4 with GaLore, as in the paper.

Source: GaLore (arXiv 2403.03507), Table 2, and the authors' script for 350M:
rank 256, learning rate 0.01, scale 0.25, gap 200, 60,000 steps of 512 x 256
tokens, a tenth of them warm-up, no clipping.
Command: python -m train.pretrain configs/llama_350m.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: the moments are float32 here, and bfloat16 there; documents are
packed here, and there each is cut or padded to 256 tokens; the tokenizer is
trained on C4 here, and is T5's there, so compare bits per byte, or train AdamW
(--optimizer AdamW --learning-rate 0.001) by the side.
Expected memory: 0.74 GB of weights and 1.22 GB of optimizer state
(exact, from shapes); 7.22 GiB in all on an RTX 4090, by the compiler
(make plan ARGS=configs/llama_350m.py, 25 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 1.7e+19 operations,
32 hours at 150 TFLOP/s.
Expected number: validation perplexity 18.95 (the paper; full-rank 18.80).
Our number: not yet run.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import Galore

config = Config(
  model=llama('350m', dtype='bfloat16', param_dtype='bfloat16'),
  corpus=Tfds('c4/en'),
  optimizer=Galore(rank=256, gap=200, scale=0.25, subspace='svd'),
  steps=60_000,
  learning_rate=0.01,
  batch_size=512,
  sequence_length=256,
  microbatches=32,
  clip_norm=None,
  eval_every=1000,
  eval_batches=2442,  # 10 million tokens
  save_every=1000,
)
