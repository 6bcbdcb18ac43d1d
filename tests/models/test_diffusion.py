"""Tests the mathematics of diffusion against float64 formulas of the papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import diffusion as lib
from models.diffusion import Diffusion, Sampler
from tests.rounding import assert_close

SHAPE = (4, 3, 3, 2)
_SCHEDULES = pytest.mark.parametrize('schedule', ['cosine', 'linear'])
_KINDS = pytest.mark.parametrize('prediction', ['epsilon', 'v'])


def _normal(seed, shape=SHAPE):
  return np.random.default_rng(seed).standard_normal(shape)


def _images():
  return np.clip(0.5 * _normal(0), -1, 1)


def test_the_linear_schedule_is_that_of_ddpm():
  beta = np.linspace(1e-4, 0.02, 1000)
  expected = np.array([np.prod(1 - beta[: t + 1]) for t in range(1000)])
  found = Diffusion(schedule='linear').levels
  np.testing.assert_allclose(found.alpha, np.sqrt(expected), rtol=1e-12)
  # Fewer steps end at about the same level.
  few = Diffusion(schedule='linear', steps=100).levels
  np.testing.assert_allclose(
    np.log(few.alpha[-1]), np.log(found.alpha[-1]), rtol=0.1
  )


def test_the_cosine_schedule_is_that_of_nichol_and_dhariwal():
  T, s = 200, 0.008
  t = np.arange(1, T + 1)
  share = lambda t: np.cos((t / T + s) / (1 + s) * np.pi / 2) ** 2
  found = Diffusion(steps=T).levels
  # The limit of a step's variance changes only the last level.
  expected = np.sqrt(share(t) / share(0))
  np.testing.assert_allclose(found.alpha[:-1], expected[:-1], rtol=1e-10)
  last = np.sqrt(1 - 0.999) * found.alpha[-2]
  np.testing.assert_allclose(found.alpha[-1], last, rtol=1e-10)


@_SCHEDULES
@pytest.mark.parametrize('steps', [21, 1000])
def test_levels_keep_the_variance_and_get_noisier(schedule, steps):
  alpha, sigma = Diffusion(schedule=schedule, steps=steps).levels
  assert alpha.dtype == np.float64 and alpha.shape == (steps,)
  np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)
  assert (np.diff(alpha) < 0).all() and (np.diff(sigma) > 0).all()
  assert alpha[0] > 0.99 * (steps > 21) and 0 < alpha[-1] < 0.02


@_SCHEDULES
def test_noise_of_all_steps_at_once_is_the_noise_of_single_steps(schedule):
  """q(x_t | x_0) has the moments of the chain q(x_t | x_(t-1))."""
  alpha, sigma = Diffusion(schedule=schedule, steps=30).levels
  beta = 1 - (alpha / np.append(1.0, alpha[:-1])) ** 2
  mean, variance = 1.0, 0.0
  for t in range(30):
    mean, variance = (
      np.sqrt(1 - beta[t]) * mean,
      (1 - beta[t]) * variance + beta[t],
    )
    np.testing.assert_allclose(mean, alpha[t], rtol=1e-12)
    np.testing.assert_allclose(variance, sigma[t] ** 2, rtol=1e-12)


@_KINDS
def test_the_target_means_the_image_and_the_noise(prediction):
  x_0, epsilon = _images(), _normal(1)
  alpha, sigma = np.cos([0.1, 0.7, 1.2, 1.5]), np.sin([0.1, 0.7, 1.2, 1.5])
  with jax.enable_x64(True):
    args = [jnp.asarray(x) for x in (x_0, epsilon, alpha, sigma)]
    x_t = lib.mix(*args)
    output = lib.target(prediction, *args)
    found = lib.estimate(prediction, output, x_t, *args[2:])
    rows = lambda a: a[:, None, None, None]
    np.testing.assert_allclose(
      x_t, rows(alpha) * x_0 + rows(sigma) * epsilon, rtol=1e-14
    )
    if prediction == 'v':
      np.testing.assert_allclose(
        output, rows(alpha) * epsilon - rows(sigma) * x_0, rtol=1e-14
      )
    np.testing.assert_allclose(found.x_0, x_0, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.epsilon, epsilon, rtol=0, atol=1e-12)


def test_epsilon_and_v_mean_the_same_estimate():
  """Any output, not only a target, converts to the other kind and back."""
  x_t, output = _normal(2), _normal(3)
  alpha, sigma = np.cos([0.1, 0.7, 1.2, 1.5]), np.sin([0.1, 0.7, 1.2, 1.5])
  with jax.enable_x64(True):
    levels = jnp.asarray(alpha), jnp.asarray(sigma)
    first = lib.estimate('epsilon', jnp.asarray(output), x_t, *levels)
    v = lib.target('v', *first, *levels)
    second = lib.estimate('v', v, x_t, *levels)
    np.testing.assert_allclose(second.x_0, first.x_0, rtol=1e-9)
    np.testing.assert_allclose(second.epsilon, output, rtol=1e-9, atol=1e-9)


def test_loss_weights_are_errors_of_the_image():
  """A weighted error of epsilon, or of v, is min(snr, 5) times that of x_0."""
  alpha, sigma = Diffusion(steps=50).levels
  snr = alpha**2 / sigma**2
  error_of_x_0 = {'epsilon': snr, 'v': snr + 1}
  for prediction, per_error in error_of_x_0.items():
    kind = Diffusion(steps=50, prediction=prediction, min_snr=5.0)
    found = kind.loss_weights(jnp.float32(alpha), jnp.float32(sigma))
    expected = np.minimum(snr, 5) / per_error
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    simple = Diffusion(steps=50, prediction=prediction)
    assert np.all(simple.loss_weights(jnp.ones(3), jnp.ones(3)) == 1)


def _denoise(predict, x, diffusion, sampler, **labels):
  """Returns the images of `denoise` in float64."""
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), len(x))
    run = lambda x: lib.denoise(predict, x, keys, diffusion, sampler, **labels)
    return np.asarray(jax.jit(run)(jnp.asarray(x)))


@_SCHEDULES
@_KINDS
@pytest.mark.parametrize('steps', [1, 7, 30])
def test_ddim_with_the_true_noise_recovers_the_image(
  schedule, prediction, steps
):
  """Each step of DDIM stays on the line from x_0 to epsilon."""
  x_0, epsilon = _images(), _normal(1)
  diffusion = Diffusion(schedule=schedule, steps=30, prediction=prediction)
  alpha, sigma = diffusion.levels

  def predict(x, times, labels):
    levels = [jnp.asarray(level)[times] for level in (alpha, sigma)]
    expected = lib.mix(x_0, epsilon, *levels)
    # The network is correct only on the line.
    output = lib.target(prediction, x_0, epsilon, *levels)
    return jnp.where(jnp.max(jnp.abs(x - expected)) < 1e-9, output, jnp.nan)

  x = alpha[-1] * x_0 + sigma[-1] * epsilon
  found = _denoise(predict, x, diffusion, Sampler(steps=steps, clip=False))
  np.testing.assert_allclose(found, x_0, rtol=0, atol=1e-8)


@_SCHEDULES
def test_ancestral_steps_are_the_posterior(schedule):
  """With eta 1 and all steps, a step has the moments of DDPM's equation 7."""
  T = 40
  diffusion = Diffusion(schedule=schedule, steps=T)
  alpha, sigma = diffusion.levels
  steps = lib.make_steps(diffusion, Sampler(steps=T, eta=1.0))
  np.testing.assert_array_equal(steps.times, np.arange(T)[::-1])
  x_0, x_t = _images(), _normal(1)
  before = np.append(1.0, alpha[:-1]) ** 2
  beta = 1 - alpha**2 / before
  for i, t in enumerate(steps.times):
    mean = np.sqrt(before[t]) * beta[t] / (1 - alpha[t] ** 2) * x_0
    mean += np.sqrt(1 - beta[t]) * (1 - before[t]) / (1 - alpha[t] ** 2) * x_t
    variance = (1 - before[t]) / (1 - alpha[t] ** 2) * beta[t]
    epsilon = (x_t - alpha[t] * x_0) / sigma[t]
    found = steps.alpha_next[i] * x_0 + steps.direction[i] * epsilon
    np.testing.assert_allclose(found, mean, rtol=0, atol=1e-9)
    np.testing.assert_allclose(steps.std[i] ** 2, variance, rtol=1e-9)


def test_a_step_draws_the_posterior():
  """Samples of one ancestral step have its mean and standard deviation."""
  diffusion = Diffusion(steps=10)
  sampler = Sampler(steps=10, eta=1.0, clip=False)
  steps = lib.make_steps(diffusion, sampler)
  kept = []

  def predict(x, times, labels):
    jax.debug.callback(lambda x: kept.append(np.asarray(x)), x, ordered=True)
    return jnp.full_like(x, 0.25)

  x = np.full((4000, 1), 0.5)
  _denoise(predict, x, diffusion, sampler)
  # The input of the second call is the result of the first step.
  x_0 = (0.5 - steps.sigma[0] * 0.25) / steps.alpha[0]
  mean = steps.alpha_next[0] * x_0 + steps.direction[0] * 0.25
  # Standard errors of a mean and of a deviation of 4,000 draws, times 4.
  error = 4 * steps.std[0] / np.sqrt(4000)
  assert abs(kept[1].mean() - mean) < error
  assert abs(kept[1].std() - steps.std[0]) < error


@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('steps', [1, 6, 25])
def test_each_step_keeps_the_level_of_noise(eta, steps):
  """The noise of x_s has the variance sigma_s^2, whatever eta is."""
  diffusion = Diffusion(steps=25)
  found = lib.make_steps(diffusion, Sampler(steps=steps, eta=eta))
  assert len(found.times) == steps and found.times[0] == 24
  assert (np.diff(found.times) < 0).all()
  sigma_next = np.append(found.sigma[1:], 0)
  total = found.direction**2 + found.std**2
  np.testing.assert_allclose(total, sigma_next**2, rtol=1e-12)
  # The last step returns the estimate of the image.
  assert found.alpha_next[-1] == 1
  assert found.direction[-1] == found.std[-1] == 0
  if not eta:
    assert not found.std.any()


def test_clipped_images_stay_in_range_and_on_the_line():
  diffusion = Diffusion(steps=12)
  far = lambda x, times, labels: 5 * jnp.ones_like(x)
  x = _normal(1)
  found = _denoise(far, x, diffusion, Sampler(steps=12))
  assert np.abs(found).max() <= 1
  # The first step, by hand: epsilon is computed again from the clipped image.
  steps = lib.make_steps(diffusion, Sampler(steps=12))
  x_0 = np.clip((x - steps.sigma[0] * 5) / steps.alpha[0], -1, 1)
  epsilon = (x - steps.alpha[0] * x_0) / steps.sigma[0]
  expected = steps.alpha_next[0] * x_0 + steps.direction[0] * epsilon
  kept = []

  def watched(x, times, labels):
    jax.debug.callback(lambda x: kept.append(np.asarray(x)), x, ordered=True)
    return far(x, times, labels)

  _denoise(watched, x, diffusion, Sampler(steps=12))
  np.testing.assert_allclose(kept[1], expected, rtol=0, atol=1e-12)


def _by_label(x, times, labels):
  """A network whose output depends on the label."""
  scale = (1.0 + labels.astype(x.dtype)) / (2.0 + times.astype(x.dtype))
  return jnp.expand_dims(scale, range(1, x.ndim)) * x


def test_guidance_extrapolates_from_the_class_none():
  x, times = jnp.float32(_normal(1)), jnp.int32([3, 2, 1, 0])
  labels = jnp.int32([0, 2, 1, 3])
  with_label = _by_label(x, times, labels)
  without = _by_label(x, times, jnp.full(4, 9))
  for guidance in (0.0, 1.0, 2.5):
    found = lib.guided(_by_label, guidance, 9)(x, times, labels)
    expected = without + guidance * (with_label - without)
    assert_close(found, expected, 4)


def test_guidance_of_one_runs_the_network_once():
  sizes = []

  def predict(x, times, labels):
    sizes.append(len(x))
    return _by_label(x, times, labels)

  labels = {'labels_B': np.int32([0, 1, 2, 3]), 'null_label': 4}
  diffusion = Diffusion(steps=5)
  for guidance, rows in ((1.0, 4), (2.0, 8)):
    sizes.clear()
    sampler = Sampler(steps=5, guidance=guidance)
    _denoise(predict, _normal(1), diffusion, sampler, **labels)
    assert {*sizes} == {rows}


def test_guided_v_is_guided_epsilon():
  """Guidance commutes with the conversion, because that is affine."""
  x_t = _normal(1)
  alpha, sigma = np.cos([0.1, 0.7, 1.2, 1.5]), np.sin([0.1, 0.7, 1.2, 1.5])
  with jax.enable_x64(True):
    levels = jnp.asarray(alpha), jnp.asarray(sigma)
    outputs = [jnp.asarray(_normal(seed)) for seed in (2, 3)]
    one, two = (lib.estimate('v', v, x_t, *levels) for v in outputs)
    v = outputs[0] + 3 * (outputs[1] - outputs[0])
    found = lib.estimate('v', v, x_t, *levels)
    expected = one.epsilon + 3 * (two.epsilon - one.epsilon)
    np.testing.assert_allclose(found.epsilon, expected, rtol=0, atol=1e-12)


@functools.cache
def _sampled(eta, rows):
  diffusion = Diffusion(steps=9)
  sampler = Sampler(steps=4, eta=eta, clip=False)
  predict = lambda x, times, labels: 0.3 * x
  shape = (rows, 3, 3, 1)
  return jax.jit(
    lambda key: lib.sample(predict, shape, key, diffusion, sampler)
  )


@pytest.mark.parametrize('eta', [0.0, 1.0])
def test_a_sample_depends_on_its_key_and_its_row_only(eta):
  four = _sampled(eta, 4)(jax.random.key(0))
  np.testing.assert_array_equal(four, _sampled(eta, 4)(jax.random.key(0)))
  two = _sampled(eta, 2)(jax.random.key(0))
  np.testing.assert_array_equal(two, four[:2])
  other = _sampled(eta, 4)(jax.random.key(1))
  assert np.abs(other - four).min() > 0
  assert np.abs(four[0] - four[1]).min() > 0


def test_ddim_draws_no_noise_after_the_first():
  """A step without noise does not even generate it."""
  diffusion = Diffusion(steps=9)
  x, keys = jnp.ones((2, 3)), jax.random.split(jax.random.key(0), 2)

  def text(eta):
    predict = lambda x, times, labels: x
    run = lambda x, keys: lib.denoise(
      predict, x, keys, diffusion, Sampler(steps=4, eta=eta)
    )
    return str(jax.make_jaxpr(run)(x, keys))

  assert 'random' not in text(0.0)
  assert 'random' in text(0.5)


def test_a_sampler_is_one_scan():
  """The network is traced once, for any number of steps."""
  traced = []

  def predict(x, times, labels):
    traced.append(times.shape)
    return x

  _denoise(predict, _normal(1), Diffusion(steps=50), Sampler(steps=50))
  assert traced == [(4,)]


def test_pixels_survive_the_way_to_floats_and_back():
  pixels = jnp.arange(256, dtype=jnp.uint8)
  floats = lib.to_floats(pixels)
  assert floats.dtype == jnp.float32
  assert floats[0] == -1 and floats[-1] == 1
  np.testing.assert_array_equal(lib.to_pixels(floats), pixels)
  np.testing.assert_array_equal(lib.to_floats(floats), floats)
  np.testing.assert_array_equal(lib.to_pixels(jnp.float32([-3, 3])), [0, 255])


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Diffusion(steps=0), 'steps must be at least 1 .*got 0'),
    (
      lambda: Diffusion(schedule='linear', steps=20),
      "at least 21 with the schedule 'linear', got 20",
    ),
    (lambda: Diffusion(label_dropout=1.0), r'share in \[0, 1\), got 1.0'),
    (lambda: Diffusion(min_snr=0.0), 'min_snr must be positive .*got 0.0'),
    (lambda: Sampler(steps=0), 'sampler.steps must be at least 1, got 0'),
    (lambda: Sampler(eta=1.5), r'eta is a share in \[0, 1\], got 1.5'),
    (lambda: Sampler(guidance=-1.0), 'guidance must be finite .*got -1.0'),
    (
      lambda: lib.make_steps(Diffusion(steps=10), Sampler(steps=11)),
      'at most diffusion.steps = 10, got 11',
    ),
    (
      lambda: lib.denoise(
        _by_label, jnp.ones((1, 2)), None, Diffusion(), Sampler(guidance=2.0)
      ),
      'guidance needs labels .*got guidance=2.0; use 1',
    ),
  ],
)
def test_what_is_impossible_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
