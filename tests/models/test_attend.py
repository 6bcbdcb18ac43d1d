"""Tests which implementation `attend` selects, and that both agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from models import attention

B, T, N, K, H = 2, 6, 4, 2, 16


def arrays(dtype=jnp.bfloat16, head_dim=H, time=T):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((B, time, n, head_dim) for n in (N, K, K))
  made = map(jax.random.normal, keys, shapes)
  segments = jnp.arange(time)[None] > jnp.arange(1, B + 1)[:, None]
  return *(x.astype(dtype) for x in made), segments.astype(jnp.int32)


@pytest.fixture
def with_cudnn(monkeypatch):
  module = fused_attention_stablehlo
  monkeypatch.setattr(module, 'check_cudnn_version', lambda: 90_800)


@pytest.mark.parametrize('window', [None, 1, 3])
def test_the_two_mean_the_same(monkeypatch, window):
  inputs = arrays(jnp.float32)
  # JAX's implementation in XLA replaces cuDNN's kernel, which requires a GPU.
  xla = jax.nn.dot_product_attention
  monkeypatch.setattr(
    jax.nn,
    'dot_product_attention',
    lambda *x, **options: xla(*x, **options | {'implementation': 'xla'}),
  )
  ours, theirs = (
    jax.jit(attend, static_argnums=4)(*inputs, window)
    for attend in (attention.blockwise, attention.cudnn)
  )
  assert np.max(np.abs(theirs - ours)) < 1e-5


def test_auto_goes_block_by_block_without_a_card(with_cudnn):
  program = jax.make_jaxpr(attention.attend)(*arrays())
  assert 'dot_product_attention' not in str(program)


def test_cudnn_is_taken_where_it_is(with_cudnn, monkeypatch):
  programs = {}
  for backend in ('cpu', 'gpu'):
    monkeypatch.setattr(jax, 'default_backend', lambda name=backend: name)
    for kind in ('auto', 'cudnn'):
      attend = functools.partial(attention.attend, kind=kind)
      programs[backend, kind] = str(jax.make_jaxpr(attend)(*arrays()))
  found = {k for k, x in programs.items() if 'dot_product_attention' in x}
  assert found == {('cpu', 'cudnn'), ('gpu', 'auto'), ('gpu', 'cudnn')}


def test_cudnn_is_told_a_window_that_is_one(with_cudnn):
  for window, told in ((3, '3'), (T, 'None'), (None, 'None')):
    attend = functools.partial(attention.attend, kind='cudnn', window=window)
    program = str(jax.make_jaxpr(attend)(*arrays()))
    assert f'sliding_window_length={told}' in program


@pytest.mark.parametrize(
  ('given', 'rule'),
  [
    ({'dtype': jnp.float32}, 'float32'),
    ({'head_dim': 12}, 'multiple of 8'),
    ({'time': 5}, 'sequence length'),
  ],
)
def test_what_cudnn_refuses(with_cudnn, monkeypatch, given, rule):
  inputs = arrays(**given)
  with pytest.raises(ValueError, match=rf"{rule}.*attention='auto'"):
    attention.attend(*inputs, kind='cudnn')
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  attend = functools.partial(attention.attend, kind='auto')
  assert jax.eval_shape(attend, *inputs).shape == inputs[0].shape


def test_cudnn_that_is_not_there_is_named():
  with pytest.raises(ValueError, match=r'bfloat16\[2,6,4,16\].*cuDNN'):
    attention.attend(*arrays(), kind='cudnn')
