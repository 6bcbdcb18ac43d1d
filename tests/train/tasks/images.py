"""Small sets of images in files, and configs that learn them in seconds.

An image of 8 x 8 gray pixels has a bright stripe on the left, in the middle or
on the right, which is its class.
"""

import gzip
import json
import struct

import jax
import numpy as np
from PIL import Image

from train.config import Config
from train.data.images.augment import Augment
from train.data.images.corpora import IdxImages
from train.engine import metrics, training
from train.engine.config_json import to_json

NAMES = ('left', 'middle', 'right')
SIDE = 8


def striped(number, *, seed=0, side=SIDE, channels=None, classes=3):
  """Returns images [n, side, side] or [n, side, side, channels], and labels."""
  rng = np.random.default_rng(seed)
  shape = (number, side, side) + (() if channels is None else (channels,))
  images = rng.integers(100, size=shape, dtype=np.uint8)
  labels = np.arange(number) % classes
  for image, label in zip(images, labels, strict=True):
    first = int(label) * side // classes
    image[:, first : first + 2] += 150
  return images, labels.astype(np.uint8)


def write_idx(directory, *, sizes=(96, 22), **options):
  """Writes the four idx files of a set; returns the directory as text."""
  directory.mkdir(parents=True, exist_ok=True)
  for seed, (prefix, number) in enumerate(
    zip(('train', 't10k'), sizes, strict=True)
  ):
    images, labels = striped(number, seed=seed, **options)
    for name, array in (
      (f'{prefix}-images-idx3-ubyte', images),
      (f'{prefix}-labels-idx1-ubyte', labels),
    ):
      header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
      data = gzip.compress(header + array.tobytes())
      (directory / f'{name}.gz').write_bytes(data)
  return str(directory)


def write_folders(directory, *, number=24, **options):
  """Writes PNG files into a folder for each class."""
  images, labels = striped(number, **options)
  for i, (image, label) in enumerate(zip(images, labels, strict=True)):
    folder = directory / NAMES[label]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f'{i:03}.png')
  return str(directory)


def config(model, optimizer, directory, **changes):
  """Returns a config for the idx files in a directory."""
  return Config(
    **dict(
      model=model,
      corpus=IdxImages(
        directory, names=NAMES, augment=Augment(crop=1, flip=False)
      ),
      optimizer=optimizer,
      steps=24,
      learning_rate=0.02,
      batch_size=12,
      eval_every=12,
      save_every=12,
    )
    | changes
  )


def write(path, found):
  """Writes a config file that has this config; returns its path as text."""
  path.write_text(
    'import json\n'
    'from train.config import Config\n'
    'from train.engine.config_json import from_json\n'
    f'config = from_json(Config, json.loads({json.dumps(to_json(found))!r}))\n'
  )
  return str(path)


def first_steps(path, directory, *options):
  """Returns the losses of six steps, and the metrics of a validation then."""
  setup = training.prepare([path, '--run', str(directory), *options])
  state, losses = training.begin(setup), []
  for _ in range(6):
    state, found = setup.step(state, next(setup.batches))
    losses.append(found['loss'])
  validation = setup.validate(state.evaluated)
  return [*jax.device_get(losses), *validation.values()]


def values(run, name):
  """Returns the logged values of a metric."""
  return [x[name] for x in metrics.read(run.metrics_path) if name in x]
