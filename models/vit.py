"""A vision transformer in Flax, which classifies images.

The parameters of all layers are stacked on a leading axis, as in
`models.llama`. The linen modules define the mathematics. `Layers` offers the
same model as pure functions: the whole model, or one layer at a time. The end
of the file describes the checkpoints of transformers.

Shapes: B batch, S side of the images, P side of a patch, G patches along a
side, I channels of the images, T tokens, D width, C labels, L layers.

Source: Dosovitskiy et al., `An Image is Worth 16x16 Words
<https://arxiv.org/abs/2010.11929>`_, 2020.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import flops, noise
from models.architecture import (
  LABELS,
  ONE_STACK,
  TRANSFORMER,
  Architecture,
  Fields,
  names_of,
  read_labels,
  write_labels,
)
from models.attention import Call
from models.cross_entropy import multiply
from models.huggingface_images import PREPROCESSOR, side_of
from models.model import (
  Activations,
  AttentionConfig,
  Batch,
  Dtype,
  Intercept,
  Params,
  PyTree,
  Read,
  Sums,
)
from models.modules import (
  Attention,
  LayerNorm,
  Linear,
  Mlp,
  ModuleLayers,
  Table,
  cost,
  drop,
  layer_class,
  run_layers,
  weighted,
)


@dataclasses.dataclass(frozen=True)
class VitConfig(AttentionConfig):
  """Dimensions and number formats of a vision transformer."""

  image_size: int
  """Height and width of the images, in pixels."""
  patch_size: int
  """Height and width of a patch, in pixels. It divides `image_size`."""
  width: int
  """Size of the residual stream."""
  mlp_width: int
  """Size of the mlp's hidden layer."""
  num_heads: int
  """Number of attention heads."""
  num_layers: int
  """Number of transformer layers."""
  num_labels: int
  """Number of labels to choose from."""
  labels: tuple[str, ...] | None = None
  """Names of the labels, which are written to checkpoints (None: unnamed)."""
  num_channels: int = 3
  """Number of channels of the images: 3 for colours, 1 for shades of gray."""
  mean: tuple[float, ...] = (0.5, 0.5, 0.5)
  """Mean of each channel, in images whose values are from 0 to 1. It is
  subtracted from uint8 images, after their division by 255."""
  std: tuple[float, ...] = (0.5, 0.5, 0.5)
  """Standard deviation of each channel, by which uint8 images are divided."""
  pool: Literal['mean', 'cls'] = 'mean'
  """Input of the head: the mean of all patches, or a class token that precedes
  the patches. Checkpoints of transformers have a class token."""
  qkv_bias: bool = True
  """Whether the projections to queries, keys and values have a bias."""
  dropout: float = 0.0
  """Dropout rate after the embedding, each attention and each mlp. Dropout is
  applied only if a batch has 'noise'."""
  norm_eps: float = 1e-6
  """Number added to the variance in LayerNorm."""
  init_std: float = 0.02
  """Standard deviation of the normal initial weights."""
  dtype: Dtype = 'float32'
  """Type of the activations and of the matmuls. Norms, softmax and loss are
  computed in float32."""
  param_dtype: Dtype = 'float32'
  """Type of the parameters and of their gradients."""
  remat: bool = False
  """Whether the backward pass recomputes each layer from its input."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """Implementation of attention; see `models.llama.LlamaConfig.attention`."""

  def __post_init__(self) -> None:
    """Checks that sizes are in range and divide each other."""
    sizes = ('image_size', 'patch_size', 'width', 'mlp_width', 'num_heads')
    for name in (*sizes, 'num_layers', 'num_channels'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be at least 1, got {getattr(self, name)}'
        )
    for name, divisor in (('image_size', 'patch_size'), ('width', 'num_heads')):
      whole, part = getattr(self, name), getattr(self, divisor)
      if whole % part:
        raise ValueError(
          f'{name} must be a multiple of {divisor}, got {name}={whole}, '
          f'{divisor}={part}; choose another of the two'
        )
    if self.num_labels < 2:
      raise ValueError(
        f'num_labels must be at least 2, got {self.num_labels}: count the '
        'labels to choose from'
      )
    if self.labels is not None and len(self.labels) != self.num_labels:
      raise ValueError(
        f'labels must be {self.num_labels} names, as many as num_labels, got '
        f'{self.labels}'
      )
    for name in ('mean', 'std'):
      if len(getattr(self, name)) != self.num_channels:
        raise ValueError(
          f'{name} must have one number for each of {self.num_channels} '
          f'channels, got {getattr(self, name)}; set it with num_channels'
        )
    if min(self.std) <= 0:
      raise ValueError(f'std must be positive, got {self.std}')
    if self.pool not in ('mean', 'cls'):
      raise ValueError(f"pool must be 'mean' or 'cls', got {self.pool!r}")
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f'dropout is a share of the entries in [0, 1), got {self.dropout}'
      )

  task: ClassVar[str] = 'image_classification'
  """Classifying images."""
  is_stacked: ClassVar[bool] = True
  """The layers are stacked."""

  def layers(
    self, *, read: Read | None = None, intercept: Intercept | None = None
  ) -> 'Layers':
    """Returns the model as pure functions."""
    return Layers(self, read, intercept)

  @classmethod
  def architectures(cls) -> Mapping[str, Architecture]:
    """Returns the formats of the model's checkpoints, by model_type."""
    return ARCHITECTURES

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Shape [S, S, I] of an image."""
    return (self.image_size, self.image_size, self.num_channels)

  @property
  def length(self) -> int:
    """Number of tokens: the patches and, if there is one, the class token."""
    return (self.image_size // self.patch_size) ** 2 + (self.pool == 'cls')

  def flops(self, params: PyTree, trained: PyTree, batch: Batch) -> float:
    """Returns the flops of an update, as `models.flops` counts them.

    These are 6 N + 12 L T D flops per token if all N weights of the layers and
    of the patch embedding are trained. The head reads one vector of an image,
    so it does not count.
    """
    return flops.transformer(
      params,
      trained,
      rows=batch['inputs'].shape[0],
      length=self.length,
      seen=self.length,
      width=self.width,
      num_layers=self.num_layers,
      is_product=frozenset[str]().__contains__,
    )

  def kept_bytes(self, batch: Batch) -> int:
    """Returns the bytes of the activations at the input of each layer."""
    tokens = batch['inputs'].shape[0] * self.length
    size = flops.element_bytes(self.dtype) * self.width
    return self.num_layers * tokens * size

  def attention_calls(self, batch: Batch) -> list[Call]:
    """Returns the sizes of attention, which all layers share."""
    del batch  # All images have the same number of patches.
    N = self.num_heads
    return [Call(self.length, N, N, self.width // N)]

  def tensor_sizes(self) -> dict[str, int]:
    """Returns the sizes that the mesh axis 'tensor' must divide."""
    return {'num_heads': self.num_heads, 'mlp_width': self.mlp_width}


def normalized(images: jax.Array, config: VitConfig) -> jax.Array:
  """Returns images as the model reads them, in the type of the activations.

  Args:
    images: Images [B, S, S, I]. uint8 images are divided by 255 and normalized
      by the mean and the standard deviation of each channel. Floating-point
      images are already normalized.
    config: Configuration of the model.

  Raises:
    ValueError: The images have another shape, or are integers of another type.
  """
  images = jnp.asarray(images)
  if images.shape[1:] != config.image_shape:
    raise ValueError(
      f'inputs must be images of shape {config.image_shape}, got '
      f'{images.shape[1:]}; resize them, or change image_size and num_channels'
    )
  if jnp.issubdtype(images.dtype, jnp.floating):
    return images.astype(config.dtype)
  if images.dtype != jnp.uint8:
    raise ValueError(
      f'inputs must be uint8 or floating-point, got {images.dtype}; convert '
      'them'
    )
  mean_BSSI, std_BSSI = (
    jnp.asarray(x, jnp.float32)[None, None, None]
    for x in (config.mean, config.std)
  )
  scaled = images.astype(jnp.float32) / 255
  return ((scaled - mean_BSSI) / std_BSSI).astype(config.dtype)


class Patches(nn.Module):
  """Linear map of the pixels of each patch.

  This is a convolution whose stride is the size of its kernel, computed as one
  matrix product.
  """

  config: VitConfig
  """Provides the sizes, the initialization and the types."""

  @nn.compact
  def __call__(self, images_BSSI: jax.Array) -> jax.Array:
    """Returns a vector for each patch [B, T, D], row by row."""
    config, init = self.config, nn.initializers
    B, S, _, I = images_BSSI.shape
    P, D = config.patch_size, config.width
    G = S // P
    kernel_PPID = self.param(
      'kernel',
      init.normal(config.init_std),
      (P, P, I, D),
      config.param_dtype,
    )
    bias_D = self.param('bias', init.zeros, (D,), config.param_dtype)
    patches = images_BSSI.reshape(B, G, P, G, P, I).transpose(0, 1, 3, 2, 4, 5)
    h_BTD = multiply(
      patches.reshape(B, G * G, P * P * I), kernel_PPID.reshape(-1, D)
    )
    return h_BTD + bias_D.astype(h_BTD.dtype)[None, None]


class Embedding(nn.Module):
  """Embedded patches with their positions, after a class token if there is one.

  The class token has the first position.
  """

  config: VitConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, batch: Batch) -> jax.Array:
    """Returns the embedded images [B, T, D], after dropout."""
    config = self.config
    images = normalized(batch['inputs'], config)
    h_BTD = Patches(config, name='patch_embedding')(images)
    if config.pool == 'cls':
      token_D = self.param(
        'class_token',
        nn.initializers.normal(config.init_std),
        (config.width,),
        config.param_dtype,
      )
      shape = (len(h_BTD), 1, config.width)
      first_B1D = jnp.broadcast_to(token_D.astype(h_BTD.dtype), shape)
      h_BTD = jnp.concatenate([first_B1D, h_BTD], axis=1)
    positions = Table(config, config.length, name='positions')
    h_BTD += positions(jnp.arange(config.length)[None])
    return drop(h_BTD, batch.get('noise'), 0, config.dropout)


class TransformerLayer(nn.Module):
  """One transformer layer: attention and mlp, each with a norm and a residual.

  The norms come before attention and mlp.
  """

  config: VitConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    """Returns x = {'h'} with an updated 'h'.

    If x has 'noise', the returned dict has the next layer's noise.
    """
    config, noise_B2 = self.config, x.get('noise')
    h_BTD = x['h']
    # All patches of an image are one segment.
    segments_BT = jnp.zeros(h_BTD.shape[:2], jnp.int32)
    # A remat of attention inside the remat of the layer frees attention's
    # residuals while the mlp's backward pass runs.
    mix = nn.remat(Attention) if config.remat else Attention
    mixed = mix(config, name='attention')(
      LayerNorm(config, name='attention_norm')(h_BTD), segments_BT
    )
    h_BTD += drop(mixed, noise_B2, 1, config.dropout)
    y_BTD = Mlp(config, name='mlp')(LayerNorm(config, name='mlp_norm')(h_BTD))
    new = {'h': h_BTD + drop(y_BTD, noise_B2, 2, config.dropout)}
    if noise_B2 is not None:
      new['noise'] = noise.following(noise_B2)
    return {**x, **new}


class Vit(nn.Module):
  """The whole model. `Layers` describes `batch`."""

  config: VitConfig
  """Configuration of the model."""
  read: Callable[[Any], Any] | None = None
  """Converts the stored parameters of one layer to arrays; see `Layers`."""

  def setup(self) -> None:
    """Declares the submodules; attribute names are keys of the parameters."""
    config = self.config
    layer = layer_class(TransformerLayer, remat=config.remat, read=self.read)
    self.embed = Embedding(config)
    self.blocks = layer(config)
    self.norm = LayerNorm(config)
    self.head = Linear(config, (config.width, config.num_labels), True)

  def __call__(self, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss of a batch and its sums; see `score`."""
    return self.score(self.last(batch), batch)

  def logits(self, batch: Batch) -> jax.Array:
    """Returns the logits [B, C] in float32."""
    return self.classify(self.last(batch))

  def enter(self, batch: Batch) -> Activations:
    """Returns x, the first layer's input, with noise if the batch has noise."""
    x = {'h': self.embed(batch)}
    if 'noise' in batch:
      x['noise'] = noise.following(batch['noise'])
    return x

  def last(self, batch: Batch) -> Activations:
    """Returns the output of the last layer."""
    return run_layers(self.blocks, self.enter(batch), self.config.num_layers)

  def features(self, batch: Batch) -> jax.Array:
    """Returns the inputs of the head [B, D] in float32."""
    return self.pooled(self.last(batch)).astype(jnp.float32)

  def classify(self, x: Activations) -> jax.Array:
    """Returns the logits [B, C] in float32 from the last layer's output x."""
    return self.head(self.pooled(x)).astype(jnp.float32)

  def pooled(self, x: Activations) -> jax.Array:
    """Returns one vector for each image [B, D]."""
    if self.config.pool == 'cls':
      return self.norm(x['h'][:, 0])
    h_BTD = self.norm(x['h'])
    pooled_BD = jnp.mean(h_BTD, axis=1, dtype=jnp.float32)
    return pooled_BD.astype(h_BTD.dtype)

  def score(self, x: Activations, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss and its sums from the output x of the last layer.

    `models.modules.weighted` defines them.
    """
    logits_BC = self.classify(x)
    cost_B = cost(logits_BC, batch['targets'], self.config.num_labels)
    return weighted(cost_B, batch['weights'])


@dataclasses.dataclass(frozen=True)
class Layers(ModuleLayers[VitConfig]):
  """The model as pure functions of a plain dict of parameters.

  A `batch` is a dict of 'inputs' [B, S, S, I] (uint8, or normalized numbers;
  see `normalized`), 'targets' [B] int32 and 'weights' [B] float32. Rows of
  weight 0 do not count in the loss. An optional 'noise' [B, 2] uint32 (random
  bits) turns on `config.dropout`.

  Logits are [B, C]. The input of a layer is x = {'h': [B, T, D]}.
  """

  def whole(self) -> Vit:
    """Returns the module of the whole model."""
    return Vit(self.config, self.read)

  def layer(self) -> TransformerLayer:
    """Returns the module of one layer."""
    return TransformerLayer(self.config)

  def features(self, params: Params, batch: Batch) -> jax.Array:
    """Returns the inputs of the head [B, D] in float32; reads only images."""
    return self._apply(params, batch, method='features')

  def example(self) -> Batch:
    """Returns a batch with one black image."""
    return {
      'inputs': jnp.zeros((1, *self.config.image_shape), jnp.uint8),
      'targets': jnp.zeros(1, jnp.int32),
      'weights': jnp.zeros(1, jnp.float32),
    }


def _read(fields: Fields, kind: str) -> Fields:
  del kind
  num_channels = fields.get('num_channels') or 3
  return read_labels(fields) | {
    'image_size': side_of(fields, 'image_size'),
    'patch_size': side_of(fields, 'patch_size'),
    # These are transformers' defaults without a preprocessor_config.json.
    'mean': (0.5,) * num_channels,
    'std': (0.5,) * num_channels,
  }


def _write(config: VitConfig, kind: str) -> Fields:
  del kind
  return {
    'image_size': config.image_size,
    'patch_size': config.patch_size,
    'hidden_act': 'gelu',
    'attention_probs_dropout_prob': 0.0,
  } | write_labels(config)


_MODULES = {
  'embed/patch_embedding': 'vit.embeddings.patch_embeddings.projection',
  'embed/positions/embedding': 'vit.embeddings.position_embeddings',
  'blocks/attention_norm': 'vit.encoder.layer.{}.layernorm_before',
  'blocks/attention/q': 'vit.encoder.layer.{}.attention.attention.query',
  'blocks/attention/k': 'vit.encoder.layer.{}.attention.attention.key',
  'blocks/attention/v': 'vit.encoder.layer.{}.attention.attention.value',
  'blocks/attention/o': 'vit.encoder.layer.{}.attention.output.dense',
  'blocks/mlp_norm': 'vit.encoder.layer.{}.layernorm_after',
  'blocks/mlp/up': 'vit.encoder.layer.{}.intermediate.dense',
  'blocks/mlp/down': 'vit.encoder.layer.{}.output.dense',
  'norm': 'vit.layernorm',
  'head': 'classifier',
}

ARCHITECTURES: Mapping[str, Architecture] = {
  'vit': Architecture(
    classes=(
      'ViTForImageClassification',
      'ViTModel',
      'ViTForMaskedImageModeling',
    ),
    fixed={'pool': 'cls'},
    needed=TRANSFORMER,
    optional={
      'num_channels': 'num_channels',
      'qkv_bias': 'qkv_bias',
      'norm_eps': 'layer_norm_eps',
      'init_std': 'initializer_range',
      'dropout': 'hidden_dropout_prob',
    },
    required=('image_size', 'patch_size', 'layer_norm_eps'),
    read=_read,
    write=_write,
    others=LABELS | {'image_size', 'patch_size'},
    neutral=ONE_STACK | {'hidden_act': 'gelu', 'is_decoder': False},
    # Options of the training, and of parts that are not used: the pooler, and
    # the decoder of masked images.
    harmless=frozenset(
      {
        'attention_probs_dropout_prob',
        'encoder_stride',
        'pooler_act',
        'pooler_output_size',
      }
    ),
    names=names_of(_MODULES)
    | {'embed/class_token': 'vit.embeddings.cls_token'},
    prefix='vit.',
    head='head',
    ignored=r'(vit\.)?(pooler\..*|embeddings\.mask_token)|decoder\..*',
    # Transformers 5 has these names in memory, and can write them to files.
    renamed={
      r'(^|\.)layers\.(\d+)\.': r'\1encoder.layer.\2.',
      r'\.attention\.q_proj\.': '.attention.attention.query.',
      r'\.attention\.k_proj\.': '.attention.attention.key.',
      r'\.attention\.v_proj\.': '.attention.attention.value.',
      r'\.attention\.o_proj\.': '.attention.output.dense.',
      r'\.mlp\.fc1\.': '.intermediate.dense.',
      r'\.mlp\.fc2\.': '.output.dense.',
    },
    convolutions=frozenset({'embed/patch_embedding/kernel'}),
    leading={'embed/class_token': 2, 'embed/positions/embedding': 1},
    companion=PREPROCESSOR,
  ),
}
"""The architectures by model_type."""
