"""A vision transformer that learns Fashion-MNIST from nothing, in 20 epochs.

The 60,000 training images and 10,000 test images are those of Debian's package
dataset-fashion-mnist; `--corpus.directory` names another directory of idx
files."""

from models.vit import VitConfig
from train.config import Config
from train.data.images.augment import Augment
from train.data.images.corpora import FASHION, IdxImages
from train.method import Galore

config = Config(
  model=VitConfig(
    image_size=28,
    patch_size=4,
    width=96,
    mlp_width=384,
    num_heads=3,
    num_layers=6,
    num_labels=10,
    labels=FASHION,
    num_channels=1,
    mean=(0.286,),
    std=(0.353,),
  ),
  corpus=IdxImages(names=FASHION, augment=Augment(crop=2, flip=True)),
  optimizer=Galore(rank=24, gap=100, scale=1.0, weight_decay=0.05),
  steps=4700,
  learning_rate=0.003,
  batch_size=256,
  eval_every=470,
  save_every=470,
  save_best=True,
)
