"""Training of networks that reverse a diffusion of images.

Axes: B rows of a batch, H rows, W columns and C channels of an image, K noise
levels.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, cast

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import RenderableType
from rich.text import Text

from models import denoiser, diffusion
from models.denoiser import DenoiserConfig
from models.diffusion import Sampler
from train.data.images import pixels
from train.data.images.batches import batches
from train.data.images.corpora import Images
from train.engine import mesh as mesh_lib
from train.engine.task import Batch, Data, Metrics, PyTree
from train.tasks.images import ImageTask

NUM_LEVELS = 4
"""Number of equal ranges of times whose held-out loss is measured, K."""

NUM_SAMPLES = 64
"""Number of images that are drawn after training, in rows of `COLUMNS`."""

COLUMNS = 8
"""Number of images in a row of a grid."""


class Diffusion(ImageTask):
  """Predicting the noise of noisy images, from which images are drawn."""

  sampler: ClassVar[str | None] = 'train.tasks.image_sampling'
  loss_label: ClassVar[str] = 'loss (mean squared error)'

  @property
  def model(self) -> DenoiserConfig:
    """The network."""
    return cast(DenoiserConfig, self.config.resolved_model)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the images that the network reads."""
    return self.model.image_shape

  def check_classes(self, images: Images) -> None:
    """Raises ValueError if the network has fewer classes."""
    known = self.model.num_classes
    if known is not None and images.num_classes > known:
      raise ValueError(
        f'model.num_classes must be at least {images.num_classes}, the number '
        f'of classes in the corpus, got {known}'
      )

  def open(self, run: pathlib.Path | None) -> Data:
    """Opens both splits, and checks that samples can be written."""
    check_writable(self.model)
    return super().open(run)

  def inputs(self) -> Batch:
    """Returns the shapes of a batch."""
    rows = self.config.batch_size
    shapes = {
      'inputs': jax.ShapeDtypeStruct((rows, *self.image_shape), np.uint8),
      'weights': jax.ShapeDtypeStruct((rows,), np.float32),
      'noise': jax.ShapeDtypeStruct((rows, 2), np.uint32),
    }
    if self.model.num_classes is not None:
      shapes['labels'] = jax.ShapeDtypeStruct((rows,), np.int32)
    return shapes

  def batches(self, data: Data) -> grain.DatasetIterator:
    """Returns batches of images with the bits of their noise, without end."""
    config = self.config
    put = mesh_lib.deal(config.mesh)
    return batches(
      data.train,
      batch_size=config.batch_size,
      seed=config.seed,
      augment=self.corpus.augment,
      noise=True,
      put=lambda batch: put(with_labels(self.model, batch)),
    )

  def evaluate(self, data: Data) -> Callable[[PyTree], Metrics]:
    """Returns a function that computes the held-out loss by noise level.

    Each image has one fixed time and one fixed noise. The times of the images
    alternate between the levels. Labels are not dropped.
    """
    model = self.model.without_dropout()
    sums = functools.partial(level_sums, model, self.evaluated_layers)
    rows = self.validation_rows(data)
    return functools.partial(
      losses,
      mesh_lib.measure(sums, self.config.mesh),
      batches=lambda: with_times(model, rows),
    )

  @functools.cached_property
  def evaluated_layers(self) -> denoiser.Layers:
    """The network without dropout; it reads weights as they are stored."""
    model = self.model.without_dropout()
    config = dataclasses.replace(self.config, model=model)
    return type(self)(config).stored_layers

  def samples(
    self, params: PyTree, data: Data, run: pathlib.Path
  ) -> list[RenderableType]:
    """Draws images and writes them as a grid, samples.png."""
    del data
    if jax.process_count() > 1:  # each process has only a part of the weights
      return []
    labels_B = None
    if self.model.num_classes is not None:
      labels_B = jnp.arange(NUM_SAMPLES) % self.model.num_classes
    draw = denoiser.make_sampler(self.evaluated_layers, Sampler(), NUM_SAMPLES)
    images = draw(params, jax.random.key(self.config.seed), labels_B)
    path = run / 'samples.png'
    grid = pixels.grid(np.asarray(diffusion.to_pixels(images)), COLUMNS)
    pixels.write_png(str(path), grid)
    return [Text(f'samples: {path}')]


def check_writable(model: DenoiserConfig) -> None:
  """Checks that images of a network can be written as PNG files.

  Raises:
    ImportError: Pillow is not installed.
    ValueError: no PNG file has this number of channels.
  """
  pixels.check_channels(model.num_channels)
  pixels.pillow()


def with_labels(model: DenoiserConfig, batch: Batch) -> Batch:
  """Renames the targets of a batch to labels, which only some models read."""
  others = {name: x for name, x in batch.items() if name != 'targets'}
  if model.num_classes is None:
    return others
  return others | {'labels': batch['targets']}


def with_times(
  model: DenoiserConfig, batches: Iterable[Batch]
) -> Iterator[Batch]:
  """Yields batches with a fixed time, level and noise for each row.

  They depend only on the number of rows before, not on the batch size.
  """
  # Two generators, because one would alternate between the two kinds of numbers
  # once a batch.
  times_rng, noise_rng = (np.random.default_rng([0, i]) for i in range(2))
  steps = model.diffusion.steps
  first = 0
  for batch in batches:
    rows = len(batch['inputs'])
    level_B = np.arange(first, first + rows, dtype=np.int32) % NUM_LEVELS
    first += rows
    share_B = (level_B + times_rng.random(rows)) / NUM_LEVELS
    yield with_labels(model, batch) | {
      'times': (steps * share_B).astype(np.int32),
      'levels': level_B,
      'noise': noise_rng.integers(2**32, size=(rows, 2), dtype=np.uint32),
    }


def level_sums(
  model: DenoiserConfig,
  layers: denoiser.Layers,
  params: PyTree,
  batch: Batch,
) -> dict[str, jax.Array]:
  """Returns the sums of cost and weight [K] of each noise level."""
  cost_B = costs(model, layers, params, batch)
  is_at_BK = batch['levels'][:, None] == jnp.arange(NUM_LEVELS)[None]
  weights_BK = batch['weights'][:, None] * is_at_BK
  return {
    'cost': jnp.sum(weights_BK * cost_B[:, None], axis=0),
    'weight': jnp.sum(weights_BK, axis=0),
  }


def costs(
  model: DenoiserConfig,
  layers: denoiser.Layers,
  params: PyTree,
  batch: Batch,
) -> jax.Array:
  """Returns the cost [B] of each image of a batch from `with_times`."""
  drawn = denoiser.draw(model, batch)
  output = layers.predict(params, drawn.x_t, drawn.times, drawn.labels)
  return denoiser.cost(output, drawn)


def losses(
  sums: Callable[[PyTree, Batch], dict[str, jax.Array]],
  params: PyTree,
  *,
  batches: Callable[[], Iterable[Batch]],
) -> Metrics:
  """Computes the loss, the mean over noise levels, and the loss at each level.

  Level 1 has the least noise.
  """
  found = jax.device_get([sums(params, batch) for batch in batches()])
  cost_K, weight_K = (
    np.sum([x[name] for x in found], axis=0, dtype=np.float64)
    for name in ('cost', 'weight')
  )
  # A split of a few images may not reach every level.
  loss_K = cost_K / np.where(weight_K > 0, weight_K, np.nan)
  levels = {f'loss_{k}': float(x) for k, x in enumerate(loss_K, 1)}
  return {'loss': float(np.nanmean(loss_K))} | levels
