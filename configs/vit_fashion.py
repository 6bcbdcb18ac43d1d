"""Trains a small vision transformer on Fashion-MNIST from nothing.

Source: this repository. The 60,000 training images and 10,000 test images are
those of Debian's package dataset-fashion-mnist; --corpus.directory is another
directory of idx files. The model has 0.2 million weights. 4,690 batches of 128
are 10 epochs.
Command: python -m train.pretrain configs/vit_fashion.py
This needs the extra `train` only, because idx files are read without Pillow.
Expected memory: 0.82 MB of weights and 0.56 MB of optimizer state (1.64 MB with
AdamW), computed from shapes (make plan ARGS='configs/vit_fashion.py
--estimate').
Expected time: about 1,770 CPU seconds, estimated from 12 steps of 0.365 CPU
seconds and a validation of 5.3, on one x86-64 machine with two busy cores.
Expected result: unknown.
Status: not run yet.
"""

from models.vit import VitConfig
from train.config import Config
from train.data.images.augment import Augment
from train.data.images.corpora import FASHION, IdxImages
from train.method import Galore

config = Config(
  model=VitConfig(
    image_size=28,
    patch_size=4,
    width=64,
    mlp_width=256,
    num_heads=4,
    num_layers=4,
    num_labels=10,
    labels=FASHION,
    num_channels=1,
    mean=(0.286,),
    std=(0.353,),
  ),
  corpus=IdxImages(names=FASHION, augment=Augment(crop=2, flip=True)),
  optimizer=Galore(rank=16, gap=100, scale=1.0, weight_decay=0.05),
  steps=4690,
  learning_rate=0.003,
  batch_size=128,
  eval_every=469,
  save_every=469,
  save_best=True,
)
