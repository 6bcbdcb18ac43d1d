"""optax: the tests of its contributed optimizers, with our presets.

The module `optax.contrib._common_test` is part of optax's wheel. Its tests run
unmodified. Only the list of optimizers and the function that returns one by
name are replaced.
"""

import ast
import importlib.util
import pathlib
import types
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from tests.peers import steps

pytestmark = pytest.mark.peers

# The trees of these tests have 2 x 2 matrices, or no matrix.
RANK = dict(rank=1, gap=10, targets=go.Optional())

PRESETS = {
  'chain': lambda learning_rate: optax.chain(
    go.galore(**RANK), optax.adamw(learning_rate, weight_decay=0.0)
  ),
  'adamw': lambda learning_rate: go.galore_adamw(learning_rate, **RANK),
  'rotate': lambda learning_rate: go.galore_adamw(
    learning_rate, moments='rotate', **RANK
  ),
  'adamw_8bit': lambda learning_rate: go.galore_adamw_8bit(
    learning_rate, min_size=1, **RANK
  ),
  'adafactor': lambda learning_rate: go.galore_adafactor(learning_rate, **RANK),
  'muon': lambda learning_rate: go.galore_muon(learning_rate, **RANK),
  'frugal': lambda learning_rate: go.frugal(
    learning_rate, density=0.5, gap=10, targets=go.Optional()
  ),
  'fira': lambda learning_rate: go.fira(learning_rate, **RANK),
  'apollo': lambda learning_rate: go.apollo(learning_rate, **RANK),
  'apollo_mini': lambda learning_rate: go.apollo_mini(
    learning_rate, gap=10, targets=go.Optional()
  ),
  'lomo': lambda learning_rate: go.lomo(learning_rate, clip_norm=None),
  'adalomo': lambda learning_rate: go.adalomo(learning_rate, clip_norm=None),
  'scale_sgd': lambda learning_rate: go.scale_sgd(learning_rate),
}
LEARNING_RATES = {'lomo': 1e-3}


def factory(name: str) -> Any:
  """Returns a function of the learning rate, as each entry of optax's list."""

  def make(learning_rate: optax.ScalarOrSchedule) -> Any:
    return PRESETS[name](learning_rate)

  return make


def common_tests(names: Any) -> type:
  """Returns the test case of optax for our presets.

  Its methods are parametrized when the class is defined, so the list of
  optimizers is replaced just before.
  """
  spec = importlib.util.find_spec('optax.contrib')
  path = pathlib.Path(spec.origin).with_name('_common_test.py')
  tree = ast.parse(path.read_text())
  first = next(
    i for i, node in enumerate(tree.body) if isinstance(node, ast.ClassDef)
  )
  module = types.ModuleType('optax.contrib._common_test')
  rest = tree.body[first:]
  tree.body = tree.body[:first]
  exec(compile(tree, path, 'exec'), vars(module))
  module._MAIN_OPTIMIZERS_UNDER_TEST = module._ALL_OPTIMIZERS_UNDER_TEST = [
    dict(
      opt_name=name,
      opt_kwargs={'learning_rate': LEARNING_RATES.get(name, 1e-2)},
      wrapper_name=None,
      wrapper_kwargs=None,
    )
    for name in names
  ]
  module._get_opt_factory = factory
  tree.body = rest
  exec(compile(tree, path, 'exec'), vars(module))
  return module.ContribTest


ContribTest = common_tests(PRESETS)


def test_the_matrices_of_these_tests_are_projected():
  pair = jnp.zeros((3,)), jnp.zeros((2, 2))
  state = PRESETS['chain'](0.1).init(pair)
  assert steps.bases(state) == {'1': (1, 2)}
