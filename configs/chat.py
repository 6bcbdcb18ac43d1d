"""Fine-tunes any checkpoint on chats. Start from this config for your own data.

Source: the recipe of configs/mistral_7b_guanaco.py, with a rank for a small
model. The model, its tokenizer and its chat template are read from the
checkpoint. Only the assistant's answers count in the loss.
Command: python -m train.finetune configs/chat.py --checkpoint DIR
--corpus.train chats.jsonl
To train with LoRA, add --adapter Lora --learning-rate 2e-4. AdamW then trains
the factors.
Expected memory: run make plan ARGS='configs/chat.py --checkpoint DIR'.
Expected time and result: these depend on the checkpoint and the chats.
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
