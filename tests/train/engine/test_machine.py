"""Messages about the machine, and the location of the compilation cache."""

import jax
import pytest
from jaxlib import xla_client

from train.engine import machine


def test_the_device_is_named(monkeypatch):
  monkeypatch.setattr(machine, 'nvidia', lambda: False)
  assert machine.describe() == 'device: 8 x cpu'


@pytest.mark.parametrize(
  'platforms, remedy',
  [(None, 'make clean train'), ('cpu', "JAX_PLATFORMS is 'cpu'")],
)
def test_a_card_that_is_not_used_is_named(monkeypatch, platforms, remedy):
  monkeypatch.setattr(machine, 'nvidia', lambda: True)
  before = jax.config.jax_platforms
  try:
    jax.config.update('jax_platforms', platforms)
    found = machine.describe()
  finally:
    jax.config.update('jax_platforms', before)
  assert 'an NVIDIA card is here' in found and remedy in found


def test_a_card_is_found_by_its_driver_tool(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  found = machine.nvidia()
  tool = tmp_path / 'nvidia-smi'
  tool.touch(mode=0o755)
  assert machine.nvidia() and found in (True, False)


def test_a_cache_that_the_user_chose_is_kept(monkeypatch):
  # The conftest of these tests already set a cache directory.
  before = jax.config.jax_compilation_cache_dir
  machine.cache_compilations()
  assert jax.config.jax_compilation_cache_dir == before is not None


@pytest.mark.parametrize('given', ['', 'CLIENT', 'PYTHON_CLIENT'])
def test_a_card_is_taken_but_for_a_twentieth(monkeypatch, given):
  for name in ('CLIENT', 'PYTHON_CLIENT'):
    # Setting and deleting the variable makes monkeypatch remove the program's
    # value after the test.
    monkeypatch.setenv(f'XLA_{name}_MEM_FRACTION', '')
    monkeypatch.delenv(f'XLA_{name}_MEM_FRACTION')
  if given:
    monkeypatch.setenv(f'XLA_{given}_MEM_FRACTION', '0.5')
  machine.prepare()
  # This is the memory fraction that JAX passes to its GPU client. JAX reads
  # both variables, but only one of them may be set.
  options = xla_client.generate_pjrt_gpu_plugin_options()
  assert options['memory_fraction'] == (0.5 if given else 0.95)


@pytest.mark.parametrize(
  'home, expected', [('xdg', 'xdg/'), ('', 'home/.cache/')]
)
def test_a_cache_lies_with_the_users_other_ones(
  tmp_path, monkeypatch, home, expected
):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('XDG_CACHE_HOME', home and str(tmp_path / home))
  names = (
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
  )
  before = {name: getattr(jax.config, name) for name in names}
  try:
    jax.config.update('jax_compilation_cache_dir', None)
    machine.cache_compilations()
    found, least = (getattr(jax.config, name) for name in names)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
  assert least == 0
  assert found == str(tmp_path / expected / 'galore_optax' / 'jax')
