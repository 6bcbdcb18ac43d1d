"""Norms of weight-shaped arrays are roots of float32 sums of squares.

`jnp.linalg.norm` of a sharded matrix is too large on GPUs with the partitioner
of some JAX versions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax.clipping import clip_by_global_norm, global_norm
from galore_optax.precision import norm
from galore_optax.subspace.finders import NAMES
from tests.galore_optax.every import build, maker, makers
from tests.galore_optax.layerwise.program import Residual, make_params, run
from tests.galore_optax.presets.test_contract import params
from tests.galore_optax.program import each, normal, normal32
from tests.rounding import assert_close


@pytest.fixture
def without_library_norms(monkeypatch):
  """Makes all norm functions of jax and optax raise an error."""

  def refuse(*args, **kwargs):
    raise AssertionError('a norm of a library')

  for module in (jnp.linalg, jax.scipy.linalg):
    for name in ('norm', 'vector_norm', 'matrix_norm'):
      if hasattr(module, name):
        monkeypatch.setattr(module, name, refuse)
  for module in (optax.tree, optax.tree_utils, optax):
    for name in ('norm', 'tree_norm', 'tree_l2_norm', 'global_norm'):
      if name in vars(module):
        monkeypatch.setattr(module, name, refuse)


TRANSFORMATIONS = {
  **makers(rank=3, gap=2),
  **{
    f'subspace {name}': maker('Galore', rank=3, subspace=name) for name in NAMES
  },
  'lazy': maker('Galore', rank=3, subspace=go.Lazy()),
  'both sides': maker('GaloreMuon', rank=3, side='full'),
  'clipping': lambda: optax.chain(
    clip_by_global_norm(1.0), go.galore(rank=3), optax.adamw(0.1)
  ),
}


@each(
  'name',
  TRANSFORMATIONS,
  quick=['Galore', 'Fira', 'GaloreMuon', 'lazy', 'clipping'],
)
def test_no_update_takes_a_norm_of_a_library(name, without_library_norms):
  tx, w = TRANSFORMATIONS[name](), params()
  state = jax.eval_shape(tx.init, w)
  jax.eval_shape(tx.update, w, state, w)


def test_the_fixture_refuses(without_library_norms):
  with pytest.raises(AssertionError, match='of a library'):
    update = optax.contrib.muon(0.1).update
    g = {'w': jnp.ones((3, 5))}
    jax.eval_shape(update, g, optax.contrib.muon(0.1).init(g), g)


@pytest.mark.parametrize('clip', ['exact', 'previous'])
def test_a_layerwise_step_takes_none_either(clip, without_library_norms):
  tx = build('GaloreMuon', rank=2)
  step = go.layerwise(Residual(), tx, clip_norm=1.0, clip=clip)
  jax.eval_shape(lambda: run(step, steps=1, params=make_params())[0])


def test_a_norm_is_the_root_of_a_sum_of_squares():
  x = normal((3, 5, 7))
  want = np.linalg.norm(x, axis=(1, 2), keepdims=True)
  # The tolerance allows for 35 terms, each rounded to 6e-8 of itself.
  np.testing.assert_allclose(norm(jnp.float32(x), (-2, -1)), want, rtol=4e-6)
  low = norm(jnp.asarray(x, jnp.bfloat16), (-2, -1))
  assert low.dtype == jnp.float32
  # The tolerance allows for rounding entries to the 8 significant bits of
  # bfloat16.
  np.testing.assert_allclose(low, want, rtol=2**-8)


def test_a_norm_of_many_bfloat16_leaves_is_summed_in_float32():
  tree = {str(i): jnp.ones(1, jnp.bfloat16) for i in range(300)}
  found = global_norm(tree)
  assert found.dtype == jnp.float32
  # In bfloat16, optax's sum of ones stops at 256, because 257 rounds to 256.
  assert optax.tree.norm(tree) == 16
  # The float32 sum of ones is exact; only its root is rounded.
  np.testing.assert_allclose(found, np.sqrt(300), rtol=1e-6)
  tx = clip_by_global_norm(1.0)
  updates, _ = tx.update(tree, tx.init(tree))
  total = np.sqrt(sum(float(x[0]) ** 2 for x in updates.values()))
  np.testing.assert_allclose(total, 1.0, rtol=2**-8)
  assert updates['0'].dtype == jnp.bfloat16


@pytest.mark.parametrize('max_norm', [0.5, 100.0])
def test_clipping_float32_gradients_is_optaxs(max_norm):
  g = {'a': normal32((5, 7)), 'b': {'c': normal32((3,), 1)}}
  ours, want = (
    clip_by_global_norm(max_norm),
    optax.clip_by_global_norm(max_norm),
  )
  updates, state = jax.jit(ours.update)(g, ours.init(g))
  want_updates, want_state = jax.jit(want.update)(g, want.init(g))
  # The tolerance allows for a norm of 38 squares in two programs.
  assert_close(updates, want_updates, operations=38)
  assert jax.tree.structure(state) == jax.tree.structure(want_state)


def test_clipping_passes_on_non_finite_gradients():
  g = {'a': jnp.array([1.0, jnp.nan]), 'b': jnp.ones(2)}
  tx = clip_by_global_norm(1.0)
  updates, _ = tx.update(g, tx.init(g))
  assert np.all(np.isnan(updates['a'])) and np.all(np.isnan(updates['b']))
