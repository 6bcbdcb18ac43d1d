"""Diffusion: noise schedules, targets of training, and samplers.

An image x_0 is mixed with Gaussian noise epsilon at a time t in 0..T - 1:

  x_t = alpha_t x_0 + sigma_t epsilon,  alpha_t^2 + sigma_t^2 = 1

A network predicts epsilon, or v = alpha_t epsilon - sigma_t x_0, from x_t and
t. This module contains no network: `models.unet` and `models.dit` define two.
Time T - 1 is the noisiest.

Shapes: B batch, H height, W width, C channels, T time steps of training, S
steps of a sampler.

Sources: Ho et al., `DDPM <https://arxiv.org/abs/2006.11239>`_, 2020; Song et
al., `DDIM <https://arxiv.org/abs/2010.02502>`_, 2020; Nichol and Dhariwal,
`the cosine schedule <https://arxiv.org/abs/2102.09672>`_, 2021; Salimans and
Ho, `v prediction <https://arxiv.org/abs/2202.00512>`_, 2022; Ho and Salimans,
`classifier-free guidance <https://arxiv.org/abs/2207.12598>`_, 2022.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Schedule: TypeAlias = Literal['cosine', 'linear']

Prediction: TypeAlias = Literal['epsilon', 'v']

Predict: TypeAlias = Callable[
  [jax.Array, jax.Array, jax.Array | None], jax.Array
]
"""`(x_t [B, H, W, C], times [B], labels [B] or None) -> output [B, H, W, C]`:
a network with its parameters."""

_LINEAR = (1e-4, 0.02)
"""First and last variance of the linear schedule with 1,000 steps."""
_COSINE_OFFSET = 0.008
"""Keeps the first variance of the cosine schedule from vanishing."""
_MAX_BETA = 0.999
"""Largest variance of a step of the cosine schedule."""


class Levels(NamedTuple):
  """Levels of noise: x_t = alpha x_0 + sigma epsilon."""

  alpha: np.ndarray
  """Multiplier [T] of the image, float64."""
  sigma: np.ndarray
  """Multiplier [T] of the noise, float64."""


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """The diffusion that a network learns to reverse.

  Example:
    >>> levels = Diffusion(steps=1000).levels
    >>> [round(float(x), 3) for x in levels.alpha[[0, 499, 999]]]
    [1.0, 0.703, 0.0]
  """

  schedule: Schedule = 'cosine'
  """Noise schedule: 'linear' is that of DDPM, whose variances rise linearly;
  'cosine' adds noise more slowly at both ends."""
  steps: int = 1000
  """Number of time steps, T."""
  prediction: Prediction = 'epsilon'
  """Output of the network: 'epsilon' is the noise, 'v' is
  alpha epsilon - sigma x_0."""
  label_dropout: float = 0.1
  """Probability with which training replaces a label by the class 'none', for
  classifier-free guidance. A network without classes ignores it."""
  min_snr: float | None = None
  """Limit of the signal-to-noise ratio in the loss weights of Hang et al.,
  `Min-SNR <https://arxiv.org/abs/2303.09556>`_ (None: all times have weight
  1)."""

  def __post_init__(self) -> None:
    """Checks that the schedule has its steps and that shares are shares."""
    # The last variance, 0.02 * 1000 / T, must be below 1.
    least = 21 if self.schedule == 'linear' else 1
    if self.steps < least:
      raise ValueError(
        f'diffusion.steps must be at least {least} with the schedule '
        f'{self.schedule!r}, got {self.steps}'
      )
    if not 0 <= self.label_dropout < 1:
      raise ValueError(
        'diffusion.label_dropout is a share in [0, 1), got '
        f'{self.label_dropout}'
      )
    if self.min_snr is not None and not 0 < self.min_snr < math.inf:
      raise ValueError(
        'diffusion.min_snr must be positive and finite, or None, got '
        f'{self.min_snr}'
      )

  @property
  def levels(self) -> Levels:
    """Levels of noise at all times."""
    return _levels(self.schedule, self.steps)

  def at(
    self, times_B: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
  ) -> tuple[jax.Array, jax.Array]:
    """Returns alpha [B] and sigma [B] at the given times.

    A time outside 0..T - 1 returns NaN.
    """
    alpha_B, sigma_B = (
      jnp.take(jnp.asarray(x, dtype), times_B, mode='fill') for x in self.levels
    )
    return alpha_B, sigma_B

  def loss_weights(self, alpha_B: jax.Array, sigma_B: jax.Array) -> jax.Array:
    """Returns the weight [B] of the squared error of the network's output.

    With `min_snr` = g and the signal-to-noise ratio s = alpha^2 / sigma^2, the
    weight is min(s, g) / s for epsilon and min(s, g) / (s + 1) for v. Either is
    the error of x_0 times min(s, g).
    """
    if self.min_snr is None:
      return jnp.ones_like(alpha_B)
    signal_B = alpha_B * alpha_B
    least_B = jnp.minimum(signal_B, self.min_snr * sigma_B * sigma_B)
    return least_B if self.prediction == 'v' else least_B / signal_B


@functools.lru_cache(maxsize=64)
def _levels(schedule: Schedule, steps: int) -> Levels:
  """Returns the levels of noise of a schedule.

  The linear variances of T steps are those of 1,000 steps times 1,000 / T, so
  that the last level is about the same for every T.
  """
  if schedule == 'linear':
    first, last = (x * 1000 / steps for x in _LINEAR)
    beta_T = np.linspace(first, last, steps)
  else:
    ends = np.arange(steps + 1) / steps
    angles = (ends + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * np.pi / 2
    shares = np.cos(angles) ** 2
    beta_T = np.minimum(1 - shares[1:] / shares[:-1], _MAX_BETA)
  alpha_bar_T = np.cumprod(1 - beta_T)
  found = Levels(np.sqrt(alpha_bar_T), np.sqrt(1 - alpha_bar_T))
  for array in found:
    # The arrays are cached, so that a write would change later results.
    array.flags.writeable = False
  return found


def mix(
  x_0: jax.Array, epsilon: jax.Array, alpha_B: jax.Array, sigma_B: jax.Array
) -> jax.Array:
  """Returns x_t = alpha x_0 + sigma epsilon: a sample of q(x_t | x_0)."""
  return _rows(alpha_B, x_0) * x_0 + _rows(sigma_B, x_0) * epsilon


def target(
  prediction: Prediction,
  x_0: jax.Array,
  epsilon: jax.Array,
  alpha_B: jax.Array,
  sigma_B: jax.Array,
) -> jax.Array:
  """Returns the output that the network should have.

  Args:
    prediction: 'epsilon' or 'v'.
    x_0: Images [B, ...].
    epsilon: Noise like `x_0`.
    alpha_B: Multiplier of the images.
    sigma_B: Multiplier of the noise.

  Returns:
    An array like `x_0`.
  """
  if prediction == 'epsilon':
    return epsilon
  return _rows(alpha_B, x_0) * epsilon - _rows(sigma_B, x_0) * x_0


class Estimate(NamedTuple):
  """The image and the noise of which a noisy image consists."""

  x_0: jax.Array
  """Image [B, ...]."""
  epsilon: jax.Array
  """Noise [B, ...]."""


def estimate(
  prediction: Prediction,
  output: jax.Array,
  x_t: jax.Array,
  alpha_B: jax.Array,
  sigma_B: jax.Array,
) -> Estimate:
  """Returns the image and the noise that an output of the network means.

  It is the inverse of `target` at a given x_t: x_t = alpha x_0 + sigma epsilon
  holds for the result.

  Args:
    prediction: 'epsilon' or 'v'.
    output: Output of the network, like `x_t`.
    x_t: Noisy images [B, ...].
    alpha_B: Multiplier of the images; for 'epsilon' it must not be 0.
    sigma_B: Multiplier of the noise.

  Returns:
    The estimate.
  """
  alpha, sigma = _rows(alpha_B, x_t), _rows(sigma_B, x_t)
  if prediction == 'epsilon':
    return Estimate((x_t - sigma * output) / alpha, output)
  return Estimate(alpha * x_t - sigma * output, sigma * x_t + alpha * output)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How images are drawn from a trained network."""

  steps: int = 50
  """Number of steps, S, at most the number of time steps of training."""
  eta: float = 0.0
  """Share of the noise that each step draws again: 0 is DDIM, which is
  deterministic after the first noise; 1 is ancestral sampling (DDPM), with the
  mean and the variance of the posterior q(x_s | x_t, x_0)."""
  guidance: float = 1.0
  """Multiplier g of classifier-free guidance: the output for the class 'none'
  plus g times the difference that the label makes. 1 is no guidance, and
  0 ignores the label. Ho and Salimans' w is g - 1."""
  clip: bool = True
  """Whether each estimate of the image is clipped to [-1, 1], the range of
  pixels. Latents of an autoencoder have another range."""

  def __post_init__(self) -> None:
    """Checks each field by itself."""
    if self.steps < 1:
      raise ValueError(f'sampler.steps must be at least 1, got {self.steps}')
    if not 0 <= self.eta <= 1:
      raise ValueError(f'sampler.eta is a share in [0, 1], got {self.eta}')
    if not 0 <= self.guidance < math.inf:
      raise ValueError(
        f'sampler.guidance must be finite and not negative, got {self.guidance}'
      )


class Steps(NamedTuple):
  """Coefficients of a sampler's steps, the noisiest first.

  A step from x_t to x_s, where s is the next time, computes

    x_s = alpha_next x_0 + direction epsilon + std noise

  where x_0 and epsilon are the estimates from x_t. The last step returns x_0.
  """

  times: np.ndarray
  """Times t [S], int32, from T - 1 downwards."""
  alpha: np.ndarray
  """alpha_t [S]."""
  sigma: np.ndarray
  """sigma_t [S]."""
  alpha_next: np.ndarray
  """alpha_s [S]; 1 for the last step."""
  direction: np.ndarray
  """Multiplier [S] of the estimated noise; 0 for the last step."""
  std: np.ndarray
  """Standard deviation [S] of the new noise; 0 for the last step."""


def make_steps(diffusion: Diffusion, sampler: Sampler) -> Steps:
  """Returns the coefficients of a sampler's steps, in float64.

  The times are spaced evenly, and the first is T - 1.

  Raises:
    ValueError: The sampler has more steps than the diffusion.

  Example:
    >>> make_steps(Diffusion(steps=10), Sampler(steps=3)).times
    array([9, 5, 2], dtype=int32)
  """
  T, S = diffusion.steps, sampler.steps
  if S > T:
    raise ValueError(
      f'sampler.steps must be at most diffusion.steps = {T}, got {S}'
    )
  times_S = np.arange(S, 0, -1) * T // S - 1
  alpha_S, sigma_S = (x[times_S] for x in diffusion.levels)
  alpha_next_S = np.append(alpha_S[1:], 1.0)
  sigma_next_S = np.append(sigma_S[1:], 0.0)
  # Variance of q(x_s | x_t, x_0), which is the noise of a step with eta 1.
  ratio_S = sigma_next_S / sigma_S
  fresh_S = ratio_S * np.sqrt(1 - (alpha_S / alpha_next_S) ** 2)
  std_S = sampler.eta * fresh_S
  direction_S = np.sqrt(np.maximum(sigma_next_S**2 - std_S**2, 0))
  return Steps(
    times_S.astype(np.int32), alpha_S, sigma_S, alpha_next_S, direction_S, std_S
  )


def denoise(
  predict: Predict,
  x: jax.Array,
  keys_B: jax.Array,
  diffusion: Diffusion,
  sampler: Sampler,
  labels_B: jax.Array | None = None,
  null_label: int | None = None,
) -> jax.Array:
  """Returns images [B, ...] from images of pure noise, by a scan over steps.

  Args:
    predict: The network with its parameters.
    x: Noisy images [B, ...] at time T - 1.
    keys_B: One random key per image, for the noise of the steps.
    diffusion: The diffusion that the network has learned.
    sampler: The steps.
    labels_B: Labels that are passed to the network, or None.
    null_label: Label of the class 'none', which guidance needs.

  Returns:
    An array like `x`.

  Raises:
    ValueError: There are more steps than times, or guidance without labels.
  """
  steps = make_steps(diffusion, sampler)
  if sampler.guidance != 1:
    if labels_B is None or null_label is None:
      raise ValueError(
        'guidance needs labels of a network with classes, got guidance='
        f'{sampler.guidance}; use 1'
      )
    predict = guided(predict, sampler.guidance, null_label)
  times_S, *others = steps
  coefficients = [jnp.asarray(c, x.dtype) for c in others]

  def step(
    x: jax.Array, now: tuple[jax.Array, list[jax.Array]]
  ) -> tuple[jax.Array, None]:
    time, (alpha, sigma, alpha_next, direction, std) = now
    times_B, alpha_B, sigma_B = (
      jnp.broadcast_to(c, x.shape[:1]) for c in (time, alpha, sigma)
    )
    output = predict(x, times_B, labels_B)
    found = estimate(
      diffusion.prediction, output.astype(x.dtype), x, alpha_B, sigma_B
    )
    if sampler.clip:
      x_0 = jnp.clip(found.x_0, -1, 1)
      # x_t = alpha x_0 + sigma epsilon must hold for the clipped x_0, too.
      found = Estimate(x_0, (x - alpha * x_0) / sigma)
    x = alpha_next * found.x_0 + direction * found.epsilon
    if sampler.eta:
      x += std * normal(keys_B, time, x.shape[1:], x.dtype)
    return x, None

  return jax.lax.scan(step, x, (jnp.asarray(times_S), coefficients))[0]


def sample(
  predict: Predict,
  shape: tuple[int, ...],
  key: jax.Array,
  diffusion: Diffusion,
  sampler: Sampler,
  labels_B: jax.Array | None = None,
  null_label: int | None = None,
) -> jax.Array:
  """Returns float32 images of a shape [B, H, W, C] from random noise.

  Image i depends only on the key, on i and on its label, whatever B is.

  Args:
    predict: The network with its parameters.
    shape: Shape of the result.
    key: Random key.
    diffusion: The diffusion that the network has learned.
    sampler: The steps.
    labels_B: Labels that are passed to the network, or None.
    null_label: Label of the class 'none', which guidance needs.

  Raises:
    ValueError: As `denoise`.
  """
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(shape[0]))
  x = normal(keys_B, diffusion.steps, shape[1:])
  return denoise(predict, x, keys_B, diffusion, sampler, labels_B, null_label)


def guided(predict: Predict, guidance: float, null_label: int) -> Predict:
  """Returns a network whose output is changed by classifier-free guidance.

  The network is evaluated once, on the batch with labels and on the same batch
  without.

  Args:
    predict: The network with its parameters.
    guidance: Multiplier of the difference that the label makes.
    null_label: Label of the class 'none'.
  """

  def predict_both(
    x: jax.Array, times_B: jax.Array, labels_B: jax.Array | None
  ) -> jax.Array:
    assert labels_B is not None
    twice = predict(
      jnp.concatenate([x, x]),
      jnp.concatenate([times_B, times_B]),
      jnp.concatenate([labels_B, jnp.full_like(labels_B, null_label)]),
    )
    with_label, without = jnp.split(twice, 2)
    return without + guidance * (with_label - without)

  return predict_both


def normal(
  keys_B: jax.Array,
  number: int | jax.Array,
  shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """Returns normal noise [B, *shape], each row from its key and a number."""

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, number), shape, dtype)

  return jax.vmap(draw)(keys_B)


def to_floats(images: jax.Array) -> jax.Array:
  """Converts pixels uint8 to float32 in [-1, 1]; keeps float32 images."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1
  return images.astype(jnp.float32)


def to_pixels(images: jax.Array) -> jax.Array:
  """Converts images in [-1, 1] to uint8, the inverse of `to_floats`."""
  return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def _rows(values_B: jax.Array, like: jax.Array) -> jax.Array:
  """Returns one value per row with the number of axes of `like` [B, ...]."""
  return jnp.expand_dims(values_B, range(1, like.ndim))
