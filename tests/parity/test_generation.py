"""Greedy generation with a cache returns the same tokens as transformers."""

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from models import huggingface  # noqa: E402
from models.llama import Layers  # noqa: E402
from train.tasks.text_sampling import Choice, Reader, stream  # noqa: E402

pytestmark = pytest.mark.parity

_SIZES = {
  'vocab_size': 101,
  'hidden_size': 48,
  'intermediate_size': 88,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'num_hidden_layers': 3,
  'max_position_embeddings': 256,
  'initializer_range': 0.2,
}
_CASES = {
  'Llama': {'tie_word_embeddings': True},
  'Mistral': {'sliding_window': 9},
  'Qwen3': {'head_dim': 16},
}


@pytest.mark.parametrize('kind', _CASES)
def test_greedy_tokens_are_those_of_generate(kind, tmp_path):
  torch.manual_seed(0)
  config = getattr(transformers, f'{kind}Config')(
    **_SIZES | _CASES[kind], attn_implementation='eager', dtype='float32'
  )
  reference = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
  reference.save_pretrained(tmp_path)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(3, 101, size=n).tolist() for n in (1, 5, 30)]
  # Generate one prompt at a time, because transformers pads batches on the
  # left.
  expected = []
  for prompt in prompts:
    ids = reference.generate(
      torch.tensor([prompt]),
      attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
      do_sample=False,
      min_new_tokens=40,
      max_new_tokens=40,
      pad_token_id=0,
      eos_token_id=None,
    )
    expected.append(ids[0, len(prompt) :].tolist())
  ours, params = huggingface.load(tmp_path)
  steps = stream(
    Reader(Layers(ours), params),
    prompts,
    window=256,
    num_tokens=40,
    choice=Choice(temperature=0.0),
  )
  found = [list(row) for row in zip(*steps, strict=True)]
  assert found == expected
  assert all(len(set(row)) > 10 for row in expected)
