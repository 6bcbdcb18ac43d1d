"""`describe` returns rows whose bytes equal those of the state."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_optax import describe, galore
from tests.galore_optax.every import maker


def params():
  return {
    'blocks': {'q': jnp.zeros((2, 9, 13)), 'norm': jnp.zeros((2, 9))},
    'down': jnp.zeros((17, 5), jnp.bfloat16),
    'embed': jnp.zeros((30, 9)),
  }


def test_rows():
  table = describe(galore(optax.adam(0.1), rank=4), params())
  assert [row[:3] for row in table] == [
    ('blocks/norm', (2, 9), None),
    ('blocks/q', (2, 9, 13), (2, 4, 13)),
    ('down', (17, 5), (4, 17)),
    ('embed', (30, 9), None),
  ]
  assert table[1].basis_bytes == 4 * 2 * 4 * 9
  assert table[1].moment_bytes == 4 * 2 * (2 * 4 * 13)
  assert table[2].basis_bytes == 2 * 4 * 5  # bases have the weight's bfloat16
  assert table[2].moment_bytes == 4 * 2 * (17 * 4)  # moments are float32


def test_text():
  text = str(describe(galore(optax.adam(0.1), rank=4), params()))
  assert text.splitlines() == [
    'path         shape       projected   bytes  reason',
    'blocks/norm  (2, 9)      -             144  norm',
    'blocks/q     (2, 9, 13)  (2, 4, 13)  1,120  matrix',
    'down         (17, 5)     (4, 17)       584  matrix',
    'embed        (30, 9)     -           2,160  embedding',
    'total: 4,008 bytes of state; optax.adamw: 4,516, with moments in bfloat16'
    ' (here float32, or 8 bits)',
  ]


def masked():
  mask = jax.tree.map(lambda _: True, params()) | {'embed': False}
  return optax.masked(galore(optax.adam(0.1), rank=4), mask)


WRAPPED = {
  'verbatim': lambda: optax.chain(galore(rank=4), optax.adamw(0.1)),
  'full': lambda: galore(optax.adam(0.1), rank=4, side='full'),
  'reset': lambda: galore(optax.adam(0.1), rank=4, moments='reset'),
  'preset': maker('Galore', rank=4),
  'masked': masked,
  'MultiSteps': lambda: optax.MultiSteps(
    galore(optax.adam(0.1), rank=4), 2
  ).gradient_transformation(),
  'injected': lambda: optax.inject_hyperparams(
    lambda lr: galore(optax.adamw(lr), rank=4)
  )(0.1),
}


@pytest.mark.parametrize('name', WRAPPED)
def test_bytes_are_those_of_the_state(name):
  tx = WRAPPED[name]()
  table = describe(tx, params())
  arrays = jax.tree.leaves(tx.init(params()))
  scalars = sum(x.nbytes for x in arrays if x.ndim == 0)
  assert (
    sum(row.bytes for row in table) == sum(x.nbytes for x in arrays) - scalars
  )
  assert sum(row.projected_shape is not None for row in table) == 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  weight: jax.Array
  bias: jax.Array


@pytest.mark.parametrize(
  'build',
  [
    lambda w, v, b: [w, v, b],
    lambda w, v, b: (w, [v, {'w': b}]),
    lambda w, v, b: [Layer(w, b), Layer(v, b)][0:2],
    lambda w, v, b: {'w': w, 'a': {'w': v, 'b': b}},
  ],
  ids=['list', 'nested', 'dataclasses', 'a path that ends another'],
)
@pytest.mark.parametrize('side', ['std', 'full'])
def test_bytes_go_to_their_parameter_in_any_tree(build, side):
  w, v, b = jnp.zeros((9, 13)), jnp.zeros((11, 7)), jnp.zeros(5)
  tx = optax.chain(optax.clip(1.0), galore(optax.adam(0.1), rank=3, side=side))
  rows = {row.shape: row for row in describe(tx, build(w, v, b))}
  both = side == 'full'
  assert rows[9, 13].basis_bytes == 4 * 3 * (9 + 13 * both)
  assert rows[9, 13].moment_bytes == 8 * 3 * (3 if both else 13)
  assert rows[11, 7].basis_bytes == 4 * 3 * (7 + 11 * both)
  assert rows[11, 7].moment_bytes == 8 * 3 * (3 if both else 11)
  assert rows[5,].moment_bytes == 8 * 5


def test_a_bare_array_is_a_tree():
  (row,) = describe(galore(optax.adam(0.1), rank=3), jnp.zeros((9, 13)))
  assert row == ('', (9, 13), (3, 13), 4 * 3 * 9, 8 * 3 * 13, 'matrix')


def test_nothing_is_allocated():
  # As arrays, the weights would need 2.9 GB and the state 3.2 GB.
  shape = jax.ShapeDtypeStruct((32, 4096, 11008), jnp.bfloat16)
  (row,) = describe(galore(optax.adam(0.1), rank=1024), {'up': shape})
  assert row.projected_shape == (32, 1024, 11008)
  assert row.bytes == 32 * 1024 * (2 * 4096 + 8 * 11008)


def test_without_galore_nothing_is_projected():
  table = describe(optax.adam(0.1), {'w': jnp.zeros((9, 13))})
  assert table[0] == ('w', (9, 13), None, 0, 8 * 9 * 13, '')


def test_reasons():
  params = {
    'norm': jnp.zeros(90),
    'embed': jnp.zeros((50, 90)),
    'lm_head': jnp.zeros((90, 50)),
    'attention': {'query': {'kernel': jnp.zeros((90, 6, 15))}},
    'Conv_0': {'kernel': jnp.zeros((3, 3, 5, 40))},
    'up': jnp.zeros((90, 30)),
    'gate': jnp.zeros((90, 8)),
    'steps': jnp.zeros(3, jnp.int32),
    'none': jnp.zeros((0, 24)),
    'gain': jnp.zeros(()),
    'token': jnp.zeros(90),
  }
  # Adam does not initialize state for integers.
  tx = galore(optax.sgd(0.1), rank=8)
  assert {row.path: row.reason for row in describe(tx, params)} == {
    'norm': 'norm',
    'embed': 'embedding',
    'lm_head': 'output head',
    'attention/query/kernel': 'attention kernel, heads merged',
    'Conv_0/kernel': 'convolution',
    'up': 'matrix',
    'gate': 'rank 8 >= 8',
    'steps': 'not floating: int32',
    'none': 'empty',
    'gain': 'scalar',
    'token': 'vector',
  }


def test_reasons_of_named_targets():
  tx = galore(optax.sgd(0.1), rank=4, targets=['embed', 'blocks/q'])
  assert [row.reason for row in describe(tx, params())] == [
    'not selected by targets',
    'matrix, selected by targets',
    'not selected by targets',
    'embedding, selected by targets',
  ]


def test_leaves_outside_every_galore_have_no_reason():
  rows = {row.path: row for row in describe(masked(), params())}
  assert rows['embed'].reason == '' and rows['down'].reason == 'matrix'
  rules = {'a': galore(optax.sgd(0.1), rank=4), 'b': optax.sgd(0.1)}
  labels = {'down': 'a', 'embed': 'b', 'blocks': {'q': 'a', 'norm': 'b'}}
  table = describe(optax.partition(rules, labels), params())
  assert [row.reason for row in table] == ['', 'matrix', 'matrix', '']


def test_two_transformations_share_a_tree():
  # The second `galore` receives the updates of the first, as whole leaves.
  first = galore(optax.sgd(0.1), rank=4, targets='down')
  second = galore(optax.sgd(0.1), rank=4, targets='blocks/q')
  table = describe(optax.chain(first, second), params())
  assert [row.projected_shape for row in table] == [
    None,
    (2, 4, 13),
    (4, 17),
    None,
  ]


UNKNOWN = {
  'mixer': {'rows': jnp.zeros((200, 6, 40)), 'up': jnp.zeros((80, 90))}
}
"""A kernel [d, heads, head_dim] whose name the table does not have."""


def test_a_batch_axis_that_is_longer_than_its_matrix_is_remarked():
  table = describe(galore(optax.sgd(0.1), rank=4), UNKNOWN)
  remark = '200 matrices of (6, 40), see axes='
  assert table[0].reason == f'matrix; {remark}'
  assert remark in str(table)
  table = describe(galore(optax.sgd(0.1), rank=8), UNKNOWN)
  assert table[0].reason == f'rank 8 >= 6; {remark}'
  axes = {'.*rows': (0, (1, 2))}
  (row, _) = describe(galore(optax.sgd(0.1), rank=8, axes=axes), UNKNOWN)
  assert row.reason == 'matrix, by axes' and row.projected_shape == (8, 240)
  # Each head may be a matrix of its own if the user says so.
  axes = {'.*rows': (1, 2)}
  (row, _) = describe(galore(optax.sgd(0.1), rank=4, axes=axes), UNKNOWN)
  assert row.reason == 'matrix, by axes'


def test_a_note_says_that_many_weights_stay_whole():
  note = (
    '87% of the weights in attention and MLP stay whole: lower the rank, or'
    ' name the input and output axes of kernels by axes='
  )
  table = describe(galore(optax.sgd(0.1), rank=8), UNKNOWN)
  assert table.notes == (note,)
  assert str(table).splitlines()[-1] == note
  assert describe(galore(optax.sgd(0.1), rank=4), UNKNOWN).notes == ()


def test_the_note_counts_no_weights_that_stay_whole_by_choice():
  whole = {
    'embed': jnp.zeros((900, 90)),
    'Conv_0': {'kernel': jnp.zeros((3, 2, 9))},
  }
  whole |= {'up': jnp.zeros((80, 90)), 'other': jnp.zeros((80, 90))}
  assert describe(galore(optax.sgd(0.1), rank=8), whole).notes == ()
  tx = galore(optax.sgd(0.1), rank=8, targets='up')
  assert describe(tx, whole).notes == ()
  assert describe(optax.adam(0.1), whole).notes == ()


def test_the_total_is_compared_with_adamw_in_the_dtype_of_the_weights():
  weights = {'up': jnp.zeros((80, 90), jnp.bfloat16), 'b': jnp.zeros(7)}
  table = describe(galore(optax.adam(0.1), rank=8), weights)
  adamw = optax.adamw(0.1).init(weights)
  theirs = sum(x.nbytes for x in jax.tree.leaves(adamw) if x.ndim)
  ours = sum(row.bytes for row in table)
  assert table.total == (
    f'total: {ours:,} bytes of state; optax.adamw: {theirs:,}, with moments in'
    ' bfloat16 (here float32, or 8 bits)'
  )
  assert describe(optax.adamw(0.1), weights).total == (
    f'total: {theirs:,} bytes of state; optax.adamw: {theirs:,}'
  )
