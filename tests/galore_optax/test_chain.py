"""The usage `optax.chain(galore(...), optax.adamw(...))`, and nested chains."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from galore_optax import galore
from tests.galore_optax.program import normal32
from tests.rounding import assert_same_program

optax_chain = optax.chain.__wrapped__
BOTH_SPELLINGS = (
  r'optax\.chain\(galore\(rank=512\), optax\.adamw\(lr\)\)'
  r'.*galore\(optax\.adamw\(lr\), rank=512\)'
)


def params():
  return {
    'up': normal32((11, 17)),
    'down': normal32((17, 11), 1),
    'b': normal32(5),
  }


def assert_same(*txs: optax.GradientTransformation, **extra: Any) -> None:
  """Asserts that transformations run the same operations at every step."""
  w = params()
  assert_same_program(*((tx.init, w) for tx in txs))
  updates = [functools.partial(tx.update, **extra) for tx in txs]
  states = [jax.eval_shape(tx.init, w) for tx in txs]
  assert_same_program(
    *((f, w, state, w) for f, state in zip(updates, states, strict=True))
  )


def test_importing_the_package_makes_optax_chain_aware():
  assert optax.chain is galore_optax.chain
  assert optax_chain is not galore_optax.chain
  assert optax_chain.__module__.startswith('optax.')


def test_the_verbatim_line_is_galore_around_adamw():
  lr = optax.linear_schedule(0.0, 0.1, 3)
  line = optax.chain(galore(rank=4, gap=2), optax.adamw(lr, weight_decay=0.1))
  call = galore(optax.adamw(lr, weight_decay=0.1), rank=4, gap=2)
  # A chain nests the same state leaves in additional tuples.
  assert_same(line, call)


def test_the_verbatim_line_keeps_low_rank_state_to_the_byte():
  line = optax.chain(galore(rank=4, gap=2), optax.adamw(0.1))
  state = jax.eval_shape(line.init, params())
  r = 4
  basis = r * 11 + r * 11  # the shorter side of both weights
  moments = 2 * (r * 17 + r * 17 + 5)
  counters = 2 + 1  # GaLore's count and skipped, and Adam's count
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  assert size == 4 * (basis + moments + counters)


def test_transformations_before_a_stage_act_on_the_whole_gradient():
  before = optax.clip_by_global_norm(0.5), optax.scale(3.0)
  after = optax.scale_by_adam(), optax.scale_by_learning_rate(0.1)
  stage = {'rank': 4, 'gap': 2}
  line = optax.chain(*before, galore(**stage), *after)
  want = optax_chain(*before, galore(optax_chain(*after), **stage))
  assert_same(line, want)
  chex.assert_trees_all_equal_structs(
    *(jax.eval_shape(tx.init, params()) for tx in (line, want))
  )


WITHOUT_STAGE = {
  'one': (optax.sgd(0.1),),
  'adamw': (optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
  'pieces': (optax.scale_by_adam(), optax.scale(-0.1)),
  'schedule': (
    optax.scale_by_rms(),
    optax.scale_by_schedule(optax.linear_schedule(0.0, -1.0, 3)),
  ),
  'lamb': (optax.lamb(0.1),),
  'extra args': (optax.polyak_sgd(), optax.scale(0.5)),
  'masked': (optax.masked(optax.adam(0.1), {'up': 1, 'down': 0, 'b': 1}),),
  'nested': (optax_chain(optax.trace(0.9), optax.identity()), optax.lion(0.1)),
  'decay': (optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
  'galore with its inner': (galore(optax.adam(0.1), rank=4), optax.scale(2.0)),
  'factored': (optax.scale_by_factored_rms(), optax.scale(-1.0)),
  'injected': (optax.inject_hyperparams(optax.sgd)(0.1),),
}


@pytest.mark.parametrize('name', WITHOUT_STAGE)
def test_without_a_stage_it_is_optax_chain(name):
  ours, theirs = (
    optax.chain(*WITHOUT_STAGE[name]),
    optax_chain(*WITHOUT_STAGE[name]),
  )
  # A chain that starts with `galore(inner)` is a `Galore`, because it can also
  # accumulate projected gradients.
  assert isinstance(ours, type(theirs))
  assert type(ours) is type(theirs) or name == 'galore with its inner'
  extra = {'value': jnp.float32(3.0)} if name == 'extra args' else {}
  assert_same(ours, theirs, **extra)
  w = params()
  state, want = (jax.eval_shape(tx.init, w) for tx in (ours, theirs))
  chex.assert_trees_all_equal_structs(state, want)
  after, want = (
    jax.eval_shape(lambda s, tx=tx: tx.update(w, s, w, **extra), s)
    for tx, s in ((ours, state), (theirs, want))
  )
  chex.assert_trees_all_equal_structs(after, want)


@pytest.mark.parametrize(
  'build',
  [
    lambda: optax_chain(galore(rank=4), optax.adamw(0.1)),
    lambda: optax.chain(galore(rank=4)),
    lambda: optax.chain(optax.clip(1.0), galore(rank=4)),
    lambda: optax.chain(optax.chain(galore(rank=4)), optax.adamw(0.1)),
    lambda: galore(rank=4),
    lambda: optax.masked(galore(rank=4), {'up': True, 'down': 1, 'b': 0}),
    lambda: optax.named_chain(
      ('galore', galore(rank=4)), ('adamw', optax.adamw(0.1))
    ),
    lambda: optax.partition({'a': galore(rank=4)}, lambda p: 'a'),
    lambda: optax.MultiSteps(galore(rank=4), 2).gradient_transformation(),
  ],
  ids=['older chain', 'alone', 'last', 'nested alone', 'no chain']
  + ['masked', 'named_chain', 'partition', 'MultiSteps'],
)
def test_a_stage_without_inner_raises_with_both_spellings(build):
  with pytest.raises(TypeError, match=BOTH_SPELLINGS):
    build().init(params())


def test_a_stage_cannot_be_updated_either():
  with pytest.raises(TypeError, match=BOTH_SPELLINGS):
    galore(rank=4).update(params(), ())


def test_a_second_stage_raises():
  with pytest.raises(ValueError, match='one galore stage'):
    optax.chain(galore(rank=4), optax.adam(0.1), galore(rank=2), optax.sgd(1.0))


def test_a_chain_with_a_stage_stands_inside_other_chains():
  inner = optax.chain(galore(rank=4, gap=2), optax.adam(0.1))
  assert_same(
    optax.chain(optax.clip(0.5), optax.chain(inner)),
    optax_chain(optax.clip(0.5), galore(optax.adam(0.1), rank=4, gap=2)),
  )


def test_a_stage_may_be_used_twice():
  stage = galore(rank=4, gap=2)
  one, two = (optax.chain(stage, optax.adam(0.1)) for _ in range(2))
  assert_same(one, two)


def test_extra_args_reach_transformations_after_a_stage():
  seen = []

  def update(updates, state, params=None, *, value, **extra):
    seen.append((value, 'layer' in extra))
    return updates, state

  spy = optax.GradientTransformationExtraArgs(lambda p: (), update)
  tx = optax.chain(galore(rank=4), spy)
  state, w = jax.eval_shape(tx.init, params()), params()
  # `init` has already run the inner optimizer with a placeholder value. Only
  # the calls of `update` count here.
  seen.clear()
  jax.eval_shape(lambda state: tx.update(w, state, w, value=7), state)
  assert seen and all(value == 7 for value, _ in seen)
