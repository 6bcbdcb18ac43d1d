"""The table of names decides as the meaning of each leaf requires.

`names/*.json` has leaves of real models, with the project and its version. The
kinds and axes in these files were written by hand from the projects' code.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

from galore_optax import describe, galore, names
from galore_optax.plan import Planner
from galore_optax.projection import Projection
from models import encoder, llama, lowrank
from tests.galore_optax.every import build

FILES = sorted((pathlib.Path(__file__).parent / 'names').glob('*.json'))
OWN = next(file for file in FILES if file.stem == 'own_models')
PROJECTS = [file for file in FILES if file != OWN]
MODELS = [
  pytest.param(model['params'], id=f'{file.stem}: {name}')
  for file in PROJECTS
  for name, model in json.loads(file.read_text())['models'].items()
]

PROJECTED = ('attention', 'convolution', 'matrix')


def leaf(entry):
  return jax.ShapeDtypeStruct(tuple(entry['shape']), jnp.float32)


def of(path, *shape):
  return names.of(path, shape)


def axes_of(entry):
  """Returns the axes that a file states; a plain matrix states none."""
  return tuple(entry.get('input', [0])), tuple(entry.get('output', [1]))


def test_each_project_of_the_table_has_a_file_with_its_version():
  found = [json.loads(file.read_text()) for file in PROJECTS]
  assert {x['project'] for x in found} == {
    *('flax', 'Tunix', 'MaxText', 'EasyDeL', 'T5X', 'big_vision'),
    *('diffusers', 'Scenic', 'Bonsai', 'jax-diffusion-transformer'),
    *('dm-haiku', 'Equinox', 'Levanter', 'transformers'),
  }
  assert all(x['version'] for x in found)
  assert all(m['made'] for x in found for m in x['models'].values())


@pytest.mark.parametrize('params', MODELS)
def test_kinds_and_axes_are_those_of_the_project(params):
  for path, entry in params.items():
    shape, kind = tuple(entry['shape']), entry['kind']
    found = names.of(path, shape)
    if kind == 'vector':
      # A single vector needs no name. A stack of vectors does.
      assert found.kind == kind or sum(x > 1 for x in shape) < 2, path
    else:
      assert found.kind == kind, path
    if kind in PROJECTED:
      assert found.axes == axes_of(entry), path


@pytest.mark.parametrize('params', MODELS)
def test_the_default_projects_one_matrix_for_each_kernel(params):
  tree = {path: leaf(entry) for path, entry in params.items()}
  # The rank is 1, so that no leaf is too small.
  plans = dict(zip(sorted(tree), Planner(1)(tree), strict=True))
  for path, entry in params.items():
    plan = plans[path]
    if entry['kind'] not in PROJECTED:
      assert not isinstance(plan, Projection), path
    else:
      assert isinstance(plan, Projection), path
      assert plan.axes == axes_of(entry), path


def own_trees():
  """Yields the parameters of our own models, as shapes."""

  def shapes(layers):
    return jax.eval_shape(layers.init, jax.random.key(0))

  for size in ('9m', '60m', '130m', '350m', '1b', '7b'):
    yield f'llama {size}', shapes(llama.Layers(llama.llama(size)))
  config = llama.LlamaConfig(
    *(1000, 256, 704, 8, 5),
    num_kv_heads=2,
    head_dim=64,
    qkv_bias=True,
    qk_norm=True,
    tied=True,
  )
  yield 'llama with grouped heads', shapes(llama.Layers(config))
  for family in ('bert', 'roberta'):
    bert = encoder.EncoderConfig(1000, 768, 3072, 12, 12, 512, family)
    yield f'encoder {family}', shapes(encoder.Layers(bert))
  small = llama.Layers(llama.LlamaConfig(1000, 256, 704, 8, 5))
  for adapter in (lowrank.Lora(rank=160), lowrank.Factored(rank=160)):

    def adapted(key, adapter=adapter):
      return lowrank.adapt(small.init(key), adapter, key)

    name = f'llama {type(adapter).__name__}'
    yield name, jax.eval_shape(adapted, jax.random.key(0))


def test_plans_of_our_own_models_are_those_before_the_table():
  # The file was written by the code before the table existed.
  expected = json.loads(OWN.read_text())
  found = {
    f'{name}, rank {rank}': {
      p.path: [p.axes, p.rank, p.sides] if isinstance(p, Projection) else None
      for p in galore(optax.sgd(1.0), rank=rank).plan(tree)
    }
    for name, tree in own_trees()
    for rank in (64, 0.25)
  }
  assert json.loads(json.dumps(found)) == expected


@pytest.mark.parametrize(
  'path',
  ['logitdense/kernel', 'decoder/logits_dense/kernel', 'emb', 'pos_emb']
  + ['vocab/kernel', 'output/kernel', 'params/output/kernel', 'tok_emb/weight']
  + ['model/output/weight', 'posembed_output/pos', 'classifier/kernel']
  + ['output', 'LmHead/kernel', 'cls/predictions/decoder/kernel']
  + ['proj_out/kernel', 'vocab_proj/w'],
)
def test_vocabulary_stays_whole(path):
  assert of(path, 64, 1000).kind in ('embedding', 'head')


@pytest.mark.parametrize(
  'path',
  ['encoder/layer/0/attention/output/dense/kernel', 'attention/output/kernel']
  + ['encoder/layer/0/output/dense/kernel', 'mlp/output/w', 'multi_head/query']
  + ['layers/3/output/weight', 'MAPHead_0/MlpBlock_0/Dense_0/kernel']
  + ['decoder/block/proj_out/kernel', 'heads/0', 'ember/kernel', 'demb'],
)
def test_outputs_of_layers_are_matrices(path):
  assert of(path, 64, 1000).kind == 'matrix'


def test_experts_have_the_shape_of_a_convolution_but_not_its_name():
  shape = 3, 3, 64, 128
  assert of('moe/experts/up/kernel', *shape).axes == ((2,), (3,))
  assert of('Conv_0/kernel', *shape).axes == ((0, 1, 2), (3,))
  assert of('ConvBlock_0/Dense_0/kernel', *shape).axes == ((2,), (3,))
  assert of('convert/kernel', *shape).kind == 'matrix'


def test_the_name_of_the_array_states_the_layout_of_a_convolution():
  for name in ('conv', 'conv1', 'Conv_0', 'stem', 'patch_embed', 'downsample'):
    for leaf_name in ('kernel', 'w'):
      found = of(f'{name}/{leaf_name}', 7, 7, 3, 64)
      assert (found.kind, found.axes) == ('convolution', ((0, 1, 2), (3,)))
    found = of(f'{name}/weight', 64, 3, 7, 7)
    assert (found.kind, found.axes) == ('convolution', ((1, 2, 3), (0,)))
  # Two axes are a matrix, whatever the name is.
  assert of('conv/kernel', 64, 64).kind == 'matrix'
  assert of('patch_embed/kernel', 64, 64).kind == 'embedding'


def test_a_convolution_is_one_matrix_if_the_rank_fits_it():
  params = {'Conv_0': {'kernel': jnp.zeros((3, 3, 16, 32))}}
  tx = galore(optax.adam(0.1), rank=20)
  (row,) = describe(tx, params)
  assert row.projected_shape == (20, 144) and row.reason == 'convolution'
  updates, _ = tx.update(params, tx.init(params), params)
  assert updates['Conv_0']['kernel'].shape == (3, 3, 16, 32)


def test_a_depthwise_kernel_stays_whole_and_the_table_says_why():
  params = {
    'dwconv': {'kernel': jnp.zeros((7, 7, 1, 96))},
    'blocks': {'conv1d': {'kernel': jnp.zeros((4, 9, 1, 96))}},
    'torch': {'conv': {'weight': jnp.zeros((96, 1, 7, 7))}},
    'grouped_conv': {'kernel': jnp.zeros((3, 3, 4, 96))},
    'patch_embed': {'kernel': jnp.zeros((4, 4, 1, 64))},
  }
  rows = {
    row.path: row for row in describe(galore(optax.adam(0.1), rank=8), params)
  }
  for path in ('dwconv/kernel', 'blocks/conv1d/kernel', 'torch/conv/weight'):
    assert rows[path].projected_shape is None
    assert rows[path].reason == 'depthwise convolution: one input channel'
  assert rows['grouped_conv/kernel'].projected_shape == (8, 96)
  # No patch embedding is depthwise: its images are gray.
  assert rows['patch_embed/kernel'].projected_shape == (8, 64)
  # A named target is one matrix for each layer.
  tx = galore(optax.adam(0.1), rank=8, targets='.*/conv1d/kernel|dwconv/.*')
  rows = {row.path: row for row in describe(tx, params)}
  assert rows['dwconv/kernel'].projected_shape == (8, 96)
  assert rows['blocks/conv1d/kernel'].projected_shape == (4, 8, 96)


def test_taps_are_counted_by_the_name_or_by_the_axes():
  assert of('conv/kernel', 3, 16, 32).taps == (0,)
  assert of('conv/kernel', 3, 3, 16, 32).taps == (0, 1)
  assert of('conv/kernel', 3, 3, 3, 16, 32).taps == (0, 1, 2)
  assert of('conv/weight', 32, 16, 3, 3).taps == (2, 3)
  # Inside a stack the first axis is the layers.
  for path in ('blocks/conv', 'layers/res/Conv_0', 'scan_blocks/conv_in'):
    assert of(f'{path}/kernel', 6, 3, 3, 16, 32).taps == (1, 2)
    assert of(f'{path}/kernel', 6, 3, 3, 3, 16, 32).taps == (1, 2, 3)
    assert of(f'{path}/kernel', 6, 3, 16, 32).taps == (1,)
    assert of(f'{path}/weight', 6, 32, 16, 3, 3).taps == (3, 4)
    assert of(f'{path}/weight', 6, 32, 16, 3).taps == (3,)
    # One layer, as a layer-wise step plans for it.
    assert of(f'{path}/kernel', 3, 3, 16, 32).taps == (0, 1)
    assert of(f'{path}/weight', 32, 16, 3, 3).taps == (2, 3)
  # An element of a list of layers is not a stack.
  assert of('layers/0/conv/kernel', 3, 3, 3, 16, 32).taps == (0, 1, 2)
  assert of('blocks_0/conv/kernel', 5, 3, 3, 16, 32).taps == (0, 1, 2)
  # The name states the number of axes.
  for name in ('conv1d', 'Conv1D_0', 'conv1_d', 'causal_conv_1d'):
    assert of(f'mixer/{name}/kernel', 3, 3, 16, 32).taps == (1,), name
  assert of('blocks/conv2d/kernel', 7, 1, 16, 32).taps == (0, 1)
  assert of('res/conv2d/kernel', 6, 3, 3, 16, 32).taps == (1, 2)
  assert of('blocks/conv3d/weight', 32, 16, 3, 3, 3).taps == (2, 3, 4)


def test_a_stack_is_found_by_its_name_before_its_shape():
  # As many layers as heads: the shapes are equal, the meanings are not.
  shape = 32, 32, 128, 4096
  scanned = of('params/decoder/layers/self_attention/out/kernel', *shape)
  assert scanned.axes == ((0, 2), (3,))
  assert of('blocks/attention/out/kernel', *shape).axes == ((1, 2), (3,))


@pytest.mark.parametrize('axis', [0, 1])
def test_layers_of_maxtext_may_be_on_either_axis(axis):
  path = 'params/decoder/layers/self_attention/out/kernel'
  shape = [8, 64, 512]
  shape.insert(axis, 24)
  rest = [i for i in range(4) if i != axis]
  assert of(path, *shape).axes == (tuple(rest[:2]), (3,))
  layers = {'path': 'params/decoder/layers/mlp/wi_0/kernel', 0: (24, 512, 2048)}
  layers[1] = 512, 24, 2048
  assert of(layers['path'], *layers[axis]).axes == ((1 - axis,), (2,))


def test_a_stack_of_square_matrices_stays_a_stack():
  for name in ('query/kernel', 'q_proj/w', 'o_proj/w', 'attn/out/kernel'):
    assert of(f'blocks/{name}', 6, 512, 512).axes == ((1,), (2,))


def test_an_output_projection_may_have_fewer_inputs_than_outputs():
  # Only the names can decide: a stack of 12 layers, or 12 heads.
  shape = 12, 256, 768
  assert of('blocks/attention/out/kernel', *shape).axes == ((1,), (2,))
  assert of('blocks_0/attention/out/kernel', *shape).axes == ((0, 1), (2,))
  assert of('layers/0/attn/o_proj/w', *shape).axes == ((0, 1), (2,))
  assert of('block/self_attention/out/kernel', *shape).axes == ((0, 1), (2,))
  # With four axes one is the stack.
  shape = 6, 12, 256, 768
  assert of('blocks/attention/out/kernel', *shape).axes == ((1, 2), (3,))


def test_moments_of_tunix_have_the_shape_of_one_matrix():
  llama3 = json.loads(PROJECTS[-1].read_text())['models']['Llama 3.2 1B']
  params = {path: leaf(entry) for path, entry in llama3['params'].items()}
  rows = {
    row.path: row for row in describe(galore(optax.adam(0.1), rank=128), params)
  }
  assert rows['layers/0/attn/q_proj/w'].projected_shape == (128, 2048)
  assert rows['layers/0/attn/k_proj/w'].projected_shape == (128, 2048)
  assert rows['layers/0/attn/o_proj/w'].projected_shape == (128, 2048)
  assert rows['layers/0/attn/q_proj/w'].basis_bytes == 4 * 128 * 2048


def test_axes_decide_before_the_table():
  params = {'Conv_0': {'kernel': jnp.zeros((3, 3, 16, 32))}}
  tx = galore(optax.sgd(0.1), rank=4, axes={'.*': (2, 3)})
  (row,) = describe(tx, params)
  assert row.projected_shape == (3, 3, 4, 32)
  assert row.reason == 'convolution, by axes'


def test_names_of_vectors_hold_for_factored_moments():
  # A stack of haiku's biases [L, d] has one moment for each element.
  params = {'layers/linear': {'b': jnp.ones((6, 8)), 'w': jnp.ones((6, 8, 9))}}
  tx = build('AdaLomo')
  rows = {row.path: row for row in describe(tx, params)}
  assert rows['layers/linear/b'].bytes == 4 * 6 * 8
