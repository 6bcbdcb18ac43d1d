"""Compiled programs are shared between tests: most of them run the same one."""

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  # Of one worker: JAX does not lock its cache, and a warning is an error here.
  directory = tmp_path_factory.mktemp('compiled')
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
