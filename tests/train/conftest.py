"""Shares compiled programs between tests, most of which run the same ones."""

import jax
import pytest


@pytest.fixture(scope='session', autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
  # Each worker has a cache directory of its own, because JAX does not lock its
  # cache. A warning about a damaged entry would be an error here.
  directory = tmp_path_factory.mktemp('compiled')
  jax.config.update('jax_compilation_cache_dir', str(directory))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
