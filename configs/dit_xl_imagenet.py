"""Trains DiT-XL on pixels of ImageNet, layer by layer with 8-bit GaLore.

Source: Peebles and Xie, `DiT <https://arxiv.org/abs/2212.09748>`_, 2022: 28
layers of width 1152, batches of 256 images, learning rate 0.0001, no decay,
horizontal flips, a moving average of the weights with rate 0.9999, 400,000
steps. Rank 288 is a quarter of the width, as in the GaLore paper.
Command: python -m train.pretrain configs/dit_xl_imagenet.py
This needs imagenet2012 as prepared by TFDS; --corpus.data-dir is its directory.
It also needs Pillow: pip install 'galore-optax[train,images]'.
Differences: there is no autoencoder, so the network reads pixels, in patches of
8 x 8. It predicts v instead of noise and variances. Li and He, 2025
(arXiv 2511.13720) report that predicting noise or v can fail for patches of
16 x 16 pixels, whose 768 numbers are too many. The bases have 8 bits per
number, and a warm-up of 10,000 steps precedes the constant learning rate.
Expected memory: 6.89 GiB on an RTX 4090, by the compiler's memory analysis
(make plan ARGS=configs/dit_xl_imagenet.py, 30 November 2026, jax 0.10.2), 2.50
GiB of it for the moving average.
Expected time: not measured.
Expected result: unknown.
Status: not run yet.
"""

from models.diffusion import Diffusion
from models.dit import dit
from train.config import Config, Layerwise
from train.data.images.augment import Augment
from train.data.images.corpora import ImageTfds
from train.method import Galore8bit

config = Config(
  model=dit(
    'xl/8',
    image_size=256,
    num_channels=3,
    diffusion=Diffusion(prediction='v'),
    dtype='bfloat16',
    param_dtype='bfloat16',
    remat=True,
  ),
  corpus=ImageTfds('imagenet2012', size=256, augment=Augment(flip=True)),
  optimizer=Galore8bit(
    rank=288, gap=500, scale=1.0, subspace='power', basis_bits=8
  ),
  update=Layerwise(clip='previous', weights='rounded', accumulate=16),
  steps=400_000,
  learning_rate=0.0001,
  batch_size=256,
  warmup=0.025,
  final=1.0,
  average=0.9999,
  eval_every=10_000,
  eval_batches=40,
  save_every=10_000,
)
