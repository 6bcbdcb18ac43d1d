"""LLaMA-7B for a card of 16 GB: as llama_7b, weights in 8 bits, bases in 4.

Source: Zhang et al., Q-GaLore, 2024: rank 1024, gap 500, scale 0.25, learning
rate 0.004. The layers' matrices are stored in blocks of 256 8-bit integers,
their sums rounded stochastically; embedding and head stay bfloat16.

Command: python -m train.pretrain configs/llama_7b_16gb.py
(c4/en prepared by TFDS; --corpus.data-dir says where)
Expected memory: 11.32 GiB on an RTX 4090, by the compiler (make plan
ARGS=configs/llama_7b_16gb.py, 26 November 2026, jax 0.10.2); Q-GaLore reports
15.1 GB.
Expected time, expected number: unknown. Our number: not yet run.
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
