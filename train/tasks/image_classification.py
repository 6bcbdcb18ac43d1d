"""Training of models that classify images.

Axes: B rows of a batch, C classes, n rows of a split.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import grain
import jax
import numpy as np
from rich.console import RenderableType

from models.modules import cost, weighted
from models.vit import VitConfig
from train.data.images.batches import batches, shown, validation_batches
from train.data.images.corpora import ImageCorpus
from train.engine import mesh as mesh_lib
from train.engine.task import Batch, Data, Metrics, PyTree, Task


class ImageClassification(Task):
  """Choosing a class for an image."""

  unit: ClassVar[str] = 'images'
  holds: ClassVar[tuple[str, ...]] = ('images',)

  @property
  def model(self) -> VitConfig:
    """The model."""
    return cast(VitConfig, self.config.resolved_model)

  @property
  def corpus(self) -> ImageCorpus:
    """The corpus."""
    return cast(ImageCorpus, self.config.corpus)

  def open(self, run: Any) -> Data:
    """Opens both splits, and checks that they fit the model."""
    data = super().open(run)
    for images in (data.train, data.validation):
      check_fit(self.model, images)
    return data

  def held_out(self, run: Any) -> Data:
    """Opens the validation split, and checks that it fits the model."""
    data = super().held_out(run)
    check_fit(self.model, data.validation)
    return data

  def inputs(self) -> Batch:
    """Returns the shapes of a batch."""
    model = self.model
    rows = self.config.batch_size
    side = model.image_size
    shape = (rows, side, side, model.num_channels)
    shapes = {
      'inputs': jax.ShapeDtypeStruct(shape, np.uint8),
      'targets': jax.ShapeDtypeStruct((rows,), np.int32),
      'weights': jax.ShapeDtypeStruct((rows,), np.float32),
    }
    if model.dropout > 0:
      shapes['noise'] = jax.ShapeDtypeStruct((rows, 2), np.uint32)
    return shapes

  def describe_batch(self) -> str:
    """Returns the shape of a batch as text."""
    side = self.model.image_size
    return f'{self.config.batch_size} images of {side} x {side}'

  def batches(self, data: Data) -> grain.DatasetIterator:
    """Returns batches of randomly changed images, without end."""
    config = self.config
    return batches(
      data.train,
      batch_size=config.batch_size,
      seed=config.seed,
      augment=self.corpus.augment,
      noise=self.model.dropout > 0,
      put=mesh_lib.deal(config.mesh),
    )

  def evaluate(self, data: Data) -> Callable[[PyTree], Metrics]:
    """Returns a function that computes the loss and the accuracy of a split."""
    config = self.config
    rows = validation_batches(
      data.validation,
      batch_size=config.batch_size,
      num_batches=config.eval_batches,
    )
    loss = mesh_lib.measure(functools.partial(sums, self), config.mesh)
    return functools.partial(accuracy, loss, batches=rows)

  def example(self, data: Data) -> RenderableType:
    """Returns the classes, and an image."""
    return shown(data.train, seed=self.config.seed)

  def score(self, found: Metrics) -> float:
    """Returns the negated accuracy."""
    return -found['accuracy']


def check_fit(model: VitConfig, images: Any) -> None:
  """Raises ValueError if images have another shape or other classes."""
  side = model.image_size
  expected = (side, side, model.num_channels)
  if images.shape != expected:
    raise ValueError(
      f'the images must have the shape {expected} of the model, got '
      f'{images.shape}: set model.image_size and model.num_channels, or '
      'corpus.size and corpus.channels'
    )
  if images.num_classes > model.num_labels:
    raise ValueError(
      f'model.num_labels must be at least {images.num_classes}, the number of '
      f'classes in the corpus, got {model.num_labels}'
    )
  if model.labels and images.names and model.labels != images.names:
    raise ValueError(
      f'model.labels must be the classes of the corpus in order, '
      f'{images.names}, got {model.labels}'
    )


def sums(
  task: ImageClassification, params: PyTree, batch: Batch
) -> dict[str, jax.Array]:
  """Returns sums over a batch: the cost, the weight and the right answers."""
  logits_BC = task.stored_layers.logits(params, batch)
  cost_B = cost(logits_BC, batch['targets'], task.model.num_labels)
  _, found = weighted(cost_B, batch['weights'])
  is_right_B = logits_BC.argmax(axis=-1) == batch['targets']
  return found | {'right': (batch['weights'] * is_right_B).sum()}


def accuracy(
  measured: Callable[[PyTree, Batch], dict[str, jax.Array]],
  params: PyTree,
  *,
  batches: Iterable[Batch],
) -> Metrics:
  """Computes the mean loss and the accuracy of a split.

  All batches are queued on the device before the first result is read.
  """
  found = jax.device_get([measured(params, batch) for batch in batches])
  total = {
    name: float(np.sum([x[name] for x in found], dtype=np.float64))
    for name in ('cost', 'right', 'weight')
  }
  return {
    'loss': total['cost'] / total['weight'],
    'accuracy': total['right'] / total['weight'],
  }
