"""Updating leaf by leaf and piece by piece gives the same numbers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax.quantized import state as leafwise
from galore_optax.quantized.array import Quantized, dequantize, quantize
from galore_optax.quantized.state import quantize_state
from tests.galore_optax.program import each, random_gradients


def is_quantized(x):
  return isinstance(x, Quantized)


def decoded(state):
  return jax.tree.map(
    lambda x: dequantize(x) if is_quantized(x) else x,
    state,
    is_leaf=is_quantized,
  )


@pytest.fixture
def params():
  rng = np.random.default_rng(0)
  shapes = {'w': (24, 512), 'u': (3, 40, 72), 'b': (7,)}
  return {
    k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
  }


def plain(inner):
  """Returns an update that dequantizes the whole state, as the reference."""

  def update(updates, state, params):
    updates, new = inner.update(updates, decoded(state), params)
    store = lambda old, x: (
      quantize(x, code=old.code, block_size=old.block_size)
      if is_quantized(old)
      else x
    )
    return updates, jax.tree.map(store, state, new, is_leaf=is_quantized)

  return update


INNERS = {
  'adamw': optax.adamw(optax.cosine_decay_schedule(1.0, 50), weight_decay=0.1),
  'injected': optax.inject_hyperparams(optax.adam)(0.1),
  'momentum': optax.sgd(0.1, 0.9, nesterov=True),
}
WHOLE = {
  'noise': optax.chain(optax.add_noise(0.1, 0.1, 0), optax.sgd(0.1, 0.9)),
  'lamb': optax.lamb(0.1),
  'norm of all updates': optax.chain(
    optax.adam(1.0), optax.clip_by_global_norm(0.5)
  ),
  'partition': optax.partition(
    {'a': optax.adam(0.1), 'b': optax.sgd(0.1, 0.9)},
    {'w': 'a', 'u': 'b', 'b': 'a'},
  ),
  'factored': optax.adafactor(0.1, min_dim_size_to_factor=32, momentum=0.9),
  'sm3': optax.sm3(0.1),
}
"""Inner optimizers that are not elementwise."""


@each(
  'name, in_pieces',
  [(name, False) for name in INNERS | WHOLE]
  + [('adamw', True), ('momentum', True)],
  quick=[('adamw', True)],
)
def test_leaf_by_leaf_equals_the_whole_tree(
  name, in_pieces, params, monkeypatch
):
  if in_pieces:
    monkeypatch.setattr(leafwise, 'DIVIDE_FROM', 4096)
    monkeypatch.setattr(leafwise, 'PIECE_SIZE', 1000)
  inner = optax.with_extra_args_support((INNERS | WHOLE)[name])
  tx = quantize_state(inner, elementwise=name in INNERS)
  update = jax.jit(chex.assert_max_traces(tx.update, 1))
  whole, read = jax.jit(plain(inner)), jax.jit(decoded)
  state = jax.jit(tx.init)(params)
  for grads in random_gradients(params, 3):
    want = whole(grads, state, params)
    chex.clear_trace_counter()
    updates, new = update(grads, state, params)
    # Compilers contract a * b + c differently. This moves a value at a tie to
    # the next code. The updates are computed from the old codes, so that they
    # only differ by rounding.
    chex.assert_trees_all_close(updates, want[0], rtol=2e-4, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    pairs = zip(
      jax.tree.leaves(read(new)), jax.tree.leaves(read(want[1])), strict=True
    )
    for got, expected in pairs:
      if jnp.issubdtype(got.dtype, jnp.floating):
        got, expected = np.asarray(got), np.asarray(expected)
        off = np.abs(got - expected) > 1e-5 * np.abs(expected) + 1e-7
        assert off.mean() < 0.002
      else:
        chex.assert_trees_all_equal(got, expected)
    state = new


@pytest.mark.parametrize(
  'shapes, share',
  [
    # With one leaf, pieces are less than a tenth of the two float32 moments.
    ({'w': (8192, 1024)}, 0.1),
    # With five leaves, about one of them is in float32 at a time.
    pytest.param(
      {f'w{i}': (1024, 1024) for i in range(5)}, 0.4, marks=pytest.mark.slow
    ),
  ],
)
def test_no_float32_copy_of_the_state_is_alive(shapes, share, monkeypatch):
  monkeypatch.setattr(leafwise, 'PIECE_SIZE', 2**18)
  tx = quantize_state(optax.adamw(0.1))
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  state = jax.eval_shape(tx.init, params)
  copies = 8 * sum(x.size for x in jax.tree.leaves(params))

  def temporaries(update):
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(
      params, state, params
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(plain(optax.adamw(0.1))) > copies
  assert temporaries(tx.update) < share * copies
