"""Trains ViT-S/16 on ImageNet with 8-bit GaLore for 90 epochs.

Source: Beyer et al., `Better plain ViT baselines for ImageNet-1k
<https://arxiv.org/abs/2205.01580>`_, 2022: batches of 1024 images, learning
rate 0.001 after 10,000 steps of warm-up, global average pooling, clipping to
norm 1. Its decay of 0.0001 is not multiplied by the learning rate, so it is 0.1
here. Rank 96 is a quarter of the width, as in the GaLore paper.
Command: python -m train.pretrain configs/vit_s16_imagenet.py
This needs imagenet2012 as prepared by TFDS; --corpus.data-dir is its directory.
It also needs Pillow: pip install 'galore-optax[train,images]'.
Differences: there is no RandAugment and no mixup. Positions are learned, random
crops have at least 8 % of an image, and the last learning rate is a tenth of
the peak.
Expected memory: 4.68 GiB on an RTX 4090, by the compiler's memory analysis
(make plan ARGS=configs/vit_s16_imagenet.py, 30 November 2026, jax 0.10.2).
Expected time: not measured.
Expected result: unknown. The source reports an accuracy above 76 % with Adam,
RandAugment and mixup.
Status: not run yet.
"""

from models.vit import VitConfig
from train.config import Config
from train.data.images.augment import Augment
from train.data.images.corpora import ImageTfds
from train.method import Galore8bit

config = Config(
  model=VitConfig(
    image_size=224,
    patch_size=16,
    width=384,
    mlp_width=1536,
    num_heads=6,
    num_layers=12,
    num_labels=1000,
    dtype='bfloat16',
  ),
  corpus=ImageTfds(
    'imagenet2012',
    size=224,
    augment=Augment(scale=(0.08, 1.0), flip=True),
  ),
  optimizer=Galore8bit(rank=96, gap=200, scale=1.0, weight_decay=0.1),
  steps=112_600,  # 90 epochs
  learning_rate=0.001,
  batch_size=1024,
  microbatches=8,
  warmup=0.0888,  # 10,000 steps
  eval_every=5630,
  save_every=5630,
  save_best=True,
)
