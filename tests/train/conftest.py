"""Compiled programs are shared between tests: most of them run the same one."""

import os

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory):
  # The workers of a session have a directory each, below one of the session.
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  jax.config.update('jax_compilation_cache_dir', str(shared / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
