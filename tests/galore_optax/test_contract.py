"""optax's contract: types, shapes, tracing, checkpoints, donation, devices."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax import galore
from tests.galore_optax.every import maker
from tests.galore_optax.program import each, gradients, normal32
from tests.rounding import distance, units

KINDS = {
  'keep': lambda: galore(optax.adamw(0.1), rank=4, gap=2),
  'reset': lambda: galore(optax.adamw(0.1), rank=4, gap=2, moments='reset'),
  'full': lambda: galore(optax.adamw(0.1), rank=4, gap=2, side='full'),
  'gram': maker('Galore', rank=4, gap=2, subspace='gram'),
}
every_kind = pytest.mark.parametrize(
  'kind',
  [
    'keep',
    pytest.param('reset', marks=pytest.mark.slow),
    pytest.param('full', marks=pytest.mark.slow),
    pytest.param('gram', marks=pytest.mark.slow),
  ],
)


def params(dtype=jnp.float32):
  tree = {
    'blocks': {'up': normal32((2, 9, 13)), 'norm': normal32((2, 9), 1)},
    'down': normal32((17, 7), 2),
    'bias': normal32((5,), 3),
    'scalar': normal32((), 4),
  }
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@every_kind
def test_types(kind):
  """The state keeps its types, and updates have the types of gradients."""
  for dtype in (jnp.float32, jnp.bfloat16):
    tx, w, g = KINDS[kind](), params(dtype), gradients(params(), dtype=dtype)
    state = jax.eval_shape(tx.init, w)
    updates, after = jax.eval_shape(tx.update, g, state, w)
    assert types(state) == types(after)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, g)
  # `init` returns the same types for shapes as for arrays, also outside of a
  # trace.
  shapes = jax.eval_shape(lambda: w)
  assert types(tx.init(shapes)) == types(state)
  arrays = jax.tree.leaves(state)
  assert all(x.size for x in arrays)
  # If weights are bfloat16, moments are still float32, but bases are bfloat16.
  floats = [x for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
  low = sum(x.dtype == jnp.bfloat16 for x in floats)
  assert low == (4 if kind == 'full' else 2)


def test_float32_gradients_of_bfloat16_weights():
  tx, w, g = KINDS['keep'](), params(jnp.bfloat16), gradients(params())
  state = tx.init(w)
  updates, after = jax.eval_shape(tx.update, g, state, w)
  chex.assert_trees_all_equal_dtypes(updates, g)
  assert types(jax.eval_shape(lambda: state)) == types(after)


def test_a_state_goes_through_cond_and_scan():
  tx, w = KINDS['keep'](), params()

  @jax.jit
  def some(state):
    def step(state, i):
      update = lambda s: tx.update(gradients(w), s, w)[1]
      return jax.lax.cond(i % 2 == 0, update, lambda s: s, state), None

    return jax.lax.scan(step, state, jnp.arange(4))[0]

  assert int(some(tx.init(w)).count) == 2


@every_kind
def test_one_trace_serves_all_steps(kind):
  tx, w = KINDS[kind](), params()
  update = jax.jit(chex.assert_max_traces(tx.update, n=1))
  chex.clear_trace_counter()
  state = tx.init(w)
  for i in range(5):
    _, state = update(gradients(w, i), state, w)


def test_jit_changes_nothing():
  tx, w = KINDS['keep'](), {name: params()[name] for name in ('down', 'bias')}
  state = want_state = tx.init(w)
  update = jax.jit(tx.update)
  for i in range(3):
    updates, state = update(gradients(w, i), state, w)
    want, want_state = tx.update(gradients(w, i), want_state, w)
    # The tolerance allows for rounding, because operations are not fused
    # without jit. Adam amplifies the difference.
    assert distance(updates, want) < units(1000)


def test_donated_state_is_used_up():
  tx, w = KINDS['keep'](), params()
  update = jax.jit(tx.update, donate_argnums=1)
  state = tx.init(w)
  plain, want_state = jax.jit(tx.update), tx.init(w)
  for i in range(3):
    used = jax.tree.leaves(state)
    updates, state = update(gradients(w, i), state, w)
    want, want_state = plain(gradients(w, i), want_state, w)
    # The tolerance allows for rounding, because XLA may fuse a donated buffer
    # differently. Adam amplifies the difference.
    assert distance(updates, want) < units(1000)
    assert all(x.is_deleted() for x in used if x.ndim > 1)


def test_tree_map_params_reaches_only_bases_and_moments():
  tx, w = KINDS['keep'](), params()
  state = tx.init(w)
  marked = optax.tree.map_params(
    tx, lambda x: 'params', state, transform_non_params=lambda x: 'other'
  )
  assert marked.count == marked.skipped == marked.inner[0].count == 'other'
  assert marked.basis['blocks']['up'] == marked.basis['down'] == 'params'
  assert set(jax.tree.leaves(marked.inner[0].mu)) == {'params'}
  assert jax.tree.structure(marked) == jax.tree.structure(state)


@every_kind
def test_orbax_brings_the_state_back(kind, tmp_path):
  tx, w = KINDS[kind](), params(jnp.bfloat16)
  update = jax.jit(tx.update)
  # Restored arrays are committed to a device. If the first ones are too, all
  # calls run the same program.
  state = jax.device_put(tx.init(w), jax.devices()[0])
  for i in range(3):
    _, state = update(gradients(params(), i, jnp.bfloat16), state, w)
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(tmp_path / 'state', jax.eval_shape(tx.init, w))
  chex.assert_trees_all_equal(back, state)
  chex.assert_trees_all_equal_structs(back, state)
  for i in range(3, 5):
    g = gradients(params(), i, jnp.bfloat16)
    # The same compiled program runs twice, so results must be bit-for-bit
    # equal.
    (updates, state), (want, back) = update(g, state, w), update(g, back, w)
    chex.assert_trees_all_equal(updates, want)


# tests/galore_optax/test_sharding.py has quick cases of the same property.
@each('m, n', [('x', None), (None, 'x')], quick=[])
def test_eight_devices_are_one(m, n):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  w = {'wide': normal32((16, 24)), 'stack': normal32((2, 24, 16), 1)}
  put = lambda tree: {
    k: jax.device_put(
      x, NamedSharding(mesh, PartitionSpec(*(None,) * (x.ndim - 2), m, n))
    )
    for k, x in tree.items()
  }
  tx = KINDS['keep']()
  update = jax.jit(tx.update)
  state = want_state = tx.init(w)
  for i in range(4):
    g = gradients(w, i)
    updates, state = update(put(g), state, put(w))
    want, want_state = update(g, want_state, w)
    # The tolerance allows for summing up to 24 terms across devices in a
    # different order.
    assert distance(updates, want) < units(1000)
