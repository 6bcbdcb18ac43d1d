"""The U-Net of DDPM, which learns to draw the clothes of Fashion-MNIST.

The 60,000 training images are those of Debian's package dataset-fashion-mnist;
`--corpus.directory` names another directory of idx files.
Command: python -m train.pretrain configs/ddpm_fashion.py
"""

from models.diffusion import Diffusion
from models.unet import UnetConfig
from train.config import Config
from train.data.images.augment import Augment
from train.data.images.corpora import FASHION, IdxImages
from train.method import Galore

config = Config(
  model=UnetConfig(
    image_size=28,
    num_channels=1,
    width=32,
    multipliers=(1, 2, 2),
    num_blocks=1,
    attention_sizes=(7,),
    groups=8,
    diffusion=Diffusion(prediction='v'),
  ),
  corpus=IdxImages(names=FASHION, augment=Augment(flip=True)),
  optimizer=Galore(rank=16, gap=100, scale=1.0),
  steps=4000,
  learning_rate=0.002,
  batch_size=64,
  average=0.999,
  eval_every=500,
  eval_batches=32,
  save_every=500,
)
