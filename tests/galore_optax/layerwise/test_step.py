"""The layer-wise step equals the step on the whole tree."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import galore_optax
from galore_optax.clipping import clip_coefficient, clipped
from galore_optax.layerwise import layerwise
from galore_optax.layerwise.weights import quantized
from galore_optax.quantized.array import is_quantized
from galore_optax.quantized.state import quantize_state
from tests.galore_optax.every import build
from tests.galore_optax.layerwise.program import (
  D,
  F,
  L,
  Residual,
  V,
  galore_rule,
  make_batch,
  make_params,
  run,
  run_whole_tree,
)
from tests.galore_optax.program import each
from tests.rounding import assert_close, units

# The two programs add in different orders. This is the number of terms in a
# loss or a gradient: 28 tokens through 3 layers.
SUMS = 28 * 3
# Rounding errors of three steps. Each update is at most a tenth of the weights.
STEPS = 3 * (SUMS / 10 + 1)


# Momentum is linear, so rounding errors stay small.
MOMENTUM = optax.sgd(0.1, momentum=0.9)


@pytest.fixture(scope='module')
def with_momentum():
  return run(layerwise(Residual(), MOMENTUM))


def test_equals_the_whole_tree_step(with_momentum):
  model, tx = Residual(), MOMENTUM
  params, state, metrics = with_momentum
  whole, expected = run_whole_tree(model, tx)
  assert_close(params, whole, STEPS)
  assert_close(metrics['loss'], expected['loss'], SUMS)
  norm = jax.jit(optax.tree.norm)(expected['grads'])
  assert_close(metrics['grad_norm'], norm, SUMS)
  assert state.norm == metrics['grad_norm']


def test_galore_equals_the_whole_tree_step():
  model, tx = Residual(), galore_rule()
  params, state, _ = run(layerwise(model, tx), steps=5)
  basis = state.inner['blocks/w'].basis['blocks']['w']
  assert basis.shape == (L, 3, D)
  whole, _ = run_whole_tree(model, tx, steps=5)
  # The layer-wise step decomposes one matrix at a time, the other step a stack.
  chex.assert_trees_all_close(params, whole, rtol=1e-4, atol=1e-5)


def test_adamw_equals_the_whole_tree_step():
  model, tx = Residual(tied=True), optax.adamw(0.01)
  params, _, _ = run(layerwise(model, tx))
  whole, _ = run_whole_tree(model, tx)
  # XLA fuses multiplications and additions differently in the two programs,
  # and adds the gradients of the tied embedding in another order.
  chex.assert_trees_all_close(params, whole, rtol=1e-4, atol=1e-5)


BOUND = 0.2


@functools.cache
def one_clipped_step(clip):
  """Returns a step, and the weights, state and metrics after it."""
  step = layerwise(Residual(), optax.sgd(0.1), clip_norm=BOUND, clip=clip)
  return step, *run(step, steps=1)


def test_clips_by_the_norm_of_the_whole_gradient():
  rule = clipped(optax.sgd(0.1), BOUND)
  whole, _ = run_whole_tree(Residual(), rule, steps=1)
  for clip in ('exact', 'previous'):
    _, params, _, metrics = one_clipped_step(clip)
    assert metrics['grad_norm'] > BOUND
    # The two programs add the squares of the norm in different orders. The
    # update is a hundredth of the weights.
    assert_close(params, whole, operations=SUMS / 100 + 1)


def test_previous_norm_is_that_of_the_step_before():
  _, start, state, metrics = one_clipped_step('exact')
  step, *_ = one_clipped_step('previous')
  batch = make_batch(1)
  # `run` compiled this program.
  update = jax.jit(step, donate_argnums=(0, 1))
  params, _, _ = update(*jax.tree.map(jnp.copy, (start, state)), batch)
  grads = jax.jit(jax.grad(Residual(), has_aux=True))(start, batch)[0]
  start, grads = jax.device_get((start, grads))
  factor = float(clip_coefficient(metrics['grad_norm'], BOUND))
  expected = jax.tree.map(lambda p, g: p - 0.1 * factor * g, start, grads)
  # XLA fuses the operations of the two programs differently.
  chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-6)


def test_a_clipped_rule_is_clipped_by_the_whole_norm():
  model, rule = Residual(), optax.with_extra_args_support(optax.sgd(0.1))
  step = layerwise(model, clipped(rule, 0.2))
  assert step.clip_norm == 0.2 and step.tx is rule
  with pytest.raises(ValueError, match='give one of the two'):
    layerwise(model, clipped(rule, 0.2), clip_norm=0.2)


# `test_badam_equals_the_whole_tree_step` has microbatches too.
@pytest.mark.slow
def test_microbatches_are_one_large_batch_over_three_refreshes():
  model, tx = Residual(), galore_rule()
  three = run(layerwise(model, tx, microbatches=3), steps=6, examples=12)
  whole = run(layerwise(model, tx), steps=6, examples=12)
  # The sums over examples are computed in another order, and three
  # decompositions amplify the difference.
  chex.assert_trees_all_close(three[0], whole[0], rtol=1e-5, atol=1e-6)
  for name in ('loss', 'nll'):
    assert_close(three[2][name], whole[2][name], 3 * SUMS)


def test_slices_change_nothing_but_the_scratch(with_momentum):
  model, tx = Residual(), MOMENTUM
  cut = run(layerwise(model, tx, slices={'head/w': 3}))
  assert_close(cut[0], with_momentum[0], STEPS)
  assert cut[1].inner['head/w'][0].trace['head']['w'].shape == (3, D // 3, V)
  with pytest.raises(ValueError, match='must divide'):
    layerwise(model, tx, slices={'head/w': 4}).init(make_params())


def test_state_comes_back_from_a_checkpoint_bit_by_bit(tmp_path):
  inner = optax.sgd(0.01, momentum=0.9)
  step = layerwise(Residual(), quantize_state(inner, min_size=32))
  start, go = make_params(), jax.jit(step)
  # Restored arrays are committed to a device. If the first ones are too, all
  # calls run the same program.
  first = jax.device_put((start, step.init(start)), jax.devices()[0])
  params, state, _ = go(*first, make_batch())
  saved = {'params': params, 'state': state}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'step', saved)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(
      tmp_path / 'step', jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
    )
  # The same program ran twice on the same input.
  on = go(params, state, make_batch(7))
  again = go(back['params'], back['state'], make_batch(7))
  chex.assert_trees_all_equal(on, again)


def test_weights_in_eight_bits_are_read_and_written():
  weights = quantized(bits=8, group=32, dtype=jnp.float32)
  params = make_params()
  store = jax.jit(lambda tree: jax.tree.map(weights.store, tree))
  params['blocks'] = store(params['blocks'])

  @jax.jit
  def read(tree):
    return jax.tree.map(weights.read, tree, is_leaf=is_quantized)

  step = layerwise(Residual(), optax.sgd(0.1), weights=weights)
  new, _, _ = run(step, steps=1, params=params)
  assert is_quantized(new['blocks']['w'])
  exact, _ = run_whole_tree(
    Residual(), optax.sgd(0.1), steps=1, params=read(params)
  )
  gap = np.abs(read(new)['blocks']['w'] - exact['blocks']['w'])
  # Stochastic rounding changes a value by less than one step of its block.
  assert gap.max() < 1.01 * np.max(new['blocks']['w'].scale)
  assert gap.max() > 0


@each('train_rest', [False, True], quick=[True])
def test_badam_equals_the_whole_tree_step(train_rest):
  # Rounding errors stay small with SGD. The steps include the turn of every
  # layer and the first turn of the next cycle.
  tx = build(
    'Badam',
    switch_every=2,
    inner=optax.trace(0.9),
    weight_decay=0.1,
    train_rest=train_rest,
  )
  model = Residual()
  step = layerwise(model, tx, microbatches=2)
  params, state, metrics = run(step, steps=2 * L + 1)
  whole, expected = run_whole_tree(model, tx, steps=2 * L + 1)
  # Sums are computed in another order.
  chex.assert_trees_all_close(params, whole, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-5)
  start, params = jax.device_get((make_params(), params))
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, start)
  assert all(jax.tree.leaves(moved['blocks']))
  assert moved['head']['w'] == moved['embed']['table'] == train_rest
  assert state.inner['blocks/w'].inner.trace['blocks']['w'].shape == (D, F)
  assert (state.inner['head/w'] == ()) == (not train_rest)


def test_badam_has_the_norm_of_what_it_trains():
  model, bound = Residual(), 1e-3
  tx = build('Badam', order='fixed', start=1, inner=optax.identity())
  params, _, metrics = run(layerwise(model, tx, clip_norm=bound), steps=1)
  start = make_params()
  grads = run_whole_tree(model, tx, steps=1)[1]['grads']['blocks']
  mine = jax.tree.map(lambda g: g[1], grads)
  norm = jax.jit(optax.tree.norm)(mine)
  assert_close(metrics['grad_norm'], norm, SUMS)
  factor = clip_coefficient(metrics['grad_norm'], bound)
  moved = jax.tree.map(lambda a, b: a - b, params['blocks'], start['blocks'])
  assert not any(jnp.any(x[jnp.array([0, 2])]) for x in moved.values())
  expected = jax.tree.map(lambda g: -0.1 * factor * g, mine)
  # This is the difference of two weights of about 1, each rounded once.
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[1], moved), expected, atol=units(2)
  )


def test_badam_computes_the_weight_gradient_of_one_layer():
  def products(tx):
    step = layerwise(Residual(), tx)
    params = jax.eval_shape(make_params)
    state = jax.eval_shape(step.init, params)
    program = jax.make_jaxpr(step)(params, state, make_batch())
    return str(program).count('dot_general')

  one, rest = (build('Badam', train_rest=rest) for rest in (False, True))
  # The forward loop has two matmuls per layer. The loop over passed layers has
  # four: it recomputes these two and has two for the gradient of the layer's
  # input. The active layer has two more, for the gradients of its weights. The
  # head has one matmul forward and one backward.
  assert products(one) == 2 + 4 + (4 + 2) + 2
  # If the head is trained, its gradient is one more matmul. The gradient of the
  # embedding needs a second loop, over the layers below the active one.
  assert products(rest) == products(one) + 1 + 4


@pytest.mark.slow
def test_matrices_take_turns_as_in_the_whole_tree():
  model, tx = Residual(), galore_rule(gap=galore_optax.Staggered(3))
  params, state, _ = run(layerwise(model, tx), steps=5)
  whole, _ = run_whole_tree(model, tx, steps=5)
  # The layer-wise step decomposes one matrix at a time, the other step a stack.
  chex.assert_trees_all_close(params, whole, rtol=1e-4, atol=1e-5)
  w, u = (state.inner[f'blocks/{x}'] for x in 'wu')
  assert np.array_equal(w.count, u.count)


class Bare(Residual):
  """A model whose stack is a single array, with any second result of `loss`."""

  def __init__(self, aux):
    super().__init__()
    self.aux = aux

  def block(self, w, x):
    return {**x, 'h': x['h'] + jnp.tanh(x['h'] @ w)}

  def loss(self, params, x, batch):
    return super().loss(params, x, batch)[0], self.aux


def test_a_bare_stack_and_any_aux():
  tx = optax.sgd(0.1)
  params = make_params() | {'blocks': 0.3 * jnp.ones((L, D, D))}
  whole, expected = run_whole_tree(Bare(()), tx, steps=2, params=params)
  for aux in ((), None, 3.0, {'loss': 7.0}):
    ours, _, metrics = run(layerwise(Bare(aux), tx), steps=2, params=params)
    assert_close(ours, whole, STEPS)
    assert_close(metrics['loss'], expected['loss'], SUMS)
    assert metrics.get('aux') == (aux if not isinstance(aux, dict) else None)


def test_rejects_what_it_cannot_do():
  with pytest.raises(ValueError, match='must be one of exact, previous'):
    layerwise(Residual(), optax.sgd(0.1), clip_norm=1.0, clip='never')
  for options in ({'microbatches': 0}, {'accumulate': 0}):
    with pytest.raises(ValueError, match='must be an integer >= 1, got 0'):
      layerwise(Residual(), optax.sgd(0.1), **options)
  with pytest.raises(ValueError, match='clip_norm must be positive'):
    layerwise(Residual(), optax.sgd(0.1), clip_norm=-1.0)
  with pytest.raises(ValueError, match=r"\['blocks'\] must hold the layers"):
    layerwise(Residual(), optax.sgd(0.1)).init({'layers': jnp.ones((3, 2))})
  step = layerwise(Residual(), optax.sgd(0.1), microbatches=3)
  with pytest.raises(ValueError, match='must divide the batch of 4, got 3'):
    run(step, steps=1)
  with pytest.raises(ValueError, match='match no parameter'):
    layerwise(
      Residual(), galore_optax.galore(optax.sgd(0.1), rank=2, targets=['x'])
    ).init(make_params())
  part = layerwise(Residual(), build('Badam', blocks='blocks/u'))
  with pytest.raises(
    ValueError, match=r'whole layer stack.*not so for blocks/w'
  ):
    part.init(make_params())
