"""Fine-tunes Llama-3.1-8B on chats, on one GPU with 24 GB.

Source: the recipe of configs/mistral_7b_guanaco.py.
Command: python -m train.finetune configs/llama31_8b_chat.py --checkpoint DIR
--corpus.train chats.jsonl
Differences: the embedding and the head have 128,256 rows, so that bfloat16
weights do not fit (24.29 GiB in total with --update.weights rounded). The
matrices of the transformer layers are therefore stored as 8-bit integers in
blocks of 256, and are rounded stochastically after each update.
Expected memory: 18.04 GiB on an RTX 4090, by the compiler's memory analysis
(make plan ARGS=configs/llama31_8b_chat.py, 26 November 2026, jax 0.10.2).
Expected time and result: unknown.
Status: not run yet.
"""

import dataclasses

from configs import mistral_7b_guanaco
from models.llama import Llama3Scaling, LlamaConfig
from train.data.chats import Chats

recipe = mistral_7b_guanaco.config
config = dataclasses.replace(
  recipe,
  # These are the sizes of meta-llama/Llama-3.1-8B. With them, `make plan`
  # works without the checkpoint.
  model=LlamaConfig(
    vocab_size=128_256,
    width=4096,
    mlp_width=14_336,
    num_heads=32,
    num_layers=32,
    num_kv_heads=8,
    rope_theta=500_000.0,
    rope_scaling=Llama3Scaling(
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_length=8192,
    ),
    norm_eps=1e-5,
    dtype='bfloat16',
    param_dtype='bfloat16',
    remat=True,
  ),
  corpus=Chats('chats.jsonl'),
  update=dataclasses.replace(recipe.update, slices=64, weights='int8'),
  steps=1000,
)
