"""Every preset keeps optax's contract: types, traces, checkpoints and devices.

LOOPS lists the presets for which a stack equals a loop over its layers. BAdam
is excluded because it chooses one layer of the stack at a time.
"""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint
from jax.sharding import NamedSharding, PartitionSpec

import galore_optax as go
from tests.galore_optax.layerwise.program import (
  Residual,
  make_params,
  run,
  run_whole_tree,
)
from tests.galore_optax.program import each, gradients, normal32
from tests.rounding import distance

L, STEPS = 3, 5
RANK = dict(rank=3, gap=2)

frugal = lambda subspace, **options: (
  lambda: go.frugal(
    0.1, **dict(density=0.5, gap=2, subspace=subspace) | options
  )
)
EIGHT_BITS = dict(block_size=33, min_size=30)
"""Blocks are rows of the low-rank gradients, in stacks and single matrices."""
adam_8bit = lambda: go.quantize_state(go.scale_by_galore_adam(), **EIGHT_BITS)

LOOPS = {
  'galore_adamw': lambda: go.galore_adamw(0.1, weight_decay=0.1, **RANK),
  'galore_adamw_8bit': lambda: go.galore_adamw_8bit(0.1, **EIGHT_BITS, **RANK),
  'galore_adafactor': lambda: go.galore_adafactor(0.1, b1=0.9, **RANK),
  'rotate': lambda: go.galore_adamw(0.1, moments='rotate', **RANK),
  'frugal-svd': frugal('svd', weight_decay=0.1),
  'frugal-random': frugal('random', inner='sgdm', residual='sgd'),
  # The inner optimizer is linear in the gradient. Adam would divide the
  # rounding errors of power iteration by small entries.
  'frugal-power': frugal('power', inner='sgdm', residual='sgd'),
  'frugal-columns': frugal('columns', inner='lion'),
  'frugal-rows': frugal('rows'),
  'frugal-entries': frugal('entries'),
  'frugal-0': frugal('svd', density=0.0),
  'frugal-1': frugal('svd', density=1.0),
  'fira': lambda: go.fira(0.1, weight_decay=0.1, **RANK),
  'fira-8bit': lambda: go.fira(0.1, inner=adam_8bit(), **RANK),
  'fira-reset': lambda: go.fira(0.1, moments='reset', **RANK),
  'apollo': lambda: go.apollo(0.1, **RANK),
  'apollo-8bit': lambda: go.apollo(0.1, inner=adam_8bit(), **RANK),
  'apollo_mini': lambda: go.apollo_mini(0.1, gap=2),
  'galore_muon': lambda: go.galore_muon(0.1, weight_decay=0.1, **RANK),
  'scale_sgd': lambda: go.scale_sgd(0.1, weight_decay=0.1),
  'lomo': lambda: go.lomo(0.1, clip_norm=None, weight_decay=0.1),
  'adalomo': lambda: go.adalomo(0.1, clip_norm=None, weight_decay=0.1),
}
"""Presets for which a stack equals a loop over its layers."""

PRESETS = LOOPS | {
  'badam': lambda: go.badam(0.1, switch_every=2, weight_decay=0.1),
  'lomo-clipped': lambda: go.lomo(0.1),
  'adalomo-clipped': lambda: go.adalomo(0.1),
}


def stack():
  return {
    'blocks': {
      'up': normal32((L, 6, 11)),
      'down': normal32((L, 11, 6), 1),
      'norm': normal32((L, 6), 2),
    }
  }


def params(dtype=jnp.float32):
  rest = {'embed': normal32((13, 6), 3), 'bias': normal32((5,), 4)}
  return jax.tree.map(lambda x: x.astype(dtype), stack() | rest)


def types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@each(
  'name',
  PRESETS,
  quick=['frugal-columns', 'fira', 'badam', 'adalomo'],
)
def test_types(name):
  """`init` accepts shapes, and moments are float32 for bfloat16 weights."""
  tx, w = PRESETS[name](), params(jnp.bfloat16)
  shapes = jax.eval_shape(lambda: w)
  state = tx.init(shapes)
  kept = types(jax.eval_shape(lambda: state))
  assert types(jax.eval_shape(tx.init, w)) == kept
  updates, after = jax.eval_shape(tx.update, shapes, state, shapes)
  assert types(after) == kept
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, shapes)
  for path, x in jax.tree_util.tree_leaves_with_path(state):
    assert x.size
    if jax.tree_util.GetAttrKey('basis') not in path:
      assert x.dtype != jnp.bfloat16, jax.tree_util.keystr(path)


@each('name', PRESETS, quick=['badam'])
def test_one_trace_and_a_checkpoint_serve_all_steps(name, tmp_path):
  tx, w = PRESETS[name](), params()
  chex.clear_trace_counter()
  update = jax.jit(chex.assert_max_traces(tx.update, n=1))
  state = tx.init(w)
  for i in range(3):
    _, state = update(gradients(w, i), state, w)
  # The state of LOMO is empty, and Orbax does not save an empty tree.
  saved = {'state': state, 'step': jnp.int32(3)}
  with orbax.checkpoint.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', saved)
    checkpointer.wait_until_finished()
    shapes = jax.eval_shape(lambda: saved)
    back = checkpointer.restore(tmp_path / 'state', shapes)['state']
  chex.assert_trees_all_equal(back, state)
  chex.assert_trees_all_equal_structs(back, state)
  for i in range(3, STEPS):
    g = gradients(w, i)
    (updates, state), (want, back) = update(g, state, w), update(g, back, w)
    chex.assert_trees_all_equal((updates, state), (want, back))


@each('name', LOOPS, quick=['fira'])
def test_a_stack_is_a_loop_over_its_layers(name):
  tx, w = LOOPS[name](), stack()
  tx = optax.with_extra_args_support(tx)
  one = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  whole = jax.jit(tx.update)
  alone = jax.jit(lambda g, s, w, i: tx.update(g, s, w, layer=i))
  state, states = tx.init(w), [tx.init(one(w, i)) for i in range(L)]
  for step in range(STEPS):
    g = gradients(w, step)
    updates, state = whole(g, state, w)
    for i in range(L):
      want, states[i] = alone(one(g, i), states[i], one(w, i), i)
      # The tolerance allows for rounding, because a batched product sums in a
      # different order.
      assert distance(one(jax.device_get(updates), i), want) < 1e-3


@each('name', PRESETS, quick=['adalomo-clipped'])
def test_eight_devices_are_one(name):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  w = {'blocks': {'up': normal32((2, 16, 24))}, 'embed': normal32((24, 16), 1)}
  if name == 'frugal-blocks':
    tx = frugal('blocks', targets='blocks/up')()
  else:
    tx = PRESETS[name]()
  inputs = jnp.stack([gradients(w['embed'], i) for i in range(8)])

  @jax.jit
  def step(w, state, inputs, i):
    # The gradient is the mean over a batch of eight, with one example per
    # device.
    sway = jnp.mean(jnp.sin(i + inputs), axis=0)
    g = gradients(w, i)
    up = g['blocks']['up'] + sway.T[None]
    return tx.update({'blocks': {'up': up}, 'embed': sway}, state, w)

  def place(spec):
    return lambda x: jax.device_put(
      x, NamedSharding(mesh, PartitionSpec(*spec))
    )

  sharded = jax.tree.map(place((None, 'x')), w)
  examples = place(('x',))(inputs)
  state = want_state = tx.init(w)
  for i in range(4):
    updates, state = step(sharded, state, examples, i)
    want, want_state = step(w, want_state, inputs, i)
    # The tolerance allows for summing across devices in a different order.
    # Power iteration and Adam amplify rounding errors of weak directions and
    # small entries.
    assert distance(updates, want) < 1e-3


@each('name', LOOPS, quick=['adalomo'])
def test_layerwise_is_the_whole_tree(name):
  model, tx = Residual(), LOOPS[name]()
  start = make_params()
  ours, _, _ = run(go.layerwise(model, tx), steps=4, params=start)
  want, _ = run_whole_tree(model, tx, steps=4, params=start)
  # The tolerance allows for rounding: the layer-wise step differentiates and
  # decomposes single matrices, the whole-tree step stacks. Adam divides small
  # entries by their own magnitude, which amplifies the difference.
  chex.assert_trees_all_close(ours, want, rtol=1e-3, atol=1e-4)
