"""Pre-trains LLaMA 60M on C4 with FRUGAL, as in the FRUGAL paper.

Source: Zmushko et al. (arXiv 2411.07837), Table 2, and the authors' script for
60M. Density 0.25, gap 200, learning rate 0.001 for both Adam and signSGD;
200,000 steps of 512 x 256 tokens, in learning-rate cycles of 10,000 steps, the
first tenth of each warm-up; no clipping; float32 weights.
Command: python -m train.pretrain configs/frugal_60m.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Differences: here, Adam updates a quarter of each matrix's columns; in the
script, it updates a quarter of the matrices, in rotation. Documents are packed
here; the script cuts or pads each to 256 tokens. The tokenizer is trained on C4
here; the script uses that of T5. Perplexities are therefore not comparable;
also train AdamW (--optimizer AdamW). The paper's GaLore: --optimizer Galore
--optimizer.rank 0.25 --learning-rate 0.01.
Expected memory: 3.35 GiB on an RTX 4090, of which 0.29 GiB is optimizer state,
by the compiler's memory analysis (make plan ARGS=configs/frugal_60m.py, 26
November 2026, jax 0.10.2).
Expected time: not measured. 6 x parameters x tokens is 9.1e+18 floating-point
operations, 17 hours at 150 TFLOP/s.
Expected result: validation perplexity 23.59 in the paper (24.06 with density 0;
AdamW 22.73, GaLore 25.68, BAdam 24.86).
Status: not run yet.
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
