"""BERT and RoBERTa in Flax, with a head that classifies or scores a text.

The parameters of all layers are stacked on a leading axis, as in
`models.llama`. The linen modules define the mathematics. `Layers` offers the
same model as pure functions: the whole model, or one layer at a time.

Shapes: B batch, T time, D width, F mlp width, N heads, H head dimension,
C labels, L layers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import flops, noise
from models.architecture import Architecture
from models.attention import Call
from models.model import (
  Activations,
  AttentionConfig,
  Batch,
  Dtype,
  Intercept,
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
class EncoderConfig(AttentionConfig):
  """Dimensions and number formats of a BERT or a RoBERTa."""

  vocab_size: int
  """Number of tokens: rows of the token embedding."""
  width: int
  """Size of the residual stream."""
  mlp_width: int
  """Size of the mlp's hidden layer."""
  num_heads: int
  """Number of attention heads."""
  num_layers: int
  """Number of transformer layers."""
  num_positions: int
  """Number of rows of the position embedding; see `max_length`."""
  family: Literal['bert', 'roberta'] = 'bert'
  """BERT or RoBERTa. In RoBERTa, positions count from `pad_id` + 1, and the
  head also has dropout on its input."""
  num_types: int = 2
  """Number of token types, such as first and second sentence. If it is 1, a
  batch's types are ignored."""
  num_labels: int = 2
  """Number of labels to choose from; 1 means regression to a number."""
  labels: tuple[str, ...] | None = None
  """Names of the labels, which are written to checkpoints (None: unnamed)."""
  pad_id: int = 0
  """Token that fills short rows."""
  dropout: float = 0.0
  """Dropout rate after the embedding, each attention and each mlp, and in the
  head. Dropout is applied only if a batch has 'noise'."""
  norm_eps: float = 1e-12
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
    """Checks that sizes are in range and that the heads divide the width."""
    sizes = ('vocab_size', 'width', 'mlp_width', 'num_heads', 'num_layers')
    others = ('num_types', 'num_labels', 'max_length')
    for name in sizes + others:
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be at least 1, got {getattr(self, name)}'
        )
    if self.width % self.num_heads:
      raise ValueError(
        'width must be a multiple of num_heads, got '
        f'width={self.width}, num_heads={self.num_heads}; choose another of '
        'the two'
      )
    if self.labels is not None and len(self.labels) != self.num_labels:
      raise ValueError(
        f'labels must be {self.num_labels} names, as many as num_labels, got '
        f'{self.labels}'
      )
    if not 0 <= self.pad_id < self.vocab_size:
      raise ValueError(
        f'pad_id must be a token, in 0..{self.vocab_size - 1}, got '
        f'{self.pad_id}'
      )
    if not 0 <= self.dropout < 1:
      raise ValueError(
        f'dropout is a share of the entries in [0, 1), got {self.dropout}'
      )

  task: ClassVar[str] = 'text_classification'
  """Classifying texts, or predicting a number from them."""
  is_stacked: ClassVar[bool] = True
  """The layers are stacked."""
  large: ClassVar[tuple[str, ...]] = ('embed/tokens/embedding',)
  """Weights of the vocabulary."""

  def layers(
    self, *, read: Read | None = None, intercept: Intercept | None = None
  ) -> 'Layers':
    """Returns the model as pure functions."""
    return Layers(self, read, intercept)

  @classmethod
  def architectures(cls) -> Mapping[str, Architecture]:
    """Returns the formats of the model's checkpoints, by model_type."""
    from models import huggingface_encoder  # It imports this module.

    return huggingface_encoder.ARCHITECTURES

  def flops(self, params: PyTree, trained: PyTree, batch: Batch) -> float:
    """Returns the flops of an update, as `models.flops` counts them.

    The head reads one token of a row, so it does not count.
    """
    rows, length = batch['inputs'].shape
    return flops.transformer(
      params,
      trained,
      rows=rows,
      length=length,
      seen=length,
      width=self.width,
      num_layers=self.num_layers,
      is_product=frozenset[str]().__contains__,
    )

  def kept_bytes(self, batch: Batch) -> int:
    """Returns the bytes of the activations at the input of each layer."""
    size = flops.element_bytes(self.dtype) * self.width
    return self.num_layers * batch['inputs'].size * size

  def attention_calls(self, batch: Batch) -> list[Call]:
    """Returns the sizes of attention, which all layers share."""
    length = batch['inputs'].shape[1]
    N = self.num_heads
    return [Call(length, N, N, self.head_width)]

  def tensor_sizes(self) -> dict[str, int]:
    """Returns the sizes that the mesh axis 'tensor' must divide."""
    return {'num_heads': self.num_heads, 'mlp_width': self.mlp_width}

  @property
  def qkv_bias(self) -> bool:
    """Whether the projections to queries, keys and values have a bias."""
    return True

  @property
  def head_width(self) -> int:
    """Size of one attention head."""
    return self.width // self.num_heads

  @property
  def first_position(self) -> int:
    """Position of the first token of each row."""
    return self.pad_id + 1 if self.family == 'roberta' else 0

  @property
  def max_length(self) -> int:
    """Maximum number of tokens in a row: those that have a position."""
    return self.num_positions - self.first_position


class Embedding(nn.Module):
  """Sum of token, type and position embeddings, normalized."""

  config: EncoderConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, batch: Batch) -> jax.Array:
    """Returns the embedded inputs [B, T, D], after dropout."""
    config, tokens_BT = self.config, batch['inputs']
    length = tokens_BT.shape[1]
    if length > config.max_length:
      raise ValueError(
        f'inputs must have at most {config.max_length} tokens, for which '
        f'there are positions, got {length}; cut them'
      )
    positions_1T = config.first_position + jnp.arange(length)[None]
    types_BT = batch['types']
    if config.num_types == 1:
      types_BT = jnp.zeros_like(types_BT)
    h_BTD = Table(config, config.vocab_size, name='tokens')(tokens_BT)
    h_BTD += Table(config, config.num_types, name='types')(types_BT)
    h_BTD += Table(config, config.num_positions, name='positions')(positions_1T)
    h_BTD = LayerNorm(config, name='norm')(h_BTD)
    return drop(h_BTD, batch.get('noise'), 0, config.dropout)


class TransformerLayer(nn.Module):
  """One transformer layer: attention and mlp, each with a residual and a norm.

  The norms come after the residual sums.
  """

  config: EncoderConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    """Returns x = {'h', 'segments'} with an updated 'h'.

    If x has 'noise', the returned dict has the next layer's noise.
    """
    config, noise_B2 = self.config, x.get('noise')
    mix = nn.remat(Attention) if config.remat else Attention
    mixed = mix(config, name='attention')(x['h'], x['segments'])
    h_BTD = x['h'] + drop(mixed, noise_B2, 1, config.dropout)
    h_BTD = LayerNorm(config, name='attention_norm')(h_BTD)
    y_BTD = Mlp(config, name='mlp')(h_BTD)
    h_BTD += drop(y_BTD, noise_B2, 2, config.dropout)
    new = {'h': LayerNorm(config, name='mlp_norm')(h_BTD)}
    if noise_B2 is not None:
      new['noise'] = noise.following(noise_B2)
    return {**x, **new}


class Head(nn.Module):
  """Classification head on the first token of each row."""

  config: EncoderConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, x: Activations) -> jax.Array:
    """Returns the logits [B, C] in float32."""
    config, noise_B2 = self.config, x.get('noise')
    D, C = config.width, config.num_labels
    h_BD = x['h'][:, 0]
    if config.family == 'roberta':
      h_BD = drop(h_BD, noise_B2, 3, config.dropout)
    y_BD = jnp.tanh(Linear(config, (D, D), True, name='dense')(h_BD))
    y_BD = drop(y_BD, noise_B2, 4, config.dropout)
    out = Linear(config, (D, C), True, name='out')
    return out(y_BD).astype(jnp.float32)


class Encoder(nn.Module):
  """The whole model. `Layers` describes `batch`."""

  config: EncoderConfig
  """Configuration of the model."""
  read: Callable[[Any], Any] | None = None
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
    return self.score(self.last(batch), batch)

  def logits(self, batch: Batch) -> jax.Array:
    """Returns the logits [B, C] in float32."""
    return self.head(self.last(batch))

  def enter(self, batch: Batch) -> Activations:
    """Returns x, the first layer's input, with noise if the batch has noise."""
    x = {'h': self.embed(batch), 'segments': batch['segments']}
    if 'noise' in batch:
      x['noise'] = noise.following(batch['noise'])
    return x

  def last(self, batch: Batch) -> Activations:
    """Returns the output of the last layer."""
    return run_layers(self.blocks, self.enter(batch), self.config.num_layers)

  def score(self, x: Activations, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss and its sums from the output x of the last layer.

    `models.modules.weighted` defines them.
    """
    logits_BC = self.head(x)
    cost_B = cost(logits_BC, batch['targets'], self.config.num_labels)
    return weighted(cost_B, batch['weights'])


@dataclasses.dataclass(frozen=True)
class Layers(ModuleLayers[EncoderConfig]):
  """The model as pure functions of a plain dict of parameters.

  A `batch` is a dict of 'inputs', 'types' and 'segments' [B, T] int32,
  'targets' [B] and 'weights' [B] float32. Targets are int32 labels, or float32
  numbers if `num_labels` is 1. Rows of weight 0 do not count in the loss.
  Attention never crosses a segment; padding has another segment than tokens. An
  optional 'noise' [B, 2] uint32 (random bits) turns on `config.dropout`.

  Logits are [B, C]. The input of a layer is x = {'h': [B, T, D], 'segments'}.
  """

  def whole(self) -> Encoder:
    """Returns the module of the whole model."""
    return Encoder(self.config, self.read)

  def layer(self) -> TransformerLayer:
    """Returns the module of one layer."""
    return TransformerLayer(self.config)

  def example(self) -> Batch:
    """Returns a batch of zeros with one row of one token."""
    names: list[str] = ['inputs', 'types', 'segments']
    batch = dict.fromkeys(names, jnp.zeros((1, 1), jnp.int32))
    batch['targets'] = jnp.zeros(1, jnp.int32)
    batch['weights'] = jnp.zeros(1, jnp.float32)
    return batch
