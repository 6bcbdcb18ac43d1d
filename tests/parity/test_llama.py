"""LLaMA equals transformers' LlamaForCausalLM with the same weights."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from models import huggingface  # noqa: E402
from models.llama import Layers, LlamaConfig  # noqa: E402
from tests.parity.reference import perturb  # noqa: E402

pytestmark = pytest.mark.parity

_CASES = pytest.mark.parametrize(
  ('num_kv_heads', 'tied'), [(6, False), (2, False), (1, True), (6, True)]
)


def _config(num_kv_heads, tied):
  return LlamaConfig(
    vocab_size=101,
    width=48,
    mlp_width=88,
    num_heads=6,
    num_kv_heads=num_kv_heads,
    num_layers=3,
    rope_theta=500.0,
    norm_eps=1e-5,
    tied=tied,
    loss_chunk=16,
  )


def _reference(config):
  """Returns transformers' model, with weights large enough to affect logits."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=config.vocab_size,
      hidden_size=config.width,
      intermediate_size=config.mlp_width,
      num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads,
      num_hidden_layers=config.num_layers,
      rms_norm_eps=config.norm_eps,
      rope_parameters={
        'rope_type': 'default',
        'rope_theta': config.rope_theta,
      },
      tie_word_embeddings=config.tied,
      initializer_range=0.2,
      max_position_embeddings=64,
      attn_implementation='eager',
      dtype='float32',
    )
  )
  perturb(model)
  return model.eval()


def _tensors(named):
  return {name: x.detach().numpy().copy() for name, x in named}


def _batch(config):
  rng = np.random.default_rng(0)
  tokens = rng.integers(config.vocab_size, size=(3, 18), dtype=np.int32)
  shape = (3, 17)
  return {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': np.ones(shape, np.float32),
    'positions': np.tile(np.arange(17, dtype=np.int32), (3, 1)),
    'segments': np.zeros(shape, np.int32),
  }


def _assert_close(actual, expected):
  # The tolerance allows for float32 sums in a different order. The measured
  # difference is 5e-6 of the largest entry.
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * scale)


@_CASES
def test_logits_and_gradients_equal(num_kv_heads, tied):
  config = _config(num_kv_heads, tied)
  reference = _reference(config)
  params = huggingface.params_of(
    _tensors(reference.state_dict().items()), config
  )
  model, batch = Layers(config), _batch(config)

  inputs = torch.from_numpy(batch['inputs']).long()
  targets = torch.from_numpy(batch['targets']).long()
  logits = reference(inputs).logits
  loss = torch.nn.functional.cross_entropy(
    logits.reshape(-1, config.vocab_size), targets.reshape(-1)
  )
  loss.backward()
  gradients = {
    name: parameter.grad.numpy()
    for name, parameter in reference.named_parameters()
  }

  _assert_close(model.logits(params, batch), logits.detach().numpy())
  step = jax.jit(jax.value_and_grad(model, has_aux=True))
  (our_loss, _), our_gradients = step(params, batch)
  np.testing.assert_allclose(our_loss, loss.item(), rtol=1e-5)
  ours = huggingface.tensors_of(our_gradients, config)
  assert sorted(ours) == sorted(gradients)
  for name, gradient in gradients.items():
    _assert_close(ours[name], gradient)
