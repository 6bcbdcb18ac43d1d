"""Turns labelled images into batches, with random crops and flips.

Shapes: B images of a batch, H rows, W columns and C channels of an image.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np
from rich.table import Table
from rich.text import Text

from train.data.batches import Batch, ahead
from train.data.images import pixels
from train.data.images.augment import Augment
from train.data.images.corpora import BoxOf, Images, Stored

# Number of random numbers that crop and flip an image.
_DRAWS = 5

# Characters from dark to bright, for an image in a table.
_SHADES = np.array(list(' .:-=+*#%@'))
# Largest number of characters in a row of that image.
_COLUMNS = 56
# Largest number of classes in a table.
_CLASSES = 20


def batches(
  examples: Images,
  *,
  batch_size: int,
  seed: int,
  augment: Augment | None = None,
  noise: bool = False,
  put: Callable[[Batch], Batch] = jax.device_put,
) -> grain.DatasetIterator[Batch]:
  """Returns an endless iterator of training batches on the device.

  A thread makes the batches while the previous step runs, and decodes the image
  files of a batch in parallel threads. Every epoch has another order and other
  augmentations. The state of the iterator is a small JSON object. A restored
  iterator returns the same batches, bit for bit.

  Args:
    examples: `corpus.open('train')`.
    batch_size: B.
    seed: seed of the order, the augmentation and the noise.
    augment: random changes; None makes none.
    noise: whether batches have random bits.
    put: sends a batch to one or several devices.

  Returns:
    An iterator of dicts: `inputs` [B, H, W, C] uint8, `targets` [B] int32,
      `weights` [B] float32 ones, and with `noise`, `noise` [B, 2] uint32.

  Raises:
    ValueError: the batch size is wrong. While iterating: an image has another
      size.
    OSError: while iterating, Pillow cannot read an image.
  """
  _check_batch_size(batch_size)
  augment = augment or Augment()
  if augment.scale is not None:
    pixels.pillow()
  stored = examples.stored(seed=seed, repeat=True)
  rows = stored.batch(batch_size, drop_remainder=True, batch_fn=list)
  # Random numbers of a whole batch are drawn much faster than those of a row.
  stack = functools.partial(_training_batch, examples, augment, noise)
  return iter(ahead(rows.random_map(stack, seed=seed).map(put)))


def validation_batches(
  examples: Images, *, batch_size: int, num_batches: int | None = None
) -> grain.IterDataset[Batch]:
  """Returns one pass over a split, with the same batches each time.

  The batches are those of `batches`, but in a fixed order, without changes and
  in host memory. The last batch is padded with black images of weight 0.

  Args:
    examples: `corpus.open('validation')`.
    batch_size: B.
    num_batches: number of batches after which the pass stops; None takes the
      whole split.
  """
  _check_batch_size(batch_size)
  stack = functools.partial(_validation_batch, examples, batch_size)
  found = examples.stored(seed=0, repeat=False).batch(
    batch_size, drop_remainder=False, batch_fn=stack
  )
  if num_batches is not None:
    found = grain.experimental.LimitIterDataset(found, num_batches)
  return ahead(found)


def shown(examples: Images, *, seed: int = 0, counted: int = 1000) -> Table:
  """Returns a table with the number of images of each class, and an image.

  Args:
    examples: `corpus.open('train')`.
    seed: seed of the order; the first image is shown.
    counted: number of images that are read to count their classes, if the
      corpus does not have a list of labels.
  """
  stream = examples.stored(seed=seed, repeat=False)
  first = next(iter(stream))
  labels_n = examples.labels_n
  if labels_n is None:
    read = itertools.islice(stream, counted)
    labels_n = np.array([stored.label for stored in read])
  counts = np.bincount(labels_n, minlength=examples.num_classes)
  height, width, channels = examples.shape
  caption = (
    f'{len(examples):,} images of {height} x {width} x {channels} in '
    f'{examples.num_classes:,} classes'
  )
  if len(labels_n) < len(examples):
    caption += f', of which {len(labels_n):,} are counted'
  if examples.left_out:
    caption += (
      f'; {len(examples.left_out):,} files that Pillow cannot read are left '
      f'out, {examples.left_out[0]} first'
    )
  name = _name(examples, first.label)
  table = Table(title='an example', caption=caption, box=None)
  table.add_column('class')
  table.add_column('images', justify='right')
  table.add_column(f'an image of {name}')
  listed = range(min(len(counts), _CLASSES))
  names = [_name(examples, label) for label in listed]
  numbers = [f'{counts[label]:,}' for label in listed]
  if len(counts) > _CLASSES:
    rest = counts[_CLASSES:]
    names.append(f'and {len(rest):,} more')
    numbers.append(f'{rest.min():,} to {rest.max():,} each')
  drawn = _characters(examples.image(first))
  table.add_row(*map(Text, ('\n'.join(names), '\n'.join(numbers), drawn)))
  return table


def _check_batch_size(batch_size: int) -> None:
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}')


def _training_batch(
  examples: Images,
  augment: Augment,
  noise: bool,
  stored: Sequence[Stored],
  rng: np.random.Generator,
) -> Batch:
  uniform_B5 = rng.random((len(stored), _DRAWS))

  def image(i: int) -> np.ndarray:
    return _augmented(examples, augment, stored[i], uniform_B5[i])

  batch = _stacked(image, stored)
  if noise:
    batch['noise'] = rng.integers(2**32, size=(len(stored), 2), dtype=np.uint32)
  return batch


def _validation_batch(
  examples: Images, batch_size: int, stored: Sequence[Stored]
) -> Batch:
  def image(i: int) -> np.ndarray:
    return examples.image(stored[i])

  batch = _stacked(image, stored)
  missing = batch_size - len(stored)
  return {
    name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
    for name, array in batch.items()
  }


def _stacked(
  image: Callable[[int], np.ndarray], stored: Sequence[Stored]
) -> Batch:
  """Stacks examples, given a function that makes the image of each.

  Images that must be decoded are made in parallel threads. An image in memory
  takes less time than a thread.
  """
  rows = range(len(stored))
  images = (
    pixels.map_in_threads(image, rows)
    if isinstance(stored[0].data, bytes)
    else map(image, rows)
  )
  return {
    'inputs': np.stack(list(images)),
    'targets': np.array([row.label for row in stored], np.int32),
    'weights': np.ones(len(stored), np.float32),
  }


def _augmented(
  examples: Images, augment: Augment, stored: Stored, uniform_5: np.ndarray
) -> np.ndarray:
  """Returns a randomly changed image [H, W, C]."""
  height, width, _ = examples.shape
  box_of: BoxOf | None = None
  if augment.scale is not None:
    box_of = functools.partial(
      pixels.random_box,
      uniform_4=uniform_5[:4],
      aspect=width / height,
      scale=augment.scale,
    )
  image_HWC = examples.image(stored, box_of)
  if augment.crop:
    offsets_2 = uniform_5[:2] * (2 * augment.crop + 1)
    image_HWC = _shifted(image_HWC, augment.crop - offsets_2.astype(int))
  if augment.flip and uniform_5[4] < 0.5:
    image_HWC = image_HWC[:, ::-1]
  return image_HWC


def _shifted(image_HWC: np.ndarray, shift_2: np.ndarray) -> np.ndarray:
  """Moves an image down and right, and fills the other pixels with zeros."""
  height, width, _ = image_HWC.shape
  down, right = (int(shift) for shift in shift_2)
  found = np.zeros_like(image_HWC)
  found[
    max(0, down) : max(0, height + down), max(0, right) : max(0, width + right)
  ] = image_HWC[
    max(0, -down) : max(0, height - down),
    max(0, -right) : max(0, width - right),
  ]
  return found


def _name(examples: Images, label: int) -> str:
  return examples.names[label] if examples.names else str(label)


def _characters(image_HWC: np.ndarray) -> str:
  """Draws an image with a character for each block of pixels."""
  grey_HW = image_HWC[..., :3].mean(-1)
  height, width = grey_HW.shape
  columns = min(2 * width, _COLUMNS)
  # A character is about twice as high as it is wide.
  rows = max(1, round(columns * height / width / 2))
  lines_y = (np.arange(rows) + 0.5) * height / rows
  places_x = (np.arange(columns) + 0.5) * width / columns
  block_yx = grey_HW[np.ix_(lines_y.astype(int), places_x.astype(int))]
  shades_yx = _SHADES[(block_yx / 256 * len(_SHADES)).astype(int)]
  return '\n'.join(''.join(line).rstrip() for line in shades_yx)
