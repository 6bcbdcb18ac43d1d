"""Corpora of labelled images: folders by class, idx files, and TFDS.

A corpus is a dataclass that a config names, as in `train.data.corpus`. Its
`open(split)` returns `Images`. `train.data.images.batches` makes batches.

Shapes: n images of H rows, W columns and C channels.
"""

import abc
import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import grain
import numpy as np

from train.data import corpus
from train.data.corpus import RandomAccess, Sharded, Split
from train.data.images import idx, pixels
from train.data.images.augment import Augment
from train.data.images.pixels import Box, Shape

FASHION = (
  *('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat'),
  *('Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
)
"""Names of the classes of Fashion-MNIST."""

# Files with other endings are not images of a class.
_ENDINGS = (
  *('.png', '.jpg', '.jpeg', '.bmp', '.gif', '.webp', '.tif', '.tiff'),
  *('.ppm', '.pgm', '.pbm', '.avif', '.jp2'),
)

# Features of TFDS that name the file of an image.
_FILE_FEATURES = ('file_name', 'filename', 'image/filename', 'id')


class Example(NamedTuple):
  """An image and its class."""

  image: np.ndarray
  """[H, W, C] uint8."""
  label: int
  """Index of the class."""
  place: str
  """Where the image is, for errors."""


class Stored(NamedTuple):
  """An example as it is stored."""

  data: bytes | np.ndarray
  """The content of an image file, or an array [H, W, C] uint8."""
  label: int
  """Index of the class."""
  place: str
  """Where the image is, for errors."""


Records: TypeAlias = RandomAccess[Stored] | Sharded[Stored]
BoxOf: TypeAlias = Callable[[int, int], Box]
"""Chooses a rectangle of an image from its height and width."""


@dataclasses.dataclass(frozen=True)
class Images:
  """The images of a split, all of one shape, and their classes."""

  records: Records
  """The examples as they are stored."""
  shape: Shape
  """H, W and C of each image."""
  num_classes: int
  """Number of classes. Labels are smaller."""
  names: tuple[str, ...] | None = None
  """Names of the classes, in order of their labels."""
  is_resized: bool = False
  """Whether images of another size are cropped and resized to `shape`."""
  labels_n: np.ndarray | None = None
  """The labels [n] of all images if they are known without reading images."""
  left_out: tuple[str, ...] = ()
  """Paths of files that are left out because Pillow cannot read them."""
  remedy: str = 'put a sound image in its place, or leave it out'
  """Advice in the error about an image that cannot be read."""

  def __len__(self) -> int:
    """Number of images."""
    return len(self.records)

  def stored(self, *, seed: int, repeat: bool) -> grain.IterDataset[Stored]:
    """Streams the examples as `stream` does, but does not decode images."""
    return self.records.stream(seed=seed, repeat=repeat)

  def stream(self, *, seed: int, repeat: bool) -> grain.IterDataset[Example]:
    """Streams the examples in an order fixed by `seed`.

    Args:
      seed: seed of the shuffle.
      repeat: whether to repeat forever, with another order in each epoch.
        Otherwise the stream is one pass.
    """
    return self.stored(seed=seed, repeat=repeat).map(self.example)

  def example(self, stored: Stored) -> Example:
    """Decodes the image of an example."""
    return Example(self.image(stored), stored.label, stored.place)

  def image(self, stored: Stored, box_of: BoxOf | None = None) -> np.ndarray:
    """Returns the image of an example, [H, W, C] uint8.

    Args:
      stored: the example.
      box_of: chooses the rectangle that is resized to H and W. With None it is
        the largest centred one if images are resized, otherwise the whole.

    Raises:
      OSError: Pillow cannot read the image.
      ValueError: the image has another shape.
    """
    height, width, channels = self.shape
    image, found = stored.data, self.shape
    if isinstance(image, bytes):
      try:
        image = pixels.decode(image, channels)
      except ValueError as error:
        # `train.engine.training` prints an OSError as one line, also in the
        # middle of a run.
        raise OSError(f'{stored.place}: {error}; {self.remedy}') from error
      found = (image.height, image.width, channels)
    if box_of is None and self.is_resized:
      box_of = functools.partial(pixels.centred_box, aspect=width / height)
    if box_of is not None:
      box = box_of(found[0], found[1])
      return pixels.resized(image, box, height, width)
    _check_size(stored.place, found[:2], self.shape)
    return image if isinstance(image, np.ndarray) else pixels.to_array(image)


class ImageCorpus(corpus.Corpus):
  """A corpus of labelled images."""

  holds: ClassVar[str] = 'images'
  """What the data are, for `Task.holds`."""
  augment: Augment
  """Random changes of training images."""

  @abc.abstractmethod
  def open(self, split: Split) -> Images:
    """Returns the images of a split."""


@dataclasses.dataclass(frozen=True)
class ImageFolders(ImageCorpus):
  """Your own images: a folder for each class.

  The names of the folders in `train`, in sorted order, are the classes. Every
  image file below such a folder belongs to its class (.png, .jpg, .webp and
  other formats that Pillow reads). Other files and hidden ones are ignored.
  Images are rotated by their EXIF orientation. They are decoded when they are
  read.

  ImageNet, Imagenette and Food-101, for example, are distributed in such
  folders.

  A path such as CLASS/NAME.jpg decides whether an image is held out, so copies
  of an image under other names can be in both splits.
  """

  train: str
  """Directory with the folders of the training images."""

  validation: str | None = None
  """Directory with the same folders of validation images; None holds out
  training images."""

  holdout: float = 0.1
  """Share of the training images that is held out for validation if
  `validation` is None."""

  size: int | None = None
  """H and W to which the largest centred square of each image is resized. None
  requires that all images have one size, for which each header is read when
  the corpus is opened."""

  channels: int = 3
  """1 (grey), 3 (RGB) or 4 (RGBA); images are converted."""

  skip_unreadable: bool = False
  """Whether to leave out files that Pillow cannot read. Each image is decoded
  once when the corpus is opened, to find them."""

  augment: Augment = dataclasses.field(default_factory=Augment)
  """Random changes of training images."""

  def open(self, split: Split) -> Images:
    """Returns the images of a split.

    Raises:
      FileNotFoundError: a directory does not exist.
      ImportError: Pillow is not installed.
      ValueError: there are no class folders, a class or the split is empty, or
        a file is not an image or has another size than the first.
    """
    pixels.pillow()
    pixels.check_channels(self.channels)
    _check_size_option(self.size)
    names = _class_folders(self.train)
    every = _files_by_class(self.train, names)
    files = self._files(split, every, names)
    left_out: tuple[str, ...] = ()
    if self.skip_unreadable:
      left_out = _unreadable(files, self.channels)
      files = _without(files, left_out)
    self._check_split(split, files, names, len(left_out))
    if self.size is None:
      height, width = self._only_size(every, files)
    else:
      height = width = self.size
    return Images(
      RandomAccess(files, _read),
      (height, width, self.channels),
      len(names),
      names,
      is_resized=self.size is not None,
      labels_n=np.array([label for _, label in files]),
      left_out=left_out,
      remedy='replace or delete the file, or set corpus.skip_unreadable',
    )

  def _files(
    self, split: Split, every: list['_File'], names: tuple[str, ...]
  ) -> list['_File']:
    """Returns the files of a split, given all files in `train`."""
    if self.validation is not None:
      if split == 'train':
        return every
      return _files_by_class(self.validation, names)
    corpus.check_holdout(self.holdout)
    return [
      (path, label)
      for path, label in every
      if corpus.in_split(split, _path_crc(path, self.train), self.holdout)
    ]

  def _check_split(
    self,
    split: Split,
    files: list['_File'],
    names: tuple[str, ...],
    num_left_out: int,
  ) -> None:
    """Raises ValueError if a split, or a class to train on, has no image."""
    missing = set(range(len(names))) - {label for _, label in files}
    if files and (split == 'validation' or not missing):
      return
    root = self.train
    if split == 'validation' and self.validation is not None:
      root = self.validation
    of_class = f' of class {names[min(missing)]!r}' if files else ''
    reasons = [f'{num_left_out:,} cannot be read'] if num_left_out else []
    if self.validation is None:
      reasons.append(f'holdout={self.holdout}')
    raise ValueError(
      f'the {split} split of {root} has no image{of_class} '
      f'({", ".join(reasons)}): add images, or set corpus.validation or '
      'corpus.holdout'
    )

  def _only_size(
    self, every: list['_File'], files: list['_File']
  ) -> tuple[int, int]:
    """Returns H and W of all files.

    The files of both splits are compared with the first training image.

    Raises:
      ValueError: a file has another size.
    """
    first = every[0][0]
    if self.skip_unreadable:
      readable = (
        file for file in every if not _unreadable([file], self.channels)
      )
      first = next(readable)[0]
    height, width = _header(first)
    for path, _ in files:
      found = _header(path)
      if found != (height, width):
        raise ValueError(
          f'{path} has {found[0]} x {found[1]} pixels, but {first} has '
          f'{height} x {width}: set corpus.size, to which images are resized'
        )
    return height, width


@dataclasses.dataclass(frozen=True)
class IdxImages(ImageCorpus):
  """Images in idx files, the format of MNIST; Fashion-MNIST by default.

  Debian's package dataset-fashion-mnist has its 60,000 training images and
  10,000 test images of 28 x 28 pixels (MIT licence). MNIST, KMNIST and EMNIST
  have files of the same format. All images are held in memory.
  """

  directory: str = idx.FASHION_DIRECTORY
  """Directory of the files."""

  train: tuple[str, str] = (
    'train-images-idx3-ubyte',
    'train-labels-idx1-ubyte',
  )
  """Files of the training images and of their labels, as they are named or
  with .gz added."""

  validation: tuple[str, str] | None = (
    't10k-images-idx3-ubyte',
    't10k-labels-idx1-ubyte',
  )
  """Files of the validation images and labels; None holds out training
  images."""

  holdout: float = 0.1
  """Share of the training images that is held out for validation if
  `validation` is None. A hash of an image's pixels decides."""

  names: tuple[str, ...] | None = None
  """Names of the classes; None numbers them up to the largest training
  label. Those of Fashion-MNIST are `FASHION`."""

  augment: Augment = dataclasses.field(default_factory=Augment)
  """Random changes of training images."""

  def open(self, split: Split) -> Images:
    """Returns the images of a split.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a file is damaged or of another kind, the numbers of images
        and labels differ, or a label is not a class.
    """
    train_labels_n = self._labels(self.train[1])
    num_classes = len(self.names or ()) or int(train_labels_n.max()) + 1
    train_path = self._path(self.train[0])
    shape = idx.image_shape(train_path, idx.shape_of(train_path))
    files = self.train
    if split == 'validation' and self.validation is not None:
      files = self.validation
    images_path = self._path(files[0])
    images = idx.read(images_path)
    images_nHWC = images.reshape(
      -1, *idx.image_shape(images_path, images.shape)
    )
    labels_n = train_labels_n if files is self.train else self._labels(files[1])
    places_n = np.arange(len(images_nHWC))
    self._check(files, images_nHWC, labels_n, shape, num_classes)
    if self.validation is None:
      corpus.check_holdout(self.holdout)
      crcs_n = np.array([zlib.crc32(image.tobytes()) for image in images_nHWC])
      places_n = places_n[corpus.in_split(split, crcs_n, self.holdout)]
      if not len(places_n):
        raise ValueError(
          f'the {split} split of {images_path} is empty: '
          f'holdout={self.holdout} of {len(images_nHWC)} images; name '
          'validation files, or another holdout'
        )
    stored = _Array(images_nHWC, labels_n, places_n, images_path)
    return Images(
      RandomAccess(stored, _same, num_threads=0),
      shape,
      num_classes,
      self.names,
      labels_n=labels_n[places_n],
    )

  def _path(self, name: str) -> str:
    return idx.find(os.path.expanduser(self.directory), name)

  def _labels(self, name: str) -> np.ndarray:
    path = self._path(name)
    labels_n = idx.read(path)
    if labels_n.ndim != 1:
      raise ValueError(
        f'{path} has {labels_n.ndim} dimensions, but labels have 1: name the '
        'file of images first and that of labels second'
      )
    return labels_n.astype(np.int32)

  def _check(
    self,
    files: tuple[str, str],
    images_nHWC: np.ndarray,
    labels_n: np.ndarray,
    shape: Shape,
    num_classes: int,
  ) -> None:
    images_path, labels_path = map(self._path, files)
    if len(images_nHWC) != len(labels_n):
      raise ValueError(
        f'{images_path} has {len(images_nHWC):,} images, but {labels_path} has '
        f'{len(labels_n):,} labels: name two files of one set'
      )
    if images_nHWC.shape[1:] != shape:
      raise ValueError(
        f'{images_path} has images of shape {images_nHWC.shape[1:]}, but those '
        f'of {self._path(self.train[0])} have {shape}: name files of one set'
      )
    wrong_n = np.flatnonzero(labels_n >= num_classes)
    if len(wrong_n):
      i = int(wrong_n[0])
      raise ValueError(
        f'{labels_path}: label {i:,} must be in 0..{num_classes - 1}, got '
        f'{labels_n[i]}; name files of one set, or all classes in corpus.names'
      )


@dataclasses.dataclass(frozen=True)
class ImageTfds(ImageCorpus):
  """A set of labelled images that TFDS has prepared, read without TensorFlow.

  Examples are `imagenet2012`, `cifar10` and `oxford_flowers102`. On a machine
  with TensorFlow, tfds.builder(NAME, file_format='array_record')
  .download_and_prepare() downloads and prepares a set. The archives of
  imagenet2012 must be downloaded from image-net.org first. Sets in the format
  tfrecord are read too, but are not shuffled globally.

  Pillow decodes images when they are read, and
  they are rotated by their EXIF orientation.
  """

  name: str = 'imagenet2012'
  """Name as in tfds.load: name/config, with :version if a version is needed."""

  data_dir: str | None = None
  """Directory of the prepared data; None is TFDS' default,
  ~/tensorflow_datasets."""

  train: str = 'train'
  """The split to train on."""

  validation: str = 'validation'
  """The split to validate on, 'test' in many sets; array_record also has slices
  ('train[99%:]')."""

  size: int | None = None
  """H and W to which the largest centred square of each image is resized. None
  requires a set whose images have one size."""

  image: str = 'image'
  """Feature of the image."""

  label: str = 'label'
  """Feature of the class."""

  augment: Augment = dataclasses.field(default_factory=Augment)
  """Random changes of training images."""

  def open(self, split: Split) -> Images:
    """Returns the images of a split.

    Raises:
      FileNotFoundError: the data set is not prepared in `data_dir`.
      ImportError: Pillow is not installed.
      ValueError: it does not have this split or these features, or its images
        have different sizes and `size` is None.
    """
    pixels.pillow()
    _check_size_option(self.size)
    source = corpus.Tfds(self.name, self.data_dir, self.train, self.validation)
    features = source.features()
    shape = self._shape(features)
    names = self._names(features)
    read = functools.partial(
      _stored,
      image=self.image,
      label=self.label,
      num_classes=len(names),
      name=self.name,
    )
    return Images(
      source.records(split, undecoded=self.image).mapped(read),
      shape,
      len(names),
      names,
      is_resized=self.size is not None,
    )

  def _shape(self, features: Mapping[str, Any]) -> Shape:
    from tensorflow_datasets.core.features import image_feature

    feature = features[self.image] if self.image in features else None
    if not isinstance(feature, image_feature.Image):
      raise ValueError(
        f'{self.name} has no image feature {self.image!r}, but '
        f'{sorted(features)}: name it with corpus.image, or name a set of '
        'images'
      )
    shape = cast(tuple[int | None, ...], feature.shape)
    if feature.np_dtype != np.uint8 or len(shape) != 3:
      raise ValueError(
        f'the feature {self.image!r} of {self.name} is {feature.np_dtype} '
        f'{shape}, but images are uint8 with 3 dimensions: name '
        'another with corpus.image'
      )
    height, width, channels = shape
    channels = channels or 3
    pixels.check_channels(channels)
    if self.size is not None:
      return self.size, self.size, channels
    if height is None or width is None:
      raise ValueError(
        f'the images of {self.name} have different sizes: set corpus.size '
        '(224 for example), to which images are resized'
      )
    return height, width, channels

  def _names(self, features: Mapping[str, Any]) -> tuple[str, ...]:
    from tensorflow_datasets.core.features import class_label_feature

    feature = features[self.label] if self.label in features else None
    if (
      not isinstance(feature, class_label_feature.ClassLabel)
      or feature.num_classes is None
    ):
      raise ValueError(
        f'{self.name} has no feature {self.label!r} of classes, but '
        f'{sorted(features)}: name a ClassLabel with corpus.label'
      )
    return tuple(cast(Sequence[str], feature.names))


_File: TypeAlias = tuple[str, int]
"""Path and label of an image."""


class _Array(Sequence[Stored]):
  """Images and labels in memory."""

  def __init__(
    self,
    images_nHWC: np.ndarray,
    labels_n: np.ndarray,
    places_m: np.ndarray,
    path: str,
  ) -> None:
    self._images_nHWC = images_nHWC
    self._labels_n = labels_n
    self._places_m = places_m
    self._path = path

  def __len__(self) -> int:
    return len(self._places_m)

  def __getitem__(self, index: Any) -> Any:
    i = int(self._places_m[index])
    label = int(self._labels_n[i])
    return Stored(self._images_nHWC[i], label, f'{self._path}, image {i:,}')


def _same(stored: Stored) -> Stored:
  return stored


def _read(file: _File) -> Stored:
  path, label = file
  with open(path, 'rb') as opened:
    return Stored(opened.read(), label, path)


def _stored(
  record: Mapping[str, Any],
  image: str,
  label: str,
  num_classes: int,
  name: str,
) -> Stored:
  """Returns the example in a record of TFDS."""
  files = (record[key] for key in _FILE_FEATURES if key in record)
  file = next(files, '')
  if isinstance(file, bytes):
    file = file.decode('utf-8', 'replace')
  place = f'{name}, image {file}' if file else f'an image of {name}'
  index = int(record[label])
  if not 0 <= index < num_classes:
    raise ValueError(
      f'{place}: the label must be in 0..{num_classes - 1}, got {index}; name '
      'a split with labels'
    )
  return Stored(bytes(record[image]), index, place)


def _check_size_option(size: int | None) -> None:
  if size is not None and size < 1:
    raise ValueError(
      f'size must be at least 1, got {size}: it is the height and width of '
      'images in pixels'
    )


def _check_size(place: str, found: tuple[int, int], shape: Shape) -> None:
  if found != shape[:2]:
    raise ValueError(
      f'{place} has {found[0]} x {found[1]} pixels, but the first image has '
      f'{shape[0]} x {shape[1]}: set corpus.size, to which images are resized'
    )


def _class_folders(root: str) -> tuple[str, ...]:
  """Returns the sorted names of the folders in a directory."""
  directory = os.path.expanduser(root)
  if not os.path.isdir(directory):
    raise FileNotFoundError(
      f'{root} is not a directory: name one that has a folder of images for '
      'each class'
    )
  with os.scandir(directory) as entries:
    names = sorted(
      entry.name
      for entry in entries
      if entry.is_dir() and not entry.name.startswith('.')
    )
  if not names:
    raise ValueError(
      f'{root} has no folders: put the images of each class into a folder with '
      "the class's name"
    )
  return tuple(names)


def _files_by_class(root: str, names: tuple[str, ...]) -> list[_File]:
  """Returns the image files of each class, sorted by class and path."""
  unknown = sorted(set(_class_folders(root)) - set(names))
  if unknown:
    raise ValueError(
      f'{root} has a folder {unknown[0]!r}, which is not a class of the '
      f'training images ({len(names)} classes from {names[0]!r} to '
      f'{names[-1]!r}): rename it'
    )
  files: list[_File] = []
  for label, name in enumerate(names):
    folder = os.path.join(os.path.expanduser(root), name)
    found = [(path, label) for path in _image_files(folder)]
    # A class without a folder of validation images is allowed.
    if not found and os.path.isdir(folder):
      raise ValueError(
        f'{folder} has no image: file names must end in one of '
        f'{", ".join(_ENDINGS)}; add images, or delete the folder'
      )
    files += found
  return files


def _image_files(folder: str) -> list[str]:
  """Returns the sorted paths of the images below a folder."""
  found: list[str] = []
  for directory, folders, files in os.walk(folder):
    # os.walk does not enter the folders that are removed from the list.
    folders[:] = [name for name in folders if not name.startswith('.')]
    found += [
      os.path.join(directory, name)
      for name in files
      if name.lower().endswith(_ENDINGS) and not name.startswith('.')
    ]
  return sorted(found)


def _path_crc(path: str, root: str) -> int:
  """Returns a hash of the path below the root, alike on every system."""
  below = os.path.relpath(path, os.path.expanduser(root))
  return zlib.crc32(below.replace(os.sep, '/').encode())


def _unreadable(files: Sequence[_File], channels: int) -> tuple[str, ...]:
  """Returns the paths of files that Pillow cannot read."""

  def is_readable(file: _File) -> bool:
    try:
      with open(file[0], 'rb') as opened:
        pixels.decode(opened.read(), channels)
    except ValueError:
      return False
    return True

  found = pixels.map_in_threads(is_readable, files)
  return tuple(
    path for (path, _), sound in zip(files, found, strict=True) if not sound
  )


def _without(files: list[_File], paths: Sequence[str]) -> list[_File]:
  excluded = frozenset(paths)
  return [file for file in files if file[0] not in excluded]


def _header(path: str) -> tuple[int, int]:
  try:
    return pixels.size_in_header(path)
  except ValueError as error:
    raise ValueError(
      f'{path}: {error}; replace or delete the file, or set '
      'corpus.skip_unreadable'
    ) from error
