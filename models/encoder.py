"""BERT and RoBERTa in Flax with a head that scores a whole text.

Blocks are stacked on a leading axis, as those of `models.llama`. The linen
modules below are the one definition of the mathematics; `Layers` offers the
same model as pure functions, whole or one layer at a time.

Shapes: B batch, T time, D width, F mlp width, N heads, H head dimension, V
vocabulary, P positions, K kinds of tokens, C labels, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import attention, noise
from models.llama import Dtype, Linear, apply


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Dimensions and number formats of a BERT or a RoBERTa."""

  vocab_size: int
  """Number of tokens that the embedding knows."""
  width: int
  """Size of the residual stream."""
  mlp_width: int
  """Size of the hidden layer."""
  num_heads: int
  """Heads of attention."""
  num_layers: int
  """Number of blocks."""
  num_positions: int
  """Rows of the table of positions; see `max_length`."""
  family: Literal['bert', 'roberta'] = 'bert'
  """Which of the two: RoBERTa's first token has the position after that of
  `pad_id`, and its head drops out of its input too."""
  num_types: int = 2
  """Kinds of tokens, such as first and second sentence; 1 tells none apart."""
  num_labels: int = 2
  """Labels to choose from; 1 is a number to predict."""
  labels: tuple[str, ...] | None = None
  """Their names, for those who read a checkpoint (None: numbers)."""
  pad_id: int = 0
  """Token that fills short rows."""
  dropout: float = 0.0
  """Share of the entries that are zeroed after the embedding, after each
  attention, after each mlp and in the head, where a batch brings noise."""
  norm_eps: float = 1e-12
  """Added to the variance in LayerNorm."""
  init_std: float = 0.02
  """Standard deviation of the normal initial weights."""
  dtype: Dtype = 'float32'
  """Type of the activations and of the matmuls; norms, softmax and loss are
  float32 inside."""
  param_dtype: Dtype = 'float32'
  """Type of the parameters, hence of their gradients."""
  remat: bool = False
  """Whether the backward pass recomputes each block from its input."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """As in `models.llama`."""

  def __post_init__(self):
    """Checks the sizes, and that the heads fit."""
    for name in (
      *('vocab_size', 'width', 'mlp_width', 'num_heads', 'num_layers'),
      *('num_types', 'num_labels', 'max_length'),
    ):
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

  causal: ClassVar[bool] = False
  """Attention reaches later tokens, too."""
  window: ClassVar[None] = None
  """Attention reaches all tokens of a text."""

  @property
  def head_width(self) -> int:
    """Size of a head."""
    return self.width // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Heads of keys and values."""
    return self.num_heads

  @property
  def first_position(self) -> int:
    """Position of a row's first token."""
    return self.pad_id + 1 if self.family == 'roberta' else 0

  @property
  def max_length(self) -> int:
    """Tokens in the longest row."""
    return self.num_positions - self.first_position


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def normalize(h, scale_D, bias_D, eps):
  """(h - mean) / sqrt(variance + eps) * scale + bias; h alone is kept."""
  x = h.astype(jnp.float32)
  x -= jnp.mean(x, axis=-1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  scale, bias = (
    jnp.expand_dims(w.astype(jnp.float32), range(h.ndim - 1))
    for w in (scale_D, bias_D)
  )
  return (x * scale + bias).astype(h.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x):
  """x times the normal distribution's share below x, by erf."""
  return jax.nn.gelu(x, approximate=False)


def drop(x, noise_B2, site, rate):
  """Zeroes a share of the entries and scales the others up.

  Args:
    x: [B, ...].
    noise_B2: a key for each row, so that it draws the same zeros in whichever
      part of a batch it is; None drops nothing.
    site: number of the place in the model.
    rate: the share.
  """
  if noise_B2 is None or not rate:
    return x
  return noise.drop(x, noise.folded(noise_B2, site), rate)


class LayerNorm(nn.Module):
  """Standardizes, then scales and shifts; float32 inside."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, h):
    """Normalizes the last axis."""
    config, init = self.config, nn.initializers
    shape, dtype = h.shape[-1:], config.param_dtype
    scale_D = self.param('scale', init.ones, shape, dtype)
    bias_D = self.param('bias', init.zeros, shape, dtype)
    return normalize(h, scale_D, bias_D, config.norm_eps)


class Table(nn.Module):
  """A row for each token, position or kind."""

  config: EncoderConfig
  size: int

  @nn.compact
  def __call__(self, rows):
    """Looks rows up; a number outside the table gives NaN."""
    config = self.config
    init = nn.initializers.normal(config.init_std)
    shape = (self.size, config.width)
    table = self.param('embedding', init, shape, config.param_dtype)
    return jnp.take(table, rows, axis=0, mode='fill').astype(config.dtype)


class Embedding(nn.Module):
  """Token plus position plus kind, normalized."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, batch):
    """Embeds the inputs."""
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


class Attention(nn.Module):
  """Attention in both directions, inside segments."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, h_BTD, segments_BT):
    """Mixes time steps of one segment."""
    config, D, N = self.config, self.config.width, self.config.num_heads

    def heads(name):
      y_BTD = Linear(config, (D, D), True, name=name)(h_BTD)
      return y_BTD.reshape(*h_BTD.shape[:2], N, D // N)

    q_BTNH, k_BTNH, v_BTNH = heads('q'), heads('k'), heads('v')
    if self.is_initializing():
      # As in `llama.Attention`.
      y_BTNH = q_BTNH
    else:
      y_BTNH = attention.attend(
        *(q_BTNH, k_BTNH, v_BTNH, segments_BT),
        kind=config.attention,
        causal=False,
      )
    return Linear(config, (D, D), True, name='o')(y_BTNH.reshape(h_BTD.shape))


class Mlp(nn.Module):
  """down(gelu(up))."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, h_BTD):
    """Transforms each time step by itself."""
    D, F = self.config.width, self.config.mlp_width
    up_BTF = Linear(self.config, (D, F), True, name='up')(h_BTD)
    return Linear(self.config, (F, D), True, name='down')(gelu(up_BTF))


class Block(nn.Module):
  """One layer: attention and mlp, each added, then normalized."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x):
    """Maps {'h', 'segments'} to the same with a new 'h'."""
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
  """Scores of a text, read off its first token."""

  config: EncoderConfig

  @nn.compact
  def __call__(self, x):
    """Logits [B, C] in float32."""
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
  """The whole model; `batch` and `read` are those that `Layers` describes."""

  config: EncoderConfig
  read: Callable[[Any], Any] | None = None

  def setup(self):
    """Declares the parts under the names that their parameters carry."""
    config = self.config
    # A scan merges nothing across iterations: recomputation needs no barrier.
    block = nn.remat(Block, prevent_cse=False) if config.remat else Block
    if self.read is not None:
      block = nn.map_variables(block, 'params', self.read)
    self.embed = Embedding(config)
    self.blocks = block(config)
    self.head = Head(config)

  def __call__(self, batch):
    """The loss of a batch and what it is made of."""
    return self.score(self.run_blocks(self.enter(batch)), batch)

  def logits(self, batch):
    """Logits [B, C] in float32."""
    return self.head(self.run_blocks(self.enter(batch)))

  def enter(self, batch):
    """Embeds the inputs; segments and noise ride along."""
    x = {'h': self.embed(batch), 'segments': batch['segments']}
    if 'noise' in batch:
      x['noise'] = noise.following(batch['noise'])
    return x

  def run_blocks(self, x):
    """All blocks, by a scan over their stacked parameters."""
    scan = nn.scan(
      lambda block, x: (block(x), None),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.config.num_layers,
    )
    return scan(self.blocks, x)[0]

  def score(self, x, batch):
    """sum(weights * cost) / weights.size, and the sums of both."""
    logits_BC = self.head(x)
    cost_B = cost(logits_BC, batch['targets'], self.config.num_labels)
    weights_B = batch['weights']
    total = jnp.sum(weights_B * cost_B)
    sums = {'cost': total, 'weight': jnp.sum(weights_B)}
    return total / weights_B.size, sums


def cost(logits_BC, targets_B, num_labels):
  """-log p(target), or the squared error where there is one label."""
  if num_labels == 1:
    return (logits_BC[:, 0] - targets_B.astype(jnp.float32)) ** 2
  chosen_BC = (
    targets_B.astype(jnp.int32)[:, None] == jnp.arange(num_labels)[None]
  )
  chosen_B = jnp.sum(jnp.where(chosen_BC, logits_BC, 0.0), axis=-1)
  return jax.nn.logsumexp(logits_BC, axis=-1) - chosen_B


@dataclasses.dataclass(frozen=True)
class Layers:
  """The model as pure functions of a plain dict of parameters.

  `batch` holds 'inputs', 'types', 'segments' [B, T] int32, 'targets' [B] (int32
  labels, or float32 numbers where num_labels is 1) and 'weights' [B] float32: a
  row of weight 0 is not scored. Attention never crosses a segment: tokens are
  of one, what fills a row of another. With 'noise' [B, 2] uint32, any bits,
  `config.dropout` is at work.

  `embed`, `block` and `loss` are the model one layer at a time; calling the
  object is their composition with a scan over params['blocks'].
  """

  config: EncoderConfig
  read: Callable[[Any], Any] | None = None
  """Makes arrays of one layer of params['blocks'] where they are stored as
  something else; the whole model calls it layer by layer, `block` does not."""
  intercept: Callable[..., Any] | None = None
  """A linen interceptor of all that is computed, such as `lowrank.hook`."""

  def init(self, key):
    """Fresh parameters; their shapes under `jax.eval_shape`."""
    keys = ('inputs', 'types', 'segments')
    # Of two tokens, if there are as many positions: cuDNN takes no odd number.
    shape = (1, min(2, self.config.max_length))
    batch = dict.fromkeys(keys, jnp.zeros(shape, jnp.int32))
    batch['targets'] = jnp.zeros(1, jnp.int32)
    batch['weights'] = jnp.zeros(1, jnp.float32)  # under x64 too
    return Encoder(self.config).init(key, batch)['params']

  def __call__(self, params, batch):
    """(loss, {'cost', 'weight'}) of a batch; see `loss`."""
    return self._apply(params, batch)

  def logits(self, params, batch):
    """Logits [B, C] float32 from inputs, types and segments."""
    return self._apply(params, batch, method=Encoder.logits)

  def embed(self, params, batch):
    """x = {'h': [B, T, D], 'segments'}; reads params['embed']."""
    return self._apply(params, batch, method=Encoder.enter)

  def block(self, layer_params, x):
    """One block: params['blocks'] without the leading axis."""
    params = {'params': layer_params}
    return apply(Block(self.config), self.intercept, params, x)

  def loss(self, params, x, batch):
    """Loss from the last block's x; reads params['head'].

    With weights scaled to mean 1 over a whole batch, the mean of this loss
    over microbatches of equal size is the weighted mean of the batch.

    Args:
      params: The parameters.
      x: What the last block returned.
      batch: The batch that x was embedded from.

    Returns:
      sum(weights * cost) / weights.size, and the sums {'cost', 'weight'}.
    """
    return self._apply(params, x, batch, method=Encoder.score)

  def _apply(self, params, *inputs, method=None):
    model = Encoder(self.config, self.read)
    params = {'params': params}
    return apply(model, self.intercept, params, *inputs, method=method)
