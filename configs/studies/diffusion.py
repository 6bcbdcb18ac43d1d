"""Compares methods on the U-Net of DDPM, with two forms of convolutions.

`python -m configs.studies.diffusion` trains a U-Net of 0.7 million weights to
remove noise from Fashion-MNIST at 14 x 14 pixels (means of 2 x 2 pixels). The
methods project the kernel [kh, kw, in, out] of a convolution as one matrix
[kh kw in, out]. "GaLore, Tucker-2" projects input and output channels instead,
with bases that all taps share (`galore_optax.SharedBasis`). Its rank 16 stores
about as much as rank 8 of a matrix.

The search is that of `configs.studies.comparison.search`, with two learning
rates for each method. All methods are in the final round, with three seeds.
They have rank 8, and GaLore also has ranks 4 and 16.

The page is results/diffusion.md. `configs.studies.comparison.command` explains
how to interrupt, continue and repeat runs.

Reductions for two CPU cores: the images are small, the last runs have 0.17
epochs, and the weights are not averaged. The learning rates are selected on the
test images, after half of the steps. No images are drawn.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

import galore_optax as go
from configs.ddpm_fashion import config as given
from configs.studies.comparison import command, images, table
from configs.studies.comparison.images import (
  ImageStudy,
  Size,
  means_by_batch,
)
from configs.studies.comparison.runs import finite
from configs.studies.comparison.study import Method, Metric, Score
from models.denoiser import DenoiserConfig
from train.config import Config
from train.data.images import idx
from train.data.images.corpora import IdxImages
from train.engine.task import Batch, Data
from train.tasks import diffusion
from train.tasks.diffusion import costs, with_times

TUCKER = {'.*': go.SharedBasis(side='both')}

METHODS = images.methods(4, 16) | {
  'GaLore, Tucker-2': Method(table.make('Galore', axes=TUCKER)),
  'GaLore, Tucker-2, rank 16': Method(
    table.make('Galore', axes=TUCKER, rank=16)
  ),
}

SIZE = images.size(640, len(METHODS), batch_size=16, eval_images=512, rank=8)


class DiffusionStudy(ImageStudy):
  """A study of a network that reverses a diffusion."""

  metrics: ClassVar[Sequence[Metric]] = (Metric('error', 'held-out loss'),)

  def held_out(self, config: Config, data: Data) -> list[Batch]:
    """Returns batches of test images with fixed times and noise."""
    task = diffusion.Diffusion(config)
    return list(with_times(task.model, task.validation_rows(data)))

  def score(self, task: Any) -> Callable[[Any, Batch], Any]:
    """Returns a function that computes the cost of each image of a batch."""
    model, layers = task.model.without_dropout(), task.evaluated_layers
    return lambda params, batch: costs(model, layers, params, batch)

  def measured(self, held_out: Sequence[Batch], score: Score) -> dict[str, Any]:
    """Returns the held-out loss in total and by batch."""
    found = [score(batch) for batch in held_out]
    return {
      'error': finite(np.concatenate(found).mean()),
      'rows': means_by_batch(found),
    }


@dataclasses.dataclass(frozen=True)
class Unet(DiffusionStudy):
  """Methods on a U-Net."""

  size: Size = SIZE

  name: ClassVar[str] = 'diffusion'
  title: ClassVar[str] = 'A diffusion U-Net with several methods'
  methods: ClassVar[Mapping[str, Method]] = METHODS
  usual: ClassVar[Sequence[str]] = (*METHODS,)
  matrices: ClassVar[str] = '(down|middle|up).*kernel'

  @property
  def model(self) -> DenoiserConfig:
    """The model of configs/ddpm_fashion.py for images of 14 x 14 pixels."""
    model: Any = given.model
    return dataclasses.replace(model, image_size=14, multipliers=(1, 2))

  def corpus(self, name: str, scratch: pathlib.Path) -> IdxImages:
    """Returns Fashion-MNIST at half its height and width."""
    return halved(super().corpus(name, scratch), scratch)


def halved(corpus: IdxImages, directory: pathlib.Path) -> IdxImages:
  """Returns a corpus whose pixels are means of 2 x 2 pixels of another.

  Args:
    corpus: images of even height and width.
    directory: where the files of the new corpus are written.
  """
  assert corpus.validation is not None
  for images_name, labels_name in (corpus.train, corpus.validation):
    images_nHW, labels_n = (
      idx.read(idx.find(corpus.directory, name))
      for name in (images_name, labels_name)
    )
    n, height, width = images_nHW.shape
    parts = images_nHW.reshape(n, height // 2, 2, width // 2, 2)
    means_nhw = parts.mean(axis=(2, 4)).round().astype(np.uint8)
    write_idx(directory / images_name, means_nhw)
    write_idx(directory / labels_name, labels_n)
  return dataclasses.replace(corpus, directory=str(directory))


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes an array of bytes as an idx file."""
  sizes = np.array(array.shape, '>u4').tobytes()
  path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


STUDY = Unet()

if __name__ == '__main__':
  command.main(STUDY)
