"""Transformers loads a fine-tuned model from the directory that we export.

The command lines are those of the 7B and 8B configs, on a small random
checkpoint of the same architecture. Only options that require the full size are
replaced.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

from models import huggingface  # noqa: E402
from models.llama import Layers, Llama3Scaling, LlamaConfig  # noqa: E402
from tests.train.data.tiny import CHATML, write  # noqa: E402
from tests.train.test_finetune import chats_file  # noqa: E402
from train import export, finetune  # noqa: E402
from train.engine import metrics  # noqa: E402
from train.tasks import text_model as model  # noqa: E402

pytestmark = pytest.mark.parity

SMALL = dict(width=32, mlp_width=48, num_heads=4, num_layers=3, num_kv_heads=2)
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 32)
MODELS = {
  'mistral_7b_guanaco': LlamaConfig(400, **SMALL, window=24),
  'llama31_8b_chat': LlamaConfig(
    400, **SMALL, rope_theta=5e5, rope_scaling=SCALING, tied=True
  ),
}
SIZES = [
  *('--optimizer.rank', '8', '--optimizer.gap', '3', '--update.slices', '2'),
  *('--sequence-length', '64', '--steps', '6', '--eval-every', '3'),
  *('--eval-batches', '2', '--learning-rate', '0.001'),
]


@pytest.mark.parametrize('name', MODELS)
def test_transformers_loads_a_fine_tuned_model(tmp_path, name):
  small, source = tmp_path / 'small', tmp_path / 'source'
  source.mkdir()
  write(source, CHATML, {'eos_token': '<|im_end|>'})
  config = MODELS[name]
  params = Layers(config).init(jax.random.key(0))
  huggingface.save(small, config, params, source=source)
  run, out = tmp_path / 'run', tmp_path / 'out'
  code = finetune.main(
    [
      *(f'configs/{name}.py', '--checkpoint', str(small), '--run', str(run)),
      *('--corpus.train', str(chats_file(tmp_path)), *SIZES),
    ]
  )
  assert code == 0
  export.main([str(run), str(out), '--dtype', 'float32'])
  before, after = (
    jax.tree.leaves(huggingface.load(x)[1]['blocks']) for x in (small, out)
  )
  moved = [np.any(a != b) for a, b in zip(before, after, strict=True)]
  assert all(moved)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
    out, dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  text = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'Question 7?'}],
    tokenize=False,
    add_generation_prompt=True,
  )
  ids = tokenizer(text, return_tensors='pt')['input_ids']
  with torch.no_grad():
    expected = theirs(ids).logits.numpy()
  ours = model.opened(out)
  np.testing.assert_array_equal(
    ours.tokenizer.encode(text, special=True), ids[0].numpy()
  )
  tokens_BT = ids.numpy().astype(np.int32)
  batch = {
    'inputs': tokens_BT,
    'positions': np.arange(tokens_BT.shape[1], dtype=np.int32)[None],
    'segments': np.ones_like(tokens_BT),
  }
  # The tolerance allows for float32 sums in a different order.
  np.testing.assert_allclose(
    ours.layers.logits(ours.params, batch), expected, atol=1e-4
  )
  losses = [x for x in metrics.read(run / 'metrics.jsonl') if 'loss' in x]
  assert len(losses) == 6
