"""Other libraries may wrap `optax.chain` before or after our import."""

import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from tests.galore_optax.every import PRESETS, PROJECTING
from tests.galore_optax.program import each, normal32
from tests.rounding import assert_close

RAW = optax.chain.__wrapped__


@pytest.fixture
def unloaded():
  """Unloads galore_optax during a test; restores it and `optax.chain` after."""
  ours = {k: m for k, m in sys.modules.items() if is_ours(k)}
  installed = optax.chain
  for name in ours:
    del sys.modules[name]
  optax.chain = RAW
  yield
  for name in filter(is_ours, list(sys.modules)):
    del sys.modules[name]
  sys.modules.update(ours)
  optax.chain = installed


def is_ours(name):
  return name.split('.')[0] == 'galore_optax'


class Recorder:
  """A wrapper of `optax.chain` that is an object without a `__name__`."""

  def __init__(self, chain, calls):
    self.chain, self.calls = chain, calls

  def __call__(self, *args):
    self.calls.append(len(args))
    return self.chain(*args)


def wrapped(chain, calls, kind='wraps'):
  """Returns a wrapper of another library, which records its calls."""
  record = Recorder(chain, calls)
  if kind == 'object':
    return record

  def other(*args):
    return record(*args)

  return functools.wraps(chain)(other) if kind == 'wraps' else other


def load():
  return importlib.import_module('galore_optax')


def params():
  return {'w': normal32((5, 7)), 'b': normal32((3,), 1)}


def first_update(tx):
  w = params()
  state = tx.init(w)
  return jax.jit(tx.update)(jax.tree.map(jnp.sin, w), state, w)[0]


def check_chains(library, chain):
  """Checks that `chain` handles `galore` stages, and otherwise is optax's."""
  stage = functools.partial(library.galore, rank=2)
  line = chain(optax.scale(2.0), stage(), optax.sgd(0.5), optax.scale(0.5))
  want = RAW(
    optax.scale(2.0), stage(RAW(optax.sgd(0.5), optax.scale(0.5)))
  )  # fmt: skip
  # The tolerance allows for sums of up to seven terms in two programs.
  assert_close(first_update(line), first_update(want), operations=20)
  line = chain(stage(optax.sgd(0.5)), optax.scale(0.5))
  assert type(line).__name__ == 'Galore'
  updates = first_update(chain(optax.sgd(1.0), optax.scale(0.5)))
  # The tolerance allows for a sine, which XLA computes to a few ulps.
  want = -0.5 * np.sin(np.float64(params()['b']))
  assert_close(updates['b'], want, operations=10)


@each('kind', ['wraps', 'plain', 'object'], quick=['wraps'])
def test_a_wrapper_from_before_the_import_is_called(unloaded, kind):
  calls = []
  optax.chain = wrapped(RAW, calls, kind)
  library = load()
  assert optax.chain is library.chain
  optax.chain(optax.sgd(0.1), optax.scale(1.0), optax.scale(1.0))
  assert calls == [3]
  calls.clear()
  stage = library.galore(rank=2)
  optax.chain(optax.scale(2.0), stage, optax.sgd(0.1), optax.scale(1.0))
  # Our chain calls the wrapper twice: for the transformations after the stage,
  # and for those before it with the complete stage.
  assert calls == [2, 2]
  calls.clear()
  optax.chain(library.galore(optax.sgd(0.1), rank=2), optax.scale(1.0))
  assert calls == [1]
  check_chains(library, optax.chain)


@each('kind', ['wraps', 'plain', 'object'], quick=['wraps'])
def test_a_wrapper_from_after_the_import_stays(unloaded, kind):
  library, calls = load(), []
  optax.chain = other = wrapped(optax.chain, calls, kind)
  assert load() is library and optax.chain is other
  check_chains(library, optax.chain)
  assert calls == [4, 2, 2]
  # Reloading the package does not wrap the chain again.
  importlib.reload(library)
  assert optax.chain is other


def depth(chain):
  found = 0
  while hasattr(chain, '__wrapped__'):
    chain, found = chain.__wrapped__, found + 1
  return found


@each('inside', [False, True], quick=[True])
def test_reloads_do_not_stack(unloaded, inside):
  calls = []
  if inside:
    optax.chain = wrapped(RAW, calls)
  for _ in range(2):
    library = importlib.reload(load())
    assert optax.chain is library.chain
    assert depth(optax.chain) == 1 + inside
  for _ in range(2):
    for name in filter(is_ours, list(sys.modules)):
      del sys.modules[name]
    library = load()
    assert optax.chain is library.chain
    assert depth(optax.chain) == 1 + inside
    importlib.reload(sys.modules['galore_optax.galore'])
    library = importlib.reload(library)
    assert optax.chain is library.chain
    assert depth(optax.chain) == 1 + inside
  check_chains(library, optax.chain)
  assert bool(calls) == inside


def test_reloads_between_two_wrappers_do_not_stack(unloaded):
  calls, later = [], []
  optax.chain = wrapped(RAW, calls)
  load()
  optax.chain = wrapped(optax.chain, later)
  for _ in range(2):
    for name in filter(is_ours, list(sys.modules)):
      del sys.modules[name]
    library = load()
    # The chain handles stages of the reloaded package, and still calls both
    # wrappers.
    assert optax.chain is library.chain and depth(optax.chain) == 4
  check_chains(library, optax.chain)
  assert calls and later


def test_a_chain_that_was_put_back_becomes_aware_again(unloaded):
  library = load()
  optax.chain = RAW  # as a reload of optax does
  importlib.reload(library)
  assert optax.chain is library.chain


def test_presets_do_not_need_optax_chain(unloaded, monkeypatch):
  """Presets still return `Galore` if a program replaces `optax.chain`.

  Some programs replace it by a function that returns plain transformations.
  """
  library = load()
  chain = optax.chain

  def plain(*args):
    return optax.GradientTransformation(*chain(*args))

  monkeypatch.setattr(optax, 'chain', plain)
  for name in PROJECTING:
    preset = getattr(library, PRESETS[name].__name__)
    assert isinstance(preset(0.1), library.Galore)


def test_nothing_was_left_behind():
  assert optax.chain is galore_optax.chain
  assert optax.chain.__wrapped__ is RAW
