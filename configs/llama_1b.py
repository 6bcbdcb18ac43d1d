"""LLaMA 1B on C4 with GaLore, as in the paper.

Source: GaLore (arXiv 2403.03507), Table 2, and the authors' script for 1B:
rank 512, learning rate 0.01, scale 0.25, gap 200, 100,000 steps of 512 x 256
tokens, a tenth of them warm-up, no clipping.
The script has rank 1024, the paper 512; this is the paper.
Command: python -m train.pretrain configs/llama_1b.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: the moments are float32 here, and bfloat16 there; documents are
packed here, and there each is cut or padded to 256 tokens; the tokenizer is
trained on C4 here, and is T5's there, so compare bits per byte, or train AdamW
(--optimizer AdamW --learning-rate 0.001) by the side.
Expected memory: 2.68 GB of weights and 3.82 GB of optimizer state
(exact, from shapes); 14.24 GiB in all on an RTX 4090, by the compiler
(make plan ARGS=configs/llama_1b.py, 25 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 1.1e+20 operations,
195 hours at 150 TFLOP/s.
Expected number: validation perplexity 15.64 (the paper; full-rank 15.56).
Our number: not yet run.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import Galore

config = Config(
  model=llama('1b', dtype='bfloat16', param_dtype='bfloat16', remat=True),
  corpus=Tfds('c4/en'),
  optimizer=Galore(rank=512, gap=200, scale=0.25, subspace='svd'),
  steps=100_000,
  learning_rate=0.01,
  batch_size=512,
  sequence_length=256,
  microbatches=32,
  clip_norm=None,
  eval_every=1000,
  eval_batches=2442,  # 10 million tokens
  save_every=1000,
)
