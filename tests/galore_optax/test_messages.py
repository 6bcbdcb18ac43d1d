"""Error messages name the cause that the caller can change."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from galore_optax import galore, trial
from galore_optax.quantized.state import quantize_state
from tests.galore_optax.every import PRESETS, build
from tests.galore_optax.program import each, tree

OPTIONS = {'rank': 3, 'gap': 2}
SHAPES = {'w': (7, 9), 'b': (5,)}


def scaled_by_loss(strict):
  """Scales updates by the norms of the weights; needs the loss."""

  def update(updates, state, params=None, *, value, **extra):
    scaled = jax.tree.map(
      lambda u, w: u * jnp.linalg.norm(w) / value, updates, params
    )
    return scaled, state

  def strict_update(updates, state, params=None, *, value):
    return update(updates, state, params, value=value)

  return optax.GradientTransformationExtraArgs(
    lambda params: (), strict_update if strict else update
  )


NEED_VALUE = {
  'momo': lambda: optax.chain(optax.clip(1.0), optax.contrib.momo(0.1)),
  'masked': lambda: optax.masked(
    optax.contrib.momo(0.1), {'w': True, 'b': False}
  ),
  'apply_if_finite': lambda: optax.apply_if_finite(optax.contrib.momo(0.1), 3),
  'trust ratio': lambda: optax.chain(scaled_by_loss(False), optax.sgd(0.1)),
  'strict': lambda: scaled_by_loss(True),
  'strict in a chain': lambda: optax.chain(
    scaled_by_loss(True), optax.sgd(0.1)
  ),
}


@each('name', NEED_VALUE, quick=['masked', 'strict', 'strict in a chain'])
def test_an_inner_that_needs_the_loss_is_checked_with_one(name):
  with pytest.raises(ValueError, match='more than decoupled weight decay'):
    galore(NEED_VALUE[name](), **OPTIONS).init(tree(SHAPES))


def test_arguments_that_a_signature_lacks_are_left_out():
  def update(updates, state, params=None, *, grad, value):
    return jax.tree.map(lambda g: g * value, grad), state

  tx = optax.GradientTransformationExtraArgs(lambda params: (), update)
  assert trial.try_update(tx, 3.0, (), None)[0] == 3.0


def needs(name):
  def update(updates, state, params=None, **extra):
    return jax.tree.map(lambda u: u * extra_of(**extra), updates), state

  namespace = {}
  exec(f'def extra_of(*, {name}, **_):\n  return {name}', namespace)
  extra_of = namespace['extra_of']
  return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_an_inner_that_cannot_be_tried_is_named():
  with pytest.raises(trial.CannotTryError, match="'batch_size'"):
    trial.try_update(needs('batch_size'), 1.0, (), None)
  with pytest.warns(UserWarning, match="tried at init.*'batch_size'.*decay"):
    galore(needs('batch_size'), **OPTIONS).init(tree(SHAPES))
  with pytest.warns(UserWarning, match="tried at init.*'batch_size'.*element"):
    quantize_state(needs('batch_size')).init(tree(SHAPES))
  with pytest.warns(UserWarning, match="tried at init.*'batch_size'.*rate"):
    build('Badam', blocks='s', inner=needs('batch_size')).init(
      {'s': jnp.ones((2, 3, 4))}
    )


OTHER_RANK = {
  'rows': lambda rank: galore(optax.adam(0.1), rank=rank),
  'seeds': lambda rank: build('Apollo', rank=rank),
  '8 bits': lambda rank: build('Galore8bit', rank=rank),
  'coordinates': lambda rank: galore(
    optax.adam(0.1), rank=rank, subspace='coordinates'
  ),
  'both sides': lambda rank: galore(optax.sgd(0.1), rank=rank, side='both'),
  'quantized': lambda rank: galore_optax.quantize_bases(
    galore(optax.sgd(0.1), rank=rank)
  ),
}


@each(
  'name',
  OTHER_RANK,
  quick=[name for name in OTHER_RANK if name != '8 bits'],
)
def test_a_state_of_another_rank_is_refused(name):
  make, w = OTHER_RANK[name], tree(SHAPES)
  data = flax.serialization.to_bytes(make(2).init(w))
  other = flax.serialization.from_bytes(make(4).init(w), data)
  with pytest.raises(ValueError, match=r'for w .*, and rank 4 needs .*\(4'):
    make(4).update(w, other, w)
  same = flax.serialization.from_bytes(make(2).init(w), data)
  jax.eval_shape(make(2).update, w, same, w)


def test_every_stage_refuses_a_state_of_another_rank_or_tree():
  tx, w = galore(optax.adam(0.1), **OPTIONS), tree(SHAPES)
  other = galore(optax.adam(0.1), rank=2).init(w)
  low = tx.project(w, tx.init(w))
  with pytest.raises(ValueError, match='rank 3 needs'):
    tx.refresh(w, other)
  with pytest.raises(ValueError, match='rank 3 needs'):
    tx.project(w, other)
  with pytest.raises(ValueError, match='rank 3 needs'):
    tx.apply(low, other, w)
  with pytest.raises(ValueError, match=r'of another structure.*tx\.init'):
    tx.update({'v': w['w']}, tx.init(w))


def test_a_line_search_inside_is_named():
  with pytest.raises(ValueError, match='calls value_fn'):
    galore(optax.lbfgs(), **OPTIONS).init(tree(SHAPES))
  with pytest.raises(ValueError, match='calls obj_fn'):
    galore(optax.contrib.sophia(0.1), **OPTIONS).init(tree(SHAPES))


def test_a_snapshot_behind_adam_works():
  norm = optax.snapshot('n', optax.tree.norm)
  for parts in ((norm, optax.adam(0.1)), (optax.adam(0.1), norm)):
    optax.chain(galore(**OPTIONS), *parts).init(tree(SHAPES))


def test_8_bits_under_strict_promotion_names_the_dtypes():
  with jax.numpy_dtype_promotion('strict'):
    with pytest.raises(ValueError, match=r'raises for a piece: .*promotion'):
      quantize_state(optax.adam(0.1)).init(tree(SHAPES))


def test_static_options_of_badam_are_named():
  injected = optax.inject_hyperparams(PRESETS['Badam'])
  with pytest.raises(ValueError, match=r"static_args=.*'train_rest'"):
    injected(0.1).init({'blocks': jnp.ones((2, 3, 4))})
  static = ('switch_every', 'train_rest', 'master_weights', 'start', 'seed')
  injected = optax.inject_hyperparams(PRESETS['Badam'], static_args=static)
  injected(0.1).init({'blocks': {'w': jnp.ones((2, 3, 4))}})


@pytest.mark.parametrize(
  'wrapped',
  [
    lambda stage: optax.named_chain(('a', stage), ('b', optax.adam(0.1))),
    lambda stage: optax.chain(optax.masked(stage, True), optax.adam(0.1)),
    lambda stage: optax.chain(optax.chain(stage), optax.adam(0.1)),
  ],
  ids=['named_chain', 'masked', 'nested'],
)
def test_a_stage_inside_a_wrapper_is_told_the_spelling_that_works(wrapped):
  with pytest.raises(
    TypeError, match=r'optax\.adamw\(lr\), rank.*nested chain'
  ):
    wrapped(galore(**OPTIONS)).init(tree(SHAPES))


def test_apollo_has_no_infinity_in_its_state():
  tx, w = build('Apollo', rank=3), tree(SHAPES)
  with jax.debug_infs(True):
    state = tx.init(w)
    _, state = jax.jit(tx.update)(w, state, w)
  assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))


def reads_in_python(f):
  """Multiplies updates by a number that Python reads: f(updates, params)."""

  def update(updates, state, params=None):
    factor = float(f(updates, params))
    new = jax.tree.map(lambda u: factor * u, updates)
    return new, {'is_first': False}

  return optax.GradientTransformation(lambda _: {'is_first': True}, update)


def clip_in_python():
  return reads_in_python(lambda g, _: 1 / max(1.0, optax.tree.norm(g)))


def norm_after_first():
  """Reads a Python bool of its state, and scales by the norm of a weight."""

  def update(updates, state, params=None):
    if state['is_first']:
      updates = jax.tree.map(
        lambda u, w: u * jnp.linalg.norm(w), updates, params
      )
    return updates, {'is_first': False}

  return optax.GradientTransformation(lambda _: {'is_first': True}, update)


@pytest.mark.parametrize(
  'inner',
  [
    norm_after_first(),
    pytest.param(
      optax.chain(clip_in_python(), optax.scale_by_trust_ratio()),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_an_inner_that_python_reads_is_checked(inner):
  with pytest.raises(ValueError, match='reads params for more than'):
    galore(inner, rank=3).init(tree(SHAPES))


def test_an_inner_that_python_reads_from_a_weight_is_named():
  with pytest.raises(ValueError, match='has no forward derivative'):
    weight = reads_in_python(lambda _, w: optax.tree.norm(w))
    galore(weight, rank=3).init(tree(SHAPES))


def test_an_inner_that_python_reads_may_decay_weights():
  tx = galore(optax.chain(clip_in_python(), optax.adamw(0.1)), rank=3)
  same = optax.chain(clip_in_python(), galore(optax.adamw(0.1), rank=3))
  params = tree(SHAPES)
  found, want = (
    one.update(params, one.init(params), params)[0] for one in (tx, same)
  )
  # Adam's first update does not depend on the norm of the gradient.
  chex.assert_trees_all_close(found, want, rtol=1e-4)


def test_an_inner_that_python_reads_has_no_learning_rate_of_its_own():
  inner = optax.chain(clip_in_python(), optax.sgd(0.1))
  tx = build('Frugal', density=0.5, inner=inner)
  with pytest.raises(ValueError, match='has a learning rate of its own'):
    tx.init(tree(SHAPES))


def test_a_gradient_without_a_parameter_is_named():
  tx = galore(optax.sgd(0.1), rank=3)
  state = tx.init({**tree(SHAPES), 'step': jnp.int32(1)})
  grads = {**tree(SHAPES), 'step': jnp.float32(0)}
  with pytest.raises(ValueError, match='gradient for step, but tx'):
    tx.update(grads, state)


def test_a_parameter_without_a_gradient_has_a_remedy():
  tx = galore(optax.sgd(0.1), rank=3)
  state = tx.init(tree(SHAPES))
  with pytest.raises(ValueError, match='needs a gradient, zero instead of'):
    tx.update({**tree(SHAPES), 'b': None}, state)


def test_the_state_of_another_optimizer_is_named():
  tx, w = galore(optax.adam(0.1), rank=4), {'w': jnp.ones((9, 13))}
  state = optax.adam(0.1).init(w)
  with pytest.raises(ValueError, match='must be a GaloreState, got a tuple'):
    tx.update(w, state, w)


def test_a_gradient_of_another_shape_is_named():
  tx, w = galore(optax.adam(0.1), rank=4), {'w': jnp.ones((9, 13))}
  g = {'w': jnp.ones((13, 9))}
  with pytest.raises(ValueError, match=r'got \(13, 9\) for w of shape'):
    tx.update(g, tx.init(g), w)
