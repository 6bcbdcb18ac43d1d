"""The vision transformer equals transformers' model on the same images."""

import re

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from models import huggingface, huggingface_config  # noqa: E402
from tests.parity.reference import perturb  # noqa: E402

pytestmark = pytest.mark.parity

B = 5

_SIZES = {
  'image_size': 21,
  'patch_size': 7,
  'num_channels': 3,
  'hidden_size': 48,
  'intermediate_size': 88,
  'num_attention_heads': 6,
  'num_hidden_layers': 3,
  'initializer_range': 0.2,
  'layer_norm_eps': 1e-6,
  'num_labels': 11,
}
_CASES = pytest.mark.parametrize(
  'fields', [{}, {'qkv_bias': False, 'num_channels': 1}], ids=['bias', 'none']
)


def _reference(task='ForImageClassification', dtype='float32', **fields):
  """Returns transformers' model, with weights large enough to affect logits."""
  torch.manual_seed(0)
  config = transformers.ViTConfig(
    **_SIZES | fields, attn_implementation='eager', dtype=dtype
  )
  model = getattr(transformers, f'ViT{task}')(config)
  perturb(model)
  return model.to(getattr(torch, dtype)).eval()


def _batch(config):
  rng = np.random.default_rng(0)
  shape = (B, *config.image_shape)
  return {
    'inputs': rng.standard_normal(shape, np.float32),
    'targets': np.int32([2, 0, 10, 1, 1]),
    'weights': np.ones(B, np.float32),
  }


def _logits(reference, batch, **others):
  images = np.moveaxis(batch['inputs'], -1, 1)
  return reference(pixel_values=torch.from_numpy(images.copy()), **others)


def _on_disk(name):
  """Returns the name in a checkpoint, as our reader translates it."""
  renamed = huggingface_config.ARCHITECTURES['vit'].renamed
  for before, now in renamed.items():
    name = re.sub(before, now, name)
  return name


@_CASES
def test_logits_and_gradients_equal(fields, tmp_path):
  reference = _reference(**fields)
  reference.save_pretrained(tmp_path)
  config, params = huggingface.load(tmp_path)
  assert (config.num_labels, config.length) == (11, 10)
  batch = _batch(config)
  labels = torch.from_numpy(batch['targets']).long()
  output = _logits(reference, batch, labels=labels)
  expected = output.logits.detach().numpy()
  assert expected.std() > 0.05
  found = config.layers().logits(params, batch)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

  output.loss.backward()
  step = jax.jit(jax.value_and_grad(config.layers(), has_aux=True))
  (loss, _), gradients = step(params, batch)
  np.testing.assert_allclose(loss, output.loss.item(), rtol=1e-5)
  ours = huggingface.tensors_of(gradients, config)
  theirs = {
    _on_disk(name): x.grad.numpy() for name, x in reference.named_parameters()
  }
  assert sorted(ours) == sorted(theirs)
  largest = max(np.abs(gradient).max() for gradient in theirs.values())
  for name, gradient in theirs.items():
    # Float32 sums are taken in different orders. The exact gradient of a key
    # bias is zero, so its tolerance is relative to the largest gradient of the
    # model.
    atol = 2e-5 * max(np.abs(gradient).max(), 0.01 * largest)
    np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=atol)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@_CASES
def test_transformers_reads_our_checkpoint(fields, dtype, tmp_path):
  names = {'id2label': {0: 'no', 1: 'yes', 2: 'perhaps'}, 'num_labels': 3}
  reference = _reference(dtype=dtype, **fields | names)
  reference.save_pretrained(tmp_path / 'theirs')
  config, params = huggingface.load(tmp_path / 'theirs')
  assert config.labels == ('no', 'yes', 'perhaps')
  huggingface.save(tmp_path / 'ours', config, params, max_shard_bytes=100_000)
  theirs, ours = (
    transformers.AutoModelForImageClassification.from_pretrained(
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
  found, expected = (_logits(x, _batch(config)).logits for x in (ours, theirs))
  assert torch.equal(found, expected)


@pytest.mark.parametrize('task', ['Model', 'ForMaskedImageModeling'])
def test_a_checkpoint_without_a_head_has_one_drawn(task, tmp_path):
  reference = _reference(task)
  reference.save_pretrained(tmp_path / 'a')
  with pytest.raises(ValueError, match=r'has no .*head/kernel'):
    huggingface.load(tmp_path / 'a')
  config, params = huggingface.load(
    tmp_path / 'a', key=jax.random.key(0), num_labels=4
  )
  huggingface.save(tmp_path / 'b', config, params)
  whole = transformers.AutoModelForImageClassification.from_pretrained(
    tmp_path / 'b', attn_implementation='eager'
  )
  batch = _batch(config)
  found = config.layers().logits(params, batch)
  expected = _logits(whole.eval(), batch).logits.detach().numpy()
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
  # The body must have the checkpoint's weights. Only the head is drawn.
  theirs = reference.state_dict()
  for name, tensor in whole.state_dict().items():
    body = name if name in theirs else name.partition('.')[2]
    assert name.startswith('classifier') or torch.equal(tensor, theirs[body])


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]},
    {'do_normalize': False, 'rescale_factor': 1 / 127},
    {'do_rescale': False, 'image_mean': [120.0] * 3, 'image_std': [60.0] * 3},
  ],
)
def test_images_are_normalized_as_by_transformers(fields, tmp_path):
  pytest.importorskip('PIL')
  size = {'height': 21, 'width': 21}
  processor = transformers.ViTImageProcessor(size=size, **fields)
  reference = _reference()
  reference.save_pretrained(tmp_path / 'a')
  processor.save_pretrained(tmp_path / 'a')
  config, params = huggingface.load(tmp_path / 'a')
  huggingface.save(tmp_path / 'b', config, params, source=tmp_path / 'a')
  rng = np.random.default_rng(1)
  batch = _batch(config)
  batch['inputs'] = rng.integers(0, 256, batch['inputs'].shape, np.uint8)
  found = config.layers().logits(params, batch)
  written = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'b')
  for reader in (processor, written):
    images = reader(images=list(batch['inputs']), return_tensors='np')
    pixels = np.moveaxis(images['pixel_values'], 1, -1)
    expected = _logits(reference, {'inputs': np.float32(pixels)})
    # Without normalization, the activations are larger.
    np.testing.assert_allclose(
      found, expected.logits.detach().numpy(), rtol=1e-4, atol=3e-4
    )
