"""Trains the U-Net of DDPM to draw the clothes of Fashion-MNIST.

Source: Ho et al., `DDPM <https://arxiv.org/abs/2006.11239>`_, 2020, for the
architecture; this repository chose the sizes. The 60,000 training images are
those of Debian's package dataset-fashion-mnist; --corpus.directory is another
directory of idx files. 3,750 batches of 32 are 2 epochs.
Command: python -m train.pretrain configs/ddpm_fashion.py
This needs Pillow, which writes the images: pip install
'galore-optax[train,images]'.
Differences: the network has 1.1 million weights, predicts v, and follows the
cosine schedule.
Expected memory: 4.5 MB of weights, 4.5 MB of their average and 2.7 MB of
optimizer state (8.9 MB with AdamW), computed from shapes (make plan
ARGS='configs/ddpm_fashion.py --estimate').
Expected time: about 2,800 CPU seconds, estimated from 12 steps with 64 images
of 1.403 CPU seconds, on one x86-64 machine with two busy cores.
Expected result: unknown.
Status: not run yet.
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
  steps=3750,
  learning_rate=0.002,
  batch_size=32,
  average=0.999,
  eval_every=750,
  eval_batches=32,
  save_every=750,
)
