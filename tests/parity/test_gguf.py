"""`models.gguf` reads a GGUF file as transformers does."""

import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytest.importorskip('gguf')

from models import gguf  # noqa: E402
from models.llama import Layers  # noqa: E402
from tests.models.test_gguf import _CONFIG, _write  # noqa: E402

pytestmark = pytest.mark.parity

T = 40


@pytest.mark.parametrize('kind', ['F32', 'Q8_0'])
def test_logits_equal(kind, tmp_path):
  _write(tmp_path / 'a.gguf', kind=kind)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file='a.gguf', dtype='float32', attn_implementation='eager'
  ).eval()
  ids = np.random.default_rng(0).integers(_CONFIG.vocab_size, size=(2, T))
  with torch.no_grad():
    expected = model(torch.from_numpy(ids)).logits.numpy()
  assert expected.std() > 0.3
  config, params = gguf.load(tmp_path / 'a.gguf')
  places = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  batch = {'inputs': ids.astype(np.int32), 'positions': places}
  batch |= {'segments': np.zeros_like(places)}
  found = Layers(config).logits(params, batch)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
