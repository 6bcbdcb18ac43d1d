"""`from_hf_args` converts optimizer names of transformers to ours."""

import re

import jax
import pytest

from models.llama import Layers, LlamaConfig
from train import method
from train.config import Config, Layerwise, WholeTree
from train.data.corpus import Chitchat
from train.hf_args import from_hf_args

_ALL = [r'.*.attn.*', r'.*.mlp.*']
_ATTENTION = tuple(f'blocks/attention/{name}/kernel' for name in 'qkvo')
_MLP = tuple(f'blocks/mlp/{name}/kernel' for name in ('gate', 'up', 'down'))
_GALORE = {'rank': 128, 'gap': 200, 'scale': 0.25}


def test_galore_of_most_recipes():
  found = from_hf_args(
    'galore_adamw_8bit_layerwise',
    'rank=128,update_proj_gap=200,scale=0.25',
    targets=_ALL,
  )
  assert found == {
    'optimizer': method.Galore8bit(**_GALORE, targets=_ATTENTION + _MLP),
    'update': Layerwise(),
  }


@pytest.mark.parametrize(
  ('optim', 'optim_args', 'optimizer'),
  [
    ('galore_adamw', None, method.Galore(**_GALORE, targets=_MLP)),
    (
      'galore_adamw',
      ' rank = 4, scale=2,proj_type=left, update_proj_gap=50',
      method.Galore(rank=4, gap=50, scale=2.0, side='right', targets=_MLP),
    ),
    (
      'galore_adafactor',
      {'proj_type': 'right', 'rank': 7},
      method.GaloreAdafactor(
        rank=7, gap=200, scale=0.25, side='left', targets=_MLP
      ),
    ),
    (
      'apollo_adamw',
      'scale_type=tensor,rank=1,scale=128,proj=random',
      method.Apollo(rank=1, gap=200, scale=128.0, channels=False, targets=_MLP),
    ),
    (
      'apollo_adamw',
      '',
      method.Apollo(rank=128, gap=200, scale=1.0, targets=_MLP),
    ),
  ],
)
@pytest.mark.parametrize('suffix', ['', '_layerwise'])
def test_optimizers_that_project(optim, optim_args, optimizer, suffix):
  update = Layerwise() if suffix else WholeTree()
  found = from_hf_args(optim + suffix, optim_args, ['mlp'])
  assert found == {'optimizer': optimizer, 'update': update}


@pytest.mark.parametrize(
  ('optim', 'optimizer', 'update'),
  [
    ('lomo', method.Lomo(), Layerwise()),
    ('adalomo', method.AdaLomo(), Layerwise()),
    ('adamw_torch', method.AdamW(), WholeTree()),
    ('adamw_torch_fused', method.AdamW(), WholeTree()),
    ('adamw_8bit', method.Adam8bit(), WholeTree()),
    ('adamw_bnb_8bit', method.Adam8bit(), WholeTree()),
  ],
)
def test_optimizers_that_do_not_project(optim, optimizer, update):
  assert from_hf_args(optim) == {'optimizer': optimizer, 'update': update}


@pytest.mark.parametrize(
  ('targets', 'paths'),
  [
    (['q_proj', 'v_proj'], (_ATTENTION[0], _ATTENTION[2])),
    (r'.*\.(q|k)_proj', _ATTENTION[:2]),
    ('model.layers.*mlp.*', _MLP),
    (['lm_head'], ('lm_head/kernel',)),
    ([r'.*o_proj', 'head'], (_ATTENTION[3] + '|lm_head/kernel',)),
  ],
)
def test_targets_are_those_of_the_same_modules(targets, paths):
  optimizer = from_hf_args('galore_adamw', None, targets)['optimizer']
  assert optimizer.targets == paths


_MODULES = (
  *(f'self_attn.{name}_proj' for name in 'qkvo'),
  *(f'mlp.{name}_proj' for name in ('gate', 'up', 'down')),
)


@pytest.mark.parametrize('spell', [str, re.escape], ids=['name', 'regex'])
@pytest.mark.parametrize('num_layers', [2, 24, 200])
def test_layers_are_counted_from_full_names(num_layers, spell):
  names = [
    spell(f'model.layers.{i}.{module}')
    for i in range(num_layers)
    for module in _MODULES
  ]
  found = from_hf_args('galore_adamw', None, names)['optimizer']
  assert found.targets == _ATTENTION + _MLP
  found = from_hf_args('galore_adamw', None, [*names, 'lm_head'])['optimizer']
  assert found.targets == (
    *(_ATTENTION + _MLP)[:-1],
    f'{_MLP[2]}|lm_head/kernel',
  )


def test_full_names_that_leave_out_a_layer_are_an_error():
  names = [f'model.layers.{i}.mlp.up_proj' for i in range(24)]
  match = r'but not model\.layers\.{}\.mlp\.up_proj'.format
  with pytest.raises(ValueError, match=match(7)):
    from_hf_args('galore_adamw', None, names[:7] + names[8:])
  # The model has more layers than the names list.
  with pytest.raises(ValueError, match=match(12)):
    from_hf_args('galore_adamw', None, names[:12], num_layers=24)
  with pytest.raises(ValueError, match=match(1)):
    from_hf_args('galore_adamw', None, names[:1])
  found = from_hf_args('galore_adamw', None, names[:1], num_layers=1)
  assert found['optimizer'].targets == _MLP[1:2]


def test_a_pattern_of_numbers_holds_for_a_model_of_known_depth():
  pattern = r'model\.layers\.(0|1|2)\.mlp\.up_proj'
  with pytest.raises(ValueError, match='Give num_layers'):
    from_hf_args('galore_adamw', None, pattern)
  found = from_hf_args('galore_adamw', None, pattern, num_layers=3)
  assert found['optimizer'].targets == _MLP[1:2]


@pytest.mark.parametrize('kind', [list, tuple, set, iter])
def test_targets_may_be_any_collection(kind):
  found = from_hf_args('galore_adamw', None, kind(['q_proj', 'v_proj']))
  assert found['optimizer'].targets == (_ATTENTION[0], _ATTENTION[2])


def test_an_encoder_has_modules_of_other_names():
  found = from_hf_args(
    'galore_adamw', None, ['query', 'intermediate'], model_type='roberta'
  )
  paths = ('blocks/attention/q/kernel', 'blocks/mlp/up/kernel')
  assert found['optimizer'].targets == paths
  name = 'bert.encoder.layer.{}.attention.self.query'.format
  found = from_hf_args(
    'galore_adamw', None, [name(i) for i in range(12)], model_type='bert'
  )
  assert found['optimizer'].targets == paths[:1]
  with pytest.raises(ValueError, match=r'a model has bert.encoder.layer.0'):
    from_hf_args('galore_adamw', None, ['mlp'], model_type='bert')
  with pytest.raises(ValueError, match=r"model_type must be .* got 'gpt2'"):
    from_hf_args('galore_adamw', None, ['mlp'], model_type='gpt2')


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('targets', ['all-linear', 'all_linear'])
def test_all_linear_has_the_head_where_there_is_one(tied, targets):
  model = LlamaConfig(24, 16, 32, 2, 2, tied=tied)
  config = Config(
    **from_hf_args('galore_adamw', 'rank=2', targets),
    model=model,
    corpus=Chitchat(),
    steps=10,
    learning_rate=0.1,
    batch_size=2,
    sequence_length=8,
    clip_norm=None,
  )
  params = jax.eval_shape(Layers(model).init, jax.random.key(0))
  basis = jax.eval_shape(config.transformation().init, params)[0].basis
  rows = [x for x in jax.tree.leaves(basis) if x.shape[-2:] == (2, 16)]
  assert len(rows) == (7 if tied else 8)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('galore', None, _ALL), "optim must be one of .*'galore_adamw'.*'galore'"),
    (('adamw_8bit_layerwise',), 'optim must be one of'),
    (('galore_adamw', 'gap=3', _ALL), "'gap'; did you mean"),
    (('galore_adamw', 'update_proj_gab=3', _ALL), 'mean update_proj_gap'),
    (('galore_adamw', 'scale_type=channel', _ALL), "got 'scale_type'"),
    (('lomo', 'rank=3'), r"optim_args of lomo must be of \[\], got 'rank'$"),
    (('galore_adamw', 'rank', _ALL), "key=value, .*got 'rank'"),
    (('galore_adamw', 'rank=big', _ALL), "rank must be an integer, got 'big'"),
    (('galore_adamw', 'scale=x', _ALL), "scale must be a number, got 'x'"),
    (('galore_adamw', 'proj_type=up', _ALL), r"of \['std', .*got 'up'"),
    (('apollo_adamw', 'proj=svd', _ALL), r"of \['random'\], got 'svd'"),
    (
      ('galore_adamw',),
      'galore_adamw needs targets.*layers.0.self_attn.q_proj',
    ),
    (('lomo', None, _ALL), 'leave them out'),
    (('galore_adamw', None, ['c_attn']), r"\['c_attn'\] match no .*lm_head"),
    (('galore_adamw', None, 'mlp'), "'mlp' match no linear module"),
    # One target matches no module, and the other one does.
    (('galore_adamw', None, ['c_attn', 'mlp']), r"targets \['c_attn'\] match"),
    (
      ('galore_adamw', None, ['mlp', 'embed_tokens', 'norm']),
      r"targets \['embed_tokens', 'norm'\] match no",
    ),
    (('galore_adamw', None, ['all-linear']), r"\['all-linear'\] match no"),
    (('galore_adamw', None, []), r'targets \[\] match no'),
    (('galore_adamw', None, '('), r"'\(' is no regular expression"),
    (('galore_adamw', None, ['layers.0.mlp']), 'but not model.layers.1.mlp.g'),
  ],
)
def test_unsupported_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    from_hf_args(*arguments)
