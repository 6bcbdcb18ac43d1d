"""Pre-trains LLaMA-7B on one GPU with 16 GB: 8-bit weights and 4-bit bases.

Source: Zhang et al., Q-GaLore, 2024 (arXiv 2407.08296). Rank 1024, gap 500,
scale 0.25, learning rate 0.004. The matrices of the transformer layers are
stored as 8-bit integers in blocks of 256, and are rounded stochastically after
each update. The embedding and the head remain bfloat16. Batches have 2
sequences. Other settings are as in configs/llama_7b.py.
Command: python -m train.pretrain configs/llama_7b_16gb.py
This needs c4/en as prepared by TFDS; --corpus.data-dir is its directory.
Expected memory: 11.44 GiB on an RTX 4090, by the compiler's memory analysis
(make plan ARGS=configs/llama_7b_16gb.py, 30 November 2026, jax 0.10.2).
Q-GaLore reports 15.1 GB.
Expected time and result: unknown.
Status: not run yet.
"""

from models.llama import llama
from train.config import Config, Layerwise
from train.data.corpus import Tfds
from train.method import Galore8bit

config = Config(
  model=llama('7b', dtype='bfloat16', param_dtype='bfloat16', remat=True),
  corpus=Tfds('c4/en'),
  optimizer=Galore8bit(rank=1024, gap=500, subspace='power', basis_bits=4),
  update=Layerwise(clip='previous', slices=32, weights='int8'),
  steps=150_000,
  learning_rate=0.004,
  batch_size=2,
  sequence_length=256,
)
