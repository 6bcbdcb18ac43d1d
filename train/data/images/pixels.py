"""Reads, crops and writes images with Pillow, which is imported on first use.

Shapes: n images of H rows, W columns and C channels.
"""

import concurrent.futures
import contextlib
import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

Shape: TypeAlias = tuple[int, int, int]
"""H, W and C."""

T = TypeVar('T')
U = TypeVar('U')

# Pillow's name of an image with this many channels.
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}

# EXIF orientations that swap rows and columns.
_ON_THE_SIDE = (5, 6, 7, 8)

# Number of images that are given to the threads at once.
_SUBMITTED = 1024

# Width divided by height of a random crop, compared with the result's.
_MOST_STRETCHED = 4 / 3


class Box(NamedTuple):
  """A rectangle of an image, in pixels from its upper left corner."""

  left: float
  upper: float
  right: float
  lower: float


def pillow() -> Any:
  """Returns the package PIL.

  Raises:
    ImportError: Pillow is not installed.
  """
  try:
    import PIL.ExifTags
    import PIL.Image
    import PIL.ImageOps
  except ImportError as error:
    raise ImportError(
      'image files need the package Pillow, which is not installed: pip '
      "install 'galore-optax[images]'"
    ) from error
  return PIL


def check_channels(channels: int) -> None:
  """Raises ValueError unless images can have this number of channels."""
  if channels not in _MODES:
    raise ValueError(
      f'channels must be 1 (grey), 3 (RGB) or 4 (RGBA), got {channels}'
    )


def decode(data: bytes, channels: int) -> Any:
  """Decodes the content of an image file.

  The image is rotated by its EXIF orientation. Colours are converted to the
  number of channels, and transparency is dropped unless there are four.

  Args:
    data: the bytes of the file.
    channels: 1, 3 or 4.

  Returns:
    An image of Pillow.

  Raises:
    ValueError: Pillow cannot read the data, or a channel has more than 8 bits.
  """
  library = pillow()
  with _reading():
    image = library.Image.open(io.BytesIO(data))
    image = library.ImageOps.exif_transpose(image)
    image.load()
  # Pillow would replace all values above 255 by 255.
  if image.mode.startswith(('I', 'F')):
    raise ValueError(f'its mode is {image.mode}, which is not 8 bits a channel')
  if image.mode == 'P' and 'transparency' in image.info:
    image = image.convert('RGBA')
  return image.convert(_MODES[channels])


def size_in_header(path: str) -> tuple[int, int]:
  """Returns H and W of an image file, of which only the header is read.

  Raises:
    ValueError: Pillow cannot read the header.
  """
  library = pillow()
  with _reading(), library.Image.open(path) as image:
    width, height = image.size
    orientation = image.getexif().get(library.ExifTags.Base.Orientation)
  return (width, height) if orientation in _ON_THE_SIDE else (height, width)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
  """Raises ValueError for the many kinds of errors that Pillow raises."""
  try:
    yield
  except Exception as error:
    raise ValueError(
      f'Pillow cannot read it ({type(error).__name__}: {str(error)[:200]})'
    ) from error


def map_in_threads(
  function: Callable[[T], U], items: Sequence[T]
) -> Iterator[U]:
  """Yields the results in order. Pillow decodes images in parallel threads."""
  for start in range(0, len(items), _SUBMITTED):
    yield from _threads().map(function, items[start : start + _SUBMITTED])


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def to_array(image: Any) -> np.ndarray:
  """Returns an image of Pillow as an array [H, W, C] uint8."""
  array = np.array(image)
  return array[..., None] if array.ndim == 2 else array


def resized(image_HWC: Any, box: Box, height: int, width: int) -> np.ndarray:
  """Resizes a rectangle of an image with a bicubic filter.

  The result is that of a crop after the whole image was resized.

  Args:
    image_HWC: an array [H, W, C] uint8, or an image of Pillow.
    box: the rectangle.
    height: number of rows of the result.
    width: number of columns of the result.

  Returns:
    An array [height, width, C] uint8.
  """
  Image = pillow().Image
  if isinstance(image_HWC, np.ndarray):
    grey = image_HWC.shape[-1] == 1
    image_HWC = Image.fromarray(image_HWC[..., 0] if grey else image_HWC)
  found = image_HWC.resize((width, height), Image.Resampling.BICUBIC, box)
  return to_array(found)


def centred_box(height: int, width: int, aspect: float) -> Box:
  """Returns the largest centred rectangle with a given width / height.

  >>> centred_box(100, 200, 1.0)
  Box(left=50.0, upper=0.0, right=150.0, lower=100.0)
  """
  columns = min(width, height * aspect)
  rows = min(height, width / aspect)
  left, upper = (width - columns) / 2, (height - rows) / 2
  return Box(left, upper, left + columns, upper + rows)


def random_box(
  height: int,
  width: int,
  *,
  uniform_4: np.ndarray,
  aspect: float,
  scale: tuple[float, float],
) -> Box:
  """Returns a rectangle of a random area, shape and place.

  Its area is uniform between the shares `scale` of the image's area. The
  logarithm of its width / height is uniform between those of `aspect` * 3/4 and
  `aspect` * 4/3, as far as such a rectangle fits into the image.

  Args:
    height: H of the image.
    width: W of the image.
    uniform_4: four random numbers between 0 and 1.
    aspect: width / height of the result of a resize, which the rectangle has on
      average.
    scale: least and largest area.
  """
  area = height * width * (scale[0] + uniform_4[0] * (scale[1] - scale[0]))
  # A wider rectangle would exceed the width, a narrower one the height.
  widest, narrowest = width**2 / area, area / height**2
  bounds = np.log(
    np.clip(
      (aspect / _MOST_STRETCHED, aspect * _MOST_STRETCHED), narrowest, widest
    )
  )
  ratio = np.exp(bounds[0] + uniform_4[1] * (bounds[1] - bounds[0]))
  columns = min(width, float(np.sqrt(area * ratio)))
  rows = min(height, float(np.sqrt(area / ratio)))
  left = float(uniform_4[2]) * (width - columns)
  upper = float(uniform_4[3]) * (height - rows)
  return Box(left, upper, left + columns, upper + rows)


def grid(
  images_nHWC: np.ndarray, columns: int, *, margin: int = 2
) -> np.ndarray:
  """Puts images side by side, with white margins between them.

  Args:
    images_nHWC: the images, uint8. They fill the rows of the grid in order.
    columns: number of images in a row of the grid.
    margin: width of the margins in pixels.

  Returns:
    An array [height, width, C] uint8. Places without an image are white.

  Raises:
    ValueError: the array is empty, or does not contain images.

  Example:
    >>> grid(np.zeros((5, 28, 28, 1), np.uint8), columns=3).shape
    (58, 88, 1)
  """
  _check_bytes('images', images_nHWC, (4,))
  if columns < 1 or not len(images_nHWC):
    raise ValueError(
      'a grid needs at least one column and one image, got '
      f'columns={columns} and {len(images_nHWC)} images'
    )
  n, height, width, channels = images_nHWC.shape
  columns = min(columns, n)
  rows = -(-n // columns)
  cells = np.full(
    (rows * columns, height + margin, width + margin, channels), 255, np.uint8
  )
  cells[:n, :height, :width] = images_nHWC
  cells = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
  whole = cells.reshape(
    rows * (height + margin), columns * (width + margin), channels
  )
  return whole[: len(whole) - margin, : whole.shape[1] - margin]


def write_png(path: str, image_HWC: np.ndarray) -> None:
  """Writes an image as a PNG file.

  Args:
    path: path of the file.
    image_HWC: the image, uint8, with 1, 3 or 4 channels.

  Raises:
    ValueError: the array is not an image.
  """
  _check_bytes('an image', image_HWC, (3,))
  check_channels(image_HWC.shape[-1])
  grey = image_HWC.shape[-1] == 1
  image = pillow().Image.fromarray(image_HWC[..., 0] if grey else image_HWC)
  image.save(path, format='PNG')


def _check_bytes(what: str, array: np.ndarray, ndims: tuple[int, ...]) -> None:
  if array.dtype != np.uint8 or array.ndim not in ndims:
    raise ValueError(
      f'{what} must be uint8 with {ndims[0]} dimensions ending in H, W, C, got '
      f'{array.dtype} {list(array.shape)}: scale the values to 0..255 and '
      'convert them with astype(np.uint8)'
    )
