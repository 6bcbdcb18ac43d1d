"""Pre-trains a LLaMA with 5.3 million parameters on dialogue: the first run.

Source: the text is chitchat-dataset (PyPI, MIT licence), 12.7 MB. The model has
the proportions of the smallest models that GaLore's authors pre-train.
Command: python -m train.pretrain configs/quickstart.py
Expected memory: 21 MB of weights and 25 MB of optimizer state (42 MB with
AdamW). The state of the projected weights is 32.3% of AdamW's.
Expected time: 1.2 minutes of training steps on two idle CPU cores (sum of
step_seconds in metrics.jsonl of `make train`, 30 November 2026).
Result: 1.847 bits per byte, perplexity 121.6 per token, on 16,384 positions of
the validation split (30 November 2026).
"""

from models.llama import LlamaConfig
from train.config import Config
from train.data.corpus import Chitchat
from train.method import Galore

config = Config(
  model=LlamaConfig(
    vocab_size=4096, width=256, mlp_width=688, num_heads=4, num_layers=4
  ),
  corpus=Chitchat(),
  # 'gram' computes the subspace of the SVD in a fraction of the SVD's time. The
  # study configs.studies.quickstart found this pair of scale and learning rate
  # to be the best: 0.003 for projected matrices, 0.1 for all other weights.
  optimizer=Galore(rank=64, gap=50, subspace='gram', scale=0.03),
  steps=300,
  learning_rate=0.1,
  batch_size=8,
  sequence_length=128,
  eval_every=75,
  eval_batches=16,
  save_every=150,
)
