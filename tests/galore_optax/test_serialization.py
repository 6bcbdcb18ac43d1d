"""States pass through flax.serialization and pickle, including structure.

The library never imports flax; `tests/test_architecture.py` checks that.
"""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import galore_optax as go
from galore_optax.layerwise.weights import quantized
from galore_optax.quantized.array import Quantized, quantize_linear
from tests.galore_optax.every import PRESETS, build, maker, makers
from tests.galore_optax.layerwise.program import Residual
from tests.galore_optax.program import each, normal32

LOW = dict(rank=5, gap=2)
EIGHT_BITS = dict(block_size=16, min_size=1)


def params(dtype=jnp.float32):
  tree = {
    'blocks': {'up': normal32((2, 17, 33)), 'norm': normal32((2, 17), 1)},
    'down': normal32((33, 17), 2),
    'embed': normal32((9, 17), 3),
  }
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def adam_8bit():
  return go.quantize_state(optax.adamw(0.1), **EIGHT_BITS)


def scale_by_adam_8bit():
  return go.quantize_state(optax.scale_by_adam(), **EIGHT_BITS)


def galore(**options):
  return go.galore(adam_8bit(), **LOW | options)


STATES = {
  **makers(**LOW, **EIGHT_BITS, bits=8, master_weights=True),
  'bases of 4 bits': lambda: go.quantize_bases(galore(), bits=4),
  'bases of 8 bits': lambda: go.quantize_bases(galore(), bits=8),
  'both sides': lambda: go.quantize_bases(galore(side='full')),
  'lazy bases': lambda: galore(subspace=go.Lazy(go.Packed('svd'))),
  'staggered': lambda: galore(gap=go.Staggered(3)),
  'two inners': lambda: galore(moments='reset'),
  'rotate': lambda: galore(moments='rotate'),
  'coordinates': lambda: galore(subspace='coordinates'),
  'inner in 8 bits': maker('Frugal', inner=scale_by_adam_8bit()),
  'seeds': maker('Apollo', **LOW),
  'masked': lambda: optax.masked(
    galore(targets='blocks/up'), {'blocks': True, 'down': False, 'embed': True}
  ),
  'chain': lambda: optax.chain(optax.clip(1.0), galore()),
  'injected': lambda: optax.inject_hyperparams(
    PRESETS['Galore8bit'], static_args=('rank', 'gap', *EIGHT_BITS)
  )(0.1, **EIGHT_BITS, **LOW),
}
CHANGES = {
  'bfloat16': lambda: params(jnp.bfloat16),
  'FrozenDict': lambda: FrozenDict(params()),
  'both': lambda: FrozenDict(params(jnp.bfloat16)),
}


def filled(tree):
  """Returns a tree of the same types with varied elements."""

  def fill(x):
    # NumPy compiles nothing.
    return jnp.asarray(np.arange(x.size).reshape(x.shape) % 7, x.dtype)

  return jax.tree.map(fill, tree)


def check_same(back, tree):
  # The tree structure includes the static fields of quantized arrays.
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)
  chex.assert_trees_all_equal(back, tree)


def check_round_trips(tree):
  zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), tree)
  data = serialization.to_bytes(tree)
  check_same(serialization.from_bytes(zeros, data), tree)
  fields = serialization.to_state_dict(tree)
  check_same(serialization.from_state_dict(zeros, fields), tree)
  packed = serialization.msgpack_serialize(fields)
  fields = serialization.msgpack_restore(packed)
  check_same(serialization.from_state_dict(zeros, fields), tree)
  # Some programs convert all leaves of a state dict to arrays.
  arrays = jax.tree.map(np.asarray, fields)
  check_same(serialization.from_state_dict(zeros, arrays), tree)
  check_same(pickle.loads(pickle.dumps(jax.device_get(tree))), tree)


@each('name', STATES, quick=['Badam'])
def test_a_state_round_trips(name):
  state = filled(jax.eval_shape(STATES[name]().init, params()))
  check_round_trips(state)
  # flax cannot serialize typed PRNG keys, so states must not contain any.
  for x in jax.tree.leaves(state):
    assert not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


@each('change', CHANGES, quick=['both'])
def test_a_state_of_other_params_round_trips(change):
  tx = go.quantize_bases(galore())
  state = jax.eval_shape(tx.init, CHANGES[change]())
  basis = jax.tree.leaves(state.basis, is_leaf=lambda x: isinstance(x, tuple))
  assert any(isinstance(x, Quantized) and x.code == 'int4' for x in basis)
  check_round_trips(filled(state))


@each(
  'bits, eight_bits', [(4, False), (8, False), (8, True)], quick=[(8, False)]
)
def test_a_layerwise_step_with_stored_weights_round_trips(bits, eight_bits):
  weights = quantized(bits=bits, group=16, dtype=jnp.bfloat16)
  stored = jax.tree.map(
    lambda x: jax.jit(weights.store)(x) if x.ndim > 2 else x,
    {'blocks': {'w': normal32((2, 17, 17)), 'norm': normal32((2, 17))}},
  )
  inner = adam_8bit() if eight_bits else optax.lion(0.1)
  tx = go.galore(inner, targets='blocks/w', **LOW)
  step = go.layerwise(Residual(), tx, weights=weights)
  state = jax.eval_shape(step.init, stored)
  check_round_trips(filled((stored, state)))


def test_a_restored_TrainState_goes_on():
  tx = build('Galore8bit', basis_bits=4, **EIGHT_BITS, **LOW)
  w = {'w': normal32((17, 33))}
  state = TrainState.create(apply_fn=None, params=w, tx=tx)
  # `create` sets the step to a Python number, which would be traced again.
  state = state.replace(step=jnp.int32(0))
  step = jax.jit(lambda state, g: state.apply_gradients(grads=g))
  state = step(state, w)
  zeros = jax.tree.map(lambda x: jnp.asarray(np.zeros_like(x)), state)
  back = serialization.from_bytes(zeros, serialization.to_bytes(state))
  check_same(step(back, w), step(state, w))


def test_a_float_state_is_refused_where_codes_are_expected():
  q = jax.jit(quantize_linear)(jnp.ones((4, 256)))
  fields = serialization.to_state_dict({'w': jnp.ones((4, 256))})
  with pytest.raises((ValueError, AttributeError)):
    serialization.from_state_dict({'w': q}, fields)


def test_a_quantized_array_is_one_node_to_jax():
  four_bits = functools.partial(quantize_linear, bits=4, group=8)
  q = jax.jit(four_bits)(jnp.ones((3, 33)))
  leaves = jax.tree_util.tree_leaves_with_path(q)
  assert [path[0].name for path, _ in leaves] == ['codes', 'scale']
  assert type(jax.tree.map(lambda x: x, q)) is Quantized
  assert jax.jit(lambda q: q)(q).num_columns == 33
