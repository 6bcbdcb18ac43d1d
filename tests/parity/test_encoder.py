"""BERT and RoBERTa equal transformers' models on the same weights and batch."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from models import huggingface  # noqa: E402
from models.encoder import Layers  # noqa: E402
from tests.parity.reference import perturb  # noqa: E402

pytestmark = pytest.mark.parity

B, T = 4, 21

_SIZES = {
  'vocab_size': 101,
  'hidden_size': 48,
  'intermediate_size': 88,
  'num_attention_heads': 6,
  'num_hidden_layers': 3,
  'max_position_embeddings': 40,
  'initializer_range': 0.2,
}
_CASES = {
  'Bert': {'pad_token_id': 0},
  'Roberta': {'pad_token_id': 1, 'type_vocab_size': 1},
}


def _reference(kind, task='SequenceClassification', dtype='float32', **fields):
  """Returns transformers' model, with weights large enough to affect logits."""
  torch.manual_seed(0)
  config = getattr(transformers, f'{kind}Config')
  model = getattr(
    transformers, f'{kind}{"For" if task != "Model" else ""}{task}'
  )(
    config(
      **_SIZES | _CASES[kind] | fields,
      attn_implementation='eager',
      dtype=dtype,
    )
  )
  perturb(model)
  return model.to(getattr(torch, dtype)).eval()


def _batch(pad_id, types):
  rng = np.random.default_rng(0)
  lengths_B1 = np.array([21, 13, 9, 2])[:, None]
  segments_BT = np.int32(np.arange(T)[None] < lengths_B1)
  tokens_BT = rng.integers(3, 101, (B, T), dtype=np.int32)
  second_BT = np.int32(np.arange(T)[None] >= lengths_B1 // 2)
  return {
    'inputs': np.where(segments_BT, tokens_BT, np.int32(pad_id)),
    'types': second_BT * segments_BT * (types > 1),
    'segments': segments_BT,
    'targets': np.int32([2, 0, 1, 1]),
    'weights': np.ones(B, np.float32),
  }


def _logits(reference, batch, **others):
  long = lambda name: torch.from_numpy(batch[name]).long()
  return reference(
    input_ids=long('inputs'),
    attention_mask=long('segments'),
    token_type_ids=long('types'),
    **others,
  )


@pytest.mark.parametrize('num_labels', [3, 1])
@pytest.mark.parametrize('kind', _CASES)
def test_logits_and_gradients_equal(kind, num_labels, tmp_path):
  reference = _reference(kind, num_labels=num_labels)
  reference.save_pretrained(tmp_path)
  config, params = huggingface.load(tmp_path)
  assert config.num_labels == num_labels
  batch = _batch(config.pad_id, config.num_types)
  targets = torch.from_numpy(batch['targets'])
  output = _logits(
    reference,
    batch,
    labels=targets.float() if num_labels == 1 else targets.long(),
  )
  expected = output.logits.detach().numpy()
  assert expected.std() > 0.05
  found = Layers(config).logits(params, batch)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

  output.loss.backward()
  step = jax.jit(jax.value_and_grad(Layers(config), has_aux=True))
  (loss, _), gradients = step(params, batch)
  np.testing.assert_allclose(loss, output.loss.item(), rtol=1e-5)
  ours = huggingface.tensors_of(gradients, config)
  theirs = {name: x.grad.numpy() for name, x in reference.named_parameters()}
  assert sorted(ours) == sorted(theirs)
  largest = max(np.abs(gradient).max() for gradient in theirs.values())
  for name, gradient in theirs.items():
    # Float32 sums are taken in different orders. The exact gradient of a key
    # bias is zero, so its tolerance is relative to the largest gradient of the
    # model.
    atol = 2e-5 * max(np.abs(gradient).max(), 0.01 * largest)
    np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', _CASES)
def test_transformers_reads_our_checkpoint(kind, dtype, tmp_path):
  names = {'id2label': {0: 'no', 1: 'yes', 2: 'perhaps'}}
  _reference(kind, dtype=dtype, **names).save_pretrained(tmp_path / 'theirs')
  config, params = huggingface.load(tmp_path / 'theirs')
  assert config.labels == ('no', 'yes', 'perhaps')
  huggingface.save(tmp_path / 'ours', config, params, max_shard_bytes=100_000)
  theirs, ours = (
    transformers.AutoModelForSequenceClassification.from_pretrained(
      tmp_path / name, attn_implementation='eager'
    )
    for name in ('theirs', 'ours')
  )
  assert type(ours) is type(theirs)
  assert ours.dtype == theirs.dtype == getattr(torch, dtype)
  assert ours.config.id2label == theirs.config.id2label == names['id2label']
  weights = theirs.state_dict()
  assert weights.keys() == ours.state_dict().keys()
  for name, weight in ours.state_dict().items():
    assert torch.equal(weight, weights[name])
  batch = _batch(config.pad_id, config.num_types)
  found, expected = (_logits(x, batch).logits for x in (ours, theirs))
  assert torch.equal(found, expected)


@pytest.mark.parametrize('task', ['Model', 'MaskedLM'])
@pytest.mark.parametrize('kind', _CASES)
def test_a_checkpoint_without_a_head_has_one_drawn(kind, task, tmp_path):
  reference = _reference(kind, task)
  reference.save_pretrained(tmp_path / 'a')
  with pytest.raises(ValueError, match=r'has no .*head/out/kernel'):
    huggingface.load(tmp_path / 'a')
  config, params = huggingface.load(
    tmp_path / 'a', key=jax.random.key(0), num_labels=3
  )
  huggingface.save(tmp_path / 'b', config, params)
  whole = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / 'b', attn_implementation='eager'
  )
  batch = _batch(config.pad_id, config.num_types)
  found = Layers(config).logits(params, batch)
  expected = _logits(whole.eval(), batch).logits.detach().numpy()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  # The body, and BERT's pooler, must have the checkpoint's weights. Only the
  # head is drawn at random.
  theirs = reference.state_dict()
  for name, tensor in whole.state_dict().items():
    for old in (name, name.partition('.')[2]):
      if old in theirs:
        assert torch.equal(tensor, theirs[old])
        break
    else:
      assert name.startswith('classifier') or (task, 'pooler' in name) == (
        'MaskedLM',
        True,
      )


def test_a_field_of_attention_that_we_lack_is_named(tmp_path):
  _reference('Bert').save_pretrained(tmp_path)
  file = tmp_path / 'config.json'
  fields = json.loads(file.read_text())
  file.write_text(
    json.dumps(fields | {'position_embedding_type': 'relative_key'})
  )
  with pytest.raises(ValueError, match=r"position_embedding_type .*'relative_"):
    huggingface.load(tmp_path)
