"""Which leaves are projected; errors contain a value, a rule and a remedy."""

import dataclasses
import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_optax
from galore_optax import Elsewhere, Optional, containers, galore
from galore_optax import paths as selection
from galore_optax.projection import Projection, Whole
from tests.galore_optax.every import PRESETS as EVERY
from tests.galore_optax.every import build
from tests.galore_optax.program import each, run
from tests.rounding import assert_same_program

W = jnp.zeros((9, 13))


def projected(params, **options):
  """Returns the paths of leaves that have a basis."""
  tx = galore(optax.sgd(0.1), **{'rank': 4, **options})
  state = jax.eval_shape(tx.init, params)
  leaves = jax.tree_util.tree_leaves_with_path(state.basis)
  return {
    jax.tree_util.keystr(p, simple=True, separator='/') for p, _ in leaves
  }


def test_the_default_takes_matrices_larger_than_the_rank_on_both_axes():
  params = {
    'wide': jnp.zeros((5, 100)),
    'tall': jnp.zeros((100, 5)),
    'stack': jnp.zeros((2, 3, 5, 6)),
    'as small as the rank': jnp.zeros((4, 100)),
    'small stack': jnp.zeros((100, 5, 4)),
    'vector': jnp.zeros(100),
    'scalar': jnp.zeros(()),
  }
  assert projected(params) == {'wide', 'tall', 'stack'}


def test_the_default_measures_the_matrix_that_axes_name():
  # Neither the 3 heads nor their dimension of 4 exceeds the rank, but their
  # product of 12 does.
  params = {'q': jnp.zeros((9, 3, 4)), 'stack': jnp.zeros((2, 9, 3, 4))}
  axes = {'q|stack': (-3, (-2, -1))}
  assert projected(params, axes=axes) == {'q', 'stack'}
  assert projected(params, axes=axes, rank=8) == {'q', 'stack'}
  assert 'rank 9 projects no parameter' in failure(params, axes=axes, rank=9)


@pytest.mark.parametrize(
  'name',
  ['embed', 'embedding', 'embed_tokens', 'lm_head', 'head', 'logits', 'wte']
  + ['wpe', 'norm', 'attention_norm', 'norm_1', 'layernorm', 'ln_f', 'scale']
  + ['bias', 'LayerNorm_1', 'ln1', 'q_bias', 'unembed', 'shared_embed']
  + ['pos_embedding', 'mlm_head', 'wordEmbeddings', 'HEAD'],
)
def test_the_default_leaves_out(name):
  params = {'up': W, 'a': {name: {'kernel': W}, 'b': [W, {name: W}]}}
  assert projected(params) == {'up', 'a/b/0'}


@pytest.mark.parametrize(
  'name',
  ['heads', 'upscale', 'biased', 'headroom', 'wtes', 'multi_head_attention'],
)
def test_the_default_matches_whole_components(name):
  assert projected({name: W}) == {name}


MODEL = {
  'blocks': {'q': {'kernel': W, 'bias': W[0]}, 'up': {'kernel': W}},
  'embed': W,
}


@pytest.mark.parametrize(
  'targets, expected',
  [
    (['blocks/q/kernel'], {'blocks/q/kernel'}),
    ('blocks/q/kernel', {'blocks/q/kernel'}),
    ([r'.*/kernel', 'embed'], {'blocks/q/kernel', 'blocks/up/kernel', 'embed'}),
    (lambda path, leaf: 'up' in path and leaf.ndim == 2, {'blocks/up/kernel'}),
    (('embed',), {'embed'}),
  ],
)
def test_targets_by_name(targets, expected):
  assert projected(MODEL, targets=targets) == expected


def test_a_named_target_may_have_the_rank_as_its_side():
  assert projected({'norm': jnp.zeros((4, 9))}, targets='norm') == {'norm'}


def failure(params=MODEL, **options):
  with pytest.raises(ValueError) as caught:
    galore(optax.sgd(0.1), **{'rank': 4, **options}).init(params)
  return str(caught.value)


def test_a_regex_that_matches_nothing_lists_the_paths():
  message = failure(targets=['.*/kernel', 'blocks/q', 'kernel'])
  assert "['blocks/q', 'kernel']" in message
  assert 'whole path' in message
  assert 'blocks/q/kernel' in message and 'embed' in message


def test_a_malformed_regex_is_named():
  assert "'(oops'" in failure(targets='(oops')


def test_a_target_that_the_rank_does_not_fit_says_the_range():
  assert 'rank must be in 1..9 for embed of shape (9, 13), got 10' in failure(
    targets='embed', rank=10
  )


def test_a_vector_is_no_target():
  message = failure(targets='blocks/q/bias')
  assert 'blocks/q/bias of shape (13,)' in message
  assert 'no matrix' in message and 'Leave it out' in message


def test_rank_512_on_a_model_of_width_512_raises():
  params = {'q': jax.ShapeDtypeStruct((2, 512, 512), jnp.float32)}
  message = failure(params, rank=512)
  assert 'rank 512 projects no parameter' in message
  assert 'Lower rank to at most 511 or name targets' in message
  assert 'q (2, 512, 512)' in message


@pytest.mark.parametrize('targets', [[], lambda path, leaf: False])
def test_targets_that_select_nothing_raise(targets):
  assert 'select no parameter' in failure(targets=targets)


@pytest.mark.parametrize(
  'option, value, rule',
  [
    ('scale', -1.0, 'a finite number >= 0'),
    ('scale', float('nan'), 'a finite number >= 0'),
    ('scale', None, 'a finite number >= 0'),
    ('residual', 'sign', 'a rule of galore_optax.residual'),
    ('rank', 0, 'an integer >= 1 or a float in (0, 1]'),
    ('rank', -1, 'an integer >= 1'),
    ('rank', 1.5, 'a float in (0, 1]'),
    ('rank', 0.0, 'a float in (0, 1]'),
    ('rank', float('nan'), 'a float in (0, 1]'),
    ('rank', True, 'an integer >= 1'),
    ('rank', '8', 'an integer >= 1'),
    ('gap', 0, 'an integer >= 1, in optimizer steps'),
    ('gap', -200, 'an integer >= 1'),
    ('gap', 1.5, 'an integer >= 1'),
    ('gap', True, 'an integer >= 1'),
    ('side', 'up', 'std, reverse_std, left, right, both, full'),
    ('subspace', 'magic', 'svd, gram'),
    ('moments', 'drop', 'keep, reset'),
  ],
)
def test_options_out_of_range_raise_at_once(option, value, rule):
  with pytest.raises(ValueError) as caught:
    galore(**{option: value})
  message = str(caught.value)
  assert message.startswith(f'{option} must be')
  assert rule in message and repr(value) in message


@pytest.mark.parametrize(
  ('option', 'ours'),
  [
    ({'update_proj_gap': 200}, 'gap'),
    ({'proj_type': 'right'}, r"side \(its 'left' 'right'\)"),
    ({'optim_target_modules': ['attn']}, 'targets'),
    ({'betas': (0.9, 0.999)}, 'b1 and b2'),
  ],
)
@pytest.mark.parametrize(
  'name', ['Galore', 'Galore8bit', 'GaloreAdafactor', 'ApolloMini']
)
def test_an_option_of_the_reference_is_told_its_name_here(option, ours, name):
  (theirs,) = option
  message = f'{theirs} is called {ours} here; train/README'
  with pytest.raises(TypeError, match=message):
    galore(optax.sgd(0.1), **option)
  with pytest.raises(TypeError, match=message):
    EVERY[name](0.1, **option)


def test_another_option_is_refused_as_ever():
  with pytest.raises(TypeError, match="unexpected keyword argument 'gab'"):
    galore(optax.sgd(0.1), gab=3)


def test_the_update_raises_as_init_does():
  # The state was made for one tree, and the gradients have another.
  tx = galore(optax.sgd(0.1), rank=4)
  with pytest.raises(ValueError, match='projects no parameter'):
    tx.update({'b': jnp.zeros(3)}, tx.init({'b': W}))


class TestElsewhere:
  """Checks of targets are relaxed for a part of a model.

  Targets may match leaves in the other parts.
  """

  def test_a_regex_may_name_the_other_part(self):
    part = {'blocks': {'q': W}, 'embed': Elsewhere()}
    assert projected(part, targets=['blocks/q', 'embed']) == {'blocks/q'}
    other = {'blocks': Elsewhere(), 'embed': W}
    assert projected(other, targets=['blocks/q']) == set()

  def test_nothing_may_be_selected(self):
    assert projected({'blocks': Elsewhere(), 'norm': W[0]}) == set()
    assert projected({'blocks': Elsewhere(), 'embed': Elsewhere()}) == set()

  def test_a_rank_that_does_not_fit_still_raises(self):
    part = {'blocks': {'q': W}, 'embed': Elsewhere()}
    with pytest.raises(ValueError, match='rank must be in'):
      galore(optax.sgd(0.1), rank=40, targets='blocks/q').init(part)

  def test_it_is_a_node_without_leaves(self):
    assert jax.tree.leaves(Elsewhere()) == []
    one, two = (jax.tree.structure({'a': Elsewhere(), 'b': 1}) for _ in '12')
    assert one == two


VECTORS = {'bias': jnp.ones(5), 'gain': jnp.full(3, 2.0)}

OPTIONAL = [
  Optional(),
  Optional('.*/kernel'),
  Optional(['.*/kernel', 'up']),
  Optional(lambda path, leaf: leaf.ndim > 1),
]


PRESETS = [
  *(
    (name, {'rank': 4} if name == 'Apollo' else {})
    for name, preset in EVERY.items()
    if 'targets' in inspect.signature(preset).parameters
  ),
  *(('Frugal', {'density': density}) for density in (0, 1)),
  *(('Frugal', {'subspace': x}) for x in ('columns', 'rows', 'entries')),
]
"""Presets with the option `targets`, and options of theirs."""


def after_three_steps(tx, params, *, jit=False):
  """Returns the parameters after three steps on their own sines."""
  sines = functools.partial(jax.tree.map, jnp.sin)
  return run(tx, params, 3 * [sines], jit=jit)[-1].params


class TestOptional:
  """`Optional` targets may select no leaf; then only the inner runs."""

  @pytest.mark.parametrize('targets', OPTIONAL)
  @pytest.mark.parametrize('moments', ['keep', 'reset'])
  def test_an_empty_selection_is_the_inner_alone(self, targets, moments):
    inner = optax.adamw(0.1)
    tx = galore(inner, targets=targets, moments=moments)
    chex.assert_trees_all_equal(
      after_three_steps(tx, VECTORS), after_three_steps(inner, VECTORS)
    )

  @pytest.mark.parametrize('name, options', PRESETS)
  def test_every_preset_with_targets_has_it(self, name, options):
    preset = EVERY[name]
    tx = preset(0.1, targets=Optional(), **options)
    updates, _ = tx.update(VECTORS, tx.init(VECTORS), VECTORS)
    assert all(jnp.all(u < 0) for u in jax.tree.leaves(updates))
    if options.get('density') not in (0, 1):
      with pytest.raises(ValueError, match=r'targets=galore_optax.Optional'):
        preset(0.1, **options).init(VECTORS)

  @each('name, options', PRESETS, quick=PRESETS[:1])
  def test_vectors_move_as_they_do_next_to_a_matrix(self, name, options):
    preset = EVERY[name]
    params = VECTORS | {'up': jnp.ones((150, 160))}
    tx = preset(0.1, targets=Optional(), **options)
    # Next to a matrix, the program is that of the default targets.
    plain = preset(0.1, **options)
    assert_same_program(
      (tx.update, params, tx.init(params), params),
      (plain.update, params, plain.init(params), params),
    )
    without = after_three_steps(tx, VECTORS, jit=True)
    after = after_three_steps(tx, params, jit=True)
    assert not jnp.allclose(after['up'], params['up'])
    # The programs differ, and so may the rounding of the last bits.
    shared = {name: after[name] for name in VECTORS}
    chex.assert_trees_all_close(without, shared, rtol=1e-5)

  def test_what_it_selects_is_what_its_targets_select(self):
    for targets in (None, '.*/kernel', ['embed'], lambda p, x: p == 'embed'):
      assert projected(MODEL, targets=Optional(targets)) == projected(
        MODEL, targets=targets
      )
    assert projected(MODEL, targets=Optional(['embed', 'absent'])) == {'embed'}

  def test_frugal_without_a_subspace_selects_by_regex(self):
    tx = build('Frugal', density=0, targets=Optional('gain'))
    signs = after_three_steps(tx, VECTORS)['gain'] - VECTORS['gain']
    np.testing.assert_allclose(signs, -0.3, rtol=1e-5)

  def test_axes_may_match_nothing_too(self):
    axes = {'.*/proj/kernel': (0, (1, 2))}
    tx = galore(optax.sgd(0.1), targets=Optional(), axes=axes)
    assert tx.init(VECTORS).count == 0
    with pytest.raises(ValueError, match='match no parameter'):
      galore(optax.sgd(0.1), axes=axes).init(VECTORS)

  def test_a_selected_leaf_must_still_be_a_matrix_that_the_rank_fits(self):
    assert 'is no matrix' in failure(targets=Optional('blocks/q/bias'))
    message = failure(targets=Optional('embed'), rank=10)
    assert 'rank must be in 1..9' in message

  @pytest.mark.parametrize('targets', [3, {'a': 1}, Optional()])
  def test_it_checks_the_targets_inside(self, targets):
    with pytest.raises(ValueError, match='targets must be None, a regex'):
      Optional(targets)

  def test_groups_and_injected_hyperparameters_have_it(self):
    grouped = galore_optax.grouped(
      EVERY['Galore'], [galore_optax.Group('bias', rate=0.5)]
    )
    after_three_steps(grouped(0.1, targets=Optional()), VECTORS)
    static = ('rank', 'gap', 'targets')
    injected = optax.inject_hyperparams(EVERY['Galore'], static_args=static)
    tx = injected(0.1, rank=4, targets=Optional())
    plain = build('Galore', rank=4, targets=Optional())
    chex.assert_trees_all_close(
      after_three_steps(tx, VECTORS), after_three_steps(plain, VECTORS)
    )
    assert tx.init(VECTORS).hyperparams['learning_rate'] == 0.1

  def test_a_tree_without_leaves(self):
    assert (
      after_three_steps(galore(optax.sgd(0.1), targets=Optional()), {}) == {}
    )

  def test_chain_and_describe(self):
    tx = optax.chain(galore(targets=Optional()), optax.adam(0.1))
    table = galore_optax.describe(tx, VECTORS)
    assert [row.reason for row in table] == ['bias', 'vector']
    assert [row.bytes for row in table] == [40, 24]


@pytest.mark.parametrize(
  'axes, rule',
  [
    ({'.*/kernal': (0, 1)}, 'match no parameter'),
    ({'(': (0, 1)}, 'no regular expression'),
    ({'embed': (0, 2)}, 'axes must be distinct and in -2..1 for embed'),
    ({'embed': (0, 0)}, 'axes must be distinct and in -2..1 for embed'),
    ({'embed': (0, (1, -1))}, 'axes must be distinct and in -2..1 for embed'),
  ],
)
def test_axes_that_name_no_matrix_raise(axes, rule):
  assert rule in failure(axes=axes, targets='embed')


def test_axes_may_name_a_part_that_is_elsewhere():
  part = {'blocks': {'q': W}, 'embed': Elsewhere()}
  assert projected(part, axes={'embed': (0, 1)}) == {'blocks/q'}


def test_complex_and_integer_leaves_are_left_out():
  params = {'c': W.astype(jnp.complex64), 'i': W.astype(jnp.int32), 'w': W}
  assert projected(params) == {'w'}
  assert 'complex64' in failure(params, targets='c')


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
  query: jax.Array
  value: jax.Array


def test_an_attribute_named_value_is_a_component_among_others():
  # NNX wraps each leaf in a node whose only attribute is `value`, which an
  # opened tree does not have.
  params = {'a': Attention(W, W), 'variable': nnx.Param(W)}
  plain = containers.opened(params)
  assert selection.paths(plain) == ['a/query', 'a/value', 'variable']
  # The state contains an array for the chosen paths.
  chosen = {'a/value', 'variable'}
  assert projected(params, targets='a/value|variable') == chosen


@pytest.mark.parametrize('batch', [(), (5,)], ids=['one', 'stack'])
def test_attention_that_keeps_its_heads_apart_is_one_matrix(batch):
  # The shapes are those of flax's MultiHeadDotProductAttention with width 512
  # and 8 heads.
  params = {
    'attention': {
      name: {'kernel': jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)}
      for name, shape in {
        **dict.fromkeys(['query', 'key', 'value'], (512, 8, 64)),
        'out': (8, 64, 512),
      }.items()
    }
  }
  state = jax.eval_shape(galore(optax.adam(0.1), rank=128).init, params)
  shapes = jax.tree.leaves(
    jax.tree.map(lambda x: x.shape, state.inner[0].mu),
    is_leaf=lambda x: isinstance(x, tuple),
  )
  assert shapes == 4 * [(*batch, 128, 512)]


def test_a_stack_of_matrices_under_such_a_name_stays_a_stack():
  params = {'query': {'kernel': jnp.zeros((3, 16, 16))}}
  state = jax.eval_shape(galore(optax.adam(0.1), rank=4).init, params)
  assert state.inner[0].mu['query']['kernel'].shape == (3, 4, 16)


def test_a_rank_of_numpy_is_taken_and_a_rate_is_no_inner():
  assert projected(MODEL, rank=np.int64(4)) == projected(MODEL, rank=4)
  with pytest.raises(ValueError, match='must be a transformation'):
    galore(1e-3, rank=16)


def test_a_predicate_is_asked_once():
  asked = []
  tx = galore(
    optax.sgd(0.1), rank=4, targets=lambda path, leaf: not asked.append(path)
  )
  params = {'w': W}
  state = tx.init(params)
  tx.update(params, state, params)
  assert asked == ['w']


def test_both_is_another_name_of_full():
  params = {'w': jnp.ones((3, 5, 7)), 'v': jnp.ones((7, 5))}
  both, full = (
    galore(optax.sgd(1.0), rank=2, side=x) for x in ('both', 'full')
  )
  assert both.plan(params) == full.plan(params)


def test_plans_of_a_complex_tree_are_not_those_of_a_real_one():
  plan = galore(optax.sgd(0.1), rank=2).plan
  params = {'w': jnp.ones((4, 6)), 'v': jnp.ones((4, 6))}
  assert all(isinstance(p, Projection) for p in plan(params))
  params['v'] = params['v'].astype(jnp.complex64)
  whole, projected = plan(params)
  assert isinstance(projected, Projection) and isinstance(whole, Whole)
