"""LLaMA 130M on C4 with GaLore, as in the paper.

Source: GaLore (arXiv 2403.03507), Table 2, and the authors' script for 130M:
rank 256, learning rate 0.01, scale 0.25, gap 200, 20,000 steps of 512 x 256
tokens, a tenth of them warm-up, no clipping.
Command: python -m train.pretrain configs/llama_130m.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: the moments are float32 here, and bfloat16 there; documents are
packed here, and there each is cut or padded to 256 tokens; the tokenizer is
trained on C4 here, and is T5's there, so compare bits per byte, or train AdamW
(--optimizer AdamW --learning-rate 0.001) by the side.
Expected memory: 0.27 GB of weights and 0.65 GB of optimizer state
(exact, from shapes); 4.18 GiB in all on an RTX 4090, by the compiler
(make plan ARGS=configs/llama_130m.py, 25 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 2.1e+18 operations,
3.9 hours at 150 TFLOP/s.
Expected number: validation perplexity 25.36 (the paper; full-rank 25.08).
Our number: not yet run.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import Galore

config = Config(
  model=llama('130m', dtype='bfloat16', param_dtype='bfloat16'),
  corpus=Tfds('c4/en'),
  optimizer=Galore(rank=256, gap=200, scale=0.25, subspace='svd'),
  steps=20_000,
  learning_rate=0.01,
  batch_size=512,
  sequence_length=256,
  microbatches=16,
  clip_norm=None,
  eval_every=1000,
  eval_batches=1221,  # 10 million tokens
  save_every=1000,
)
