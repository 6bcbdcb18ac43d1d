"""LLaMA 60M on C4 with FRUGAL, in the setting of its paper.

Source: Zmushko et al. (arXiv 2411.07837), Table 2, and the authors' script for
60M: density 0.25, gap 200, learning rate 0.001 of Adam and of the signs,
200,000 steps of 512 x 256 tokens in cycles of 10,000, a tenth of each warm-up,
no clipping, float32 weights.
Command: python -m train.pretrain configs/frugal_60m.py
(c4/en prepared by TFDS; --corpus.data-dir says where).
Differences: a quarter of each matrix's columns has Adam here, and there a
quarter of the matrices, in turns; documents are packed here, and there each is
cut or padded to 256 tokens; the tokenizer is trained on C4 here, and is T5's
there, so compare with AdamW (--optimizer AdamW) by the side. GaLore there:
--optimizer Galore --optimizer.rank 0.25 --learning-rate 0.01.
Expected memory: 3.35 GiB on an RTX 4090, 0.29 of them optimizer state, by the
compiler (make plan ARGS=configs/frugal_60m.py, 26 November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 9.1e+18 operations, 17
hours at 150 TFLOP/s.
Expected number: validation perplexity 23.59 (with density 0 24.06; AdamW 22.73,
GaLore 25.68, BAdam 24.86).
Our number: not yet run.
"""

from models.llama import llama
from train.config import Config
from train.data.corpus import Tfds
from train.method import Frugal

config = Config(
  model=llama('60m', dtype='bfloat16', param_dtype='float32'),
  corpus=Tfds('c4/en'),
  optimizer=Frugal(density=0.25, gap=200, subspace='columns'),
  steps=200_000,
  learning_rate=0.001,
  batch_size=512,
  sequence_length=256,
  microbatches=8,
  cycles=20,
  clip_norm=None,
  eval_every=2000,
  eval_batches=610,  # 10 million tokens
  save_every=2000,
)
