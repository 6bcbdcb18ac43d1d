"""The base of tasks on images: their data, which must fit the model."""

import abc
import pathlib
from typing import ClassVar, cast

import grain
from rich.console import RenderableType

from train.data.images.batches import Batch, shown, validation_batches
from train.data.images.corpora import ImageCorpus, Images
from train.engine.task import Data, Task


class ImageTask(Task):
  """A task whose data are images."""

  unit: ClassVar[str] = 'images'
  holds: ClassVar[tuple[str, ...]] = ('images',)

  @property
  @abc.abstractmethod
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the images that the model reads."""

  @abc.abstractmethod
  def check_classes(self, images: Images) -> None:
    """Raises ValueError if the model does not have the classes of images."""

  @property
  def corpus(self) -> ImageCorpus:
    """The corpus."""
    return cast(ImageCorpus, self.config.corpus)

  def open(self, run: pathlib.Path | None) -> Data:
    """Opens both splits, and checks that they fit the model."""
    data = super().open(run)
    for images in (data.train, data.validation):
      self._check(images)
    return data

  def held_out(self, run: pathlib.Path) -> Data:
    """Opens the validation split, and checks that it fits the model."""
    data = super().held_out(run)
    self._check(data.validation)
    return data

  def describe_batch(self) -> str:
    """Returns the shape of a batch as text."""
    height, width, _ = self.image_shape
    return f'{self.config.batch_size} images of {height} x {width}'

  def validation_rows(self, data: Data) -> grain.IterDataset[Batch]:
    """Returns the batches of a validation."""
    return validation_batches(
      data.validation,
      batch_size=self.config.batch_size,
      num_batches=self.config.eval_batches,
    )

  def example(self, data: Data) -> RenderableType:
    """Returns the classes, and an image."""
    return shown(data.train, seed=self.config.seed)

  def _check(self, images: Images) -> None:
    """Raises ValueError if images have another shape or other classes."""
    if images.shape != self.image_shape:
      raise ValueError(
        f'the images must have the shape {self.image_shape} of the model, got '
        f'{images.shape}: set model.image_size and model.num_channels, or '
        'corpus.size and corpus.channels'
      )
    self.check_classes(images)
