"""Random changes of training images, which a corpus of images names."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Augment:
  """Random changes of training images, which differ in each epoch."""

  crop: int = 0
  """Number of black pixels that are added at each edge before a random crop to
  the old size. 4 is usual for images of 32 x 32."""

  scale: tuple[float, float] | None = None
  """Least and largest share of an image's area that is cropped at random, with
  another width / height, and resized to the shape of the images. The share is
  of the stored image, if that is larger. (0.08, 1.0) is usual for ImageNet.
  Pillow resizes, which needs the extra `images`."""

  flip: bool = False
  """Whether half of the images are mirrored left to right."""

  def __post_init__(self) -> None:
    """Raises ValueError if the sizes contradict each other."""
    if self.crop < 0:
      raise ValueError(
        f'corpus.augment.crop must be at least 0 pixels, got {self.crop}: 4 is '
        'usual'
      )
    scale = self.scale
    if scale is not None and not 0 < scale[0] <= scale[1] <= 1:
      raise ValueError(
        'corpus.augment.scale must be two shares 0 < least <= largest <= 1 of '
        f"the image's area, got {scale}: (0.08, 1.0) is usual"
      )
    if scale is not None and self.crop:
      raise ValueError(
        f'corpus.augment.crop={self.crop} and augment.scale={scale} both '
        'crop: set one'
      )
