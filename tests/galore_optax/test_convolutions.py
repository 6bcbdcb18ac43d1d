"""A convolution is one matrix, or a Tucker-2 decomposition with shared bases.

The NumPy oracle below computes the decomposition in float64: projection, Adam,
refresh and rotation of moments.
"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import galore_optax as go
from galore_optax import SharedBasis, describe, galore
from tests.galore_optax.every import PRESETS, PROJECTING, build
from tests.galore_optax.program import Adam, each, normal, trajectory

KERNEL = (3, 2, 7, 5)
TUCKER = {'.*': SharedBasis(side='both')}


@pytest.fixture(autouse=True)
def x64():
  with jax.enable_x64(True):
    yield


def conv(x, name='kernel'):
  return {'conv': {name: jnp.asarray(x)}}


def updates_of(tx, params, grads):
  """Returns the weights after each step and the last state."""
  weights, states = trajectory(tx, params, grads)
  return weights, jax.tree.map(lambda x: x[-1], states)


def close(one, other, rtol=1e-10):
  # The tolerance allows for a few hundred float64 sums, which Adam amplifies
  # where a gradient is small.
  chex.assert_trees_all_close(one, other, rtol=rtol, atol=rtol)


# One matrix.


def as_matrix(x):
  return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def to_torch(x):
  """Returns kernels [..., kh, kw, in, out] as [..., out, in, kh, kw]."""
  return np.moveaxis(x, (-1, -2), (-4, -3))


def matrix_of_torch(x):
  """Returns kernels [..., out, in, kh, kw] as [..., in kh kw, out]."""
  x = np.moveaxis(x, -4, -1)
  return x.reshape(*x.shape[:-4], -1, x.shape[-1])


LOW = dict(rank=3, gap=2)
RULES = {
  'svd': lambda **axes: galore(optax.adamw(0.1), **LOW, **axes),
  'random': lambda **axes: galore(
    optax.adamw(0.1), subspace='random', **LOW, **axes
  ),
  'rotate': lambda **axes: galore(
    optax.adamw(0.1), side='both', moments='rotate', **LOW, **axes
  ),
  '8 bits': lambda **axes: build('Galore8bit', min_size=0, **LOW, **axes),
  'fira': lambda **axes: build('Fira', **LOW, **axes),
}


@each(
  ('rule', 'name', 'stack'),
  [(r, n, s) for r in RULES for n in ('kernel', 'weight') for s in ((), (4,))],
  quick=[('svd', 'kernel', ()), ('svd', 'weight', (4,))],
)
def test_a_convolution_is_bit_for_bit_the_reshaped_matrix(rule, name, stack):
  torch = name == 'weight'
  flat = matrix_of_torch if torch else as_matrix
  layout = to_torch if torch else np.asarray
  start = layout(normal((*stack, *KERNEL)))
  grads = layout(normal((5, *stack, *KERNEL), 1))
  top = 'blocks' if stack else 'net'
  ours, state = updates_of(
    RULES[rule](), {top: conv(start, name)}, {top: conv(grads, name)}
  )
  # Without axes a stack of matrices with this name would be a stack of
  # convolutions with one tap axis.
  want, want_state = updates_of(
    RULES[rule](axes={'.*': (-2, -1)}),
    {top: conv(flat(start), name)},
    {top: conv(flat(grads), name)},
  )
  found = flat(np.asarray(ours[top]['conv'][name]))
  np.testing.assert_array_equal(found, want[top]['conv'][name])
  chex.assert_trees_all_equal(state, want_state)


def test_the_numbers_of_a_convolution_are_those_of_its_form():
  params = {'conv': {'kernel': jax.ShapeDtypeStruct((3, 3, 32, 64), 'float32')}}

  def numbers(axes):
    (row,) = describe(galore(optax.adam(0.1), rank=8, axes=axes), params)
    return row.bytes // 4, row.projected_shape, row.reason

  assert numbers(None) == (5120, (8, 288), 'convolution')
  found = numbers({'.*': (2, 3)})
  assert found == (11520, (3, 3, 8, 64), 'convolution, by axes')
  reason = 'convolution, by axes: a basis for 9 matrices'
  # Bases of 8 x 32 and 8 x 64, and two moments of 9 x 8 x 8.
  assert numbers(TUCKER) == (1920, (3, 3, 8, 8), reason)
  # A basis of 8 x 32, and two moments of 9 x 8 x 64.
  axes = {'.*': SharedBasis()}
  assert numbers(axes) == (8 * 32 + 2 * 9 * 8 * 64, (3, 3, 8, 64), reason)


def test_a_patch_kernel_is_a_matrix_and_experts_are_a_stack():
  shape = jax.ShapeDtypeStruct
  params = {
    'patch_embed': {'kernel': shape((4, 4, 3, 64), 'float32')},
    'experts': {'kernel': shape((3, 3, 32, 64), 'float32')},
  }
  rows = {
    row.path: row
    for row in describe(go.galore(optax.adam(0.1), rank=8), params)
  }
  assert rows['patch_embed/kernel'].projected_shape == (8, 64)
  assert rows['experts/kernel'].projected_shape == (3, 3, 8, 64)
  assert rows['experts/kernel'].basis_bytes == 4 * 9 * 8 * 32


def test_a_convolution_that_the_rank_does_not_fit_is_measured_as_a_matrix():
  params = conv(normal((3, 3, 2, 40)))
  (row,) = describe(galore(optax.sgd(0.1), rank=17), params)
  assert row.projected_shape == (17, 40)
  tx = galore(optax.sgd(0.1), rank=19, targets='.*')
  with pytest.raises(ValueError, match=r'rank must be in 1\.\.18 for conv/ker'):
    tx.init(params)
  tx = galore(optax.sgd(0.1), rank=3, targets='.*', axes=TUCKER)
  with pytest.raises(ValueError, match=r'rank must be in 1\.\.2 for conv/ker'):
    tx.init(params)
  tx = galore(optax.sgd(0.1), rank=2, targets=go.Optional(), axes=TUCKER)
  assert describe(tx, params)[0].reason == 'rank 2 >= 2'


def test_coordinates_of_a_kernel_with_channels_first_are_selected():
  params = conv(normal((16, 12, 1, 1)), 'weight')
  (row,) = describe(build('Frugal', density=0.25, subspace='columns'), params)
  assert row.projected_shape == (3, 16)


# Shared bases.


def unfolding(g, axis):
  """Returns the unfolding [m, all other axes] of a kernel."""
  return np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)


def leading(g_mn, rank, previous):
  """Returns the leading left singular vectors, with galore's signs."""
  new = np.linalg.svd(g_mn)[0][:, :rank].T
  for i, row in enumerate(new):
    agreement = row[np.argmax(np.abs(row))]
    if previous is not None:
      agreement = row @ previous[i]
    new[i] = row if agreement >= 0 else -row
  return new


def turned(low, in_rr, out_rr):
  return np.einsum('hwab,ca,db->hwcd', low, in_rr, out_rr)


def oracle(start, grads, ranks, *, rate, scale, decay, gap, moments):
  """Returns the weights after each step; ranks of input and output channels."""
  w, adam, a, b, found = start.copy(), Adam(), None, None, []
  for t, g in enumerate(grads):
    if t % gap == 0:
      old = a, b
      a = leading(unfolding(g, 2), ranks[0], old[0])
      b = leading(unfolding(g, 3), ranks[1], old[1])
      if t and moments == 'reset':
        adam = Adam()
      if t and moments == 'rotate':
        c, d = a @ old[0].T, b @ old[1].T
        w1, w2 = 1 - adam.b1**adam.t, 1 - adam.b2**adam.t
        mean = adam.m / w1
        variance = turned(adam.v / w2 - mean**2, c**2, d**2)
        adam.v = w2 * np.abs(variance + turned(mean, c, d) ** 2)
        adam.m = turned(adam.m, c, d)
    low = np.einsum('hwio,ai,bo->hwab', g, a, b)
    step = np.einsum('hwab,ai,bo->hwio', -rate * adam(low), a, b)
    w = w + scale * step - rate * decay * w
    found.append(w)
  return np.array(found)


@each('moments', ['keep', 'reset', 'rotate'], quick=['keep', 'rotate'])
def test_tucker_2_is_the_numpy_oracle(moments):
  options = dict(scale=0.5, gap=3, moments=moments)
  start, grads = normal(KERNEL), normal((8, *KERNEL), 1)
  inner = optax.adamw(0.1, weight_decay=0.2)
  tx = galore(inner, rank=3, axes=TUCKER, **options)
  ours, state = updates_of(tx, conv(start), conv(grads))
  want = oracle(start, grads, (3, 3), rate=0.1, decay=0.2, **options)
  # Neighbouring singular values amplify rounding errors of the bases.
  close(ours['conv']['kernel'], want, rtol=1e-8)
  rows_in, rows_out = state.basis['conv']['kernel']
  assert rows_in.shape == (3, 7) and rows_out.shape == (3, 5)
  # The stage in a chain is the same transformation.
  if moments == 'keep':
    stage = galore(rank=3, axes=TUCKER, **options)
    again, _ = updates_of(go.chain(stage, inner), conv(start), conv(grads))
    chex.assert_trees_all_equal(again, ours)


def test_a_share_is_one_of_each_side():
  options = dict(scale=0.5, gap=2, moments='rotate')
  start, grads = normal(KERNEL), normal((4, *KERNEL), 1)
  tx = galore(optax.adam(0.1), rank=0.6, axes=TUCKER, **options)
  ours, state = updates_of(tx, conv(start), conv(grads))
  rows_in, rows_out = state.basis['conv']['kernel']
  assert rows_in.shape == (4, 7) and rows_out.shape == (3, 5)
  want = oracle(start, grads, (4, 3), rate=0.1, decay=0, **options)
  close(ours['conv']['kernel'], want, rtol=1e-8)


def test_full_rank_loses_nothing():
  start, grads = conv(normal(KERNEL)), conv(normal((4, *KERNEL), 1))
  inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3))
  tx = galore(inner, rank=1.0, scale=1.0, gap=3, axes=TUCKER)
  ours, state = updates_of(tx, start, grads)
  sides = [x.shape for x in state.basis['conv']['kernel']]
  assert sides == [(7, 7), (5, 5)]
  close(ours, updates_of(inner, start, grads)[0])


def test_gradients_of_low_multilinear_rank_lose_nothing():
  core, a, b = normal((4, 3, 2, 2, 3)), normal((2, 7), 1), normal((3, 5), 2)
  grads = conv(np.einsum('thwab,ai,bo->thwio', core, a, b))
  tx = galore(optax.sgd(0.3), rank=3, scale=1.0, gap=1, axes=TUCKER)
  start = conv(normal(KERNEL))
  ours, _ = updates_of(tx, start, grads)
  close(ours, updates_of(optax.sgd(0.3), start, grads)[0])


def test_the_projection_is_linear_and_its_transpose_unprojects():
  tx = galore(optax.sgd(1.0), rank=3, scale=1.0, axes=TUCKER)
  x, y = conv(normal(KERNEL)), conv(normal(KERNEL, 1))
  state, project = jax.jit(tx.refresh)(x, tx.init(x)), jax.jit(tx.project)
  low = [project(g, state)['conv']['kernel'] for g in (x, y)]
  mixed = jax.tree.map(lambda x, y: 2 * x - 3 * y, x, y)
  found = project(mixed, state)['conv']['kernel']
  assert found.shape == (3, 2, 3, 3)
  close(found, 2 * low[0] - 3 * low[1])
  updates, _ = jax.jit(tx.apply)(project(x, state), state, x, x)
  inside = jax.tree.map(jnp.negative, updates)
  close(project(inside, state)['conv']['kernel'], low[0])
  # <project(x), project(y)> = <x, unproject(project(y))> for such a pair.
  dot = jnp.vdot(inside['conv']['kernel'], y['conv']['kernel'])
  close(dot, jnp.vdot(low[0], low[1]))


@pytest.mark.parametrize('tx', [
  galore(optax.adam(0.1), rank=3, axes=TUCKER),
  galore(optax.adam(0.1), rank=0.5, axes=TUCKER, moments='rotate'),
  build('Galore8bit', rank=3, axes=TUCKER, min_size=0),
])  # fmt: skip
def test_the_state_has_the_bytes_that_describe_states(tx):
  with jax.enable_x64(False):
    params = {'blocks': conv(jnp.ones((2, *KERNEL), jnp.float32))}
    (row,) = describe(tx, params)
    state = jax.jit(tx.init)(params)
  arrays = [x for x in jax.tree.leaves(state) if x.ndim]
  assert sum(x.nbytes for x in arrays) == row.bytes
  bases = optax.tree.get(state, 'basis') if isinstance(state, tuple) else None
  assert sum(x.nbytes for x in jax.tree.leaves(bases)) == row.basis_bytes
  ranks = (4, 3) if row.projected_shape[-2:] == (4, 3) else (3, 3)
  assert row.projected_shape == (2, 3, 2, *ranks)
  assert row.basis_bytes == 2 * 4 * (ranks[0] * 7 + ranks[1] * 5)


@each('moments', ['keep', 'rotate'], quick=['rotate'])
def test_a_stack_is_a_loop_over_its_layers(moments):
  tx = galore(optax.adamw(0.1), rank=3, gap=2, axes=TUCKER, moments=moments)
  start, grads = normal((2, *KERNEL)), normal((5, 2, *KERNEL), 1)
  ours, state = updates_of(tx, {'blocks': conv(start)}, {'blocks': conv(grads)})
  assert state.basis['blocks']['conv']['kernel'][0].shape == (2, 3, 7)
  layers = {f'layers_{i}': conv(x) for i, x in enumerate(start)}
  of_layers = {f'layers_{i}': conv(grads[:, i]) for i in range(2)}
  want, _ = updates_of(tx, layers, of_layers)
  for i in range(2):
    found = ours['blocks']['conv']['kernel'][:, i]
    close(found, want[f'layers_{i}']['conv']['kernel'])


def test_channels_first_are_channels_last():
  tx = galore(optax.adamw(0.1), rank=3, gap=2, axes=TUCKER)
  start, grads = normal(KERNEL), normal((5, *KERNEL), 1)
  want, _ = updates_of(tx, conv(start), conv(grads))
  torch = conv(to_torch(start), 'weight'), conv(to_torch(grads), 'weight')
  ours, _ = updates_of(tx, *torch)
  close(ours['conv']['weight'], to_torch(want['conv']['kernel']))
  # Another name, with its axes.
  axes = {'w': SharedBasis(1, 0, (2, 3), side='both')}
  tx = galore(optax.adamw(0.1), rank=3, gap=2, axes=axes)
  named, _ = updates_of(tx, *({'w': x['conv']['weight']} for x in torch))
  chex.assert_trees_all_equal(named['w'], ours['conv']['weight'])


@each('side', ['std', 'left', 'right'], quick=['left', 'right'])
def test_one_side_may_be_shared(side):
  # The kernel [kh, kw, in, out] with a shared basis of the inputs is a matrix
  # [in, kh kw out], and that of the outputs is a matrix [kh kw in, out].
  left = side == 'left'
  start, grads = normal(KERNEL), normal((5, *KERNEL), 1)

  def flat(x):
    return (
      as_matrix(x)
      if not left
      else np.moveaxis(x, -2, -4).reshape(*x.shape[:-4], 7, -1)
    )

  axes = {'.*': SharedBasis(side=side)}
  tx = galore(optax.adamw(0.1), rank=3, gap=2, axes=axes)
  ours, state = updates_of(tx, conv(start), conv(grads))
  low = (3, 2, 3, 5) if left else (3, 2, 3, 7)
  assert state.inner[0].mu['conv']['kernel'].shape == low
  tx = galore(optax.adamw(0.1), rank=3, gap=2, side='left' if left else 'right')
  want, _ = updates_of(tx, {'w': flat(start)}, {'w': flat(grads)})
  close(flat(np.asarray(ours['conv']['kernel'])), want['w'])


def test_experts_may_share_a_basis():
  params = {'experts': {'up': jnp.asarray(normal((2, 4, 7, 9)))}}
  tx = galore(optax.adam(0.1), rank=3, axes={'.*': SharedBasis(-2, -1, -3)})
  state = tx.init(params)
  assert state.basis['experts']['up'].shape == (2, 3, 7)
  assert state.inner[0].mu['experts']['up'].shape == (2, 4, 3, 9)


@each(
  'subspace',
  ['gram', 'randomized', 'power', 'random', 'coordinates', go.Gaussian()]
  + [go.Lazy(memory=1), go.Packed('svd', bits=8)],
  quick=['coordinates'],
)
def test_each_subspace_shares_one_basis(subspace):
  tx = galore(
    optax.sgd(1.0),
    rank=2,
    gap=go.Staggered(2),
    scale=1.0,
    subspace=subspace,
    axes=TUCKER,
  )
  params = {'blocks': conv(normal((4, *KERNEL)))}
  state = tx.init(params)
  for seed in range(3):
    grads = {'blocks': conv(normal((4, *KERNEL), seed))}
    updates, state = jax.jit(tx.update)(grads, state, params)
    u = np.asarray(updates['blocks']['conv']['kernel'])
    for one in u:
      # All taps have their channels in the same two dimensions.
      assert np.linalg.matrix_rank(unfolding(one, 2), tol=1e-6) == 2
      assert np.linalg.matrix_rank(unfolding(one, 3), tol=1e-6) == 2
    if subspace == 'coordinates':
      used = np.any(u != 0, axis=(1, 2, 4))
      assert np.all(np.sum(used, axis=1) == 2)


RANKED = [
  name
  for name in PROJECTING
  if {'rank', 'axes'} <= inspect.signature(PRESETS[name]).parameters.keys()
]


@each('name', RANKED, quick=['GaloreMuon'])
def test_presets_accept_shared_bases(name):
  params = {'blocks': conv(normal((2, *KERNEL))), 'w': jnp.ones((9, 8))}
  tx = build(name, rank=3, gap=2, axes=TUCKER)
  rows = {row.path: row for row in describe(tx, params)}
  assert rows['blocks/conv/kernel'].projected_shape == (2, 3, 2, 3, 3)
  state, step = tx.init(params), jax.jit(tx.update)
  for _ in range(3):
    updates, state = step(params, state, params)
    params = optax.apply_updates(params, updates)
  moved = np.asarray(updates['blocks']['conv']['kernel'])
  assert np.all(np.isfinite(moved)) and np.any(moved)


@each('cut', ['in', 'out'], quick=['out'])
def test_a_mesh_cuts_a_shared_basis_and_computes_the_same(cut):
  mesh = jax.make_mesh((8,), ('fsdp',))
  place = NamedSharding(
    mesh, PartitionSpec(*(None,) * (2 + (cut == 'out')), 'fsdp')
  )
  tx = galore(optax.adamw(0.1), rank=3, gap=2, axes=TUCKER, moments='rotate')
  shape = (3, 3, 16, 24)
  start, grads = normal(shape), normal((4, *shape), 1)
  want, _ = updates_of(tx, conv(start), conv(grads))
  params = jax.device_put(conv(start), place)
  shardings = go.state_shardings(tx, params, conv_of(place))
  specs = [tuple(x.spec) for x in jax.tree.leaves(shardings.basis)]
  assert specs == [(None, 'fsdp'), (None, 'fsdp')]
  mu = shardings.inner[0].mu['conv']['kernel']
  assert not any(tuple(mu.spec))
  state, step = tx.init(params), jax.jit(tx.update)
  for g in grads:
    updates, state = step(jax.device_put(conv(g), place), state, params)
    params = optax.apply_updates(params, updates)
  for x, of_x in zip(
    *map(jax.tree.leaves, (state.basis, shardings.basis)), strict=True
  ):
    assert x.sharding.is_equivalent_to(of_x, x.ndim)
  close(params['conv']['kernel'], want['conv']['kernel'][-1], rtol=1e-8)


def conv_of(place):
  return {'conv': {'kernel': place}}


def test_a_mesh_that_cuts_experts_cuts_their_shared_basis():
  mesh = jax.make_mesh((8,), ('expert',))
  place = NamedSharding(mesh, PartitionSpec('expert'))
  tx = galore(optax.adam(0.1), rank=3, axes={'.*': SharedBasis(1, 2, 0)})
  params = {'up': jax.ShapeDtypeStruct((8, 16, 24), 'float32')}
  state = go.state_shardings(tx, params, {'up': place})
  assert tuple(state.basis['up'].spec) == (None, 'expert')
  assert tuple(state.inner[0].mu['up'].spec) == ('expert', None, None)


class Convolutions:
  """A residual network of convolutions for `layerwise`."""

  def embed(self, params, batch):
    return _conv(batch['x'], params['stem']['kernel'])

  def block(self, layer_params, x):
    return x + jnp.tanh(_conv(x, layer_params['conv']['kernel']))

  def loss(self, params, x, batch):
    del params
    return jnp.mean((x - batch['y']) ** 2), {}


def _conv(x, kernel):
  layout = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=layout
  )


@each('axes', [None, 'tucker'], quick=['tucker'])
def test_a_layerwise_step_is_that_of_the_whole_tree(axes):
  axes = {'blocks/.*': SharedBasis(side='both')} if axes else None
  tx = galore(optax.adamw(0.1), rank=3, gap=2, axes=axes, moments='rotate')
  model = Convolutions()
  params = {
    'stem': {'kernel': 0.1 * jnp.asarray(normal((3, 3, 4, 6)))},
    'blocks': conv(0.1 * normal((3, 3, 3, 6, 6), 1)),
  }
  batch = {'x': normal((2, 5, 5, 4), 2), 'y': normal((2, 5, 5, 6), 3)}
  batch = jax.tree.map(jnp.asarray, batch)

  def loss(params):
    x = model.embed(params, batch)
    for kernel in params['blocks']['conv']['kernel']:
      x = model.block({'conv': {'kernel': kernel}}, x)
    return model.loss(params, x, batch)[0]

  @jax.jit
  def whole(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  step = go.layerwise(model, tx)
  ours, state, run = params, step.init(params), jax.jit(step)
  want, want_state = params, tx.init(params)
  for _ in range(4):
    ours, state, _ = run(ours, state, batch)
    want, want_state = whole(want, want_state)
  low = (
    state.inner['blocks/conv/kernel'].inner[0].mu['blocks']['conv']['kernel']
  )
  assert low.shape == ((3, 3, 3, 3, 3) if axes else (3, 3, 54))
  close(ours, want, rtol=1e-7)


def test_a_shared_basis_without_axes_is_for_convolutions():
  params = {
    'blocks': conv(jnp.ones((2, *KERNEL))) | {'norm': jnp.ones((2, 7))},
    'dense': {'kernel': jnp.ones((9, 8))},
    'swapped': {'kernel': jnp.ones((9, 8))},
  }
  params['blocks']['conv']['bias'] = jnp.ones((2, 5))
  axes = TUCKER | {'swapped/.*': (1, 0)}
  tx = galore(optax.adam(0.1), rank=3, axes=axes)
  rows = {row.path: row for row in describe(tx, params)}
  assert rows['blocks/conv/kernel'].projected_shape == (2, 3, 2, 3, 3)
  assert rows['dense/kernel'].reason == 'matrix'
  assert rows['swapped/kernel'].reason == 'matrix, by axes'
  assert rows['blocks/conv/bias'].reason == 'bias'


def test_a_state_of_the_other_form_is_refused():
  params = conv(normal(KERNEL))
  state = galore(optax.adam(0.1), rank=3).init(params)
  tx = galore(optax.adam(0.1), rank=3, axes=TUCKER)
  with pytest.raises(ValueError, match='saved with another rank, side or'):
    tx.update(params, state, params)


def test_both_forms_of_one_shape_may_be_in_one_tree():
  params = {name: conv(normal(KERNEL)) for name in ('matrices', 'shared')}
  axes = {'matrices/.*': (2, 3), 'shared/.*': SharedBasis()}
  tx = galore(optax.adam(0.1), rank=3, side='both', axes=axes)
  state = jax.eval_shape(tx.init, params)
  found = [x.shape for x in jax.tree.leaves(state.basis)]
  assert found == [(3, 2, 3, 7), (3, 2, 3, 5), (3, 7), (3, 5)]
  _, after = jax.eval_shape(tx.update, params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: SharedBasis(0, 1), 'must have input, output and shared axes'),
    (lambda: SharedBasis(shared=(0, 1)), 'or none of them for a convolution'),
    (lambda: SharedBasis('a', 1, 0), "got \\('a', 1, 0\\)"),
    (lambda: SharedBasis(side='up'), 'side must be one of'),
    (lambda: {'de.*': SharedBasis()}, "axes 'de.*': .* has none there: give"),
    (lambda: {'.*': SharedBasis(0, 1, 1)}, 'axes must be distinct'),
    (lambda: {'.*': SharedBasis(0, 1, 2)}, r'in -2\.\.1 for dense/kernel'),
  ],
)
def test_errors_name_the_rule(make, message):
  with pytest.raises(ValueError, match=message):
    axes = make()
    tx = galore(optax.adam(0.1), rank=3, axes=axes)
    tx.init({'dense': {'kernel': jnp.ones((7, 9))}})
