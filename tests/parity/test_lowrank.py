"""PEFT reads our adapters, and we read the adapters of PEFT."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

from models import huggingface, lowrank  # noqa: E402
from models.llama import Layers  # noqa: E402
from models.lowrank import Lora  # noqa: E402
from models.peft import load_adapter, save_adapter  # noqa: E402

pytestmark = [
  pytest.mark.parity,
  # PEFT uses an attribute that transformers deprecates.
  pytest.mark.filterwarnings('ignore:`is_gradient_checkpointing`'),
]

T = 20


def _reference(directory):
  """Saves a small random LLaMA with transformers, and returns the model."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    initializer_range=0.2,
  )
  model = transformers.LlamaForCausalLM(config).eval()
  model.save_pretrained(directory)
  return model


def _batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(61, size=(2, T), dtype=np.int32)
  return {
    'inputs': tokens,
    'positions': np.tile(np.arange(T, dtype=np.int32), (2, 1)),
    'segments': np.zeros((2, T), np.int32),
  }


def _logits(model):
  with torch.no_grad():
    return model(torch.from_numpy(_batch()['inputs']).long()).logits.numpy()


def _logits_of_ours(config, params, adapter=None):
  hook = None if adapter is None else lowrank.hook(adapter)
  return jax.jit(Layers(config, intercept=hook).logits)(params, _batch())


@pytest.mark.parametrize('targets', [None, ('.*/[qv]/kernel',)])
def test_peft_reads_our_adapter(targets, tmp_path):
  reference = _reference(tmp_path / 'base')
  plain = _logits(reference)
  config, params = huggingface.load(tmp_path / 'base')
  adapter = Lora(rank=3, alpha=5.0, dropout=0.1, targets=targets)
  params = lowrank.adapt(params, adapter, jax.random.key(0))
  factors, treedef = jax.tree.flatten_with_path(params)
  keys = jax.random.split(jax.random.key(1), len(factors))
  params = treedef.unflatten(
    w + 0.2 * jax.random.normal(key, w.shape) * (path[-1].key == 'lora_b')
    for (path, w), key in zip(factors, keys, strict=True)
  )
  save_adapter(tmp_path / 'adapter', params, adapter, base='base')
  theirs = peft.PeftModel.from_pretrained(reference, tmp_path / 'adapter')
  expected = _logits(theirs.eval())
  assert np.abs(expected - plain).max() > 0.1
  found = _logits_of_ours(config, params, adapter)
  # The tolerance allows for float32 sums in a different order; logits are about
  # 1.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

  # The merged weights equal those of PEFT, also after transformers has read
  # them from our directory.
  merged = lowrank.merge(params, adapter)
  huggingface.save(tmp_path / 'merged', config, merged)
  whole = theirs.merge_and_unload().state_dict()
  ours = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'merged')
  for name, tensor in ours.state_dict().items():
    np.testing.assert_allclose(
      *(tensor.numpy(), whole[name].numpy()), rtol=0, atol=1e-6, err_msg=name
    )
  np.testing.assert_allclose(_logits(ours.eval()), expected, rtol=0, atol=1e-5)


def test_we_read_an_adapter_of_peft(tmp_path):
  reference = _reference(tmp_path / 'base')
  fields = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    lora_dropout=0.05,
    target_modules=['q_proj', 'o_proj', 'down_proj'],
    init_lora_weights=False,
    task_type='CAUSAL_LM',
  )
  theirs = peft.get_peft_model(reference, fields).eval()
  theirs.save_pretrained(tmp_path / 'adapter')
  config, params = huggingface.load(tmp_path / 'base')
  params, adapter = load_adapter(tmp_path / 'adapter', params)
  assert (adapter.rank, adapter.scale, adapter.dropout) == (4, 1.5, 0.05)
  found = _logits_of_ours(config, params, adapter)
  np.testing.assert_allclose(found, _logits(theirs), rtol=0, atol=1e-5)


def test_a_fresh_a_is_as_wide_as_theirs():
  a, b = lowrank.fresh_factors((64, 96), 32, jax.random.key(0))
  theirs = torch.empty(32, 64)
  torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
  # Our factor A and PyTorch's are two random draws of 2,048 uniform numbers, so
  # their maxima and standard deviations agree only within these tolerances.
  assert float(a.max()) == pytest.approx(float(theirs.max()), rel=0.01)
  assert float(a.std()) == pytest.approx(float(theirs.std()), rel=0.05)
  assert not b.any()
