"""Pre-trains LLaMA 1B on C4 with GaLore, as in the GaLore paper.

Source: GaLore (arXiv 2403.03507), Table 2, and the authors' script for 1B. Rank
512, learning rate 0.01, scale 0.25, gap 200; 100,000 steps of 512 x 256 tokens,
the first tenth of them warm-up; no clipping. The rank is the paper's; the
script has 1024.
Command: python -m train.pretrain configs/llama_1b.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: moments are float32 here and bfloat16 in the script. Documents are
packed here; the script cuts or pads each to 256 tokens. The tokenizer is
trained on C4 here; the script uses that of T5. Perplexities per token are
therefore not comparable. Compare bits per byte, or also train AdamW
(--optimizer AdamW --learning-rate 0.001).
Expected memory: 2.68 GB of weights and 3.82 GB of optimizer state, computed
from shapes. 14.75 GiB in total on an RTX 4090, by the compiler's memory
analysis (make plan ARGS=configs/llama_1b.py, 30 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 1.1e+20 floating-point
operations, 195 hours at 150 TFLOP/s.
Expected result: validation perplexity 15.64 in the paper (full-rank 15.56).
Status: not run yet.
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
