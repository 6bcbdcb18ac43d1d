"""Pre-trains LLaMA 60M on C4 with GaLore, as in the GaLore paper.

Source: GaLore (arXiv 2403.03507), Table 2, and the authors' script for 60M.
Rank 128, learning rate 0.01, scale 0.25, gap 200; 10,000 steps of 512 x 256
tokens, the first tenth of them warm-up; no clipping.
Command: python -m train.pretrain configs/llama_60m.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: moments are float32 here and bfloat16 in the script. Documents are
packed here; the script cuts or pads each to 256 tokens. The tokenizer is
trained on C4 here; the script uses that of T5. Perplexities per token are
therefore not comparable. Compare bits per byte, or also train AdamW
(--optimizer AdamW --learning-rate 0.001).
Expected memory: 0.12 GB of weights and 0.32 GB of optimizer state, computed
from shapes. 3.13 GiB in total on an RTX 4090, by the compiler's memory analysis
(make plan ARGS=configs/llama_60m.py, 25 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 4.6e+17 floating-point
operations, 0.8 hours at 150 TFLOP/s.
Expected result: validation perplexity 34.88 in the paper (full-rank 34.06).
Status: not run yet.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import Galore

config = Config(
  model=llama('60m', dtype='bfloat16', param_dtype='bfloat16'),
  corpus=Tfds('c4/en'),
  optimizer=Galore(rank=128, gap=200, scale=0.25, subspace='svd'),
  steps=10_000,
  learning_rate=0.01,
  batch_size=512,
  sequence_length=256,
  microbatches=8,
  clip_norm=None,
  eval_every=1000,
  eval_batches=610,  # 10 million tokens
  save_every=1000,
)
