"""Trains a diffusion transformer to draw one of ten kinds of clothes.

Source: Peebles and Xie, `DiT <https://arxiv.org/abs/2212.09748>`_, 2022, for
the architecture; this repository chose the sizes. It learns Fashion-MNIST from
nothing, with dropped labels for classifier-free guidance. The 60,000 training
images are those of Debian's package dataset-fashion-mnist; --corpus.directory
is another directory of idx files. 4,500 batches of 64 are 4.8 epochs.
Command: python -m train.pretrain configs/dit_fashion.py
This needs Pillow, which writes the images: pip install
'galore-optax[train,images]'.
Differences: the network has 1.9 million weights and predicts v.
Expected memory: 7.5 MB of weights, 7.5 MB of their average and 5.0 MB of
optimizer state (15.0 MB with AdamW), computed from shapes (make plan
ARGS='configs/dit_fashion.py --estimate').
Expected time: about 2,850 CPU seconds, estimated from 12 steps with 128 images
of 1.247 CPU seconds, on one x86-64 machine with two busy cores.
Expected result: unknown.
Status: not run yet.
"""

from models.diffusion import Diffusion
from models.dit import DitConfig
from train.config import Config
from train.data.images.augment import Augment
from train.data.images.corpora import FASHION, IdxImages
from train.method import Galore

config = Config(
  model=DitConfig(
    image_size=28,
    num_channels=1,
    patch_size=4,
    width=128,
    num_heads=4,
    num_layers=6,
    num_classes=10,
    diffusion=Diffusion(prediction='v'),
  ),
  corpus=IdxImages(names=FASHION, augment=Augment(flip=True)),
  optimizer=Galore(rank=32, gap=100, scale=1.0),
  steps=4500,
  learning_rate=0.002,
  batch_size=64,
  average=0.999,
  eval_every=900,
  eval_batches=32,
  save_every=900,
)
