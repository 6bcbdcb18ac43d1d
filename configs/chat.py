"""Fine-tunes any checkpoint on chats: the one to start from.

Source: the recipe of mistral_7b_guanaco at the rank of a small model. The
model, its tokenizer and its template come from the checkpoint; only the
answers are scored.

Command: python -m train.finetune configs/chat.py --checkpoint DIR
--corpus.train chats.jsonl
With LoRA: add --adapter Lora --learning-rate 2e-4; AdamW trains its factors.
Expected memory: make plan ARGS='configs/chat.py --checkpoint DIR' tells.
Expected time, expected number: of the checkpoint and the chats.
"""

from train.config import Config, Imported, Layerwise
from train.data.chats import Chats
from train.method import Galore8bit

config = Config(
  model=Imported(),
  corpus=Chats('chats.jsonl'),
  optimizer=Galore8bit(rank=128, gap=200, scale=1.0, subspace='power'),
  update=Layerwise(weights='rounded'),
  steps=300,
  learning_rate=1e-5,
  warmup=0.1,
  batch_size=8,
  sequence_length=512,
  eval_every=50,
  save_every=300,
  save_best=True,
)
