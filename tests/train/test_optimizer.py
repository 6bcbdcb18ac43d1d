import dataclasses
import inspect

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from train.methods import (
  Apollo,
  ApolloMini,
  Badam,
  Fira,
  Frugal,
  GaloreAdafactor,
)

import galore_optax
from galore_optax.layerwise.weights import quantize_bases
from train.method import AdamW, Galore, Galore8bit, OptaxGalore

SHAPES = {'blocks': {'up': (3, 14, 22)}, 'embed': (24, 14), 'norm': (14,)}


def tree(seed):
  leaves, treedef = jax.tree.flatten(
    SHAPES, is_leaf=lambda x: isinstance(x, tuple)
  )
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  return treedef.unflatten(
    [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
  )


def updates(tx, num_steps=5):
  params, found = tree(0), []
  state = tx.init(params)
  update = jax.jit(tx.update)
  for i in range(num_steps):
    change, state = update(tree(i + 1), state, params)
    params = optax.apply_updates(params, change)
    found.append(params)
  return found, state


def test_optax_galore_is_optax_galore_with_a_state_that_can_be_saved():
  schedule = optax.linear_schedule(0.0, 0.1, 5)
  options = {'rank': 3, 'update_proj_gap': 2, 'weight_decay': 0.1}
  ours, state = updates(OptaxGalore(**options).build(schedule))
  theirs, other = updates(optax.contrib.galore(schedule, **options))
  # Two compiled programs, which may fuse a multiply and an add differently.
  chex.assert_trees_all_close(ours, theirs, rtol=0, atol=1e-6)
  assert all(leaf.size for leaf in jax.tree.leaves(state))
  assert not all(leaf.size for leaf in jax.tree.leaves(other))


def test_adamw_is_adamw():
  ours, _ = updates(AdamW(b1=0.8, weight_decay=0.1).build(lambda count: 0.1))
  theirs, _ = updates(optax.adamw(lambda count: 0.1, b1=0.8, weight_decay=0.1))
  chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.parametrize(
  'options',
  [{}, {'side': 'reverse_std', 'subspace': 'gram', 'moments': 'reset'}],
)
def test_galore_takes_every_option(options):
  optimizer = Galore(rank=3, gap=2, weight_decay=0.1, b1=0.8, **options)
  found, state = updates(optimizer.build(lambda count: 0.1))
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))
  sizes = [leaf.size for leaf in jax.tree.leaves(state)]
  # Adam's two moments of the stack alone are 1848; projected with its basis,
  # the stack takes 3 * 3 * (14 + 2 * 22) = 522 or 3 * 3 * (22 + 2 * 14) = 450.
  assert 0 not in sizes and sum(sizes) < 1848


@pytest.mark.parametrize(
  'basis_bits', [pytest.param(None, marks=pytest.mark.slow), 4]
)
def test_galore_in_8_bits_is_the_preset(basis_bits):
  options = {'rank': 3, 'gap': 2, 'subspace': 'power', 'weight_decay': 0.1}
  optimizer = Galore8bit(basis_bits=basis_bits, **options)
  preset = galore_optax.galore_adamw_8bit(0.1, **options)
  if basis_bits:
    preset = quantize_bases(preset, bits=basis_bits)
  ours, _ = updates(optimizer.build(lambda count: 0.1), 3)
  want, _ = updates(preset, 3)
  chex.assert_trees_all_close(ours, want, rtol=1e-6)


def test_adamw_keeps_float32_moments_for_bfloat16_weights():
  tx = AdamW().build(lambda count: 0.1)
  params = optax.tree.cast(tree(0), jnp.bfloat16)
  shapes = jax.eval_shape(tx.init, params)
  for name in ('mu', 'nu'):
    moments = optax.tree.get(shapes, name)
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype('f4')}
  change, state = tx.update(params, tx.init(params), params)
  chex.assert_trees_all_equal_dtypes(change, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))


METHODS = {
  'frugal': Frugal(density=0.4, gap=2),
  'frugal, columns': Frugal(gap=2, subspace='columns', inner='lion'),
  'badam': Badam(switch_every=2, train_rest=True),
  'fira': Fira(rank=3, gap=2, moments='reset'),
  'fira, 8 bits': Fira(rank=3, gap=2, bits=8),
  'apollo': Apollo(rank=3, gap=2),
  'apollo_mini': ApolloMini(gap=2),
  'adafactor': GaloreAdafactor(rank=3, gap=2, b1=0.9),
}


@pytest.mark.parametrize('name', METHODS)
def test_a_method_is_the_preset_of_its_name(name):
  tx = METHODS[name].build(lambda count: 0.1)
  found, state = updates(tx, num_steps=3)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))
  assert 0 not in [leaf.size for leaf in jax.tree.leaves(state)]
  moved = jnp.abs(found[-1]['blocks']['up'] - tree(0)['blocks']['up'])
  # BAdam has had two turns of two steps; three layers are in the stack.
  still = jnp.sum(jnp.all(moved == 0, axis=(1, 2)))
  assert still == (1 if name == 'badam' else 0)


def test_defaults_are_those_of_the_presets():
  for optimizer in (Frugal, Badam, Fira, Apollo, ApolloMini, GaloreAdafactor):
    name = {'ApolloMini': 'apollo_mini', 'GaloreAdafactor': 'galore_adafactor'}
    preset = name.get(optimizer.__name__, optimizer.__name__.lower())
    parameters = inspect.signature(getattr(galore_optax, preset)).parameters
    for field in dataclasses.fields(optimizer):
      if field.name in parameters:
        assert field.default == parameters[field.name].default, field.name
