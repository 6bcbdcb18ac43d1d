"""Diffusion transformer (DiT) in Flax, with all layers on a leading axis.

The image is cut into patches, which are the positions of a transformer. The
time and the label of an image make one vector, the condition, from which each
layer computes the scales and shifts of its norms and the gates of its residuals
(adaLN-zero). The gates are zero initially, so that each layer is the identity.
Unlike the paper's, this network does not predict variances.

Shapes: B batch, T patches, D width, F mlp width, N heads, H head dimension, P
pixels and channels of a patch, L layers.

Source: Peebles and Xie, `DiT <https://arxiv.org/abs/2212.09748>`_, 2022.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import denoiser
from models.denoiser import DenoiserConfig, LabelTable
from models.model import (
  Activations,
  Batch,
  Dtype,
  Intercept,
  Params,
  Read,
  Sums,
)
from models.modules import Linear, apply, attend, layer_class, run_layers

_TIME_FEATURES = 256
"""Number of cosines and sines of a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DitConfig(DenoiserConfig):
  """Dimensions and number formats of a DiT. The defaults are DiT-S/2."""

  is_stacked: ClassVar[bool] = True

  patch_size: int = 2
  """Height and width of a patch, in pixels."""
  width: int = 384
  """Size of the residual stream and of the condition."""
  num_heads: int = 6
  """Number of attention heads."""
  num_layers: int = 12
  """Number of transformer layers."""
  mlp_width: int | None = None
  """Size of the mlp's hidden layer (None: 4 width)."""
  norm_eps: float = 1e-6
  """Number added to the variance in layer norm."""

  def __post_init__(self) -> None:
    """Checks that sizes are positive and divide as they must."""
    super().__post_init__()
    denoiser.check_sizes(
      patch_size=self.patch_size,
      width=self.width,
      num_heads=self.num_heads,
      num_layers=self.num_layers,
      mlp_width=self.mlp_width,
    )
    if self.image_size % self.patch_size:
      raise ValueError(
        'image_size must be a multiple of patch_size, got '
        f'image_size={self.image_size}, patch_size={self.patch_size}; choose '
        'another patch or pad the images'
      )
    if self.width % self.num_heads:
      raise ValueError(
        'width must be a multiple of num_heads, got '
        f'width={self.width}, num_heads={self.num_heads}'
      )
    if self.width % 4:
      raise ValueError(
        'width must be a multiple of 4, for sines and cosines of rows and '
        f'columns, got {self.width}'
      )

  @property
  def num_patches(self) -> int:
    """Number of patches of an image, T."""
    return (self.image_size // self.patch_size) ** 2

  @property
  def hidden_width(self) -> int:
    """Size of the mlp's hidden layer, also if `mlp_width` is None."""
    return 4 * self.width if self.mlp_width is None else self.mlp_width

  @property
  def attention_shapes(self) -> list[tuple[int, int, int]]:
    """Positions, heads and head dimension of each layer's attention."""
    head_dim = self.width // self.num_heads
    return [(self.num_patches, self.num_heads, head_dim)] * self.num_layers

  def kept_bytes(self, batch: Batch) -> int:
    """Returns the bytes of the layers' inputs that the backward pass needs.

    The input of a layer is the activations of all patches and the condition.

    Args:
      batch: the batch, or the shapes, that one backward pass computes.
    """
    vectors = self.num_layers * len(batch['inputs']) * (self.num_patches + 1)
    return vectors * self.width * jnp.dtype(self.dtype).itemsize

  def tensor_sizes(self) -> dict[str, int]:
    """Returns the fields that the mesh axis 'tensor' must divide, by name."""
    return {'num_heads': self.num_heads, 'mlp_width': self.hidden_width}

  def layers(
    self, *, read: Read | None = None, intercept: Intercept | None = None
  ) -> 'Layers':
    """Returns the model as pure functions; see `Layers`."""
    return Layers(self, read, intercept)


# Width, heads and layers of the models of the paper.
_SIZES = {
  's': (384, 6, 12),
  'b': (768, 12, 12),
  'l': (1024, 16, 24),
  'xl': (1152, 16, 28),
}


def dit(size: str, **overrides: Any) -> DitConfig:
  """Returns a model of the DiT paper, for 1,000 classes and 32 x 32 inputs.

  The paper's inputs are latents of an autoencoder, with `num_channels=4`.

  Args:
    size: Size and patch size, such as 's/2', 'b/4', 'l/2' or 'xl/2'.
    **overrides: Fields of `DitConfig` that replace those of this size.

  Returns:
    The configuration.

  Raises:
    ValueError: The size is unknown.

  Example:
    >>> dit('xl/2', num_channels=4, dtype='bfloat16').num_patches
    256
  """
  name, _, patch = size.partition('/')
  if name not in _SIZES or not patch.isdecimal():
    raise ValueError(
      f'size must be one of {", ".join(_SIZES)}, a slash and the patch size, '
      f"such as 'xl/2', got {size!r}; any other model is a DitConfig"
    )
  width, num_heads, num_layers = _SIZES[name]
  config = DitConfig(
    num_classes=1000,
    patch_size=int(patch),
    width=width,
    num_heads=num_heads,
    num_layers=num_layers,
  )
  return dataclasses.replace(config, **overrides)


@dataclasses.dataclass(frozen=True)
class _Weight:
  """Describes a weight to `Linear`."""

  init_std: float
  """Standard deviation of the normal initial weights."""
  param_dtype: Dtype
  """Type of the parameters."""


def _linear(
  config: DitConfig,
  shape: tuple[int, int],
  name: str,
  *,
  std: float | None = None,
) -> Linear:
  """Returns a linear map with bias.

  Args:
    config: Provides the type of the parameters.
    shape: Shape [in, out] of the kernel.
    name: Name of the module.
    std: Standard deviation of the initial kernel; None is Xavier's.
  """
  if std is None:
    std = math.sqrt(2 / sum(shape))
  return Linear(_Weight(std, config.param_dtype), shape, True, name=name)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def modulate(
  h_BTD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array, eps: float
) -> jax.Array:
  """Returns (h - mean) / sqrt(variance + eps) * (1 + scale) + shift.

  Computes in float32. Under `jax.checkpoint`, only the inputs are stored for
  the backward pass.
  """
  x = h_BTD.astype(jnp.float32)
  x -= jnp.mean(x, axis=-1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  shift, scale = (
    y_BD.astype(jnp.float32)[:, None, :] for y_BD in (shift_BD, scale_BD)
  )
  return (x * (1 + scale) + shift).astype(h_BTD.dtype)


def _gelu(x: jax.Array) -> jax.Array:
  """Returns the tanh approximation of GELU; only x is kept for its gradient."""
  return jax.checkpoint(jax.nn.gelu, prevent_cse=False)(x)


def sincos_positions(grid_size: int, width: int) -> np.ndarray:
  """Returns fixed position embeddings [T, D] of a square grid, in float64.

  One half of the features encodes the column of a patch and the other half its
  row, each by sines and cosines of geometric wavelengths.

  Args:
    grid_size: Number of patches in a row, and of rows.
    width: Number of features, a multiple of 4.
  """
  turns = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
  angles = np.arange(grid_size)[:, None] * turns[None]
  waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  columns = np.tile(waves, (grid_size, 1))
  rows = np.repeat(waves, grid_size, axis=0)
  return np.concatenate([columns, rows], axis=1)


def to_patches(x: jax.Array, size: int) -> jax.Array:
  """Cuts images [B, H, W, C] into patches [B, T, size size C], row by row."""
  B, H, W, C = x.shape
  x = x.reshape(B, H // size, size, W // size, size, C)
  return x.swapaxes(2, 3).reshape(B, -1, size * size * C)


def from_patches(patches_BTP: jax.Array, size: int) -> jax.Array:
  """Joins patches of square images, the inverse of `to_patches`."""
  B, T, P = patches_BTP.shape
  grid = math.isqrt(T)
  x = patches_BTP.reshape(B, grid, grid, size, size, P // size**2)
  return x.swapaxes(2, 3).reshape(B, grid * size, grid * size, -1)


class Embedding(nn.Module):
  """Embeds patches with their positions, and the time with the label."""

  config: DitConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(
    self, x_t: jax.Array, times_B: jax.Array, labels_B: jax.Array | None
  ) -> Activations:
    """Returns {'h': [B, T, D], 'c': [B, D]}."""
    config, D = self.config, self.config.width
    patches_BTP = to_patches(x_t.astype(config.dtype), config.patch_size)
    shape = (patches_BTP.shape[-1], D)
    h_BTD = _linear(config, shape, 'patches')(patches_BTP)
    grid_size = config.image_size // config.patch_size
    positions_TD = sincos_positions(grid_size, D)
    h_BTD += jnp.asarray(positions_TD, config.dtype)[None]
    waves = denoiser.embed_times(
      times_B, config.diffusion.steps, _TIME_FEATURES, config.dtype
    )
    shape = (_TIME_FEATURES, D)
    c_BD = nn.silu(_linear(config, shape, 'time_in', std=0.02)(waves))
    c_BD = _linear(config, (D, D), 'time_out', std=0.02)(c_BD)
    if labels_B is not None:
      c_BD += LabelTable(config, D, name='labels')(labels_B)
    return {'h': h_BTD, 'c': c_BD}


class Attention(nn.Module):
  """Attention between all patches of an image."""

  config: DitConfig
  """Provides the sizes of the heads and the implementation of attention."""

  @nn.compact
  def __call__(self, h_BTD: jax.Array) -> jax.Array:
    """Returns the mix [B, T, D] of the patches."""
    config = self.config
    B, T, D = h_BTD.shape
    q_BTNH, k_BTNH, v_BTNH = (
      _linear(config, (D, D), name)(h_BTD).reshape(B, T, config.num_heads, -1)
      for name in ('q', 'k', 'v')
    )
    one_BT = jnp.zeros((B, T), jnp.int32)
    y_BTNH = attend(self, q_BTNH, k_BTNH, v_BTNH, one_BT, kind=config.attention)
    return _linear(config, (D, D), 'o')(y_BTNH.reshape(B, T, D))


class Mlp(nn.Module):
  """Two linear maps with a GELU between them: down(gelu(up))."""

  config: DitConfig
  """Provides the widths."""

  @nn.compact
  def __call__(self, h_BTD: jax.Array) -> jax.Array:
    """Returns [B, T, D], each patch computed from itself only."""
    D, F = self.config.width, self.config.hidden_width
    up_BTF = _linear(self.config, (D, F), 'up')(h_BTD)
    return _linear(self.config, (F, D), 'down')(_gelu(up_BTF))


class TransformerLayer(nn.Module):
  """One adaLN-zero layer: attention and mlp, modulated by the condition."""

  config: DitConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    """Returns x = {'h', 'c'} with an updated 'h'."""
    config, D = self.config, self.config.width
    h_BTD, c_BD = x['h'], x['c']
    modulation = _linear(config, (D, 6 * D), 'modulation', std=0.0)
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
      modulation(nn.silu(c_BD)), 6, axis=-1
    )
    # A remat of attention inside the remat of the layer frees attention's
    # residuals while the mlp's backward pass runs.
    mix = nn.remat(Attention) if config.remat else Attention
    y_BTD = modulate(h_BTD, shift1, scale1, config.norm_eps)
    h_BTD += gate1[:, None, :] * mix(config, name='attention')(y_BTD)
    y_BTD = modulate(h_BTD, shift2, scale2, config.norm_eps)
    h_BTD += gate2[:, None, :] * Mlp(config, name='mlp')(y_BTD)
    return {**x, 'h': h_BTD}


class Head(nn.Module):
  """Modulated norm and a linear map from each patch to its pixels."""

  config: DitConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, x: Activations) -> jax.Array:
    """Returns the output [B, H, W, C] in float32."""
    config, D = self.config, self.config.width
    modulation = _linear(config, (D, 2 * D), 'modulation', std=0.0)
    shift, scale = jnp.split(modulation(nn.silu(x['c'])), 2, axis=-1)
    y_BTD = modulate(x['h'], shift, scale, config.norm_eps)
    shape = (D, config.patch_size**2 * config.num_channels)
    y_BTP = _linear(config, shape, 'out', std=0.0)(y_BTD)
    return from_patches(y_BTP, config.patch_size).astype(jnp.float32)


class Dit(nn.Module):
  """The whole model. `Layers` describes `batch`."""

  config: DitConfig
  """Configuration of the model."""
  read: Read | None = None
  """Converts the stored parameters of one layer to arrays; see `Layers`."""

  def setup(self) -> None:
    """Declares the submodules; attribute names are keys of the parameters."""
    config = self.config
    layer = layer_class(TransformerLayer, remat=config.remat, read=self.read)
    self.embed = Embedding(config)
    self.blocks = layer(config)
    self.head = Head(config)

  def __call__(self, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss of a batch and its sums; see `score`."""
    return self.score(self._run_layers(self.enter(batch)), batch)

  def predict(
    self, x_t: jax.Array, times_B: jax.Array, labels_B: jax.Array | None
  ) -> jax.Array:
    """Returns the output [B, H, W, C] in float32."""
    return self.head(self._run_layers(self.embed(x_t, times_B, labels_B)))

  def enter(self, batch: Batch) -> Activations:
    """Returns x = {'h', 'c'}, the input of the first layer."""
    drawn = denoiser.draw(self.config, batch)
    return self.embed(drawn.x_t, drawn.times, drawn.labels)

  def _run_layers(self, x: Activations) -> Activations:
    """Applies all layers."""
    return run_layers(self.blocks, x, self.config.num_layers)

  def score(self, x: Activations, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss and its sums from the output x of the last layer.

    The noise of the batch is drawn again, which makes the same numbers. See
    `denoiser.score`.
    """
    drawn = denoiser.draw(self.config, batch)
    return denoiser.score(self.head(x), drawn, batch['weights'])


@dataclasses.dataclass(frozen=True)
class Layers(denoiser.Layers):
  """The DiT as pure functions; see `denoiser.Layers` for the batch.

  `embed`, `block` and `loss` compute the model one layer at a time. Calling the
  object composes them, with a scan over the layers in params['blocks'].
  """

  config: DitConfig
  """Configuration of the model."""

  def module(self) -> nn.Module:
    """Returns the linen module."""
    return Dit(self.config, self.read)

  def embed(self, params: Params, batch: Batch) -> Activations:
    """Returns x = {'h': [B, T, D], 'c': [B, D]}, the first layer's input.

    'c' is the condition, which each layer passes on. Reads only
    params['embed'].
    """
    return self._apply(params, batch, method='enter')

  def block(self, layer_params: Params, x: Activations) -> Activations:
    """Applies one transformer layer.

    Args:
      layer_params: Parameters of one layer: an entry of params['blocks'] along
        the leading axis, as arrays.
      x: Input of the layer, as `embed` or the layer before returns it.

    Returns:
      x with an updated 'h'.
    """
    layer = TransformerLayer(self.config)
    return apply(layer, self.intercept, {'params': layer_params}, x)

  def loss(
    self, params: Params, x: Activations, batch: Batch
  ) -> tuple[jax.Array, Sums]:
    """Returns the loss from the output of the last layer.

    Args:
      params: The parameters; only params['head'] is read.
      x: Output of the last layer.
      batch: The batch from which x was computed.

    Returns:
      sum(weights * cost) / weights.size, and the sums {'cost', 'weight'}.
    """
    return self._apply(params, x, batch, method='score')
