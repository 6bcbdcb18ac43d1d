"""Reads idx files, the format of MNIST: arrays of bytes behind a header."""

import contextlib
import gzip
import math
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import numpy as np

from train.data.images.pixels import Shape

FASHION_DIRECTORY = '/usr/share/datasets/fashion-mnist'
"""Where Debian's package dataset-fashion-mnist puts Fashion-MNIST."""


def find(directory: str, name: str) -> str:
  """Returns the path of an idx file, which may end in .gz."""
  for ending in ('', '.gz'):
    path = os.path.join(directory, name + ending)
    if os.path.isfile(path):
      return path
  package = ''
  if directory == FASHION_DIRECTORY:
    package = "install Debian's package dataset-fashion-mnist, or "
  raise FileNotFoundError(
    f'no {name} or {name}.gz in {directory}: {package}set corpus.directory to '
    'the directory of your idx files'
  )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
  """Opens an idx file, and names it if it is damaged."""
  open_file = gzip.open if path.endswith('.gz') else open
  try:
    with open_file(path, 'rb') as file:
      yield cast(BinaryIO, file)
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(
      f'{path} is not a whole gzip file ({error}): get the file again'
    ) from error


def shape_of(path: str) -> tuple[int, ...]:
  """Returns the shape that an idx file states."""
  with _opened(path) as file:
    return _header(path, file)


def read(path: str) -> np.ndarray:
  """Reads an idx file of unsigned bytes.

  Raises:
    ValueError: the file is damaged or of another kind.
  """
  with _opened(path) as file:
    shape = _header(path, file)
    data = file.read()
  if len(data) != math.prod(shape):
    raise ValueError(
      f'{path} must have {math.prod(shape):,} bytes after its header, which '
      f'states {" x ".join(map(str, shape))}, but has {len(data):,}: get the '
      'file again'
    )
  return np.frombuffer(data, np.uint8).reshape(shape)


def _header(path: str, file: BinaryIO) -> tuple[int, ...]:
  """Reads the header: two zeros, the type, the number of sizes, the sizes."""
  magic = file.read(4)
  if magic[:3] != b'\0\0\x08' or len(magic) < 4:
    raise ValueError(
      f'{path} must begin with the bytes 00 00 08 of an idx file of unsigned '
      f'bytes, got {magic.hex(" ") or "an empty file"}: name an idx file'
    )
  sizes = file.read(4 * magic[3])
  if len(sizes) < 4 * magic[3]:
    raise ValueError(f'{path} ends in its header: get the file again')
  shape = tuple(int(size) for size in np.frombuffer(sizes, '>u4'))
  if not math.prod(shape) or not shape:
    raise ValueError(
      f'{path} is empty: its header states {" x ".join(map(str, shape))}; '
      'name a file with images'
    )
  return shape


def image_shape(path: str, shape: tuple[int, ...]) -> Shape:
  """Returns the shape of an image, given that of a file."""
  if len(shape) not in (3, 4):
    raise ValueError(
      f'{path} has {len(shape)} dimensions, but images have 3, or 4 with '
      'channels: name the file of images first and that of labels second'
    )
  return shape[1], shape[2], shape[3] if len(shape) == 4 else 1
