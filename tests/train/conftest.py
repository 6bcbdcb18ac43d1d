"""Compiled programs are shared between tests: most of them run the same one."""

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  jax.config.update(
    'jax_compilation_cache_dir', str(tmp_path_factory.mktemp('cache'))
  )
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
