"""Reads and writes preprocessor_config.json of transformers.

The file accompanies config.json. It states how a model normalizes images.
"""

import dataclasses
import math
from typing import Any, Protocol

from models.architecture import Companion, Fields

_GEOMETRY = frozenset(
  {
    'do_resize',
    'size',
    'resample',
    'do_center_crop',
    'crop_size',
    'crop_pct',
    'default_to_square',
    'do_convert_rgb',
  }
)
"""Fields about how an image is brought to the size of the model. Data for the
model already have this size."""

_VALUES = frozenset(
  {'do_rescale', 'rescale_factor', 'do_normalize', 'image_mean', 'image_std'}
)
"""Fields about the values of the pixels."""

_OF_PROGRAMS = frozenset(
  {
    '_valid_processor_keys',
    'data_format',
    'device',
    'disable_grouping',
    'feature_extractor_type',
    'image_processor_type',
    'input_data_format',
    'processor_class',
    'return_tensors',
  }
)
"""Fields about the program that reads the images."""


class ImageConfig(Protocol):
  """The fields of a configuration that describe images."""

  @property
  def image_size(self) -> int:
    """Height and width of the images."""
    ...

  @property
  def num_channels(self) -> int:
    """Number of channels of the images."""
    ...

  @property
  def mean(self) -> tuple[float, ...]:
    """Mean of each channel, in images whose values are from 0 to 1."""
    ...

  @property
  def std(self) -> tuple[float, ...]:
    """Standard deviation of each channel."""
    ...


def side_of(fields: Fields, name: str) -> int:
  """Returns the side of a square, which may be written as two numbers.

  Args:
    fields: Fields of a JSON file.
    name: Name of the field.

  Raises:
    ValueError: The sides differ, or are not whole numbers.
  """
  value = fields[name]
  sides = value if isinstance(value, list) else [value, value]
  if len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
    raise ValueError(
      f'{name} must be a whole number or two equal ones, got {value!r}: only '
      'squares are implemented'
    )
  return sides[0]


def _read(config: Any, fields: Fields) -> Any:
  """Returns the model with the normalization of a preprocessor_config.json.

  Absent fields have the defaults of transformers.
  """
  fields = {name: x for name, x in fields.items() if x is not None}
  for name in sorted(fields.keys() - _GEOMETRY - _VALUES - _OF_PROGRAMS):
    # Such as `do_pad` or `do_reduce_labels`.
    if fields[name] is not False:
      raise ValueError(
        f'{name} is not implemented, got {fields[name]!r}; take it out if the '
        'images do not depend on it'
      )
  side = _processed_side(fields)
  if side not in (None, config.image_size):
    raise ValueError(
      f'size must be the image_size {config.image_size} of config.json, got '
      f'{side}; correct one of the files'
    )
  # `unit` is the value of a white pixel before it is normalized.
  unit = 255.0
  if fields.get('do_rescale', True):
    unit *= fields.get('rescale_factor', 1 / 255)
  unit = 1.0 if math.isclose(unit, 1.0) else unit
  mean = std = (0.5,) * config.num_channels
  if not fields.get('do_normalize', True):
    mean, std = (0.0,) * config.num_channels, (1.0,) * config.num_channels
  else:
    mean = _by_channel(config, fields, 'image_mean') or mean
    std = _by_channel(config, fields, 'image_std') or std
  return dataclasses.replace(
    config,
    mean=tuple(x / unit for x in mean),
    std=tuple(x / unit for x in std),
  )


def _processed_side(fields: Fields) -> int | None:
  """Returns the side of the images that a preprocessor makes, if it is known.

  Raises:
    ValueError: The images would not be squares.
  """
  name = 'crop_size' if fields.get('do_center_crop') else 'size'
  size = fields.get(name)
  if size is None or not (name == 'crop_size' or fields.get('do_resize', True)):
    return None
  if isinstance(size, dict) and 'shortest_edge' in size:
    return None  # Transformers would keep the proportions of the image.
  if isinstance(size, dict):
    size = [size['height'], size['width']]
  return side_of({name: size}, name)


def _by_channel(
  config: ImageConfig, fields: Fields, name: str
) -> tuple[float, ...] | None:
  """Returns a field with a number for each channel, or for all; None if absent.

  Raises:
    ValueError: It has another number of channels than the model.
  """
  value = fields.get(name)
  if value is None:
    return None
  numbers = value if isinstance(value, list) else [value] * config.num_channels
  if len(numbers) != config.num_channels:
    raise ValueError(
      f'{name} must have {config.num_channels} numbers, as many as '
      f'num_channels in config.json, got {value!r}; correct one of the files'
    )
  return tuple(map(float, numbers))


def _write(config: ImageConfig, source: Fields) -> Fields:
  """Returns the fields of a preprocessor_config.json.

  How images are resized is copied from the source if it is for the same size.
  """
  geometry = {name: x for name, x in source.items() if name in _GEOMETRY}
  if _processed_side(geometry) != config.image_size:
    side = config.image_size
    geometry = {'do_resize': True, 'size': {'height': side, 'width': side}}
  return geometry | {
    'image_processor_type': 'ViTImageProcessor',
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(config.mean),
    'image_std': list(config.std),
  }


PREPROCESSOR = Companion('preprocessor_config.json', _read, _write)
"""The file of a configuration that has the fields of `ImageConfig`."""
