"""A small LLaMA on dialogues, with GaLore: the first run on any machine."""

from models.llama import LlamaConfig
from train.config import Config
from train.corpus import Chitchat
from train.optimizer import Galore

config = Config(
  model=LlamaConfig(
    vocab_size=4096, width=256, mlp_width=688, num_heads=4, num_layers=4
  ),
  corpus=Chitchat(),
  optimizer=Galore(rank=64, gap=100),
  steps=600,
  learning_rate=0.01,
  batch_size=16,
  sequence_length=128,
  eval_every=100,
  eval_batches=16,
)
