"""Linen modules and functions that several models share.

`models.encoder` and `models.vit` are built of the same attention and mlp, and
offer their layers by the same class, `ModuleLayers`.

Shapes: B batch, T time, D width, F mlp width, N heads, H head dimension,
C labels.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Generic, Protocol, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from models import attention, cross_entropy, noise
from models.model import (
  Activations,
  Batch,
  Dtype,
  Intercept,
  Params,
  Read,
  Sums,
)

Config = TypeVar('Config')


def apply(
  module: nn.Module,
  intercept: Callable[..., Any] | None,
  variables: Mapping[str, Any],
  *inputs: Any,
  **options: Any,
) -> Any:
  """Calls `module.apply`, under a linen interceptor unless that is None.

  Args:
    module: The linen module.
    intercept: The interceptor, as `nn.intercept_methods` takes it, or None.
    variables: Collections of variables, such as {'params': ...}.
    *inputs: Positional arguments of the called method.
    **options: Keyword arguments of `module.apply`, such as `method`.

  Returns:
    The result of `module.apply`.
  """
  hook = nn.intercept_methods(intercept) if intercept else nullcontext()
  with hook:
    return module.apply(variables, *inputs, **options)


@dataclasses.dataclass(frozen=True)
class ModuleLayers(abc.ABC, Generic[Config]):
  """A stacked model of linen modules, as pure functions of its parameters.

  `embed`, `block` and `loss` compute the model one layer at a time. Calling the
  object composes them, with a scan over the layers in params['blocks'].
  """

  config: Config
  """Configuration of the model."""
  read: Read | None = None
  """Converts one layer of params['blocks'] to arrays, if it is stored in
  another form, such as 8-bit integers. Methods that run the whole model call
  it once per layer; `block` does not call it."""
  intercept: Intercept | None = None
  """A linen interceptor under which everything is computed, such as
  `lowrank.hook`, or None."""

  @abc.abstractmethod
  def whole(self) -> nn.Module:
    """Returns the module of the whole model.

    Its methods are `__call__(batch)`, which returns the loss and its sums,
    `logits(batch)`, `enter(batch)`, which returns the input of the first layer,
    and `score(x, batch)`, which returns the loss from the last layer's output.
    """

  @abc.abstractmethod
  def layer(self) -> nn.Module:
    """Returns the module of one layer."""

  @abc.abstractmethod
  def example(self) -> Batch:
    """Returns a batch of zeros with one row, which initializes the model."""

  def init(self, key: jax.Array) -> Params:
    """Returns random initial parameters.

    `jax.eval_shape` of this method returns their shapes and types.
    """
    whole = dataclasses.replace(self, read=None).whole()
    return whole.init(key, self.example())['params']

  def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns (loss, sums) of a batch; see `loss`."""
    return self._apply(params, batch)

  def logits(self, params: Params, batch: Batch) -> jax.Array:
    """Returns the float32 logits of a batch; reads no targets or weights."""
    return self._apply(params, batch, method='logits')

  def embed(self, params: Params, batch: Batch) -> Activations:
    """Returns x, the input of the first layer.

    x is a dict of activations 'h' [B, T, D] and arrays that each layer reads.
    It has 'noise' if the batch has it. Reads only params['embed'].
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
    return apply(self.layer(), self.intercept, {'params': layer_params}, x)

  def loss(
    self, params: Params, x: Activations, batch: Batch
  ) -> tuple[jax.Array, Sums]:
    """Returns the loss from the output of the last layer.

    If the weights have mean 1 over a whole batch, the mean of this loss over
    microbatches of equal size is the weighted mean of the batch.

    Args:
      params: The parameters; params['blocks'] and params['embed'] are not read.
      x: Output of the last layer.
      batch: The batch from which x was computed; only its targets and weights
        are read.

    Returns:
      sum(weights * cost) / weights.size, and the sums {'cost', 'weight'}.
    """
    return self._apply(params, x, batch, method='score')

  def _apply(
    self, params: Params, *inputs: Any, method: str | None = None
  ) -> Any:
    variables = {'params': params}
    return apply(
      self.whole(), self.intercept, variables, *inputs, method=method
    )


def layer_class(
  layer: type[nn.Module], *, remat: bool, read: Read | None
) -> Callable[..., nn.Module]:
  """Returns a class of layers, for a stack that `run_layers` scans.

  Args:
    layer: The class of one layer.
    remat: Whether the backward pass recomputes each layer from its input.
    read: Converts the stored parameters of one layer to arrays, or None.
  """
  # `prevent_cse` is needed only outside of a scan: XLA does not merge
  # computations across iterations of a loop.
  if remat:
    layer = nn.remat(layer, prevent_cse=False)
  if read is not None:
    layer = nn.map_variables(layer, 'params', read)
  return layer


def run_layers(blocks: nn.Module, x: Activations, length: int) -> Activations:
  """Applies all layers by a scan over their stacked parameters.

  Args:
    blocks: The module of the stack, an instance of `layer_class`.
    x: Input of the first layer.
    length: Number of layers.

  Returns:
    The output of the last layer.
  """
  scan = nn.scan(
    lambda layer, x: (layer(x), None),
    variable_axes={'params': 0},
    split_rngs={'params': True},
    length=length,
  )
  return scan(blocks, x)[0]


def weighted(
  cost_B: jax.Array | np.ndarray, weights_B: jax.Array
) -> tuple[jax.Array, Sums]:
  """Returns the loss and its sums from the cost of each row.

  The loss is sum(weights * cost) / weights.size. The sums are {'cost': the
  weighted sum, 'weight': the sum of the weights}.
  """
  total = jnp.sum(weights_B * cost_B)
  sums = {'cost': total, 'weight': jnp.sum(weights_B)}
  return total / weights_B.size, sums


class WeightConfig(Protocol):
  """The fields of a configuration that describe a weight."""

  @property
  def init_std(self) -> float:
    """Standard deviation of the normal initial weights."""
    ...

  @property
  def param_dtype(self) -> Dtype:
    """Type of the parameters."""
    ...


class BlockConfig(WeightConfig, Protocol):
  """The fields of a configuration that describe attention, mlp and norms."""

  @property
  def width(self) -> int:
    """Size of the residual stream."""
    ...

  @property
  def mlp_width(self) -> int:
    """Size of the mlp's hidden layer."""
    ...

  @property
  def num_heads(self) -> int:
    """Number of attention heads."""
    ...

  @property
  def qkv_bias(self) -> bool:
    """Whether the projections to queries, keys and values have a bias."""
    ...

  @property
  def norm_eps(self) -> float:
    """Number added to the variance in LayerNorm."""
    ...

  @property
  def dtype(self) -> Dtype:
    """Type of the activations and of the matmuls."""
    ...

  @property
  def attention(self) -> attention.Kind:
    """Implementation of attention."""
    ...


class Linear(nn.Module):
  """Linear map with an optional bias, computed in the input's type."""

  config: WeightConfig
  """Provides `init_std` and `param_dtype`."""
  shape: tuple[int, int]
  """Shape [in, out] of the kernel."""
  biased: bool = False
  """Whether a bias [out] is added."""

  def setup(self) -> None:
    """Declares the kernel and, if `biased`, the bias."""
    init, dtype = nn.initializers.normal, self.config.param_dtype
    self.kernel = self.param(
      'kernel', init(self.config.init_std), self.shape, dtype
    )
    if self.biased:
      zeros = nn.initializers.zeros
      self.bias = self.param('bias', zeros, self.shape[-1:], dtype)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps the last axis from `in` to `out`."""
    y = cross_entropy.multiply(x, self.kernel)
    if not self.biased:
      return y
    return y + jnp.expand_dims(self.bias.astype(y.dtype), range(y.ndim - 1))


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def normalize(
  h: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float
) -> jax.Array:
  """Returns (h - mean) / sqrt(variance + eps) * scale + bias.

  Computes in float32. Under `jax.checkpoint`, only the inputs are stored for
  the backward pass.
  """
  x = h.astype(jnp.float32)
  x -= jnp.mean(x, axis=-1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  scale, bias = (
    jnp.expand_dims(w.astype(jnp.float32), range(h.ndim - 1))
    for w in (scale_D, bias_D)
  )
  return (x * scale + bias).astype(h.dtype)


class LayerNorm(nn.Module):
  """Layer normalization with scale and bias. Computes in float32."""

  config: BlockConfig
  """Provides `norm_eps` and `param_dtype`."""

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    """Normalizes the last axis."""
    config, init = self.config, nn.initializers
    shape, dtype = h.shape[-1:], config.param_dtype
    scale_D = self.param('scale', init.ones, shape, dtype)
    bias_D = self.param('bias', init.zeros, shape, dtype)
    return normalize(h, scale_D, bias_D, config.norm_eps)


class Table(nn.Module):
  """Embedding table with one row per token, position or token type."""

  config: BlockConfig
  """Provides the width, the initialization and the types."""
  size: int
  """Number of rows."""

  @nn.compact
  def __call__(self, rows: jax.Array) -> jax.Array:
    """Returns the given rows; a row outside the table returns NaN."""
    config = self.config
    init = nn.initializers.normal(config.init_std)
    shape = (self.size, config.width)
    table = self.param('embedding', init, shape, config.param_dtype)
    return jnp.take(table, rows, axis=0, mode='fill').astype(config.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x: jax.Array) -> jax.Array:
  """Returns x times the standard normal distribution function at x.

  This is the exact GELU with erf, not the approximation with tanh. Under
  `jax.checkpoint`, only x is stored for the backward pass.
  """
  return jax.nn.gelu(x, approximate=False)


def drop(
  x: jax.Array, noise_B2: jax.Array | None, site: int, rate: float
) -> jax.Array:
  """Applies dropout: zeroes some entries and scales up the others.

  Args:
    x: Activations [B, ...].
    noise_B2: One random key per row, so that the zeros of a row do not depend
      on the rest of the batch. None disables dropout.
    site: Number of this dropout within its layer; it is folded into the keys.
    rate: Probability with which an entry is zeroed.

  Returns:
    An array like x.
  """
  if noise_B2 is None or not rate:
    return x
  return noise.drop(x, noise.folded(noise_B2, site), rate)


def attend(
  module: nn.Module,
  q_BTNH: jax.Array,
  k_BTNH: jax.Array,
  v_BTNH: jax.Array,
  segments_BT: jax.Array,
  *,
  kind: attention.Kind,
) -> jax.Array:
  """Returns bidirectional attention within segments, [B, T, N, H].

  While the module is initialized, it returns the queries. Initial parameters do
  not depend on the output of attention, and tracing attention would take most
  of the time of `init`.

  Args:
    module: The module that computes attention.
    q_BTNH: Queries.
    k_BTNH: Keys.
    v_BTNH: Values.
    segments_BT: Integers. A query attends only to keys of the same integer.
    kind: Implementation of attention.
  """
  if module.is_initializing():
    return q_BTNH
  return attention.attend(
    q_BTNH, k_BTNH, v_BTNH, segments_BT, kind=kind, causal=False
  )


class Attention(nn.Module):
  """Bidirectional attention within segments."""

  config: BlockConfig
  """Provides the sizes of the heads and the implementation of attention."""

  @nn.compact
  def __call__(self, h_BTD: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns the mix [B, T, D] of the time steps of each segment."""
    config, D, N = self.config, self.config.width, self.config.num_heads

    def heads(name: str) -> jax.Array:
      y_BTD = Linear(config, (D, D), config.qkv_bias, name=name)(h_BTD)
      return y_BTD.reshape(*h_BTD.shape[:2], N, D // N)

    qkv = heads('q'), heads('k'), heads('v')
    y_BTNH = attend(self, *qkv, segments_BT, kind=config.attention)
    return Linear(config, (D, D), True, name='o')(y_BTNH.reshape(h_BTD.shape))


class Mlp(nn.Module):
  """Two linear maps with a GELU between them: down(gelu(up))."""

  config: BlockConfig
  """Provides `width` and `mlp_width`."""

  @nn.compact
  def __call__(self, h_BTD: jax.Array) -> jax.Array:
    """Returns [B, T, D], each time step computed from itself only."""
    D, F = self.config.width, self.config.mlp_width
    up_BTF = Linear(self.config, (D, F), True, name='up')(h_BTD)
    return Linear(self.config, (F, D), True, name='down')(gelu(up_BTF))


def cost(
  logits_BC: jax.Array | np.ndarray,
  targets_B: jax.Array | np.ndarray,
  num_labels: int,
) -> jax.Array:
  """Returns the cost [B] of each row.

  The cost is -log p(target), or the squared error if `num_labels` is 1.
  """
  if num_labels == 1:
    return jnp.square(logits_BC[:, 0] - targets_B.astype(jnp.float32))
  chosen_BC = (
    targets_B.astype(jnp.int32)[:, None] == jnp.arange(num_labels)[None]
  )
  chosen_B = jnp.sum(jnp.where(chosen_BC, logits_BC, 0.0), axis=-1)
  return jax.nn.logsumexp(logits_BC, axis=-1) - chosen_B
