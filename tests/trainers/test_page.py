"""The functions that galore_optax/README.md writes into other trainers.

`tests/test_readme.py` runs the blocks of the page; `make peers` runs those that
need other libraries.
"""

import pathlib
import re
import types

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from tests.trainers import program

PAGE = pathlib.Path(go.__file__).parent / 'README.md'
SECTION = PAGE.read_text().split('\n## In your trainer\n')[1].split('\n## ')[0]
BLOCKS = re.findall(r'^```python\n(.*?)^```$', SECTION, re.M | re.S)
WEIGHTS = {'mlp': {'up': jax.ShapeDtypeStruct((600, 800), jnp.float32)}}
CONFIG = types.SimpleNamespace(
  adam_weight_decay=0.1,
  weight_decay=0.1,
  learning_rate=1e-3,
  lr_scheduler=lambda steps: optax.cosine_decay_schedule(1e-3, steps),
)


def names_of(text):
  """Returns the names that the block with a text defines."""
  (code,) = (block for block in BLOCKS if text in block)
  names = {'galore': go.galore, 'optax': optax}
  exec(code, names)
  return names


CALLS = {
  'get_optimizer': lambda f: f(CONFIG, 1e-3),
  'get_optimizer_and_scheduler': lambda f: f(CONFIG, steps=100)[0],
  'build': lambda f: f(CONFIG, 100),
}


@pytest.mark.parametrize('name', CALLS)
def test_functions_return_the_optimizer(name):
  tx = CALLS[name](names_of(f'def {name}(')[name])
  state = jax.eval_shape(tx.init, WEIGHTS)
  assert program.by_path(state)['0/basis/mlp/up'].shape == (512, 600)
  updates, _ = jax.eval_shape(tx.update, WEIGHTS, state, WEIGHTS)
  assert jax.tree.structure(updates) == jax.tree.structure(WEIGHTS)


def test_big_vision_finds_the_name(monkeypatch):
  # The block adds the name to optax.
  monkeypatch.setattr(optax, 'galore_adam', None, raising=False)
  config = names_of('optax_name')['config']
  tx = getattr(optax, config['optax_name'])(**config['optax'])
  state = jax.eval_shape(tx.init, WEIGHTS)
  assert state.basis['mlp']['up'].shape == (128, 600)
