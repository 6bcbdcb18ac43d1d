"""`from_hf_args` agrees with the code of transformers' Trainer."""

import inspect
import types

import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
galore_torch = pytest.importorskip('galore_torch')
pytest.importorskip('tyro')

from transformers import trainer_optimizer  # noqa: E402

from models import huggingface_config  # noqa: E402
from train.hf_args import from_hf_args  # noqa: E402

pytestmark = [
  pytest.mark.parity,
  # galore-torch's AdamW emits a deprecation warning about itself.
  pytest.mark.filterwarnings('ignore:This implementation of AdamW'),
]

_SIDES = {'std': 'std', 'reverse_std': 'reverse_std', 'full': 'full'}
_SIDES |= {'left': 'right', 'right': 'left'}


def _reference(optim, optim_args, targets, tied=False):
  """Returns the GaLore options of transformers' groups and their modules."""
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=16,
      hidden_size=8,
      intermediate_size=12,
      num_hidden_layers=2,
      num_attention_heads=2,
      tie_word_embeddings=tied,
    )
  )
  context = trainer_optimizer.OptimizerContext(
    args=types.SimpleNamespace(
      optim=optim,
      optim_target_modules=targets,
      parallel_mode=None,
      gradient_accumulation_steps=1,
    ),
    model=model,
    optimizer_kwargs={'lr': 0.1},
    adam_kwargs={},
    optim_args=trainer_optimizer._parse_optim_args(optim_args),
  )
  _, found = trainer_optimizer._get_galore_optimizer(context)
  _, group = found['params']
  names = {id(weight): name for name, weight in model.named_parameters()}
  modules = {names[id(x)].removesuffix('.weight') for x in group.pop('params')}
  return group, modules


@pytest.mark.parametrize('suffix', ['', '_layerwise'])
@pytest.mark.parametrize('optim', ['galore_adamw', 'galore_adamw_8bit'])
@pytest.mark.parametrize('proj_type', [None, *_SIDES])
def test_options_are_the_same(optim, suffix, proj_type):
  optim_args = proj_type and f'rank=4, scale=2,proj_type={proj_type}'
  theirs, _ = _reference(optim + suffix, optim_args, ['mlp'])
  ours = from_hf_args(optim + suffix, optim_args, ['mlp'])['optimizer']
  assert theirs == {
    'rank': ours.rank,
    'update_proj_gap': ours.gap,
    'scale': ours.scale,
    'proj_type': {b: a for a, b in _SIDES.items()}[ours.side],
  }


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize(
  'targets',
  [
    'all-linear',
    'all_linear',
    r'.*\.(q|k)_proj',
    'model.layers.*mlp.*',
    ['attn', 'mlp'],
    [r'.*.attn.*', r'.*.mlp.*'],
    ['down_proj', 'head'],
    ['q_proj', r'model\.layers\.\d+\.mlp\.up_proj'],
  ],
)
def test_targets_are_the_same(targets, tied):
  _, theirs = _reference('galore_adamw', None, targets, tied)
  ours = from_hf_args('galore_adamw', None, targets)['optimizer'].targets
  paths = {path for target in ours for path in target.split('|')}
  paths -= {'lm_head/kernel'} if tied else set()
  layers = [huggingface_config.linear_modules('llama', i) for i in range(2)]
  assert theirs == {layer[path] for path in paths for layer in layers}


def test_adafactor_by_layers_does_not_start_there():
  with pytest.raises(ValueError, match='relative_step'):
    _reference('galore_adafactor_layerwise', None, ['mlp'])
  from_hf_args('galore_adafactor_layerwise', None, ['mlp'])


def test_their_eight_bits_have_a_decay_of_their_own():
  options = inspect.signature(galore_torch.GaLoreAdamW8bit).parameters
  assert options['weight_decay'].default == 0.01
  assert options['eps'].default == 1e-8
