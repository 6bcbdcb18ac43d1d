"""LLaMA in Flax: blocks stacked on a leading axis, loss in chunks of tokens.

The linen modules below are the one definition of the mathematics; `Layers`
offers the same model as pure functions, whole or one layer at a time.

Shapes: B batch, T time (S where time is attended to, or has room in a cache),
D width, F mlp width, N query heads, K key-value heads, H head dimension,
V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import attention, cross_entropy

Dtype: TypeAlias = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Slower rotation of the long waves, for more time steps than at first.

  A wave that fits at least `high_freq_factor` times into `original_length` time
  steps keeps its frequency, one that fits at most `low_freq_factor` times has
  it divided by `factor`, and between them the share goes linearly.
  """

  factor: float
  """What the lowest frequencies are divided by."""
  low_freq_factor: float
  """Turns in `original_length` up to which a frequency is divided."""
  high_freq_factor: float
  """Turns in `original_length` from which a frequency stays."""
  original_length: int
  """Time steps that the model was first trained on."""

  def __post_init__(self):
    """Checks that the frequencies come out finite, and in order."""
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
class LlamaConfig:
  """Dimensions and number formats of a LLaMA."""

  vocab_size: int
  """Number of tokens that the embedding and the head know."""
  width: int
  """Size of the residual stream."""
  mlp_width: int
  """Size of the gated hidden layer."""
  num_heads: int
  """Query heads."""
  num_layers: int
  """Number of blocks."""
  num_kv_heads: int | None = None
  """Key and value heads, each shared by a group of query heads (None: as many
  as query heads)."""
  head_dim: int | None = None
  """Size of one attention head (None: width / num_heads)."""
  qkv_bias: bool = False
  """Whether queries, keys and values have a bias."""
  qk_norm: bool = False
  """Whether each head's queries and keys pass an RMSNorm before they turn."""
  window: int | None = None
  """Time steps that a query sees, its own and those before (None: all)."""
  rope_theta: float = 10_000.0
  """Base of the rotary embedding's wavelengths."""
  rope_scaling: Llama3Scaling | None = None
  """What is done to these wavelengths (None: nothing)."""
  norm_eps: float = 1e-6
  """Added to the mean square in RMSNorm."""
  tied: bool = False
  """Whether the head is the transposed embedding."""
  init_std: float = 0.02
  """Standard deviation of the normal initial weights."""
  dtype: Dtype = 'float32'
  """Type of the activations and of the matmuls; norms, rotations, softmax and
  loss are float32 inside."""
  param_dtype: Dtype = 'float32'
  """Type of the parameters, hence of their gradients."""
  remat: bool = False
  """Whether the backward pass recomputes each block from its input."""
  loss_chunk: int = 512
  """Tokens whose logits exist at the same time; never fewer than one time step
  of the whole batch."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """cuDNN's kernel, JAX's own products block by block, or (auto) the first on
  an NVIDIA card that has it for such heads in bfloat16, else the second."""

  def __post_init__(self):
    """Checks the sizes, and that the heads fit."""
    sizes = ('vocab_size', 'width', 'mlp_width', 'num_heads', 'num_layers')
    others = ('num_kv_heads', 'head_dim', 'window', 'loss_chunk')
    for name in (*sizes, *others):
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

  causal: ClassVar[bool] = True
  """Attention does not reach later tokens."""

  @property
  def head_width(self) -> int:
    """Size of one attention head with the default filled in."""
    if self.head_dim is None:
      return self.width // self.num_heads
    return self.head_dim

  @property
  def kv_heads(self) -> int:
    """Number of key-value heads with the default filled in."""
    if self.num_kv_heads is None:
      return self.num_heads
    return self.num_kv_heads


# Width, mlp width, heads, layers of the models in the paper's repository.
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


def llama(size: str, **overrides) -> LlamaConfig:
  """A published size, '9m' to '7b', with 32,000 tokens and an untied head.

  Args:
    size: The size's name.
    **overrides: Fields of `LlamaConfig` to set to something else.

  Returns:
    The configuration.

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


def frequencies(config: LlamaConfig):
  """Radians [H/2] by which a time step turns each pair of dimensions."""
  half = config.head_width // 2
  turns = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  scaling = config.rope_scaling
  if scaling is None:
    return turns
  fits = scaling.original_length * turns / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  kept = jnp.clip((fits - low) / (high - low), 0, 1)
  # In this order a factor of 1 changes no bit.
  return turns * (1 / scaling.factor + (1 - 1 / scaling.factor) * kept)


def rotate(x_BTNH, positions_BT, turns):
  """Rotary embedding; dimension i turns with dimension i + H/2."""
  angles = positions_BT[:, :, None, None] * turns[None, None, None, :]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def normalize(h_BTD, scale_D, eps):
  """h / sqrt(mean(h^2) + eps) * scale; the backward pass keeps h alone."""
  x_BTD = h_BTD.astype(jnp.float32)
  square = jnp.mean(x_BTD * x_BTD, axis=-1, keepdims=True)
  x_BTD *= jax.lax.rsqrt(square + eps)
  scale_BTD = jnp.expand_dims(
    scale_D.astype(jnp.float32), range(h_BTD.ndim - 1)
  )
  return (x_BTD * scale_BTD).astype(h_BTD.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(gate, up):
  """silu(gate) * up; the backward pass keeps the two alone."""
  return jax.nn.silu(gate) * up


class RMSNorm(nn.Module):
  """Divides by the root mean square, then scales; float32 inside."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, h_BTD):
    """Normalizes the last axis."""
    config = self.config
    scale_D = self.param(
      'scale', nn.initializers.ones, h_BTD.shape[-1:], config.param_dtype
    )
    return normalize(h_BTD, scale_D, config.norm_eps)


class Linear(nn.Module):
  """A matrix [in, out], multiplied in the input's type; a bias if asked for."""

  config: LlamaConfig
  shape: tuple[int, int]
  biased: bool = False

  def setup(self):
    """Declares the kernel, and the bias."""
    init, dtype = nn.initializers.normal, self.config.param_dtype
    self.kernel = self.param(
      'kernel', init(self.config.init_std), self.shape, dtype
    )
    if self.biased:
      zeros = nn.initializers.zeros
      self.bias = self.param('bias', zeros, self.shape[-1:], dtype)

  def __call__(self, x):
    """Multiplies the last axis."""
    y = cross_entropy.multiply(x, self.kernel)
    if not self.biased:
      return y
    return y + jnp.expand_dims(self.bias.astype(y.dtype), range(y.ndim - 1))


class Embedding(nn.Module):
  """A row for each token."""

  config: LlamaConfig

  def setup(self):
    """Declares the table."""
    config = self.config
    init = nn.initializers.normal(config.init_std)
    shape = (config.vocab_size, config.width)
    self.embedding = self.param('embedding', init, shape, config.param_dtype)

  def __call__(self, tokens_BT):
    """Looks rows up; a token outside the vocabulary gives NaN."""
    # Rows first, cast second: no copy of the table, and repeated tokens sum
    # their gradients in the parameters' type.
    rows_BTD = jnp.take(self.embedding, tokens_BT, axis=0, mode='fill')
    return rows_BTD.astype(self.config.dtype)


class Cache(NamedTuple):
  """Keys and values of the tokens that a model has read, row by row."""

  keys: jax.Array  # [L, B, S, K, H], turned
  values: jax.Array  # [L, B, S, K, H]
  lengths: jax.Array  # [B] int32, tokens of each row; the rest is room


class Attention(nn.Module):
  """Causal attention with grouped heads, inside segments.

  Where there are variables 'cache/keys' and 'cache/values' [B, S, K, H], every
  row goes on from the first of its positions, and is one segment; its keys and
  values of these time steps are left in 'read/keys' and 'read/values'.
  """

  config: LlamaConfig

  @nn.compact
  def __call__(self, h_BTD, positions_BT, segments_BT):
    """Mixes time steps of one segment."""
    config = self.config
    D, H, N = config.width, config.head_width, config.num_heads
    turns = frequencies(config)

    def heads(name, num_heads):
      shape = (D, num_heads * H)
      y = Linear(config, shape, config.qkv_bias, name=name)(h_BTD)
      return y.reshape(*h_BTD.shape[:2], num_heads, H)

    def turned(name, num_heads):
      x_BTNH = heads(name, num_heads)
      if config.qk_norm:
        x_BTNH = RMSNorm(config, name=f'{name}_norm')(x_BTNH)
      return rotate(x_BTNH, positions_BT, turns)

    q_BTNH, k_BTKH = turned('q', N), turned('k', config.kv_heads)
    v_BTKH = heads('v', config.kv_heads)
    if self.has_variable('cache', 'keys'):
      cached = (self.get_variable('cache', x) for x in ('keys', 'values'))
      y_BTNH = attention.attend_cached(
        *(q_BTNH, k_BTKH, v_BTKH, *cached, positions_BT), window=config.window
      )
      for name, x_BTKH in (('keys', k_BTKH), ('values', v_BTKH)):
        self.sow('read', name, x_BTKH, reduce_fn=lambda _, new: new)
    elif self.is_initializing():
      # Parameters do not depend on the mixed values. Tracing attention would
      # take most of the time of `init`.
      y_BTNH = q_BTNH
    else:
      y_BTNH = attention.attend(
        *(q_BTNH, k_BTKH, v_BTKH, segments_BT),
        window=config.window,
        kind=config.attention,
      )
    y_BTD = y_BTNH.reshape(*h_BTD.shape[:2], N * H)
    return Linear(config, (N * H, D), name='o')(y_BTD)


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate) * up)."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, h_BTD):
    """Transforms each time step by itself."""
    D, F = self.config.width, self.config.mlp_width
    gate_BTF = Linear(self.config, (D, F), name='gate')(h_BTD)
    up_BTF = Linear(self.config, (D, F), name='up')(h_BTD)
    return Linear(self.config, (F, D), name='down')(gated(gate_BTF, up_BTF))


class Block(nn.Module):
  """One layer: attention and mlp, each behind a norm, each added."""

  config: LlamaConfig

  @nn.compact
  def __call__(self, x):
    """Maps {'h', 'positions', 'segments'} to the same with a new 'h'."""
    config = self.config
    h_BTD = x['h']
    # Under remat the mlp's backward pass runs without attention's residuals.
    mix = nn.remat(Attention) if config.remat else Attention
    h_BTD += mix(config, name='attention')(
      RMSNorm(config, name='attention_norm')(h_BTD),
      x['positions'],
      x['segments'],
    )
    h_BTD += Mlp(config, name='mlp')(RMSNorm(config, name='mlp_norm')(h_BTD))
    return {**x, 'h': h_BTD}


class Llama(nn.Module):
  """The whole model; `batch` and `read` are those that `Layers` describes."""

  config: LlamaConfig
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
    self.norm = RMSNorm(config)
    if not config.tied:
      self.lm_head = Linear(config, (config.width, config.vocab_size))

  def __call__(self, batch):
    """The loss of a batch and what it is made of."""
    return self.score(self.run_blocks(self.enter(batch)), batch)

  def logits(self, batch):
    """Logits [B, T, V] in float32, all at once."""
    x = self.run_blocks(self.enter(batch))
    return cross_entropy.project_logits(self.norm(x['h']), self.head_kernel())

  def logits_at(self, batch, times_B):
    """Logits [B, V] in float32 of one time step of each row."""
    x = self.run_blocks(self.enter(batch))
    h_BTD = jnp.take_along_axis(x['h'], times_B[:, None, None], axis=1)
    kernel_DV = self.head_kernel()
    return cross_entropy.project_logits(self.norm(h_BTD), kernel_DV)[:, 0]

  def nll(self, batch):
    """-log p(target) [B, T], with few logits at a time."""
    return cross_entropy.in_chunks(
      self.norm(self.run_blocks(self.enter(batch))['h']),
      self.head_kernel(),
      batch['targets'],
      chunk=self.config.loss_chunk,
    )

  def enter(self, batch):
    """Embeds the inputs; positions and segments ride along."""
    return {
      'h': self.embed(batch['inputs']),
      'positions': batch['positions'],
      'segments': batch['segments'],
    }

  def run_blocks(self, x):
    """All blocks, by a scan over their stacked parameters."""
    scan = nn.scan(
      lambda block, x: (block(x), None),
      variable_axes={'params': 0, 'cache': 0, 'read': 0},
      split_rngs={'params': True},
      length=self.config.num_layers,
    )
    return scan(self.blocks, x)[0]

  def score(self, x, batch):
    """sum(weights * nll) / weights.size, and the two sums."""
    weights_BT = batch['weights']
    nll = cross_entropy.sum_in_chunks(
      self.norm(x['h']),
      self.head_kernel(),
      batch['targets'],
      weights_BT,
      chunk=self.config.loss_chunk,
    )
    return nll / weights_BT.size, {'nll': nll, 'weight': jnp.sum(weights_BT)}

  def head_kernel(self):
    """The matrix [D, V] that makes logits."""
    if self.config.tied:
      return self.embed.embedding.T
    return self.lm_head.kernel


def apply(module, intercept, variables, *inputs, **options):
  """Returns `module.apply`, under a linen interceptor unless it is None."""
  hook = nn.intercept_methods(intercept) if intercept else nullcontext()
  with hook:
    return module.apply(variables, *inputs, **options)


@dataclasses.dataclass(frozen=True)
class Layers:
  """The model as pure functions of a plain dict of parameters.

  `batch` holds 'inputs', 'targets', 'positions', 'segments' [B, T] int32 and
  'weights' [B, T] float32: a target of weight 0 is not scored, positions
  restart at each document, and attention never crosses a segment.

  `embed`, `block` and `loss` are the model one layer at a time; calling the
  object is their composition with a scan over params['blocks'].
  """

  config: LlamaConfig
  read: Callable[[Any], Any] | None = None
  """Makes arrays of one layer of params['blocks'] where they are stored as
  something else; the whole model calls it layer by layer, `block` does not."""
  intercept: Callable[..., Any] | None = None
  """A linen interceptor of all that is computed, such as `lowrank.hook`."""

  def init(self, key):
    """Fresh parameters; their shapes under `jax.eval_shape`."""
    keys = ('inputs', 'targets', 'positions', 'segments')
    batch = dict.fromkeys(keys, jnp.zeros((1, 1), jnp.int32))
    batch['weights'] = jnp.zeros((1, 1), jnp.float32)  # under x64 too
    return Llama(self.config).init(key, batch)['params']

  def __call__(self, params, batch):
    """(loss, {'nll', 'weight'}) of a batch; see `loss`."""
    return self._apply(params, batch)

  def logits(self, params, batch):
    """Logits [B, T, V] float32 from inputs, positions and segments."""
    return self._apply(params, batch, method=Llama.logits)

  def nll(self, params, batch):
    """-log p(target) [B, T] float32, whatever the weights are."""
    return self._apply(params, batch, method=Llama.nll)

  def cache(self, num_rows, length, dtype=None):
    """A `Cache` of nothing, with room for `length` tokens a row.

    Args:
      num_rows: rows that are read at the same time.
      length: tokens of a row, at most; `config.window` takes none away.
      dtype: of keys and values; None is that of the activations.
    """
    config = self.config
    heads = (config.kv_heads, config.head_width)
    shape = (config.num_layers, num_rows, length, *heads)
    # Each its own: two of the same array cannot both be donated.
    keys, values = (jnp.zeros(shape, dtype or config.dtype) for _ in range(2))
    return Cache(keys, values, jnp.zeros(num_rows, jnp.int32))

  def extend(self, params, cache, tokens_BT, lengths_B):
    """Reads more tokens of each row: a prompt, or the token chosen last.

    What the cache has no room for is lost without a word.

    Args:
      params: The parameters.
      cache: What was read before; donate it, for it to be changed in place.
      tokens_BT: The tokens that come next, followed by any others.
      lengths_B: How many of each row come next; 0 leaves a row as it was.

    Returns:
      Logits [B, V] float32 after the last token of each row (of a row that is
      left as it was they mean nothing), and the new cache.
    """
    times_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    positions_BT = cache.lengths[:, None] + times_T[None, :]
    batch = {
      'inputs': tokens_BT,
      'positions': positions_BT,
      'segments': jnp.zeros_like(tokens_BT),
    }
    old = {'keys': cache.keys, 'values': cache.values}
    logits_BV, found = apply(
      *(Llama(self.config, self.read), self.intercept),
      {'params': params, 'cache': {'blocks': {'attention': old}}},
      *(batch, jnp.maximum(lengths_B - 1, 0)),
      method=Llama.logits_at,
      mutable=['read'],
    )
    new = found['read']['blocks']['attention']
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    # What is written beyond a row's tokens is not seen before its next token
    # replaces it.
    keys, values = (
      old[name]
      .at[:, rows_B1, positions_BT]
      .set(new[name].astype(old[name].dtype), mode='drop')
      for name in ('keys', 'values')
    )
    return logits_BV, Cache(keys, values, cache.lengths + lengths_B)

  def embed(self, params, batch):
    """x = {'h': [B, T, D], 'positions', 'segments'}; reads params['embed']."""
    return self._apply(params, batch, method=Llama.enter)

  def block(self, layer_params, x):
    """One block: params['blocks'] without the leading axis."""
    params = {'params': layer_params}
    return apply(Block(self.config), self.intercept, params, x)

  def loss(self, params, x, batch):
    """Loss from the last block's x; reads every entry but params['blocks'].

    With weights scaled to mean 1 over a whole batch, the mean of this loss
    over microbatches of equal size is the token-weighted mean of the batch.

    Args:
      params: The parameters.
      x: What the last block returned.
      batch: The batch that x was embedded from.

    Returns:
      sum(weights * nll) / weights.size, and the sums {'nll', 'weight'}.
    """
    return self._apply(params, x, batch, method=Llama.score)

  def _apply(self, params, *inputs, method=None):
    model = Llama(self.config, self.read)
    params = {'params': params}
    return apply(model, self.intercept, params, *inputs, method=method)
