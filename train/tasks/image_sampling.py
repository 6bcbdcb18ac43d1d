"""Draws images: `python -m train.sample RUN --num-images 64`.

`train.sample` calls `main` for a diffusion model. `--classifier RUN` measures
the squared Frechet distance between drawn and held-out images, in the features
of a vision transformer that `train.pretrain` has trained.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import jax
import numpy as np
import tyro

from models import denoiser, diffusion, frechet
from models.diffusion import Sampler
from train.data.images import pixels
from train.data.images.batches import validation_batches
from train.engine import checkpoint, machine
from train.engine.command import check_least, parse_options, user_errors
from train.engine.run import Run, is_directory
from train.engine.task import PyTree
from train.tasks.diffusion import COLUMNS, Diffusion, check_writable
from train.tasks.image_classification import ImageClassification

_AT_ONCE = 250
"""Number of images that are drawn at the same time, for the distance."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Draws images from a diffusion model, and writes them as a PNG grid."""

  program: ClassVar[str] = 'train.sample'
  path: tyro.conf.Positional[pathlib.Path]
  """Directory of a run."""
  best: bool = False
  """Read the checkpoint with the best validation instead of the newest one."""
  output: pathlib.Path | None = None
  """File to write; None is RUN/drawn.png."""
  num_images: int = 64
  """Number of images in the grid."""
  label: int | None = None
  """Class of all images; None draws the classes in turns."""
  seed: int = 0
  """Seed of the noise."""
  sampler: Annotated[Sampler, tyro.conf.arg(name='')] = dataclasses.field(
    default_factory=lambda: Sampler()
  )
  """How images are drawn."""
  classifier: pathlib.Path | None = None
  """Run of a vision transformer, in whose features the squared Frechet distance
  to held-out images is measured."""
  num_measured: int = 5000
  """Largest number of images, drawn and held out, for the distance."""


def main(argv: Sequence[str]) -> None:
  """Draws images."""
  with user_errors():
    options = parse_options(Options, argv)
    machine.prepare()
    output = options.output or options.path / 'drawn.png'
    check(options, output)
    run = Run(options.path)
    task = Diffusion(run.config())
    check_writable(task.model)
    draw = drawing(task, options)
    features = None
    if options.classifier is not None:
      features = features_of(options.classifier, task)
    params = checkpoint.restore_params(
      run.checkpoints_path, task, best=options.best
    )
    held_out = None
    if features is not None:
      held_out = np.concatenate([*real(task, options.num_measured)])
  key = jax.random.key(options.seed)
  images = draw(params, key, options.num_images)
  pixels.write_png(str(output), pixels.grid(images, COLUMNS))
  print(f'written: {output}')
  if features is not None and held_out is not None:
    drawn = draw(params, jax.random.fold_in(key, 1), len(held_out))
    moments = [frechet.moments(features(x)) for x in (drawn, held_out)]
    print(
      f'squared Frechet distance: {frechet.distance(*moments):.4f} '
      f'({len(held_out):,} drawn and held-out images)'
    )


def check(options: Options, output: pathlib.Path) -> None:
  """Checks options that do not depend on the model.

  Raises:
    FileNotFoundError: the directory of the output does not exist.
    IsADirectoryError: the output is a directory.
    ValueError: a number is too small.
  """
  check_least(1, num_images=options.num_images)
  # A covariance needs two images.
  check_least(2, num_measured=options.num_measured)
  check_least(0, seed=options.seed)
  if output.is_dir():
    raise IsADirectoryError(
      f'--output must be a file, got the directory {output}: add a name such '
      'as drawn.png'
    )
  if not output.absolute().parent.is_dir():
    raise FileNotFoundError(
      f'--output {output}: there is no directory {output.parent}; make it first'
    )


def drawing(
  task: Diffusion, options: Options
) -> Callable[[PyTree, jax.Array, int], np.ndarray]:
  """Returns `(parameters, key, n) -> images [n, H, W, C]`, uint8.

  Raises:
    ValueError: the sampler, or the label, does not fit the model.
  """
  num_classes = task.model.num_classes
  label = options.label
  if label is not None and not 0 <= label < (num_classes or 0):
    expected = 'absent' if num_classes is None else f'in 0..{num_classes - 1}'
    raise ValueError(f'--label must be {expected} for this model, got {label}')
  measured = 0 if options.classifier is None else options.num_measured
  size = min(_AT_ONCE, max(options.num_images, measured))
  sample = denoiser.make_sampler(task.evaluated_layers, options.sampler, size)

  def draw(params: PyTree, key: jax.Array, number: int) -> np.ndarray:
    found = []
    for part in range(-(-number // size)):
      labels_B: Any = None
      if num_classes is not None:
        labels_B = (np.arange(size) + part * size) % num_classes
        labels_B = labels_B if label is None else np.full(size, label)
      images = sample(params, jax.random.fold_in(key, part), labels_B)
      found.append(np.asarray(diffusion.to_pixels(images)))
    return np.concatenate(found)[:number]

  return draw


def real(task: Diffusion, number: int) -> Iterator[np.ndarray]:
  """Yields at most `number` held-out images, in parts."""
  held_out = task.corpus.open('validation')
  for batch in validation_batches(held_out, batch_size=_AT_ONCE):
    images = batch['inputs'][batch['weights'] > 0][:number]
    number -= len(images)
    yield images
    if not number:
      return


def features_of(
  directory: pathlib.Path, task: Diffusion
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the features [n, D] of images, from a trained classifier.

  Raises:
    FileNotFoundError: the directory is not a run.
    ValueError: the run is not a classifier of such images.
  """
  if is_directory(directory):
    raise ValueError(
      '--classifier must be the run of an image classifier, got '
      f'{directory}, which is a directory of transformers'
    )
  run = Run(directory)
  config = run.config()
  if config.resolved_model.task != 'image_classification':
    raise ValueError(
      '--classifier must be the run of an image classifier, got '
      f'{run.directory}, which holds a {type(config.model).__name__}'
    )
  classifier = ImageClassification(config)
  expected = task.model.image_shape
  if classifier.model.image_shape != expected:
    raise ValueError(
      f'--classifier must read images of {expected}, got '
      f'{classifier.model.image_shape} in {run.directory}'
    )
  params = checkpoint.restore_params(
    run.checkpoints_path, classifier, best=True
  )
  found = jax.jit(classifier.stored_layers.features)

  def features(images: np.ndarray) -> np.ndarray:
    starts = range(0, len(images), _AT_ONCE)
    parts = [images[start : start + _AT_ONCE] for start in starts]
    return np.concatenate([found(params, {'inputs': x}) for x in parts])

  return features
