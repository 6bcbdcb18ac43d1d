"""Checkpoints are read from and written for transformers, per architecture."""

import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from models import huggingface, huggingface_config  # noqa: E402
from models.llama import Layers  # noqa: E402
from tests.parity.reference import perturb  # noqa: E402

pytestmark = pytest.mark.parity

T = 40

_SIZES = {
  'vocab_size': 101,
  'hidden_size': 48,
  'intermediate_size': 88,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'num_hidden_layers': 3,
  'max_position_embeddings': 256,
  'initializer_range': 0.2,
  'rms_norm_eps': 1e-5,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 500.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
_WINDOW = {
  'use_sliding_window': True,
  'sliding_window': 9,
  'max_window_layers': 0,
}

# Per architecture: fields of transformers' config, and overrides of our config.
# Each single override must change the logits, so that these fields are known to
# matter.
_CASES = {
  'Llama': (
    {'rope_parameters': _LLAMA3, 'tie_word_embeddings': True},
    {'rope_scaling': None},
  ),
  'Mistral': ({'sliding_window': 9, 'head_dim': 12}, {'window': None}),
  'Qwen2': ({'tie_word_embeddings': True}, {}),
  'Qwen3': ({'head_dim': 16, **_WINDOW}, {'window': None}),
}


def _reference(kind, dtype='float32'):
  """Returns transformers' model, with weights large enough to affect logits."""
  torch.manual_seed(0)
  config = getattr(transformers, f'{kind}Config')
  model = getattr(transformers, f'{kind}ForCausalLM')(
    config(
      **_SIZES | _CASES[kind][0],
      attn_implementation='eager',
      dtype=dtype,
    )
  )
  perturb(model)
  return model.to(getattr(torch, dtype)).eval()


def _batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(_SIZES['vocab_size'], size=(3, T + 1), dtype=np.int32)
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones((3, T), np.float32),
    'positions': np.tile(np.arange(T, dtype=np.int32), (3, 1)),
    'segments': np.zeros((3, T), np.int32),
  }


def _logits(reference, batch):
  return reference(torch.from_numpy(batch['inputs']).long()).logits


@pytest.mark.parametrize('kind', _CASES)
def test_logits_and_gradients_equal(kind, tmp_path):
  reference, batch = _reference(kind), _batch()
  reference.save_pretrained(tmp_path)
  config, params = huggingface.load(tmp_path)
  logits = _logits(reference, batch)
  expected = logits.detach().numpy()
  assert expected.std() > 0.5
  found = Layers(config).logits(params, batch)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  for name, value in _CASES[kind][1].items():
    other = Layers(dataclasses.replace(config, **{name: value}))
    assert np.abs(other.logits(params, batch) - expected).max() > 0.1

  targets = torch.from_numpy(batch['targets']).long()
  loss = torch.nn.functional.cross_entropy(
    logits.reshape(-1, config.vocab_size), targets.reshape(-1)
  )
  loss.backward()
  step = jax.jit(jax.value_and_grad(Layers(config), has_aux=True))
  (our_loss, _), gradients = step(params, batch)
  np.testing.assert_allclose(our_loss, loss.item(), rtol=1e-5)
  ours = huggingface.tensors_of(gradients, config)
  theirs = {name: x.grad.numpy() for name, x in reference.named_parameters()}
  assert sorted(ours) == sorted(theirs)
  for name, gradient in theirs.items():
    # The tolerance allows for float32 sums in a different order.
    atol = 2e-5 * np.abs(gradient).max()
    np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', _CASES)
def test_transformers_reads_our_checkpoint(kind, dtype, tmp_path):
  _reference(kind, dtype).save_pretrained(tmp_path / 'theirs')
  config, params = huggingface.load(tmp_path / 'theirs')
  huggingface.save(tmp_path / 'ours', config, params, max_shard_bytes=100_000)
  assert (tmp_path / 'ours' / 'model.safetensors.index.json').exists()
  # Reload both models. Casting the first model to bfloat16 had also cast its
  # rotary frequencies, which reloading computes in float32.
  theirs, ours = (
    transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / name, attn_implementation='eager'
    )
    for name in ('theirs', 'ours')
  )
  assert type(ours) is type(theirs)
  assert ours.dtype == theirs.dtype == getattr(torch, dtype)
  weights = theirs.state_dict()
  assert weights.keys() == ours.state_dict().keys()
  for name, weight in ours.state_dict().items():
    assert torch.equal(weight, weights[name])
  assert torch.equal(_logits(ours, _batch()), _logits(theirs, _batch()))


@pytest.mark.parametrize('kind', [*_CASES, 'Bert', 'Roberta'])
def test_all_that_a_config_can_say_of_other_programs_is_read(kind):
  theirs = getattr(transformers, f'{kind}Config')()
  # Before version 5 of transformers, a model's config could also hold
  # generation parameters.
  others = transformers.GenerationConfig._get_default_generation_params()
  fields = json.loads(theirs.to_json_string(use_diff=False))
  expected = huggingface_config.parse(fields)
  assert huggingface_config.parse(others | fields) == expected
  assert 'temperature' in others and 'use_cache' in others
