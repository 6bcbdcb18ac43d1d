"""Method classes of configs and the README's table agree with the presets."""

import dataclasses
import inspect
import pathlib
import pickle

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from tests.galore_optax.every import build
from tests.galore_optax.program import each
from train import method
from train.method import (
  AdamW,
  Fira,
  Frugal,
  Galore,
  Galore8bit,
  GaloreAdafactor,
  OptaxGalore,
)
from train.optimizers import registry
from train.optimizers import stub as method_stub

ROOT = pathlib.Path(__file__).parents[3]

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


@pytest.mark.parametrize('name', registry.METHODS)
def test_a_config_has_the_options_and_defaults_of_its_preset(name):
  kind, preset = registry.CLASSES[name], registry.METHODS[name].preset
  assert getattr(method, name) is kind and name in dir(method)
  assert pickle.loads(pickle.dumps(kind())) == kind()
  parameters = inspect.signature(preset).parameters
  for field in dataclasses.fields(kind):
    assert field.default == parameters[field.name].default
    (argument,) = field.type.__metadata__
    assert argument.help, f'{preset.__name__}: {field.name} has no Args'
  left = parameters.keys() - {field.name for field in dataclasses.fields(kind)}
  # The command line cannot express functions and trees, and `clip_norm` is an
  # option of the config.
  functions = {'learning_rate', 'axes', 'eps', 'inner', 'residual'}
  assert left <= functions | {'clip_norm'}
  assert kind().build(lambda count: 0.1).init


def test_a_new_preset_needs_no_more_than_its_signature():
  def sgd(
    learning_rate,
    *,
    momentum: float | None = None,
    nesterov: bool = False,
    where: str | list[str] | None = None,
    mask: dict | None = None,
    clip_norm: float | None = 1.0,
  ):
    """Descends.

    Args:
      learning_rate: a number.
      momentum: decay of the trace;
        None keeps none.
    """
    assert clip_norm is None and mask is None and where is None
    return optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov)

  kind = registry.options_class('Sgd', sgd)
  names = [field.name for field in dataclasses.fields(kind)]
  assert names == ['momentum', 'nesterov', 'where']
  assert inspect.getdoc(kind) == 'Descends.'
  first = dataclasses.fields(kind)[0].type.__metadata__[0]
  assert first.help == 'decay of the trace; None keeps none.'
  assert kind(momentum=0.5) == kind(momentum=0.5) != kind()
  ours, _ = updates(kind(momentum=0.5, nesterov=True).build(0.1))
  theirs, _ = updates(optax.sgd(0.1, momentum=0.5, nesterov=True))
  chex.assert_trees_all_equal(ours, theirs)


def test_optax_galore_has_no_state_of_frozen_weights() -> None:
  """A frozen weight is None in the params."""
  tx = OptaxGalore(rank=2).build(0.1)
  params = {'up': jnp.ones((4, 6)), 'norm': jnp.ones(4), 'head': None}
  change, state = tx.update(params, tx.init(params), params)
  assert change['head'] is None and change['up'].any() and change['norm'].any()
  trained = {'up': params['up'], 'norm': params['norm']}
  chex.assert_trees_all_equal_shapes(
    jax.tree.leaves(state), jax.tree.leaves(tx.init(trained))
  )


def test_optax_galore_takes_a_tree_without_a_matrix():
  tx = OptaxGalore(rank=2).build(0.1)
  stack = {'up': jnp.ones((3, 14, 22))}
  step, _ = tx.update(stack, tx.init(stack), stack)
  # Adam's first update is the sign of the gradient.
  chex.assert_trees_all_close(
    step['up'], jnp.full((3, 14, 22), -0.1), rtol=1e-5
  )


def test_optax_galore_is_optax_galore_with_a_state_that_can_be_saved():
  schedule = optax.linear_schedule(0.0, 0.1, 5)
  options = {'rank': 3, 'update_proj_gap': 2, 'weight_decay': 0.1}
  ours, state = updates(OptaxGalore(**options).build(schedule))
  theirs, other = updates(optax.contrib.galore(schedule, **options))
  # The tolerance allows for two compiled programs that contract multiplications
  # and additions differently.
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
  # Adam's two moments of the stack have 1,848 elements. If the stack is
  # projected, its basis and moments have 3 * 3 * (14 + 2 * 22) = 522 or 3 * 3 *
  # (22 + 2 * 14) = 450.
  assert 0 not in sizes and sum(sizes) < 1848


@each('basis_bits', [None, 4], quick=[None])
def test_galore_in_8_bits_is_the_preset(basis_bits):
  options = {'rank': 3, 'gap': 2, 'subspace': 'power', 'weight_decay': 0.1}
  optimizer = Galore8bit(basis_bits=basis_bits, **options)
  preset = build('Galore8bit', **options)
  if basis_bits:
    preset = galore_optax.quantize_bases(preset, bits=basis_bits)
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


def small(name):
  """Returns the options of a method for the tree of these tests."""
  kind = registry.CLASSES[name]
  known = {field.name for field in dataclasses.fields(kind)}
  options = dict(rank=3, density=0.4, gap=2, switch_every=2, train_rest=True)
  return kind(**{key: x for key, x in options.items() if key in known})


SOME = {name: small(name) for name in registry.METHODS} | {
  'columns': Frugal(gap=2, subspace='columns', inner='lion'),
  'reset': Fira(rank=3, gap=2, moments='reset'),
  '8 bits': Fira(rank=3, gap=2, bits=8),
  'first moment': GaloreAdafactor(rank=3, gap=2, b1=0.9),
}


@each('name', SOME, quick=['Frugal', 'Badam', 'reset', 'Apollo'])
def test_a_method_trains(name):
  tx = SOME[name].build(lambda count: 0.1)
  found, state = updates(tx, num_steps=3)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))
  assert 0 not in [leaf.size for leaf in jax.tree.leaves(state)]
  moved = jnp.abs(found[-1]['blocks']['up'] - tree(0)['blocks']['up'])
  # BAdam has trained two of the three layers, for two steps each.
  still = jnp.sum(jnp.all(moved == 0, axis=(1, 2)))
  assert still == (1 if name == 'Badam' else 0)


@pytest.mark.parametrize(
  'variant', [pytest.param(x, id=call) for call, x in registry.table_lines()]
)
def test_bytes_of_state_are_those_of_the_table(variant):
  # The weight is large enough for 8-bit moments, and not a multiple of a block.
  m, n, r = 48, 260, 16
  w = jax.ShapeDtypeStruct((m, n), jnp.float32)
  kind = registry.CLASSES[variant.name]
  known = {field.name for field in dataclasses.fields(kind)}
  sized = {'rank': r, 'density': r / m, 'blocks': '.*'}
  options = {k: x for k, x in sized.items() if k in known} | variant.options
  (row,) = galore_optax.describe(kind(**options).build(1.0), {'w': w})
  # BAdam selects layers of a stack, but it does not project them.
  whole = variant.cells.startswith('whole') or variant.name == 'Badam'
  assert (row.projected_shape is None) == whole
  assert row.bytes == variant.num_bytes(m, n, r)


def test_the_stub_declares_every_method():
  written = (ROOT / 'train' / 'method.pyi').read_text()
  assert written == method_stub.stub(), (
    'run `python -m train.optimizers.stub > train/method.pyi`'
  )
  for name, kind in registry.CLASSES.items():
    assert f'\nclass {name}:\n' in written
    for field in dataclasses.fields(kind):
      assert f'\n  {field.name}: ' in written


def test_a_name_that_is_no_method_is_an_attribute_error():
  with pytest.raises(AttributeError, match='Adagrad'):
    _ = method.Adagrad


def test_every_preset_is_a_method():
  # A preset is a function whose first parameter is the learning rate.
  presets = {
    name
    for name, value in vars(galore_optax).items()
    if inspect.isfunction(value)
    and [*inspect.signature(value).parameters, ''][0] == 'learning_rate'
  }
  rows = [row for row in registry.METHODS.values() if row.cells]
  assert {row.preset.__name__ for row in rows} == presets
