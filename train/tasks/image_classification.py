"""Training of models that classify images.

Axes: B rows of a batch, C classes, n rows of a split.
"""

import functools
from collections.abc import Callable, Iterable
from typing import cast

import grain
import jax
import jax.numpy as jnp
import numpy as np

from models.modules import cost, weighted
from models.vit import VitConfig
from train.data.images.batches import batches
from train.data.images.corpora import Images
from train.engine import mesh as mesh_lib
from train.engine.task import Batch, Data, Metrics, PyTree
from train.tasks.images import ImageTask


class ImageClassification(ImageTask):
  """Choosing a class for an image."""

  @property
  def model(self) -> VitConfig:
    """The model."""
    return cast(VitConfig, self.config.resolved_model)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the images that the model reads."""
    return self.model.image_shape

  def check_classes(self, images: Images) -> None:
    """Raises ValueError if the model has fewer or other labels."""
    model = self.model
    if images.num_classes > model.num_labels:
      raise ValueError(
        f'model.num_labels must be at least {images.num_classes}, the number '
        f'of classes in the corpus, got {model.num_labels}'
      )
    if model.labels and images.names and model.labels != images.names:
      raise ValueError(
        f'model.labels must be the classes of the corpus in order, '
        f'{images.names}, got {model.labels}'
      )

  def inputs(self) -> Batch:
    """Returns the shapes of a batch."""
    rows = self.config.batch_size
    shapes = {
      'inputs': jax.ShapeDtypeStruct((rows, *self.image_shape), np.uint8),
      'targets': jax.ShapeDtypeStruct((rows,), np.int32),
      'weights': jax.ShapeDtypeStruct((rows,), np.float32),
    }
    if self.model.dropout > 0:
      shapes['noise'] = jax.ShapeDtypeStruct((rows, 2), np.uint32)
    return shapes

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
    found = mesh_lib.measure(functools.partial(sums, self), self.config.mesh)
    rows = self.validation_rows(data)
    return functools.partial(accuracy, found, batches=rows)

  def score(self, found: Metrics) -> float:
    """Returns the negated accuracy."""
    return -found['accuracy']


def sums(
  task: ImageClassification, params: PyTree, batch: Batch
) -> dict[str, jax.Array]:
  """Returns sums over a batch: the cost, the weight and the right answers."""
  cost_B, is_right_B = scores(task, params, batch)
  _, found = weighted(cost_B, batch['weights'])
  return found | {'right': (batch['weights'] * is_right_B).sum()}


def scores(
  task: ImageClassification, params: PyTree, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Returns the cost of each image, and whether its answer is right: [B]."""
  logits_BC = task.stored_layers.logits(params, batch)
  cost_B = cost(logits_BC, batch['targets'], task.model.num_labels)
  return cost_B, jnp.equal(logits_BC.argmax(axis=-1), batch['targets'])


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
