"""GaLore-Adafactor equals the PyTorch reference at every step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import galore_adafactor

pytestmark = pytest.mark.parity

torch = pytest.importorskip('torch')
galore_torch = pytest.importorskip('galore_torch')
galore_projector = pytest.importorskip('galore_torch.galore_projector')

# Flax kernels are [in, out]; torch stores the transpose.
SHAPES = {'tall': (23, 13), 'wide': (13, 29), 'square': (17, 17)}
PLAIN = {'embed': (11, 7), 'bias': (19,)}
# Refreshes at steps 0, 3, ..., 12.
RANK, GAP, SCALE, STEPS, LR = 5, 3, 0.25, 13, 0.5


def sequence():
  """Returns weights and one gradient per step, with decaying spectra."""
  rng = np.random.default_rng(0)

  def draw(shape, size):
    x = size * rng.normal(size=shape)
    if len(shape) == 2:
      u, _, vt = np.linalg.svd(x, full_matrices=False)
      x = size * (u * 0.7 ** np.arange(len(vt))) @ vt
    return x.astype(np.float32)

  shapes = SHAPES | PLAIN
  params = {k: draw(shape, 0.5) for k, shape in shapes.items()}
  grads = [
    {k: draw(shape, 1e-2) for k, shape in shapes.items()} for _ in range(STEPS)
  ]
  return params, grads


def reference(params, grads, *, side, **options):
  """Yields the reference's weights after each step."""
  weights = {
    k: torch.nn.Parameter(torch.tensor(w.T.copy())) for k, w in params.items()
  }
  group = dict(rank=RANK, update_proj_gap=GAP, scale=SCALE, proj_type=side)
  optimizer = galore_torch.GaLoreAdafactor(
    [
      {'params': [weights[k] for k in SHAPES], **group},
      {'params': [weights[k] for k in PLAIN]},
    ],
    lr=LR,
    relative_step=False,
    warmup_init=False,
    **options,
  )
  for g in grads:
    for k, w in weights.items():
      w.grad = torch.tensor(g[k].T.copy())
    optimizer.step()
    yield {k: w.detach().numpy().T for k, w in weights.items()}


# The reference's `reverse_std` takes the wrong branch unless the low-rank
# gradient of a wide weight is wider than it is tall. These shapes avoid the
# wrong branch, since 13 > 5.
@pytest.mark.parametrize(
  ('b1', 'scale_parameter', 'weight_decay', 'side'),
  [
    *itertools.product((None, 0.9), (False, True), (0.0, 0.1), ('std',)),
    (0.9, True, 0.1, 'reverse_std'),
    (0.9, True, 0.1, 'full'),
  ],
)
def test_equals_reference(
  signs_by_rule, b1, scale_parameter, weight_decay, side
):
  params, grads = sequence()
  common = dict(scale_parameter=scale_parameter, weight_decay=weight_decay)
  tx = galore_adafactor(
    LR,
    b1=b1,
    **common,
    rank=RANK,
    gap=GAP,
    scale=SCALE,
    side=side,
    targets=list(SHAPES),
  )
  ours = jax.tree.map(jnp.asarray, params)
  state = tx.init(ours)
  update = jax.jit(tx.update)
  before = params
  expected = reference(params, grads, side=side, beta1=b1, **common)
  for step, want in enumerate(expected):
    updates, state = update(grads[step], state, ours)
    ours = optax.apply_updates(ours, updates)
    for name, w in want.items():
      # The tolerance allows for two different float32 SVDs, relative to the
      # weight's largest change so far, and for one ulp of rounding of the
      # weight per step.
      change = np.max(np.abs(w - before[name]))
      ulps = (step + 1) * np.spacing(np.max(np.abs(w)))
      assert change > 100 * ulps
      np.testing.assert_allclose(
        ours[name],
        w,
        rtol=0,
        atol=1e-5 * change + ulps,
        err_msg=f'{name} {step}',
      )
