"""The U-Net of DDPM in Flax, a convolutional network that reverses a diffusion.

The image passes residual blocks at several resolutions, each half of the one
before, and then the same resolutions upwards. Each block of the way up also
reads the activations of the way down.

Shapes: B batch, H height, W width, C channels of an image or of activations,
T = H W positions, N heads, E features of the condition.

Source: Ho et al., `DDPM <https://arxiv.org/abs/2006.11239>`_, 2020.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import denoiser
from models.denoiser import DenoiserConfig, LabelTable
from models.model import Batch, Intercept, Read, Sums
from models.modules import attend, drop

_FIRST_SITE = 3
"""Number of the first dropout. `denoiser.draw` folds smaller numbers into the
same keys."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnetConfig(DenoiserConfig):
  """Dimensions and number formats of a U-Net.

  The defaults are the model of DDPM for CIFAR-10, without its dropout.
  """

  width: int = 128
  """Number of channels of the first level."""
  multipliers: tuple[int, ...] = (1, 2, 2, 2)
  """Number of channels of each level, as multiples of `width`. Each level has
  half of the height and width of the level before."""
  num_blocks: int = 2
  """Number of residual blocks of a level on the way down. The way up has one
  more."""
  attention_sizes: tuple[int, ...] = (16,)
  """Heights of the levels whose residual blocks are followed by attention. The
  blocks between the two ways always have attention."""
  head_dim: int | None = None
  """Size of one attention head (None: one head of all channels)."""
  groups: int = 32
  """Number of groups of channels that group norm normalizes separately."""
  norm_eps: float = 1e-6
  """Number added to the variance in group norm."""
  dropout: float = 0.0
  """Probability with which training zeroes an entry inside a residual block."""

  def __post_init__(self) -> None:
    """Checks that sizes are positive and divide as they must."""
    super().__post_init__()
    if not self.multipliers:
      raise ValueError(
        'multipliers must have one number for each level, got ()'
      )
    denoiser.check_sizes(
      width=self.width,
      num_blocks=self.num_blocks,
      head_dim=self.head_dim,
      groups=self.groups,
      multipliers=min(self.multipliers),
    )
    denoiser.check_dropout(self.dropout)
    factor = 2 ** (len(self.multipliers) - 1)
    if self.image_size % factor:
      raise ValueError(
        f'image_size must be a multiple of {factor}, for '
        f'{len(self.multipliers)} levels of half the size each, got '
        f'{self.image_size}; use fewer multipliers or pad the images'
      )
    for channels in self.level_widths:
      if channels % self.groups:
        raise ValueError(
          f'groups must divide the channels of each level, {channels} here, '
          f'got {self.groups}; choose another width or number of groups'
        )
    if self.width % 2:
      raise ValueError(
        f'width must be even, for the time embedding, got {self.width}'
      )
    for size in self.attention_sizes:
      if size not in self.level_sizes:
        known = ', '.join(map(str, self.level_sizes))
        raise ValueError(
          f'attention_sizes must be heights of levels, {known}, got {size}'
        )
    for size, channels in self._attended:
      if channels % (self.head_dim or 1):
        raise ValueError(
          'head_dim must divide the channels of each level with attention, '
          f'{channels} at height {size}, got {self.head_dim}; choose a divisor '
          'of width'
        )

  @property
  def level_widths(self) -> tuple[int, ...]:
    """Number of channels of each level."""
    return tuple(self.width * multiplier for multiplier in self.multipliers)

  @property
  def level_sizes(self) -> tuple[int, ...]:
    """Height of each level, which is also its width."""
    return tuple(self.image_size >> i for i in range(len(self.multipliers)))

  @property
  def _attended(self) -> list[tuple[int, int]]:
    """Height and number of channels of each attention in the network."""
    levels = list(zip(self.level_sizes, self.level_widths, strict=True))
    found = [level for level in levels if level[0] in self.attention_sizes]
    return found * (2 * self.num_blocks + 1) + levels[-1:]

  @property
  def attention_shapes(self) -> list[tuple[int, int, int]]:
    """Positions, heads and head dimension of each attention in the network."""
    return [
      (size * size, self.num_heads(channels), self.head_dim or channels)
      for size, channels in self._attended
    ]

  def num_heads(self, channels: int) -> int:
    """Returns the number of heads of an attention over some channels."""
    return channels // self.head_dim if self.head_dim else 1

  def without_dropout(self) -> 'UnetConfig':
    """Returns the model of evaluation: with the same parameters, no dropout."""
    return dataclasses.replace(super().without_dropout(), dropout=0.0)

  def layers(
    self, *, read: Read | None = None, intercept: Intercept | None = None
  ) -> 'Layers':
    """Returns the model as pure functions.

    Args:
      read: Is ignored, because the layers are not stacked.
      intercept: A linen interceptor under which everything is computed.
    """
    return Layers(self, read, intercept)


def _convolution(
  config: UnetConfig,
  channels: int,
  name: str,
  *,
  size: int = 3,
  stride: int = 1,
  zero: bool = False,
) -> nn.Conv:
  """Returns a convolution with bias; `zero` makes its initial kernel zero."""
  return nn.Conv(
    channels,
    (size, size),
    strides=stride,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=_initializer(zero),
    name=name,
  )


def _linear(
  config: UnetConfig, features: int, name: str, *, zero: bool = False
) -> nn.Dense:
  """Returns a linear map with bias; `zero` makes its initial kernel zero."""
  return nn.Dense(
    features,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    kernel_init=_initializer(zero),
    name=name,
  )


def _initializer(zero: bool) -> nn.initializers.Initializer:
  if zero:
    return nn.initializers.zeros
  return nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')


def _norm(config: UnetConfig, name: str) -> nn.GroupNorm:
  """Returns a group norm, whose statistics are computed in float32."""
  return nn.GroupNorm(
    config.groups,
    epsilon=config.norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    name=name,
  )


class Condition(nn.Module):
  """Embedding of the time and, if the model has classes, of the label."""

  config: UnetConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(
    self, times_B: jax.Array, labels_B: jax.Array | None
  ) -> jax.Array:
    """Returns the condition [B, E], E = 4 width."""
    config, features = self.config, 4 * self.config.width
    waves = denoiser.embed_times(
      times_B, config.diffusion.steps, config.width, config.dtype
    )
    c_BE = nn.silu(_linear(config, features, 'time_in')(waves))
    c_BE = _linear(config, features, 'time_out')(c_BE)
    if labels_B is not None:
      c_BE += LabelTable(config, features, name='labels')(labels_B)
    return c_BE


class ResidualBlock(nn.Module):
  """Two convolutions and a residual; the condition is added between them."""

  config: UnetConfig
  """Configuration of the model."""
  channels: int
  """Number of channels of the result."""
  site: int
  """Number of this block's dropout in the model."""

  @nn.compact
  def __call__(
    self, h: jax.Array, c_BE: jax.Array, noise_B2: jax.Array | None
  ) -> jax.Array:
    """Returns activations [B, H, W, channels]."""
    config, channels = self.config, self.channels
    y = nn.silu(_norm(config, 'norm1')(h))
    y = _convolution(config, channels, 'conv1')(y)
    shift = _linear(config, channels, 'condition')(nn.silu(c_BE))
    y += shift[:, None, None, :]
    y = nn.silu(_norm(config, 'norm2')(y))
    y = drop(y, noise_B2, self.site, config.dropout)
    y = _convolution(config, channels, 'conv2', zero=True)(y)
    if h.shape[-1] != channels:
      h = _convolution(config, channels, 'conv_shortcut', size=1)(h)
    return h + y


class Attention(nn.Module):
  """Attention between all positions of an image, with a norm and a residual."""

  config: UnetConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Returns activations [B, H, W, C] like h."""
    config = self.config
    B, H, W, C = h.shape
    N = config.num_heads(C)
    normed_BTC = _norm(config, 'norm')(h).reshape(B, H * W, C)
    q_BTNH, k_BTNH, v_BTNH = (
      _linear(config, C, name)(normed_BTC).reshape(B, H * W, N, C // N)
      for name in ('q', 'k', 'v')
    )
    one_BT = jnp.zeros((B, H * W), jnp.int32)
    y_BTNH = attend(self, q_BTNH, k_BTNH, v_BTNH, one_BT, kind=config.attention)
    y = _linear(config, C, 'o', zero=True)(y_BTNH.reshape(B, H * W, C))
    return h + y.reshape(h.shape)


class Downsample(nn.Module):
  """Halves height and width by a convolution of stride 2."""

  config: UnetConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Returns activations [B, H / 2, W / 2, C]."""
    return _convolution(self.config, h.shape[-1], 'conv', stride=2)(h)


class Upsample(nn.Module):
  """Doubles height and width: repeats each pixel, then convolves."""

  config: UnetConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Returns activations [B, 2 H, 2 W, C]."""
    h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
    return _convolution(self.config, h.shape[-1], 'conv')(h)


class Unet(nn.Module):
  """The whole model. `denoiser.Layers` describes the batch."""

  config: UnetConfig
  """Configuration of the model."""

  def __call__(self, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss of a batch and its sums; see `denoiser.score`."""
    drawn = denoiser.draw(self.config, batch)
    output = self.predict(drawn.x_t, drawn.times, drawn.labels, batch['noise'])
    return denoiser.score(output, drawn, batch['weights'])

  @nn.compact
  def predict(
    self,
    x_t: jax.Array,
    times_B: jax.Array,
    labels_B: jax.Array | None,
    noise_B2: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the output [B, H, W, C] in float32; noise turns on dropout."""
    config = self.config
    residual_block = nn.remat(ResidualBlock) if config.remat else ResidualBlock
    attend = nn.remat(Attention) if config.remat else Attention
    site = _FIRST_SITE
    c_BE = Condition(config, name='condition')(times_B, labels_B)

    def block(h: jax.Array, channels: int, name: str) -> jax.Array:
      nonlocal site
      site += 1
      module = residual_block(config, channels, site, name=name)
      return module(h, c_BE, noise_B2)

    def stage(h: jax.Array, level: int, name: str) -> jax.Array:
      h = block(h, config.level_widths[level], name)
      if h.shape[1] not in config.attention_sizes:
        return h
      return attend(config, name=f'{name}_attention')(h)

    h = x_t.astype(config.dtype)
    h = _convolution(config, config.width, 'conv_in')(h)
    skips = [h]
    levels = range(len(config.multipliers))
    for level in levels:
      for i in range(config.num_blocks):
        h = stage(h, level, f'down{level}_block{i}')
        skips.append(h)
      if level != levels[-1]:
        h = Downsample(config, name=f'down{level}_downsample')(h)
        skips.append(h)
    h = block(h, h.shape[-1], 'middle_block0')
    h = attend(config, name='middle_attention')(h)
    h = block(h, h.shape[-1], 'middle_block1')
    for level in reversed(levels):
      for i in range(config.num_blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = stage(h, level, f'up{level}_block{i}')
      if level:
        h = Upsample(config, name=f'up{level}_upsample')(h)
    h = nn.silu(_norm(config, 'norm_out')(h))
    out = _convolution(config, config.num_channels, 'conv_out', zero=True)
    return out(h).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Layers(denoiser.Layers):
  """The U-Net as pure functions; see `denoiser.Layers`."""

  config: UnetConfig
  """Configuration of the model."""

  def module(self) -> nn.Module:
    """Returns the linen module."""
    return Unet(self.config)
