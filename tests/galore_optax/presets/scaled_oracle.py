"""NumPy oracle of Fira and APOLLO, and a comparison with 8-bit moments."""

import jax.numpy as jnp
import numpy as np

from galore_optax import describe, quantize_state, scale_by_galore_adam
from tests.galore_optax.program import normal32, trajectory

WARM_UP_STEPS = 4


def learning_rate(t):
  """Returns a warm-up from zero in binary fractions.

  optax rounds schedules to float32, which represents binary fractions exactly.
  """
  return min(t, WARM_UP_STEPS) / 16


def correction(t):
  """Returns Adam's bias correction after t + 1 updates."""
  return np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))


class Scaled:
  """Fira or APOLLO for one matrix, without bias correction.

  Adam runs in the subspace. The ratio of its update norm to the gradient norm,
  per channel or for the whole matrix, scales either the full gradient or its
  part outside the subspace.
  """

  def __init__(self, *, whole, channels, inside, outside, limit=1.01, off=1.0):
    self.whole, self.channels, self.off = whole, channels, off
    self.inside, self.outside, self.limit = inside, outside, limit
    self.m = self.v = 0
    self.last = None

  def __call__(self, g, p):
    """Returns the update of g [i, o] for a basis p [r, i] or [r, o]."""
    left = g.shape[0] <= g.shape[1]
    low = p @ g if left else g @ p.T
    up = (lambda x: p.T @ x) if left else (lambda x: x @ p)
    self.m = 0.9 * self.m + 0.1 * low
    self.v = 0.999 * self.v + 0.001 * low**2
    adam = self.m / (np.sqrt(self.v) + 1e-6)
    axis = (0 if left else 1) if self.channels else None
    norm = lambda x: np.sqrt(np.sum(x**2, axis=axis, keepdims=True))
    scaled = (g if self.whole else g - self.off * up(low)) * norm(adam)
    scaled = scaled / (norm(low) + 1e-8)
    size = np.linalg.norm(scaled)
    if self.last is not None and size / (self.last + 1e-8) > self.limit:
      scaled, size = (
        scaled * self.limit * self.last / size,
        (self.limit * self.last),
      )
    self.last = size
    return self.inside * up(adam) + self.outside * scaled


def run(make, weights, grads, basis, steps, decay, *, restart_every=None):
  """Returns the weights after each step.

  If the rule restarts every `restart_every` steps, its bias correction restarts
  as well.
  """
  w = {name: np.array(x) for name, x in weights.items()}
  rules = {name: make() for name in w}
  m = v = 0
  trail = []
  for t in range(steps):
    lr = learning_rate(t)
    age = t % restart_every if restart_every else t
    if restart_every and age == 0:
      rules = {name: make() for name in w}
    for name in w:
      g = np.asarray(grads[name][t])
      if g.ndim == 1:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = correction(t) * m / (np.sqrt(v) + 1e-6)
      else:
        u = correction(age) * rules[name](g, np.asarray(basis[name][t]))
      w[name] = (w[name] - lr * u) * (1 - lr * decay)
    trail.append(dict(w))
  return {name: np.stack([x[name] for x in trail]) for name in w}


def in_eight_bits(make, shape, steps=6):
  """Compares a method with 8-bit moments with the same method in float32.

  Args:
    make: returns the method for a given inner optimizer.
    shape: shape of the weight.
    steps: number of updates.

  Returns:
    For each step, the distance of the two weights relative to how far they
    moved; and the bytes of the 8-bit state.
  """
  grads, w = {'w': normal32((steps, *shape))}, {'w': jnp.zeros(shape)}
  low = make(quantize_state(scale_by_galore_adam()))
  (ours, _), (want, _) = (
    trajectory(tx, w, grads) for tx in (low, make(scale_by_galore_adam()))
  )
  apart = np.linalg.norm(ours['w'] - want['w'], axis=(1, 2))
  (row,) = describe(low, w)
  return apart / np.linalg.norm(want['w'], axis=(1, 2)), row.bytes
