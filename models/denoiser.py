"""Base classes of networks that reverse a diffusion, such as `models.unet`.

`models.diffusion` has the mathematics. Here are the fields that all such
networks have, the noise of a training batch, the loss and the sampler.

Shapes: B batch, H height, W width, C channels.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.module import InterceptorContext

from models import attention as attention_lib
from models import diffusion as diffusion_lib
from models import noise as noise_lib
from models.diffusion import Diffusion, Sampler
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
from models.modules import apply, weighted

_MAX_PERIOD = 10_000.0
"""Longest wavelength of the time embedding, divided by 2 pi, if the diffusion
has 1,000 steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserConfig(AttentionConfig):
  """Fields of all networks that reverse a diffusion of images."""

  task: ClassVar[str] = 'diffusion'

  image_size: int = 32
  """Height and width of the images, in pixels."""
  num_channels: int = 3
  """Number of channels of the images."""
  num_classes: int | None = None
  """Number of classes with which sampling is conditioned (None: no labels). The
  label `num_classes` is the class 'none'."""
  diffusion: Diffusion = dataclasses.field(default_factory=Diffusion)
  """Noise schedule and training target."""
  dtype: Dtype = 'float32'
  """Type of the activations and of the matmuls. Norms, softmax, noise and loss
  are computed in float32."""
  param_dtype: Dtype = 'float32'
  """Type of the parameters and of their gradients."""
  remat: bool = False
  """Whether the backward pass recomputes each block from its input."""
  attention: Literal['auto', 'cudnn', 'blockwise'] = 'auto'
  """Implementation of attention: 'cudnn' is cuDNN's kernel, 'blockwise' is
  plain JAX in blocks of positions. 'auto' is 'cudnn' on a GPU if cuDNN has a
  kernel for the arrays, else 'blockwise'."""

  def __post_init__(self) -> None:
    """Checks that sizes are positive."""
    check_sizes(
      image_size=self.image_size,
      num_channels=self.num_channels,
      num_classes=self.num_classes,
    )

  @property
  @abc.abstractmethod
  def attention_shapes(self) -> list[tuple[int, int, int]]:
    """Positions, heads and head dimension of each attention in the network."""

  @property
  def attention_kind(self) -> str:
    """Implementation of attention, or 'none'."""
    return self.attention if self.attention_shapes else 'none'

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """Shape [H, W, C] of an image."""
    return (self.image_size, self.image_size, self.num_channels)

  def without_dropout(self) -> Self:
    """Returns the model of evaluation: with the same parameters, no dropout.

    Labels are not dropped, either.
    """
    diffusion = dataclasses.replace(self.diffusion, label_dropout=0.0)
    return dataclasses.replace(self, diffusion=diffusion)

  def attention_calls(self, batch: Batch) -> list[attention_lib.Call]:
    """Returns the sizes of each attention in the network."""
    del batch  # All images have the same size.
    return [attention_lib.Call(T, N, N, H) for T, N, H in self.attention_shapes]

  def flops(self, params: PyTree, trained: PyTree, batch: Batch) -> float:
    """Returns the flops that the model needs for an update.

    A multiply-add counts as two flops. A kernel of N weights is multiplied with
    P positions of an image: all positions of the output for a convolution, the
    patches for a linear map on patches, 1 for an embedding of the time. The
    forward pass needs 2 P N, the gradients of the inputs 2 P N, and those of
    the weights 2 P N if they are trained. Attention over T positions of width D
    needs 12 T^2 D. Norms, activation functions, recomputation that saves memory
    and the optimizer do not count.

    Args:
      params: the parameters or their shapes, with low-rank factors.
      trained: a tree of bools: whether each parameter is trained.
      batch: the batch or its shapes.
    """
    positions = _positions(self)
    moves = jax.tree.leaves(trained)
    total = sum(12 * T * T * N * H for T, N, H in self.attention_shapes)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, w), is_trained in zip(leaves, moves, strict=True):
      *module, name = (str(getattr(key, 'key', key)) for key in path)
      if name != 'bias':
        uses = positions.get('/'.join(module), 0)
        total += (6 if is_trained else 4) * uses * w.size
    return float(len(batch['inputs']) * total)


def check_sizes(**sizes: int | None) -> None:
  """Raises ValueError unless each size is at least 1, or None."""
  for name, value in sizes.items():
    if value is not None and value < 1:
      raise ValueError(f'{name} must be at least 1, got {value}')


def check_dropout(rate: float) -> None:
  """Raises ValueError unless a dropout rate is in [0, 1)."""
  if not 0 <= rate < 1:
    raise ValueError(f'dropout is a share of the entries in [0, 1), got {rate}')


@functools.lru_cache(maxsize=16)
def _positions(config: DenoiserConfig) -> dict[str, int]:
  """Returns how many positions of an image each kernel is multiplied with.

  The network is traced with one image, and the output of each module with a
  kernel is recorded by the module's path.
  """
  found: dict[str, int] = {}

  def record(
    next_fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: InterceptorContext,
  ) -> Any:
    y = next_fun(*args, **kwargs)
    module = context.module
    is_call = context.method_name == '__call__'
    if is_call and module.has_variable('params', 'kernel'):
      found['/'.join(map(str, module.path))] = y.size // y.shape[-1]
    return y

  layers = config.layers(intercept=record)
  params = jax.eval_shape(layers.init, jax.random.key(0))
  jax.eval_shape(layers.predict, params, *_example(config))
  return found


def _example(
  config: DenoiserConfig,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns arguments of `predict` for one image."""
  zero_1 = jnp.zeros(1, jnp.int32)
  labels_1 = None if config.num_classes is None else zero_1
  return jnp.zeros((1, *config.image_shape)), zero_1, labels_1


class Drawn(NamedTuple):
  """A batch with its noise, from which the loss is computed."""

  x_t: jax.Array
  """Noisy images [B, H, W, C], float32."""
  times: jax.Array
  """Times [B], int32."""
  labels: jax.Array | None
  """Labels [B], some of them replaced by the class 'none'; None without
  classes."""
  target: jax.Array
  """Output [B, H, W, C] that the network should have, float32."""
  weights: jax.Array
  """Weight [B] of the squared error at these times."""


def draw(config: DenoiserConfig, batch: Batch) -> Drawn:
  """Returns the noisy images of a batch and the outputs they should have.

  The time, the noise and the dropped label of a row depend only on its key in
  batch['noise'].

  Raises:
    ValueError: The images have another shape than the config's.
  """
  diffusion, inputs = config.diffusion, batch['inputs']
  if inputs.shape[1:] != config.image_shape:
    raise ValueError(
      f'images must have the shape {config.image_shape}, as image_size and '
      f'num_channels of the model give it, got {inputs.shape[1:]}'
    )
  x_0 = diffusion_lib.to_floats(inputs)
  keys_B = noise_lib.keys(batch['noise'])
  if 'times' in batch:
    times_B = batch['times']
  else:
    times_B = _integers(keys_B, 0, diffusion.steps)
  epsilon = diffusion_lib.normal(keys_B, 1, x_0.shape[1:])
  labels_B = None
  if config.num_classes is not None:
    labels_B = batch['labels']
    if diffusion.label_dropout:
      is_dropped_B = _uniform(keys_B, 2) < diffusion.label_dropout
      labels_B = jnp.where(is_dropped_B, config.num_classes, labels_B)
  alpha_B, sigma_B = diffusion.at(times_B)
  return Drawn(
    diffusion_lib.mix(x_0, epsilon, alpha_B, sigma_B),
    times_B,
    labels_B,
    diffusion_lib.target(diffusion.prediction, x_0, epsilon, alpha_B, sigma_B),
    diffusion.loss_weights(alpha_B, sigma_B),
  )


def _integers(keys_B: jax.Array, number: int, end: int) -> jax.Array:
  """Returns a uniform integer [B] in 0..end - 1 from each key and a number."""

  def draw_one(key: jax.Array) -> jax.Array:
    key = jax.random.fold_in(key, number)
    return jax.random.randint(key, (), 0, end, jnp.int32)

  return jax.vmap(draw_one)(keys_B)


def _uniform(keys_B: jax.Array, number: int) -> jax.Array:
  """Returns a uniform float [B] in [0, 1) from each key and a number."""

  def draw_one(key: jax.Array) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(key, number))

  return jax.vmap(draw_one)(keys_B)


def cost(output: jax.Array, drawn: Drawn) -> jax.Array:
  """Returns the cost [B] of each row from the output of the network.

  It is the mean squared error over the pixels and channels of the row, times
  the weight of its time.
  """
  error = output.astype(jnp.float32) - drawn.target
  return drawn.weights * jnp.mean(error * error, axis=(1, 2, 3))


def score(
  output: jax.Array, drawn: Drawn, weights_B: jax.Array
) -> tuple[jax.Array, Sums]:
  """Returns the loss and its sums from the output of the network.

  `cost` is the cost of a row. `models.modules.weighted` defines the sums.
  """
  return weighted(cost(output, drawn), weights_B)


def embed_times(
  times_B: jax.Array, num_steps: int, size: int, dtype: Dtype
) -> jax.Array:
  """Returns cosines and sines [B, size] of times, of geometric wavelengths.

  Times are scaled to those of a diffusion of 1,000 steps.

  Args:
    times_B: Times in 0..num_steps - 1.
    num_steps: Number of steps of the diffusion.
    size: Number of features, an even number.
    dtype: Type of the result.
  """
  half = size // 2
  turns = _MAX_PERIOD ** (-np.arange(half) / half)
  scaled_B = times_B.astype(jnp.float32) * (1000 / num_steps)
  angles = scaled_B[:, None] * jnp.asarray(turns, jnp.float32)[None]
  waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
  return waves.astype(dtype)


class LabelTable(nn.Module):
  """Embedding of the labels, with a last row for the class 'none'."""

  config: DenoiserConfig
  """Provides the number of classes and the types."""
  size: int
  """Number of features."""

  @nn.compact
  def __call__(self, labels_B: jax.Array) -> jax.Array:
    """Returns rows [B, size]; a label beyond the table returns NaN."""
    config = self.config
    assert config.num_classes is not None
    init = nn.initializers.normal(0.02)
    shape = (config.num_classes + 1, self.size)
    table = self.param('embedding', init, shape, config.param_dtype)
    return jnp.take(table, labels_B, axis=0, mode='fill').astype(config.dtype)


@dataclasses.dataclass(frozen=True)
class Layers(abc.ABC):
  """A network as pure functions of a plain dict of parameters.

  A training `batch` is a dict of 'inputs' [B, H, W, C], uint8 or float32 in
  [-1, 1]; 'labels' [B] int32 if the model has classes; 'noise' [B, 2] uint32,
  random bits from which all random numbers of a row are drawn; and 'weights'
  [B] float32. Rows of weight 0 do not count in the loss. An optional 'times'
  [B] int32 replaces the random time steps.
  """

  config: DenoiserConfig
  """Configuration of the model."""
  read: Read | None = None
  """Converts one layer of params['blocks'] to arrays, if it is stored in
  another form, such as 8-bit integers. A model whose layers are not stacked
  ignores it."""
  intercept: Intercept | None = None
  """A linen interceptor under which everything is computed, or None."""

  @abc.abstractmethod
  def module(self) -> nn.Module:
    """Returns the linen module, with methods `__call__` and `predict`."""

  def init(self, key: jax.Array) -> Params:
    """Returns random initial parameters.

    `jax.eval_shape` of this method returns their shapes and types.
    """
    example = _example(self.config)
    module = dataclasses.replace(self, read=None).module()
    variables = module.init(key, *example, method='predict')
    return variables['params']

  def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
    """Returns (loss, {'cost', 'weight'}) of a batch; see `score`."""
    return self._apply(params, batch)

  def predict(
    self,
    params: Params,
    x_t: jax.Array,
    times_B: jax.Array,
    labels_B: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the output of the network, without dropout.

    Args:
      params: The parameters.
      x_t: Noisy images [B, H, W, C].
      times_B: Their times.
      labels_B: Their labels. A model with classes reads None as the class
        'none', which is the label `num_classes`.

    Returns:
      Epsilon or v [B, H, W, C] in float32.
    """
    labels_B = known_labels(self.config, labels_B, x_t.shape[0])
    return self._apply(params, x_t, times_B, labels_B, method='predict')

  def _apply(
    self, params: Params, *inputs: Any, method: str | None = None
  ) -> Any:
    variables = {'params': params}
    return apply(
      self.module(), self.intercept, variables, *inputs, method=method
    )


def known_labels(
  config: DenoiserConfig, labels_B: jax.Array | None, num_rows: int
) -> jax.Array | None:
  """Returns labels that fit the model.

  Raises:
    ValueError: There are labels, but the model has no classes.
  """
  if config.num_classes is None:
    if labels_B is not None:
      raise ValueError(
        'labels need a model with num_classes, got num_classes=None; pass no '
        'labels'
      )
    return None
  if labels_B is None:
    return jnp.full(num_rows, config.num_classes, jnp.int32)
  return labels_B


def make_sampler(
  layers: Layers, sampler: Sampler, num_images: int
) -> Callable[..., jax.Array]:
  """Returns a compiled function that draws images.

  Args:
    layers: The model.
    sampler: The steps, their noise and the guidance.
    num_images: Number of images that each call draws, B.

  Returns:
    `(params, key, labels_B=None) -> images [B, H, W, C]`, float32. Image i
    depends only on the parameters, the key, i and its label.

  Raises:
    ValueError: There are more steps than times of the diffusion, or guidance
      of a model without classes.

  Example:
    >>> from models.unet import UnetConfig
    >>> config = UnetConfig(
    ...   image_size=4, width=4, groups=2, multipliers=(1,), num_blocks=1,
    ...   attention_sizes=(),
    ... )
    >>> layers = config.layers()
    >>> draw_images = make_sampler(layers, Sampler(steps=2), num_images=3)
    >>> params = jax.jit(layers.init)(jax.random.key(0))
    >>> draw_images(params, jax.random.key(1)).shape
    (3, 4, 4, 3)
  """
  config = layers.config
  diffusion_lib.make_steps(config.diffusion, sampler)
  if sampler.guidance != 1 and config.num_classes is None:
    raise ValueError(
      'guidance needs a model with num_classes, got guidance='
      f'{sampler.guidance}; use 1'
    )

  @jax.jit
  def draw_images(
    params: Params, key: jax.Array, labels_B: jax.Array | None = None
  ) -> jax.Array:
    return diffusion_lib.sample(
      functools.partial(layers.predict, params),
      (num_images, *config.image_shape),
      key,
      config.diffusion,
      sampler,
      known_labels(config, labels_B, num_images),
      config.num_classes,
    )

  return draw_images
