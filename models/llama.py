"""LLaMA in Flax, with the parameters of all layers stacked on a leading axis.

The linen modules define the mathematics. `Layers` offers the same model as
pure functions: the whole model, or one layer at a time. The loss is computed in
chunks of tokens, so that the logits of all tokens never exist at once.

Shapes: B batch, T time, S time steps that a cache has room for, D width, F mlp
width, N query heads, K key-value heads, H head dimension, V vocabulary,
L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import (
  Any,
  ClassVar,
  Literal,
  NamedTuple,
  TypeAlias,
)

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import attention, cross_entropy, flops
from models.architecture import Architecture
from models.attention import Call
from models.model import (
  AttentionConfig,
  Batch,
  Dtype,
  Intercept,
  Params,
  PyTree,
  Read,
  Sums,
)
from models.modules import Linear, apply

Activations: TypeAlias = dict[str, jax.Array]
"""Input or output of a layer: the activations 'h', and arrays of the batch that
each layer reads."""


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Llama 3's scaling of rotary frequencies, which extends the context.

  A frequency that makes at least `high_freq_factor` turns in `original_length`
  time steps is kept. A frequency that makes at most `low_freq_factor` turns is
  divided by `factor`. Between these two, the multiplier is interpolated
  linearly in the number of turns.
  """

  factor: float
  """Divisor of the lowest frequencies."""
  low_freq_factor: float
  """Number of turns in `original_length` up to which a frequency is divided by
  `factor`."""
  high_freq_factor: float
  """Number of turns in `original_length` from which a frequency is kept."""
  original_length: int
  """Sequence length of the pre-training, in time steps."""

  def __post_init__(self) -> None:
    """Checks that the scaled frequencies are finite and not reordered."""
    for name in ('factor', 'original_length'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be at least 1, got {getattr(self, name)}'
        )
    if not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ValueError(
        'low_freq_factor must be positive and below high_freq_factor, got '
        f'{self.low_freq_factor} and {self.high_freq_factor}'
      )


@dataclasses.dataclass(frozen=True)
class LlamaConfig(AttentionConfig):
  """Dimensions and number formats of a LLaMA."""

  vocab_size: int
  """Number of tokens: rows of the embedding and columns of the head."""
  width: int
  """Size of the residual stream."""
  mlp_width: int
  """Size of the mlp's gated hidden layer."""
  num_heads: int
  """Number of query heads."""
  num_layers: int
  """Number of transformer layers."""
  num_kv_heads: int | None = None
  """Number of key and value heads, each shared by a group of query heads (None:
  as many as query heads)."""
  head_dim: int | None = None
  """Size of one attention head (None: width / num_heads)."""
  qkv_bias: bool = False
  """Whether the projections to queries, keys and values have a bias."""
  qk_norm: bool = False
  """Whether each head's queries and keys are normalized by an RMSNorm before
  the rotary embedding."""
  window: int | None = None
  """Number of time steps that a query attends to: its own and those before it
  (None: all)."""
  rope_theta: float = 10_000.0
  """Base of the rotary embedding's wavelengths."""
  rope_scaling: Llama3Scaling | None = None
  """Scaling of the rotary embedding's frequencies (None: no scaling)."""
  norm_eps: float = 1e-6
  """Number added to the mean square in RMSNorm."""
  tied: bool = False
  """Whether the head is the transposed embedding."""
  init_std: float = 0.02
  """Standard deviation of the normal initial weights."""
  dtype: Dtype = 'float32'
  """Type of the activations and of the matmuls. Norms, rotations, softmax and
  loss are computed in float32."""
  param_dtype: Dtype = 'float32'
  """Type of the parameters and of their gradients."""
  remat: bool = False
  """Whether the backward pass recomputes each layer from its input."""
  loss_chunk: int = 512
  """Number of tokens whose logits exist at the same time, at least one time
  step of the whole batch."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """Implementation of attention: 'cudnn' is cuDNN's kernel, 'blockwise' is
  plain JAX in blocks of time steps. 'auto' is 'cudnn' on a GPU if cuDNN has a
  kernel for the arrays, else 'blockwise'."""

  def __post_init__(self) -> None:
    """Checks that sizes are positive and that widths and heads fit."""
    sizes = ('vocab_size', 'width', 'mlp_width', 'num_heads', 'num_layers')
    others = ('num_kv_heads', 'head_dim', 'window', 'loss_chunk')
    for name in sizes + others:
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name} must be at least 1, got {value}')
    if self.head_dim is None and self.width % (2 * self.num_heads):
      raise ValueError(
        'width must be a multiple of 2 * num_heads, got '
        f'width={self.width}, num_heads={self.num_heads}; choose another of '
        'the two, or a head_dim'
      )
    if self.head_width % 2:
      raise ValueError(f'head_dim must be even, got {self.head_dim}')
    if self.num_heads % self.kv_heads:
      raise ValueError(
        'num_heads must be a multiple of num_kv_heads, got '
        f'num_heads={self.num_heads}, num_kv_heads={self.kv_heads}; choose '
        'a divisor of num_heads'
      )

  task: ClassVar[str] = 'language'
  """Predicting the next token."""
  is_stacked: ClassVar[bool] = True
  """The layers are stacked."""
  large: ClassVar[tuple[str, ...]] = ('embed/embedding', 'lm_head/kernel')
  """Weights of the vocabulary; a tied model has only the first of them."""
  has_peft_names: ClassVar[bool] = True
  """Factors can be written in PEFT's format."""

  def layers(
    self, *, read: Read | None = None, intercept: Intercept | None = None
  ) -> 'Layers':
    """Returns the model as pure functions."""
    return Layers(self, read, intercept)

  @classmethod
  def architectures(cls) -> Mapping[str, Architecture]:
    """Returns the formats of the model's checkpoints, by model_type."""
    from models import huggingface_llama  # It imports this module.

    return huggingface_llama.ARCHITECTURES

  def flops(self, params: PyTree, trained: PyTree, batch: Batch) -> float:
    """Returns the flops of an update, as `models.flops` counts them."""
    rows, length = batch['inputs'].shape
    heads = {'lm_head/kernel'}
    if self.tied:
      heads.add('embed/embedding')
    return flops.transformer(
      params,
      trained,
      rows=rows,
      length=length,
      seen=min(length, self.window or length),
      width=self.num_heads * self.head_width,
      num_layers=self.num_layers,
      is_product=heads.__contains__,
    )

  def kept_bytes(self, batch: Batch) -> int:
    """Returns the bytes of the residual stream at the input of each layer."""
    size = flops.element_bytes(self.dtype) * self.width
    return self.num_layers * batch['inputs'].size * size

  def attention_calls(self, batch: Batch) -> list[Call]:
    """Returns the sizes of attention, which all layers share."""
    length = batch['inputs'].shape[1]
    sizes = (length, self.num_heads, self.kv_heads, self.head_width)
    return [Call(*sizes, self.window, causal=True)]

  def tensor_sizes(self) -> dict[str, int]:
    """Returns the sizes that the mesh axis 'tensor' must divide."""
    return {
      'num_heads': self.num_heads,
      'num_kv_heads': self.kv_heads,
      'mlp_width': self.mlp_width,
    }

  @property
  def head_width(self) -> int:
    """Size of one attention head, also if `head_dim` is None."""
    if self.head_dim is None:
      return self.width // self.num_heads
    return self.head_dim

  @property
  def kv_heads(self) -> int:
    """Number of key-value heads, also if `num_kv_heads` is None."""
    if self.num_kv_heads is None:
      return self.num_heads
    return self.num_kv_heads


# Width, mlp width, heads and layers of the models that the GaLore paper's
# repository configures.
_SIZES = {
  '9m': (128, 352, 4, 4),
  '20m': (256, 688, 4, 4),
  '35m': (384, 1024, 8, 6),
  '40m': (416, 1024, 8, 8),
  '60m': (512, 1376, 8, 8),
  '71m': (512, 1368, 8, 12),
  '100m': (640, 1708, 10, 12),
  '130m': (768, 2048, 12, 12),
  '250m': (768, 2560, 16, 24),
  '350m': (1024, 2736, 16, 24),
  '1b': (2048, 5461, 32, 24),
  '3b': (2560, 6848, 32, 32),
  '7b': (4096, 11008, 32, 32),
}


def llama(size: str, **overrides: Any) -> LlamaConfig:
  """Returns a model of the GaLore paper, with 32,000 tokens and an untied head.

  Args:
    size: Name of the size, from '9m' to '7b'.
    **overrides: Fields of `LlamaConfig` that replace those of this size.

  Returns:
    The configuration.

  Raises:
    ValueError: The size is unknown.

  Example:
    >>> llama('60m', dtype='bfloat16').width
    512
  """
  if size not in _SIZES:
    raise ValueError(
      f'size must be one of {", ".join(_SIZES)}, got {size!r}; any other '
      'model is a LlamaConfig'
    )
  width, mlp_width, num_heads, num_layers = _SIZES[size]
  config = LlamaConfig(
    vocab_size=32_000,
    width=width,
    mlp_width=mlp_width,
    num_heads=num_heads,
    num_layers=num_layers,
  )
  return dataclasses.replace(config, **overrides)


def frequencies(config: LlamaConfig) -> jax.Array:
  """Returns the angle [H/2] per time step of each pair of dimensions."""
  half = config.head_width // 2
  turns = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  scaling = config.rope_scaling
  if scaling is None:
    return turns
  fits = scaling.original_length * turns / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = jnp.clip((fits - low) / (high - low), 0, 1)
  # Written this way, a factor of 1 returns `turns` bit for bit.
  return turns * (1 / scaling.factor + (1 - 1 / scaling.factor) * kept)


def rotate(
  x_BTNH: jax.Array, positions_BT: jax.Array, turns: jax.Array
) -> jax.Array:
  """Applies the rotary embedding to queries or keys.

  Dimensions i and i + H/2 of a head form a pair, which is rotated by the
  position times the pair's frequency.

  Args:
    x_BTNH: Queries or keys.
    positions_BT: Position of each time step in its document.
    turns: Angle per time step of each pair [H/2], from `frequencies`.

  Returns:
    The rotated array [B, T, N, H], of the type of `x_BTNH`.
  """
  angles = positions_BT[:, :, None, None] * turns[None, None, None, :]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def normalize(h_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """Returns h / sqrt(mean(h^2) + eps) * scale, computed in float32.

  Under `jax.checkpoint`, only the inputs are stored for the backward pass.
  """
  x_BTD = h_BTD.astype(jnp.float32)
  square = jnp.mean(x_BTD * x_BTD, axis=-1, keepdims=True)
  x_BTD *= jax.lax.rsqrt(square + eps)
  scale_BTD = jnp.expand_dims(
    scale_D.astype(jnp.float32), range(h_BTD.ndim - 1)
  )
  return (x_BTD * scale_BTD).astype(h_BTD.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  """Returns silu(gate) * up.

  Under `jax.checkpoint`, only the inputs are stored for the backward pass.
  """
  return jax.nn.silu(gate) * up


class RMSNorm(nn.Module):
  """Divides by the root mean square, then scales. Computes in float32."""

  config: LlamaConfig
  """Provides `norm_eps` and `param_dtype`."""

  @nn.compact
  def __call__(self, h_BTD: jax.Array) -> jax.Array:
    """Normalizes the last axis."""
    config = self.config
    scale_D = self.param(
      'scale', nn.initializers.ones, h_BTD.shape[-1:], config.param_dtype
    )
    return normalize(h_BTD, scale_D, config.norm_eps)


class Embedding(nn.Module):
  """Token embedding: a table with one row per token."""

  config: LlamaConfig
  """Provides the table's size, its initialization and the types."""

  def setup(self) -> None:
    """Declares the table [V, D]."""
    config = self.config
    init = nn.initializers.normal(config.init_std)
    shape = (config.vocab_size, config.width)
    self.embedding = self.param('embedding', init, shape, config.param_dtype)

  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    """Returns rows [B, T, D]; a token outside the vocabulary returns NaN."""
    # Casting after the lookup avoids a copy of the whole table. It also sums
    # the gradients of repeated tokens in the parameters' type.
    rows_BTD = jnp.take(self.embedding, tokens_BT, axis=0, mode='fill')
    return rows_BTD.astype(self.config.dtype)


class Cache(NamedTuple):
  """Keys and values of the tokens that the model has read so far."""

  keys: jax.Array
  """Keys [L, B, S, K, H] after the rotary embedding."""
  values: jax.Array
  """Values [L, B, S, K, H]."""
  lengths: jax.Array
  """Number of tokens read in each row [B], int32. The other time steps, up to
  S, are free."""


class Attention(nn.Module):
  """Causal grouped-query attention within segments.

  If the variables 'cache/keys' and 'cache/values' [B, S, K, H] exist, each row
  is one segment that continues the cached tokens: the cached keys before the
  row's first position count. The keys and values of the new time steps are
  then sown as 'read/keys' and 'read/values'.
  """

  config: LlamaConfig
  """Provides the sizes of the heads and the implementation of attention."""

  @nn.compact
  def __call__(
    self, h_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
  ) -> jax.Array:
    """Returns the mix [B, T, D] of the time steps of each segment."""
    config = self.config
    D, H, N = config.width, config.head_width, config.num_heads
    turns = frequencies(config)

    def heads(name: str, num_heads: int) -> jax.Array:
      shape = (D, num_heads * H)
      y = Linear(config, shape, config.qkv_bias, name=name)(h_BTD)
      return y.reshape(*h_BTD.shape[:2], num_heads, H)

    def rotated_heads(name: str, num_heads: int) -> jax.Array:
      x_BTNH = heads(name, num_heads)
      if config.qk_norm:
        x_BTNH = RMSNorm(config, name=f'{name}_norm')(x_BTNH)
      return rotate(x_BTNH, positions_BT, turns)

    q_BTNH = rotated_heads('q', N)
    k_BTKH = rotated_heads('k', config.kv_heads)
    v_BTKH = heads('v', config.kv_heads)
    if self.has_variable('cache', 'keys'):
      y_BTNH = attention.attend_cached(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        self.get_variable('cache', 'keys'),
        self.get_variable('cache', 'values'),
        positions_BT,
        window=config.window,
      )
      self.sow('read', 'keys', k_BTKH, reduce_fn=_newest)
      self.sow('read', 'values', v_BTKH, reduce_fn=_newest)
    elif self.is_initializing():
      # Initial parameters do not depend on the output of attention, and
      # tracing attention would take most of the time of `init`.
      y_BTNH = q_BTNH
    else:
      y_BTNH = attention.attend(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        segments_BT,
        window=config.window,
        kind=config.attention,
      )
    y_BTD = y_BTNH.reshape(*h_BTD.shape[:2], N * H)
    return Linear(config, (N * H, D), name='o')(y_BTD)


def _newest(old: object, new: object) -> object:
  del old
  return new


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate) * up)."""

  config: LlamaConfig
  """Provides `width` and `mlp_width`."""

  @nn.compact
  def __call__(self, h_BTD: jax.Array) -> jax.Array:
    """Returns [B, T, D], each time step computed from itself only."""
    D, F = self.config.width, self.config.mlp_width
    gate_BTF = Linear(self.config, (D, F), name='gate')(h_BTD)
    up_BTF = Linear(self.config, (D, F), name='up')(h_BTD)
    return Linear(self.config, (F, D), name='down')(gated(gate_BTF, up_BTF))


class TransformerLayer(nn.Module):
  """One transformer layer: attention and mlp, each with a norm and a residual.

  The norms come before attention and mlp.
  """

  config: LlamaConfig
  """Configuration of the model."""

  @nn.compact
  def __call__(self, x: Activations) -> Activations:
    """Returns x = {'h', 'positions', 'segments'} with an updated 'h'."""
    config = self.config
    h_BTD = x['h']
    # A remat of attention inside the remat of the layer frees attention's
    # residuals while the mlp's backward pass runs.
    mix = nn.remat(Attention) if config.remat else Attention
    h_BTD += mix(config, name='attention')(
      RMSNorm(config, name='attention_norm')(h_BTD),
      x['positions'],
      x['segments'],
    )
    h_BTD += Mlp(config, name='mlp')(RMSNorm(config, name='mlp_norm')(h_BTD))
    return {**x, 'h': h_BTD}


class Llama(nn.Module):
  """The whole model. `Layers` describes `batch`."""

  config: LlamaConfig
  """Configuration of the model."""
  read: Callable[[Any], Any] | None = None
  """Converts the stored parameters of one layer to arrays; see `Layers`."""

  def setup(self) -> None:
    """Declares the submodules; attribute names are keys of the parameters."""
    config = self.config
    # `prevent_cse` is needed only outside of a scan: XLA does not merge
    # computations across iterations of a loop.
    layer = TransformerLayer
    if config.remat:
      layer = nn.remat(layer, prevent_cse=False)
    if self.read is not None:
      layer = nn.map_variables(layer, 'params', self.read)
    self.embed = Embedding(config)
    self.blocks = layer(config)
    self.norm = RMSNorm(config)
    if not config.tied:
      self.lm_head = Linear(config, (config.width, config.vocab_size))

  def __call__(self, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss of a batch and its sums; see `score`."""
    return self.score(self.run_layers(self.enter(batch)), batch)

  def logits(self, batch: Batch) -> jax.Array:
    """Returns the logits [B, T, V] in float32, all at once."""
    x = self.run_layers(self.enter(batch))
    return cross_entropy.project_logits(self.norm(x['h']), self.head_kernel())

  def logits_at(self, batch: Batch, times_B: jax.Array) -> jax.Array:
    """Returns the float32 logits [B, V] of the time step `times_B[b]` of row b.

    Only these logits are computed, not those of the other time steps.
    """
    x = self.run_layers(self.enter(batch))
    h_BTD = jnp.take_along_axis(x['h'], times_B[:, None, None], axis=1)
    kernel_DV = self.head_kernel()
    return cross_entropy.project_logits(self.norm(h_BTD), kernel_DV)[:, 0]

  def nll(self, batch: Batch) -> jax.Array:
    """Returns -log p(target) [B, T], computed in chunks of `loss_chunk`."""
    return cross_entropy.in_chunks(
      self.norm(self.run_layers(self.enter(batch))['h']),
      self.head_kernel(),
      batch['targets'],
      chunk=self.config.loss_chunk,
    )

  def enter(self, batch: Batch) -> Activations:
    """Returns x = {'h', 'positions', 'segments'}, the first layer's input."""
    return {
      'h': self.embed(batch['inputs']),
      'positions': batch['positions'],
      'segments': batch['segments'],
    }

  def run_layers(self, x: Activations) -> Activations:
    """Applies all layers by a scan over their stacked parameters."""
    scan = nn.scan(
      lambda layer, x: (layer(x), None),
      variable_axes={'params': 0, 'cache': 0, 'read': 0},
      split_rngs={'params': True},
      length=self.config.num_layers,
    )
    return scan(self.blocks, x)[0]

  def score(self, x: Activations, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns the loss and its sums from the output x of the last layer.

    The loss is sum(weights * nll) / weights.size. The sums are {'nll': the
    weighted sum, 'weight': the sum of the weights}.
    """
    weights_BT = batch['weights']
    nll = cross_entropy.sum_in_chunks(
      self.norm(x['h']),
      self.head_kernel(),
      batch['targets'],
      weights_BT,
      chunk=self.config.loss_chunk,
    )
    return nll / weights_BT.size, {'nll': nll, 'weight': jnp.sum(weights_BT)}

  def head_kernel(self) -> jax.Array:
    """Returns the matrix [D, V] that maps activations to logits."""
    if self.config.tied:
      return self.embed.embedding.T
    return self.lm_head.kernel


@dataclasses.dataclass(frozen=True)
class Layers:
  """The model as pure functions of a plain dict of parameters.

  A `batch` is a dict of 'inputs', 'targets', 'positions' and 'segments' [B, T]
  int32, and 'weights' [B, T] float32. Targets of weight 0 do not count in the
  loss. Positions restart at each document. Attention never crosses a segment.

  `embed`, `block` and `loss` compute the model one layer at a time. Calling the
  object composes them, with a scan over the layers in params['blocks'].
  """

  config: LlamaConfig
  """Configuration of the model."""
  read: Callable[[Any], Any] | None = None
  """Converts one layer of params['blocks'] to arrays, if it is stored in
  another form, such as 8-bit integers. Methods that run the whole model call
  it once per layer; `block` does not call it."""
  intercept: Callable[..., Any] | None = None
  """A linen interceptor under which everything is computed, such as
  `lowrank.hook`, or None."""

  def init(self, key: jax.Array) -> Params:
    """Returns random initial parameters.

    `jax.eval_shape` of this method returns their shapes and types.
    """
    names: list[str] = ['inputs', 'targets', 'positions', 'segments']
    batch = dict.fromkeys(names, jnp.zeros((1, 1), jnp.int32))
    batch['weights'] = jnp.zeros((1, 1), jnp.float32)
    return Llama(self.config).init(key, batch)['params']

  def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns (loss, {'nll', 'weight'}) of a batch; see `loss`."""
    return self._apply(params, batch)

  def logits(self, params: Params, batch: Batch) -> jax.Array:
    """Returns the float32 logits [B, T, V] of a batch.

    Reads only the batch's inputs, positions and segments.
    """
    return self._apply(params, batch, method=Llama.logits)

  def nll(self, params: Params, batch: Batch) -> jax.Array:
    """Returns -log p(target) [B, T] in float32; ignores the weights."""
    return self._apply(params, batch, method=Llama.nll)

  def cache(
    self, num_rows: int, length: int, dtype: jax.typing.DTypeLike | None = None
  ) -> Cache:
    """Returns an empty `Cache` with room for `length` tokens per row.

    Args:
      num_rows: Number of rows, B.
      length: Maximum number of tokens of a row, S. A model with a
        `config.window` needs room for all tokens too.
      dtype: Type of keys and values; None is the type of the activations.
    """
    config = self.config
    heads = (config.kv_heads, config.head_width)
    shape = (config.num_layers, num_rows, length, *heads)
    # Keys and values must be two arrays: one buffer cannot be donated twice.
    keys, values = (jnp.zeros(shape, dtype or config.dtype) for _ in range(2))
    return Cache(keys, values, jnp.zeros(num_rows, jnp.int32))

  def extend(
    self,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
  ) -> tuple[jax.Array, Cache]:
    """Reads more tokens of each row, such as a prompt or the last sample.

    Tokens for which the cache has no room are dropped without an error.

    Args:
      params: The parameters.
      cache: Keys and values of the tokens before. If it is donated, it is
        updated in place.
      tokens_BT: The next tokens of each row, followed by any padding.
      lengths_B: Number of the next tokens in each row, without the padding; 0
        leaves a row unchanged.

    Returns:
      The float32 logits [B, V] after the last token of each row, and the new
      cache. The logits of unchanged rows are meaningless.
    """
    times_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    positions_BT = cache.lengths[:, None] + times_T[None, :]
    batch = {
      'inputs': tokens_BT,
      'positions': positions_BT,
      'segments': jnp.zeros_like(tokens_BT),
    }
    old = {'keys': cache.keys, 'values': cache.values}
    logits_BV, variables = apply(
      Llama(self.config, self.read),
      self.intercept,
      {'params': params, 'cache': {'blocks': {'attention': old}}},
      batch,
      jnp.maximum(lengths_B - 1, 0),
      method=Llama.logits_at,
      mutable=['read'],
    )
    new = variables['read']['blocks']['attention']
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    # Padding written past the end of a row is overwritten by the row's next
    # token before anything reads it.
    keys, values = (
      old[name]
      .at[:, rows_B1, positions_BT]
      .set(new[name].astype(old[name].dtype), mode='drop')
      for name in ('keys', 'values')
    )
    return logits_BV, Cache(keys, values, cache.lengths + lengths_B)

  def embed(self, params: Params, batch: Batch) -> Activations:
    """Returns x = {'h': [B, T, D], 'positions', 'segments'}.

    x is the input of the first layer. Reads only params['embed'].
    """
    return self._apply(params, batch, method=Llama.enter)

  def block(self, layer_params: Params, x: Activations) -> Activations:
    """Applies one transformer layer.

    Args:
      layer_params: Parameters of one layer: an entry of params['blocks'] along
        the leading axis, as arrays.
      x: Input of the layer: {'h', 'positions', 'segments'}.

    Returns:
      x with an updated 'h'.
    """
    layer = TransformerLayer(self.config)
    return apply(layer, self.intercept, {'params': layer_params}, x)

  def loss(
    self, params: Params, x: Activations, batch: Batch
  ) -> tuple[jax.Array, Sums]:
    """Returns the loss from the output of the last layer.

    If the weights have mean 1 over a whole batch, the mean of this loss over
    microbatches of equal size is the token-weighted mean of the batch.

    Args:
      params: The parameters; params['blocks'] is not read.
      x: Output of the last layer.
      batch: The batch from which x was computed; only its targets and weights
        are read.

    Returns:
      sum(weights * nll) / weights.size, and the sums {'nll', 'weight'}.
    """
    return self._apply(params, x, batch, method=Llama.score)

  def _apply(
    self,
    params: Params,
    *inputs: Any,
    method: Callable[..., Any] | None = None,
  ) -> Any:
    model = Llama(self.config, self.read)
    variables = {'params': params}
    return apply(model, self.intercept, variables, *inputs, method=method)
