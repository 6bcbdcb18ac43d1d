"""A diffusion transformer that draws one of ten kinds of clothes.

It learns Fashion-MNIST from nothing, with classifier-free guidance. The images
are those of Debian's package dataset-fashion-mnist; `--corpus.directory` names
another directory of idx files.
Command: python -m train.pretrain configs/dit_fashion.py
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
  steps=4000,
  learning_rate=0.002,
  batch_size=128,
  average=0.999,
  eval_every=500,
  eval_batches=32,
  save_every=500,
)
