"""`galore_adafactor`: a float64 oracle, limits, stacks, and its state."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import galore_optax
from galore_optax import galore_adafactor
from galore_optax.presets import adafactor
from tests.galore_optax.program import each
from tests.rounding import units

SHAPES = {'tall': (11, 5), 'wide': (5, 9), 'square': (7, 7)}
RANK, GAP, SCALE, STEPS = 3, 2, 0.25, 7  # Refreshes at steps 0, 2, 4 and 6.
OPTIONS = dict(rank=RANK, gap=GAP, scale=SCALE)


def normal(seed, shape):
  return np.random.default_rng(seed).normal(size=shape)


def trajectory(tx, params, grads):
  """Returns the weights after each step, and the last state."""
  state, history = tx.init(params), []
  step = jax.jit(tx.update)
  for g in grads:
    updates, state = step(g, state, params)
    params = optax.apply_updates(params, updates)
    history.append(params)
  return history, state


def schedule(count):
  return 0.1 / (1.0 + count)


def basis_of(g_mn, old_rm):
  """Returns the leading left singular vectors as rows, with fixed signs.

  In each row of the first basis, the entry of largest magnitude is positive.
  Each later row has a positive product with the previous row.
  """
  rows = np.linalg.svd(g_mn)[0][:, :RANK].T
  if old_rm is None:
    peaks = np.argmax(np.abs(rows), axis=1, keepdims=True)
    sign = np.sign(np.take_along_axis(rows, peaks, 1))
  else:
    sign = np.sign(np.sum(rows * old_rm, axis=1, keepdims=True))
  return sign * rows


def rms(x):
  return np.sqrt(np.mean(x**2))


def oracle(w, grads, *, b1, scale_parameter, weight_decay, is_projected=True):
  """Yields the weight after each step of Adafactor in float64.

  The order of operations is that of the PyTorch reference.
  """
  left = w.ndim == 2 and w.shape[0] <= w.shape[1]
  basis, row, col, full, mu = None, 0.0, 0.0, 0.0, 0.0
  for t, g in enumerate(grads, start=1):
    if is_projected:
      g_mn = g if left else g.T
      if (t - 1) % GAP == 0:
        basis = basis_of(g_mn, basis)
      g = basis @ g_mn
    decay = 1 - t**-0.8
    square = g**2 + 1e-30
    if g.ndim == 2:
      row = decay * row + (1 - decay) * square.mean(axis=1)
      col = decay * col + (1 - decay) * square.mean(axis=0)
      u = g / np.sqrt(np.outer(row, col) / row.mean())
    else:
      full = decay * full + (1 - decay) * square
      u = g / np.sqrt(full)
    u = u / max(1.0, rms(u))
    lr = schedule(t - 1)
    if scale_parameter:
      lr *= max(1e-3, rms(w))
    u = lr * u
    if b1:
      u = mu = b1 * mu + (1 - b1) * u
    if is_projected:
      u = SCALE * basis.T @ u
      u = u if left else u.T
    w = w - weight_decay * lr * w - u
    yield w


@each(
  'b1, scale_parameter, weight_decay',
  itertools.product([None, 0.9], [False, True], [0.0, 0.3]),
  quick=[(0.9, True, 0.3)],
)
def test_equals_float64_oracle(b1, scale_parameter, weight_decay):
  options = dict(
    b1=b1, scale_parameter=scale_parameter, weight_decay=weight_decay
  )
  shapes = SHAPES | {'bias': (6,), 'embedding': (13, 4)}
  params = {k: normal(i, s) for i, (k, s) in enumerate(shapes.items())}
  # The RMS of this weight is below the minimum of the parameter scale.
  params['wide'] *= 1e-5
  grads = [
    {k: normal((i, t), s) for i, (k, s) in enumerate(shapes.items())}
    for t in range(STEPS)
  ]
  with jax.enable_x64(True):
    tx = galore_adafactor(schedule, **options, **OPTIONS)
    history, state = trajectory(
      tx, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, grads)
    )
    for name in shapes:
      is_projected = name in SHAPES
      assert (state.basis[name] != optax.MaskedNode()) == is_projected
      expected = oracle(
        params[name],
        [g[name] for g in grads],
        is_projected=is_projected,
        **options,
      )
      for step, want in enumerate(expected):
        # Preset and oracle run in float64. The tolerance allows for rounding in
        # their SVDs.
        np.testing.assert_allclose(
          history[step][name], want, rtol=1e-10, atol=1e-12, err_msg=name
        )


@each(
  'scale_parameter, moments',
  [
    (scale, moments) for scale in (False, True) for moments in ('keep', 'reset')
  ],
  quick=[(True, 'reset')],
)
def test_stack_equals_loop(scale_parameter, moments):
  layers = 3
  shapes = {
    'mlp/kernel': (5, 9),
    'norm/scale': (8,),
    'embed': (6, 4),
    'gate/kernel': (3, 2),
  }
  # The layers differ in magnitude, so that an RMS over the whole stack would
  # give wrong results.
  size = 10.0 ** np.arange(-layers, 0)
  stacked = lambda seed: {
    k: jnp.float32(
      normal((seed, i), (layers, *s)) * size.reshape(-1, *[1] * len(s))
    )
    for i, (k, s) in enumerate(shapes.items())
  }
  grads = [stacked(t) for t in range(1, STEPS)]
  tx = galore_adafactor(
    schedule,
    b1=0.9,
    scale_parameter=scale_parameter,
    weight_decay=0.1,
    moments=moments,
    **OPTIONS,
  )
  history, _ = trajectory(tx, stacked(0), grads)
  for layer in range(layers):
    # NumPy compiles nothing.
    one = lambda tree, at=layer: jax.tree.map(lambda x: np.asarray(x)[at], tree)
    alone, _ = trajectory(tx, one(stacked(0)), [one(g) for g in grads])
    # The tolerance allows for float32 rounding, because a batched product sums
    # in a different order.
    chex.assert_trees_all_close(
      [one(h) for h in history], alone, rtol=1e-5, atol=1e-8
    )


def test_axes_of_an_attention_kernel():
  d, heads, head_dim = 7, 2, 5
  w, g = (np.float32(normal(i, (d, heads, head_dim))) for i in range(2))
  options = dict(
    b1=0.9, scale_parameter=True, weight_decay=0.3, gap=GAP, rank=RANK
  )
  flat = lambda x: {'q': jnp.asarray(x.reshape(d, heads * head_dim))}
  want, _ = trajectory(
    galore_adafactor(0.1, **options), flat(w), [flat(g), flat(-g)]
  )
  tx = galore_adafactor(0.1, axes={'q': (0, (1, 2))}, **options)
  have, _ = trajectory(
    tx, {'q': jnp.asarray(w)}, [{'q': jnp.asarray(g)}, {'q': jnp.asarray(-g)}]
  )
  for a, b in zip(have, want, strict=True):
    # The tolerance allows for computing the RMS over the axes in a different
    # order.
    np.testing.assert_allclose(flat(a['q'])['q'], b['q'], rtol=1e-6)


def test_reset_restarts_moments_at_a_refresh():
  params = {k: jnp.float32(normal(0, s)) for k, s in SHAPES.items()}
  grads = [
    {k: jnp.float32(normal(t, s)) for k, s in SHAPES.items()} for t in range(4)
  ]
  tx = galore_adafactor(0.1, b1=0.9, moments='reset', **OPTIONS)
  history, _ = trajectory(tx, params, grads)
  again, _ = trajectory(tx, history[1], grads[2:])
  # The second run has no previous basis to take signs from, but updates do not
  # depend on the signs of a basis.
  chex.assert_trees_all_close(history[2:], again, rtol=1e-5, atol=1e-6)


@each(
  'b1, scale_parameter',
  itertools.product([None, 0.9], [False, True]),
  quick=[(0.9, True)],
)
def test_unprojected_equals_optax(b1, scale_parameter):
  # optax clips and scales whole leaves and applies decay without the learning
  # rate. The results therefore agree only for single matrices and vectors, and
  # without decay.
  shapes = {'kernel': (11, 5), 'embed': (5, 9), 'norm': (6,), 'low': (4, 5)}
  params = {k: jnp.float32(normal(1, s)) for k, s in shapes.items()}
  grads = [
    {k: jnp.float32(normal(t, s)) for k, s in shapes.items()} for t in range(5)
  ]
  ours = galore_adafactor(
    schedule, b1=b1, scale_parameter=scale_parameter, rank=2, targets='low'
  )
  theirs = optax.adafactor(
    schedule,
    min_dim_size_to_factor=1,
    multiply_by_parameter_scale=scale_parameter,
    momentum=b1,
  )
  have, want = (trajectory(tx, params, grads)[0] for tx in (ours, theirs))
  drop = lambda h: {k: x for k, x in h.items() if k != 'low'}
  # The tolerance allows for float32 rounding, because optax evaluates the
  # formula in a different order.
  chex.assert_trees_all_close(
    [drop(h) for h in have], [drop(h) for h in want], rtol=1e-5, atol=1e-7
  )


def test_clip_threshold_bounds_the_rms_of_each_matrix():
  tx = adafactor.scale_by_galore_factored_rms(clip_threshold=0.5)
  g = {'kernel': jnp.float32(normal(0, (2, 3, 5)))}
  u, _ = jax.jit(tx.update)(g, tx.init(g))
  # Before clipping, the RMS at the first step is near 1. The tolerance allows
  # for rounding in its mean of 15 squares.
  rms = np.sqrt(np.mean(np.square(u['kernel']), axis=(1, 2)))
  np.testing.assert_allclose(rms, 0.5, rtol=units(15))


@pytest.mark.parametrize('b1', [None, 0.9])
def test_state_bytes(b1):
  layers, i, o, d, vocab = 2, 16, 40, 16, 50
  params = {
    'norm': {'scale': jnp.zeros((layers, d), jnp.bfloat16)},
    'embed': jnp.zeros((vocab, d), jnp.bfloat16),
    'up': jax.ShapeDtypeStruct((layers, i, o), jnp.bfloat16),
  }
  tx = galore_adafactor(0.1, b1=b1, rank=8)
  rows = {row.path: row for row in galore_optax.describe(tx, params)}
  momentum = bool(b1)
  assert rows['up'].projected_shape == (layers, 8, o)
  assert rows['up'].basis_bytes == 2 * layers * 8 * i
  assert rows['up'].moment_bytes == (4 * layers * (8 + o + momentum * 8 * o))
  assert rows['embed'].bytes == 4 * (vocab + d + momentum * vocab * d)
  assert rows['norm/scale'].bytes == 4 * layers * d * (1 + momentum)
  assert all(x.size for x in jax.tree.leaves(tx.init(params)))


def test_moments_and_updates_have_their_dtypes():
  params = {'w': jnp.ones((5, 9), jnp.bfloat16)}
  tx = galore_adafactor(0.1, b1=0.9, scale_parameter=True, **OPTIONS)
  state = jax.eval_shape(tx.init, params)
  updates, state = jax.eval_shape(tx.update, params, state, params)
  assert updates['w'].dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(state.inner)} == {
    jnp.dtype('float32'),
    jnp.dtype('int32'),
  }


def test_bfloat16_gradients_are_rescaled_in_float32():
  tx = adafactor.scale_by_galore_factored_rms()
  g = {'kernel': jnp.asarray(normal(0, (5, 9)), jnp.bfloat16)}
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), g)
  step = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
  # The tolerance allows for one rounding to bfloat16, by at most half a unit of
  # each entry.
  got, exact = np.float64(step(g)['kernel']), np.float64(step(wide)['kernel'])
  assert step(g)['kernel'].dtype == jnp.bfloat16
  np.testing.assert_allclose(
    got, exact, rtol=units(0.5, jnp.bfloat16) + units(45)
  )


@each('moments', ['keep', 'reset'], quick=['reset'])
def test_traces_once(moments):
  params = {k: jnp.float32(normal(0, s)) for k, s in SHAPES.items()}
  tx = galore_adafactor(
    schedule, b1=0.9, scale_parameter=True, moments=moments, **OPTIONS
  )

  # The trace counter is keyed by function name, so both parametrizations of the
  # test share it.
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=1)
  def step(g, state, params):
    return tx.update(g, state, params)

  state = tx.init(params)
  for _ in range(GAP + 2):
    _, state = step(params, state, params)


# test_contract.py has quick cases of a checkpoint.
@pytest.mark.slow
def test_orbax_round_trip_resumes_bit_equal(tmp_path):
  params = {
    'up': jnp.float32(normal(0, (2, 5, 9))),
    'norm': {'scale': jnp.float32(normal(1, (2, 6)))},
  }
  tx = galore_adafactor(schedule, b1=0.9, scale_parameter=True, **OPTIONS)
  _, state = trajectory(tx, params, [params] * 3)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(
      tmp_path / 'state', jax.eval_shape(tx.init, params)
    )
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  update = jax.jit(tx.update)
  chex.assert_trees_all_equal(
    update(params, restored, params), update(params, state, params)
  )


@each('moments', ['keep', 'reset'], quick=['keep'])
def test_a_part_of_the_tree_equals_its_leaves_in_the_whole(moments):
  params = {
    'blocks': {'up': jnp.float32(normal(0, (5, 9)))},
    'embed': jnp.float32(normal(1, (6, 4))),
  }
  tx = galore_adafactor(
    0.1, b1=0.9, scale_parameter=True, moments=moments, **OPTIONS
  )
  whole, _ = trajectory(tx, params, [params] * 3)
  for name in params:
    elsewhere = {k: galore_optax.Elsewhere() for k in params}
    part = elsewhere | {name: params[name]}
    alone, _ = trajectory(tx, part, [part] * 3)
    for one, all_ in zip(alone, whole, strict=True):
      # The tolerance allows for rounding, because XLA may fuse the program of a
      # part differently.
      chex.assert_trees_all_close(one[name], all_[name], rtol=1e-6)


def test_factored_rms_is_an_inner_of_its_own():
  # Composing the transformation with pieces of optax gives the same updates as
  # the preset. `galore` determines the decay of this composition by a trial
  # run.
  params = {k: jnp.float32(normal(0, s)) for k, s in SHAPES.items()}
  grads = [
    {k: jnp.float32(normal(t, s)) for k, s in SHAPES.items()} for t in range(5)
  ]
  lr, decay = 0.1, 0.3
  inner = optax.chain(
    galore_optax.scale_by_galore_factored_rms(),
    optax.scale_by_learning_rate(lr),
    optax.ema(0.9, debias=False),
    optax.add_decayed_weights(-lr * decay),
  )
  composed = galore_optax.galore(inner, **OPTIONS)
  preset = galore_adafactor(lr, b1=0.9, weight_decay=decay, **OPTIONS)
  chex.assert_trees_all_close(
    trajectory(composed, params, grads)[0],
    trajectory(preset, params, grads)[0],
    # float32 rounding: decay is added before the cast in one and after it in
    # the other
    rtol=1e-5,
  )


def test_missing_params_raise():
  params = {'w': jnp.ones((5, 9))}
  tx = galore_adafactor(0.1, **OPTIONS)
  with pytest.raises(ValueError, match='needs params'):
    tx.update(params, tx.init(params))
